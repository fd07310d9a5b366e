"""Read, write and check a target's hidden states on the disk, in the layout from which speculators trains.

    FOLDER/                                   a Hugging Face data set: input_ids, loss_mask, seq_len
    FOLDER/states.json                        what the states were made from: target, layers, documents, known prompts
    FOLDER/token_freq.pt                      how often each token occurs in answers, to choose a truncated vocabulary
    FOLDER/checked-0-of-1                     a hash of names, sizes and times of the files when all of them were whole
    FOLDER/hidden_states/hs_<i>.safetensors   hidden_states [T, n_aux + 1, D], token_ids int64 [T]

Slot j < n_aux holds what *enters* target layer ``layer_ids[j]``, as vLLM hands it to the drafter. The last slot is the
output of the last layer *before* the final norm. Files of this package have a checksum in their metadata. Files of
``speculators generate-offline-data`` have none, and are read as well.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from speculators.data_generation.offline import check_hidden_states

from vllm_slimspec.common import memory
from vllm_slimspec.common.output import write_whole
from vllm_slimspec.common.progress import steps
from vllm_slimspec.errors import CheckpointError


def state_file(folder: Path, i: int) -> Path:
    """Return the file with the states of document ``i``."""
    return folder / "hidden_states" / f"hs_{i}.safetensors"


def write_state(folder: Path, i: int, ids: torch.Tensor, states: torch.Tensor) -> None:
    """Write the states [T, n_aux + 1, D] of document ``i`` to a file, which appears only when it is whole.

    Its tokens ``ids`` are int64 [T]. Raises an OSError if the disk refuses.
    """
    file = state_file(folder, i)
    tensors = {"hidden_states": states, "token_ids": ids}
    metadata = {"crc32": str(_checksum(tensors))}
    try:
        # The file is not synced to the disk, because the checksum shows what a crash of the machine has lost.
        write_whole(file, lambda part: save_file(tensors, part, metadata), durable=False)
    except SafetensorError as error:
        raise OSError(
            f"{file}: not written ({error}); what is there is kept, make room on the disk and repeat the command"
        ) from None


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Return ``hidden_states`` and ``token_ids`` of one document.

    Raises:
        CheckpointError: the file is missing, truncated or changed.
    """
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in ("hidden_states", "token_ids")}
            expected = (opened.metadata() or {}).get("crc32")
    except (OSError, SafetensorError) as error:
        memory.raise_if_ran_out(error, file)
        raise CheckpointError(f"{file}: {error}") from None
    if expected is not None and int(expected) != _checksum(tensors):
        raise CheckpointError(f"{file}: its checksum does not match what it holds")
    return tensors


def flaw(folder: Path, i: int, ids: Sequence[int]) -> str | None:
    """Return what is wrong with the states of document ``i``, whose tokens are ``ids``; None if nothing is."""
    try:
        check_hidden_states(read_state(state_file(folder, i)), list(ids))
    except ValueError as error:
        return str(error)
    return None


def check_states(folder: Path, *, missing_is_wrong: bool = True, part: int = 0, parts: int = 1) -> None:
    """Read every file of states once, and refuse broken ones before a run trains on them or stops hours later.

    Files that were found whole are read again only if a name, a size or a time has changed, because they may be
    terabytes. This process is number ``part`` of the ``parts`` that share the work. A document without states is an
    error if ``missing_is_wrong``.

    Raises:
        CheckpointError: files are broken. The message names the first one.
    """
    if is_checked(folder, missing_is_wrong, part, parts):
        return
    seen = _look(folder, missing_is_wrong)
    documents = load_from_disk(folder).with_format(None)["input_ids"]
    flaws = []
    mine = range(part, len(documents), parts)
    for i in steps(mine, "Checking states", len(mine), "document", silent=part > 0):
        if missing_is_wrong or state_file(folder, i).exists():
            found = flaw(folder, i, documents[i])
            flaws += [found] if found else []
    if flaws:
        raise CheckpointError(
            f"{flaws[0]} ({len(flaws)} of {len(documents)} files are broken); "
            "run `slimspec train states` again, it rewrites only those"
        )
    with suppress(OSError):  # In a read-only folder the result cannot be kept, and the next run checks again.
        write_whole(folder / f"checked-{part}-of-{parts}", lambda file: file.write_text(seen))


def is_checked(folder: Path, missing_is_wrong: bool = True, part: int = 0, parts: int = 1) -> bool:
    """Return whether :func:`check_states`, with the same arguments, has found these very files whole before."""
    stamp = folder / f"checked-{part}-of-{parts}"
    return stamp.exists() and stamp.read_text() == _look(folder, missing_is_wrong)


def _look(folder: Path, missing_is_wrong: bool) -> str:
    """Return a hash of the names, sizes and times of the files."""
    digest = hashlib.sha256(str(missing_is_wrong).encode())
    for file in sorted([*folder.glob("*.arrow"), *folder.glob("hidden_states/*")]):
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_identity(folder: Path) -> dict[str, Any]:
    """Return states.json. A folder of another tool has none, and is assumed to mask its prompts."""
    file = folder / "states.json"
    found = json.loads(file.read_text()) if file.exists() else {"layer_ids": None, "prompts": 1}
    return {"prompts": 0, **found}  # Version 0.1.0 masked no prompts, and did not count them.


def read_final_states(folder: str | Path, limit: int) -> torch.Tensor:
    """Return up to ``limit`` outputs of the target's last layer, before its final norm, as [N, D].

    Raises:
        CheckpointError: the folder holds no hidden states, or a broken file.
    """
    found: list[torch.Tensor] = []
    for file in sorted((Path(folder) / "hidden_states").glob("hs_*.safetensors")):
        found.append(read_state(file)["hidden_states"][:, -1])
        if sum(map(len, found)) >= limit:
            break
    if not found:
        raise CheckpointError(f"{folder}: no hidden_states/hs_*.safetensors; run `slimspec train states` first")
    return torch.cat(found)[:limit]


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].view(torch.uint8).numpy().data, checksum)
    return checksum

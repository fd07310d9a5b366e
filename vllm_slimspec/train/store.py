"""The target's hidden states on disk, in the layout that speculators trains from.

    FOLDER/                                   a Hugging Face data set: input_ids, loss_mask, seq_len
    FOLDER/states.json                        what they are the states of: target, its layers, documents, known prompts
    FOLDER/token_freq.pt                      how often each token is asked for, to choose a truncated vocabulary
    FOLDER/checked-0-of-1                     what the files looked like when all of them were whole
    FOLDER/hidden_states/hs_<i>.safetensors   hidden_states [T, n_aux + 1, D], token_ids int64 [T]

Slot j < n_aux holds what *enters* target layer ``layer_ids[j]``, as vLLM hands it to the drafter; the last slot is the
output of the last layer *before* the final norm. Our files carry a checksum in their metadata; those of
``speculators generate-offline-data`` have none and are read as well.
"""

import hashlib
import json
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

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
    """Where the states of document ``i`` are."""
    return folder / "hidden_states" / f"hs_{i}.safetensors"


def write_state(folder: Path, i: int, ids: torch.Tensor, states: torch.Tensor) -> None:
    """Keep the states [T, n_aux + 1, D] of document ``i``, int64 [T]; the file is whole or not there.

    Raises:
        OSError: the disk refuses.
    """
    file = state_file(folder, i)
    tensors = {"hidden_states": states, "token_ids": ids}
    metadata = {"crc32": str(_checksum(tensors))}
    try:
        write_whole(file, lambda part: save_file(tensors, part, metadata), durable=False)  # the checksum tells
    except SafetensorError as error:
        raise OSError(f"{file}: not written ({error}); what is there is kept, make room and repeat it") from None


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """``hidden_states`` and ``token_ids`` of one document.

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
    """What is wrong with the states of document ``i``, which are to be those of ``ids``; None if nothing is."""
    try:
        check_hidden_states(read_state(state_file(folder, i)), list(ids))
    except ValueError as error:
        return str(error)
    return None


def check_states(folder: Path, *, missing_is_wrong: bool = True, part: int = 0, parts: int = 1) -> None:
    """Read every file once, so that no run trains on a broken one or stops at it hours later.

    What was found whole is not read again for as long as names, sizes and times are the same: it may be terabytes.

    Args:
        folder: the data set.
        missing_is_wrong: documents without states are errors.
        part: of ``parts`` processes that share the work, this one.
        parts: processes.

    Raises:
        CheckpointError: names the first broken file.
    """
    if is_checked(folder, missing_is_wrong=missing_is_wrong, part=part, parts=parts):
        return
    seen = _look(folder, missing_is_wrong)
    documents = load_from_disk(folder).with_format(None)["input_ids"]
    flaws = []
    mine = range(part, len(documents), parts)
    for i in steps(mine, "Checking states", len(mine), "document", silent=part > 0):
        ids = documents[i]
        if missing_is_wrong or state_file(folder, i).exists():
            found = flaw(folder, i, ids)
            flaws += [found] if found else []
    if flaws:
        raise CheckpointError(
            f"{flaws[0]} ({len(flaws)} of {len(documents)} files are broken); "
            "run `slimspec train states` again, it rewrites only those"
        )
    with suppress(OSError):  # data that may only be read is read again
        write_whole(_checked(folder, part, parts), lambda file: file.write_text(seen))


def is_checked(folder: Path, *, missing_is_wrong: bool = True, part: int = 0, parts: int = 1) -> bool:
    """Whether :func:`check_states` has found these very files whole before; arguments as there."""
    stamp = _checked(folder, part, parts)
    return stamp.exists() and stamp.read_text() == _look(folder, missing_is_wrong)


def _checked(folder: Path, part: int, parts: int) -> Path:
    return folder / f"checked-{part}-of-{parts}"


def _look(folder: Path, missing_is_wrong: bool) -> str:
    """One hash of what can be seen of the files without reading them."""
    digest = hashlib.sha256(str(missing_is_wrong).encode())
    for file in sorted([*folder.glob("*.arrow"), *folder.glob("hidden_states/*")]):
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def read_layer_ids(folder: Path) -> list[int] | None:
    """The target layers whose inputs these are; None if the folder is not one of ours."""
    file = folder / "states.json"
    return json.loads(file.read_text())["layer_ids"] if file.exists() else None


def knows_prompts(folder: Path) -> bool:
    """Return whether the data masks the prompt of any document; data that is not ours is taken to."""
    file = folder / "states.json"
    return not file.exists() or json.loads(file.read_text()).get("prompts", 0) > 0


def read_final_states(folder: str | Path, limit: int) -> torch.Tensor:
    """Up to ``limit`` outputs of the target's last layer (before its final norm), [N, D].

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

"""Safe reading of untrusted checkpoint folders: config.json, other JSON files, and safetensors.

Weights are read from safetensors only. No code from a folder is ever run, no link out of the folder is followed, and a
file that is larger than it can reasonably be is not read into memory. Every refusal is a :class:`CheckpointError`.
"""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_slimspec.common import memory
from vllm_slimspec.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_BYTES = {"F64": 8, "I64": 8, "I32": 4, "F32": 4, "F16": 2, "BF16": 2}  # every other type that is read has one byte
_LARGEST_TOKENIZER = 64 << 20  # bytes


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a safetensors header declares it."""

    file: Path
    dtype: str  # safetensors' name: "BF16", "I64", ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BYTES.get(self.dtype, 1)


def read_config(folder: Path) -> dict[str, Any]:
    """Read and return the config.json of a model folder."""
    file = folder / "config.json"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the path of a drafter's folder")
    if not os.path.lexists(file):
        raise CheckpointError(f"{file}: no such file; a drafter folder needs config.json beside its safetensors")
    check_place(file)
    return read_json_object(file)


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Return the declared dtype and shape of every tensor in a folder's safetensors, by name. No weights are read."""
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(path):
        for name, info in read_header(file).items():
            if (other := tensors.setdefault(name, info)) is not info:
                raise CheckpointError(f"{file}: tensor {name} is also in {other.file.name}; keep one of the two")
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the declared dtype and shape of every tensor in one file."""
    with _safe_open(file) as handle:
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - the handle is not a mapping
        return {name: TensorInfo(file, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def load_tensor(info: TensorInfo, name: str) -> "torch.Tensor":
    """Load one tensor onto the CPU in its stored dtype."""
    with _safe_open(info.file) as file:
        return file.get_tensor(name)


def load_rows(info: TensorInfo, name: str, rows: Sequence[int]) -> "torch.Tensor":
    """Load some rows of a tensor onto the CPU in its stored dtype, without reading the others."""
    import torch

    with _safe_open(info.file) as file:
        part = file.get_slice(name)
        return torch.cat([part[row : row + 1] for row in rows])


def save_tensors(tensors: "dict[str, torch.Tensor]", file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. An OSError says that it cannot be written, for which safetensors has its own class."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, str(file), metadata)
    except SafetensorError as error:
        raise OSError(f"{file}: not written ({error}); make room and run it again") from None


def check_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer.json, which may be absent, outside of its folder or larger than any; nothing of it is read."""
    file = folder / "tokenizer.json"
    if not os.path.lexists(file):
        return
    check_place(file)
    if (size := file.stat().st_size) > _LARGEST_TOKENIZER:
        raise CheckpointError(f"{file}: {size} bytes, at most {_LARGEST_TOKENIZER} are read; copy the file again")


def read_json_object(file: Path, described: int = 0) -> dict[str, Any]:
    """Read and return a JSON object that is not too large for the ``described`` bytes of weights: 1 MiB without any."""
    try:
        _check_size(file, file.stat().st_size, described)
        found = json.loads(file.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); copy the file again") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds {type(found).__name__}, must be a JSON object; copy the file again")
    return found


def read_weight_map(index: Path, described: int) -> dict[str, str]:
    """Return which file holds each tensor, from an index as :func:`read_json_object` reads it."""
    found = read_json_object(index, described)
    try:
        return {name: str(file) for name, file in found["weight_map"].items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index}: no usable weight_map ({error!r}); copy the file again") from None


def _weight_files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors"))
    for file in files:
        check_place(file)
    index = path / "model.safetensors.index.json"
    if os.path.lexists(index):
        check_place(index)
        names = set(read_weight_map(index, sum(file.stat().st_size for file in files)).values())
        if foreign := names - {file.name for file in files}:
            raise CheckpointError(
                f"{index}: weight_map names {foreign.pop()!r}, must be a .safetensors file of the same folder; "
                "copy that file, or the index, again"
            )
        return [file for file in files if file.name in names]
    if files:
        return files
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise CheckpointError(
            f"{path / pickles[0]}: a pickle checkpoint can run code and is not opened; convert it where you trust it: "
            'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{pickles[0]}', weights_only=True), 'model.safetensors')\""
        )
    raise CheckpointError(f"{path}: holds no .safetensors file; copy the drafter's weights beside config.json")


@contextmanager
def _safe_open(file: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as raw:
            header, size = int.from_bytes(raw.read(8), "little"), os.fstat(raw.fileno()).st_size
        _check_size(file, min(header, size), size)
        with safe_open(str(file), framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        memory.raise_if_ran_out(error, file)
        raise CheckpointError(f"{file}: not a complete safetensors file ({error}); copy it again") from None


def _check_size(file: Path, size: int, described: int) -> None:
    """Refuse JSON that would take more memory than the weights it describes (parsed, up to 20 times its size)."""
    most = max(1 << 20, described // 16)
    if size > most:
        raise CheckpointError(
            f"{file}: {size} bytes of JSON, at most {most} are read (1 MiB, or a sixteenth of the weights); "
            "copy the file again"
        )


def check_place(file: Path) -> None:
    """Refuse a broken link, a link out of the file's folder, and anything but a regular file, with CheckpointError."""
    try:
        real, root = file.resolve(strict=True), file.parent.resolve()
    except (OSError, RuntimeError) as error:  # a link to nothing, or to itself
        raise CheckpointError(f"{file}: a link that cannot be followed ({error}); copy the file here") from None
    # A snapshot in the hub's cache is a folder of links into the blobs beside it.
    blobs = root.parent.parent / "blobs"
    if not real.is_relative_to(root) and not (root.parent.name == "snapshots" and real.parent == blobs):
        raise CheckpointError(f"{file}: a link out of its folder, to {real}, is not followed; copy the file here")
    if not real.is_file():
        raise CheckpointError(f"{file}: is not a regular file; copy the checkpoint again")

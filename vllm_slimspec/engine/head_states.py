"""Head states on disk: the exact inputs of a draft head, and the token that the target chooses at each of them.

    index.json                 {"format": 1, "D", "dtype", "K", "target", "drafter", "sha256s", "rows"}
    states-NNNNN.safetensors   hidden [N, D]; step uint8, doc int32, pos int32, next_token int64, all [N];
                               tokens int64 [T]; documents int64 [n, 3] (number, all tokens, tokens of the prompt)

A row is the input of the head at draft step ``step`` (0 to K - 1), where it drafts the token at place ``pos`` of
document ``doc``. ``next_token`` is the greedy token of the target at that place, or -1 if it is unknown. Up to there
the drafter was fed the greedy tokens of the target. So the rows (pos, 0), (pos + 1, 1), ... are one cycle that starts
at ``pos``, and all tokens before each row were accepted.

Files that another tool writes need only index.json with ``format``, and ``hidden``. A folder without index.json is a
collection that did not finish.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from vllm_slimspec.common.files import read_header, read_json_object, save_tensors
from vllm_slimspec.common.output import write_whole
from vllm_slimspec.errors import CheckpointError

FORMAT = 1
_HELD_OUT = 5  # one document in five is held out
_BLOCK = 256  # rows that count as one document if `doc` is not recorded
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COLUMNS = {"step": torch.uint8, "doc": torch.int32, "pos": torch.int32, "next_token": torch.int64}


@dataclass(frozen=True)
class Rows:
    """Rows of a collection: ``hidden`` [N, D] and the columns, each int64 [N] or None."""

    hidden: torch.Tensor
    doc: torch.Tensor
    step: torch.Tensor | None = None
    pos: torch.Tensor | None = None
    next_token: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: Any) -> "Rows":
        return Rows(**{name: column[index] for name, column in vars(self).items() if column is not None})


@dataclass(frozen=True)
class Document:
    """A prompt and the target's greedy answer to it."""

    number: int
    tokens: list[int]  # the prompt and the answer
    prompt: int  # the number of tokens in the prompt


@dataclass(frozen=True)
class HeadStates:
    """A checked folder of head states. It is read one file at a time, so memory holds the rows of one file."""

    path: Path
    index: dict[str, Any]
    files: tuple[Path, ...]
    hidden_size: int
    dtype: torch.dtype
    rows: int

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "HeadStates":
        """Read and check the index, with the checksums of the files as they are now, and return the collection.

        Raises:
            CheckpointError: the folder holds no head states or another format, or a file has changed.
        """
        path = Path(folder)
        index = _read_index(path)
        files = tuple(sorted(path.glob("states-*.safetensors")))
        if not files:
            raise CheckpointError(f"{path}: holds no states-*.safetensors; give the folder of a collection")
        sums = {file.name: sha256(file) for file in files}
        listed = index.get("sha256s") or sums
        if set(listed) != set(sums):
            raise CheckpointError(f"{path}: its files are not those that index.json lists; copy the folder again")
        for file in files:
            if sums[file.name] != listed[file.name]:
                raise CheckpointError(f"{file}: not the file that index.json describes (sha256); copy it again")
        rows, sizes, dtypes = zip(*map(_check_file, files), strict=True)
        if len(set(sizes)) > 1 or len(set(dtypes)) > 1:
            raise CheckpointError(f"{path}: files differ in hidden size or dtype; keep those of one collection")
        return cls(path, index | {"sha256s": sums}, files, sizes[0], dtypes[0], sum(rows))

    @property
    def steps(self) -> int | None:
        """Return K, the number of draft steps in a cycle; None if it was not recorded."""
        return self.index.get("K")

    def check_head(self, hidden_size: int, drafter: str) -> None:
        """Raise CheckpointError, which names the drafter, if the states are not as wide as the input of its head."""
        if self.hidden_size != hidden_size:
            raise CheckpointError(
                f"{self.path}: states have {self.hidden_size} numbers but the head of {drafter} takes {hidden_size}; "
                "give the states of this drafter"
            )

    def read(self, held_out: bool | None = None) -> Iterator[Rows]:
        """Yield the rows of one split, or of both for None, one file at a time. One document in five is held out."""
        before = 0
        for file in self.files:
            with safe_open(str(file), framework="pt") as handle:
                names = set(handle.keys())
                columns = {name: handle.get_tensor(name).long() for name in _COLUMNS if name in names}
                hidden = handle.get_tensor("hidden")
            if not bool(torch.isfinite(hidden).all()):
                bad = int((~torch.isfinite(hidden)).any(1).nonzero()[0])
                raise CheckpointError(f"{file}: row {bad} holds NaN or Inf; collect the states again")
            rows = Rows(hidden, **{"doc": (before + torch.arange(len(hidden))) // _BLOCK} | columns)
            before += len(hidden)
            yield rows if held_out is None else rows[(rows.doc % _HELD_OUT == 0) == held_out]

    def sample(self, held_out: bool, limit: int) -> Rows:
        """Return about ``limit`` rows of one split, of whole documents that are spread evenly over the collection.

        Raises:
            CheckpointError: the split is empty.
        """
        documents = sorted({d for rows in self.read(held_out) for d in rows.doc.unique().tolist()})
        if not documents:
            raise CheckpointError(
                f"{self.path}: all {self.rows} states are of one split; collect from at least {_HELD_OUT + 1} documents"
            )
        share = min(1.0, limit / (self.rows * (1 / _HELD_OUT if held_out else 1 - 1 / _HELD_OUT)))
        count = max(1, round(share * len(documents)))
        chosen = torch.tensor([documents[i * len(documents) // count] for i in range(count)])
        parts = [rows[torch.isin(rows.doc, chosen)] for rows in self.read(held_out)]
        return concatenate([rows for rows in parts if len(rows)])

    def documents(self, held_out: bool | None = None) -> list[Document]:
        """Return the documents of one split, or of both for None, over which the states were recorded."""
        found = []
        for file in self.files:
            with safe_open(str(file), framework="pt") as handle:
                if "documents" not in handle.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                    raise CheckpointError(
                        f"{file}: the answers are not beside the states; record them again with --calibration"
                    )
                sizes, tokens = handle.get_tensor("documents"), handle.get_tensor("tokens")
            parts = tokens.split(sizes[:, 1].tolist())
            pairs = zip(sizes.tolist(), parts, strict=True)
            found += [Document(number, part.tolist(), prompt) for (number, _, prompt), part in pairs]
        return [d for d in found if held_out in (None, d.number % _HELD_OUT == 0)]


def concatenate(parts: list[Rows]) -> Rows:
    """Return the rows of all parts, in order. A column is kept if every part has it."""
    columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
    return Rows(**{name: torch.cat(c) for name, c in columns.items() if all(one is not None for one in c)})


def common(one: Rows, other: Rows) -> tuple[Rows, Rows]:
    """Return the rows of two collections at the places and draft steps that both have, in the same order."""
    _, mine, theirs = np.intersect1d(_keys(one), _keys(other), return_indices=True)
    return one[mine], other[theirs]


def _keys(rows: Rows) -> np.ndarray:
    """Return a number for each row that says its document, its place and its draft step."""
    assert rows.pos is not None
    assert rows.step is not None
    return ((rows.doc << 40) + (rows.pos << 8) + rows.step).numpy()


class StatesWriter:
    """A writer of a collection, which is written in groups. A run that was killed continues at the first missing group.

    The recipe holds the settings that identify the collection.

    Raises:
        CheckpointError: the folder holds other files, or a collection that was begun with another recipe.
    """

    def __init__(self, folder: str | os.PathLike[str], recipe: dict[str, Any]) -> None:
        self.path, self._recipe = Path(folder), recipe
        if self.complete:
            found = _read_index(self.path)
        elif (self.path / "recipe.json").is_file():
            found = json.loads((self.path / "recipe.json").read_text(encoding="utf-8"))
        else:
            # A folder may hold the temporary files of a killed run.
            there = self.path.iterdir() if self.path.is_dir() else filter(Path.exists, [self.path])
            if any(file.suffix != ".partial" for file in there):
                raise CheckpointError(f"{self.path}: holds other files; remove them or choose another folder")
            return
        # A model may have moved to another path, so its fingerprint is compared and its name is not.
        changed = sorted(key for key in recipe if found.get(key) != recipe[key] and f"{key}_fingerprint" not in recipe)
        if changed:
            values = ", ".join(f"{key} ({found.get(key)!r} there, {recipe[key]!r} now)" for key in changed)
            raise CheckpointError(f"{self.path}: begun with other values of {values}; remove it or choose another")

    @property
    def complete(self) -> bool:
        return (self.path / "index.json").is_file()

    def has(self, group: int) -> bool:
        return self._file(group).is_file()

    def write(self, group: int, rows: Rows, documents: Sequence[Document] = ()) -> None:
        """Write the rows of a group, which may be empty, and their documents. Create the folder if it is missing."""
        if not (self.path / "recipe.json").is_file():
            self.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self._recipe)
            write_whole(self.path / "recipe.json", lambda part: part.write_text(text, encoding="utf-8"))
        tensors = {"hidden": rows.hidden.contiguous()}
        tensors |= {name: getattr(rows, name).to(dtype).contiguous() for name, dtype in _COLUMNS.items()}
        tensors["tokens"] = torch.tensor([token for d in documents for token in d.tokens], dtype=torch.long)
        sizes = [[d.number, len(d.tokens), d.prompt] for d in documents]
        tensors["documents"] = torch.tensor(sizes, dtype=torch.long).view(-1, 3)
        write_whole(self._file(group), lambda part: save_tensors(tensors, part))

    def count(self) -> int:
        """Return the number of rows that this run and earlier ones have written."""
        return sum(_check_file(file)[0] for file in self.path.glob("states-*.safetensors"))

    def finish(self) -> HeadStates:
        """Write index.json, which makes the collection complete, and return the collection."""
        files = sorted(self.path.glob("states-*.safetensors"))
        _, size, dtype = _check_file(files[0])
        sizes = {"D": size, "dtype": str(dtype).removeprefix("torch."), "rows": self.count()}
        sums = {file.name: sha256(file) for file in files}
        text = json.dumps({**self._recipe, "format": FORMAT, **sizes, "sha256s": sums}, indent=2)
        write_whole(self.path / "index.json", lambda part: part.write_text(text, encoding="utf-8"))
        return HeadStates.open(self.path)

    def _file(self, group: int) -> Path:
        return self.path / f"states-{group:05d}.safetensors"


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _read_index(path: Path) -> dict[str, Any]:
    file = path / "index.json"
    if not file.is_file():
        begun = (path / "recipe.json").is_file()
        raise CheckpointError(
            f"{path}: the collection is not complete; run the same command again"
            if begun
            else f"{file}: no such file; give a folder of head states (index.json, states-*.safetensors)"
        )
    index = read_json_object(file, sum(states.stat().st_size for states in path.glob("states-*.safetensors")))
    if (found := index.get("format")) != FORMAT:
        raise CheckpointError(f"{file}: format {found!r} is not known, {FORMAT} is; collect the states again")
    return index


def _check_file(file: Path) -> tuple[int, int, torch.dtype]:
    """Check the header of a states file, and return its number of rows, D and dtype."""
    header = {name: (info.dtype, list(info.shape)) for name, info in read_header(file).items()}
    dtype, shape = header.get("hidden", ("nothing", []))
    if dtype not in _DTYPES or len(shape) != 2:
        raise CheckpointError(
            f"{file}: hidden is {dtype} {shape}, must be {', '.join(_DTYPES)} [N, D]; save it as one of these"
        )
    for name in _COLUMNS.keys() & header.keys():
        if header[name][1] != shape[:1] or not header[name][0].startswith(("I", "U")):
            raise CheckpointError(
                f"{file}: {name} is {header[name]}, must be integers [{shape[0]}], one for each row of hidden; save it "
                "that way"
            )
    return shape[0], shape[1], _DTYPES[dtype]

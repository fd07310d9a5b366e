"""Result files, read and told apart: what a report can be made of."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.measure import results as kinds

_KINDS: dict[str, type[kinds.Results]] = {
    "head": kinds.HeadResults,
    "acceptance": kinds.AcceptanceResults,
    "serve": kinds.ServeResults,
    "states": kinds.StatesResults,
}

R = TypeVar("R", bound=kinds.Results, covariant=True)


@dataclass(frozen=True)
class Source(Generic[R]):
    """One file."""

    path: Path
    results: R


@dataclass
class Material:
    """Everything that was measured on one device, by kind."""

    device: str
    head: list[Source[kinds.HeadResults]] = field(default_factory=list)
    acceptance: list[Source[kinds.AcceptanceResults]] = field(default_factory=list)
    serve: list[Source[kinds.ServeResults]] = field(default_factory=list)
    states: list[Source[kinds.StatesResults]] = field(default_factory=list)

    @property
    def sources(self) -> list[Source[kinds.Results]]:
        return [*self.head, *self.acceptance, *self.serve, *self.states]


@dataclass(frozen=True)
class LeftOut:
    """A file that no figure is made of."""

    path: Path
    kind: str


def read(paths: Sequence[Path], *, mixed_devices: bool = False) -> tuple[list[Material], list[LeftOut]]:
    """Read result files, grouped by device, the one with the most files first.

    Args:
        mixed_devices: whether several devices are allowed; each is reported for itself.

    Raises:
        ValueError: a file is not a result file, two are of different devices, or there is nothing to report.
    """
    groups: dict[str, Material] = {}
    left_out: list[LeftOut] = []
    for path in paths:
        kind = _kind(path)
        if kind not in _KINDS:
            left_out.append(LeftOut(path, kind))
            continue
        results = _KINDS[kind].read(path)
        group = groups.setdefault(results.device, Material(results.device))
        getattr(group, kind).append(Source(path, results))
        if len(groups) > 1 and not mixed_devices:
            one, other = (group.sources[0] for group in groups.values())
            raise CheckpointError(
                f"{one.path} is of {one.results.device!r} and {other.path} of {other.results.device!r}: not comparable;"
                " give files of one device, or --allow-mixed-devices to report each for itself"
            )
    if not groups:
        names = ", ".join(f"{file.path} ({file.kind})" for file in left_out) or "no files"
        raise CheckpointError(f"nothing to report in {names}; give files of kind {', '.join(_KINDS)}")
    return sorted(groups.values(), key=lambda group: -len(group.sources)), left_out


def _kind(path: Path) -> str:
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else "not what a `slimspec bench` command writes"
        )
        raise CheckpointError(f"{path}: {reason}; give files that were written with --json") from None
    return str(kind)

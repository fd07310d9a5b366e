"""What every measuring command writes, and the only thing that `slimspec report` reads."""

import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Results(_Record):
    """The head of every file; a kind of measurement adds its rows."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    kind: str
    command: str
    time: datetime
    versions: dict[str, str]
    device: str

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    def write(self, path: Path) -> None:
        """Write the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(self.model_dump_json(by_alias=True, indent=1) + "\n")
        partial.replace(path)


class HeadRow(_Record):
    """One head at one shape and batch."""

    head: str
    shape: str
    batch: int
    dtype: str
    p20_us: float
    p50_us: float
    p80_us: float
    bytes: int
    percent_of_copy_bandwidth: float


class HeadResults(Results):
    """``slimspec bench head``."""

    kind: Literal["head"] = "head"
    threads: int
    repeats: int
    copy_gb_s: float  # bytes read plus bytes written, per second
    read_gb_s: float
    rows: list[HeadRow]


class TunedRow(_Record):
    """The best tiling of one form of `up`, rank and batch bucket."""

    form: str
    rank: int
    batch: int
    block_v: int
    block_b: int
    block_r: int
    num_warps: int
    num_stages: int
    p50_us: float


class TunedTable(Results):
    """``slimspec bench head --tune``; the kernels read it."""

    kind: Literal["tuned"] = "tuned"
    gemm_rows: int  # from so many rows on an unfused GEMM is faster
    rows: list[TunedRow]


def provenance() -> dict[str, Any]:
    """The fields that say how and with what a file came about, but for the device."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.now(UTC).replace(microsecond=0),
        "versions": {name: found for name in ("vllm-slimspec", "torch", "triton", "vllm") if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

"""What every measuring command writes, and the only thing that `slimspec report` reads."""

import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_slimspec.common.output import claim_file
from vllm_slimspec.errors import CheckpointError


class Record(BaseModel):
    """What a row of a file is made from: nothing but the fields that its kind has."""

    model_config = ConfigDict(extra="forbid")


class Results(Record):
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
        text = self.model_dump_json(by_alias=True, indent=1) + "\n"
        with claim_file(path) as claim:
            claim.write(lambda new: new.write_text(text))

    @classmethod
    def read(cls, path: Path) -> Self:
        """What :meth:`write` wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not of this kind, or not of this version.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            kind = cls.model_fields["kind"].default
            words = f"not what this version writes as {kind!r} ({place}: {first['msg']}); measure again"
            raise CheckpointError(f"{path}: {words}") from None


class HeadRow(Record):
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


class TunedRow(Record):
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
    """``slimspec tune``; the kernels read it."""

    kind: Literal["tuned"] = "tuned"
    gemm_rows: int  # from so many rows on an unfused GEMM is faster
    rows: list[TunedRow]


class CrossoverRow(Record):
    """Both forms that a CPU keeps of one quantized `up`, multiplied by so many rows."""

    kind: str
    shape: str
    batch: int
    integer_us: float
    bfloat16_us: float


class CrossoverResults(Results):
    """``slimspec tune`` on a CPU; medians."""

    kind: Literal["crossover"] = "crossover"
    threads: int
    repeats: int
    rows: list[CrossoverRow]


class _AcceptedRow(Record):
    """What one head accepts over one set of prompts at one K."""

    head: str
    prompt_set: str
    num_speculative_tokens: int
    rank: int | None  # None: dense
    draft_vocab_size: int
    rerank: int | None
    head_bytes: int  # that a draft step reads
    dense_bytes: int  # of a dense head over the same vocabulary
    length: float
    low: float  # 95%, by drawing prompts anew
    high: float
    per_position: list[float]  # share of all cycles whose draft at position 1, 2, ... was accepted
    cycles: list[int]  # of each prompt
    accepted: list[int]  # draft tokens of each prompt


class AcceptanceRow(_AcceptedRow):
    """One drafter in the engine, at one temperature."""

    temperature: float
    tokens: int  # answered
    equal: int | None  # answers that are the target's own, token for token; None where they were sampled
    near_ties: int | None  # the others whose first difference was a near tie
    largest_gap: float | None  # by so much did the target prefer its own token at a first difference, in nats


class AcceptanceResults(Results):
    """``slimspec bench acceptance``."""

    kind: Literal["acceptance"] = "acceptance"
    target: str
    hidden_size: int
    vocab_size: int
    dtype: str
    max_tokens: int
    rows: list[AcceptanceRow]


class StatesRow(_AcceptedRow):
    """One head on head states: greedy cycles, and the overlap of sampled drafts."""

    accepted_of_full: float | None  # accepted drafts per cycle over those of the head `full`, None without one
    accepted_of_full_low: float | None  # 95%, the same prompts drawn for both
    accepted_of_full_high: float | None
    alpha: list[float]  # mean over all places of sum(min(p, q)) at temperature 1, by draft step


class StatesResults(Results):
    """``slimspec bench states``."""

    kind: Literal["states"] = "states"
    target: str
    hidden_size: int
    vocab_size: int
    max_tokens: int
    rows: list[StatesRow]


class ServeRow(Record):
    """One drafter behind a server at one concurrency, as ``vllm bench serve`` counted; ``none`` is the target alone."""

    head: str
    dtype: str | None = None  # None: vLLM's choice
    concurrency: int
    completed: int
    failed: int
    output_tokens: int
    duration_s: float
    tokens_per_s: float  # of output
    ttft_ms_p50: float
    ttft_ms_p80: float
    itl_ms_p50: float
    itl_ms_p80: float
    tpot_ms_p50: float  # the mean time of a token of one request, so that cycles with several tokens count as such
    tpot_ms_p80: float
    length: float | None  # acceptance length; None without a drafter


class ServeResults(Results):
    """``slimspec bench serve``."""

    kind: Literal["serve"] = "serve"
    target: str
    hidden_size: int
    vocab_size: int
    prompt_set: str
    num_speculative_tokens: int
    max_tokens: int
    acceptance: str | None = None  # whose acceptance rates vLLM imitated; None: the drafters' own
    rows: list[ServeRow]


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

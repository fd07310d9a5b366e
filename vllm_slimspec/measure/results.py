"""The JSON files that the measuring commands write. ``slimspec report`` reads nothing else."""

import re
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_slimspec.common.output import claim_file
from vllm_slimspec.errors import CheckpointError

if TYPE_CHECKING:
    from vllm_slimspec.target import Target

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """A part of a result file. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Results(Record):
    """The fields that every result file has. Each kind of measurement adds its own, with its rows."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    kind: str
    command: str
    time: datetime
    versions: dict[str, str]
    device: str

    def write(self, path: Path) -> None:
        """Write the results to ``path`` as JSON, with lists of numbers on one line, wholly or not at all."""
        text = self.model_dump_json(by_alias=True, indent=1) + "\n"
        text = re.sub(r"\[\n([-+.\deE,\s]+)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)
        with claim_file(path) as claim:
            claim.write(lambda new: new.write_text(text))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and return the results that :meth:`write` wrote, or raise CheckpointError if the file holds others."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            place, kind = ".".join(map(str, first["loc"])), cls.model_fields["kind"].default
            raise CheckpointError(
                f"{path}: not what this version writes as {kind!r} ({place}: {first['msg']}); measure again"
            ) from None


class HeadRow(Record):
    """The time of one head at one shape and batch."""

    head: str
    shape: str
    batch: int
    dtype: str
    p20_us: float
    p50_us: float
    p80_us: float
    bytes: int  # bytes of weights that a call reads
    percent_of_copy_bandwidth: float


class HeadResults(Results):
    """The results of ``slimspec bench head``."""

    kind: Literal["head"] = "head"
    threads: int
    repeats: int
    copy_gb_s: float  # 1e9 bytes read plus written, per second
    read_gb_s: float
    rows: list[HeadRow]


class TunedRow(Record):
    """The fastest tiling for one form of `up`, rank and batch bucket."""

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
    """The results of ``slimspec tune`` on a GPU, which the kernels read."""

    kind: Literal["tuned"] = "tuned"
    gemm_rows: int  # number of rows from which an unfused matrix product is faster
    rows: list[TunedRow]


class CrossoverRow(Record):
    """The times of both forms that a CPU keeps of one quantized `up`, for a product with ``batch`` rows."""

    kind: str
    shape: str
    batch: int
    integer_us: float
    bfloat16_us: float


class CrossoverResults(Results):
    """The results of ``slimspec tune`` on a CPU. Times are medians."""

    kind: Literal["crossover"] = "crossover"
    threads: int
    repeats: int
    rows: list[CrossoverRow]


class DescribedHead(Record):
    """The fields of a row that describe a drafter's head."""

    rank: int | None  # None: the head is dense
    draft_vocab_size: int
    rerank: int | None  # number of candidates that are re-ranked; None: none
    head_bytes: int  # bytes that a draft step reads, the rows of re-ranking included
    dense_bytes: int  # bytes of a dense head over the same vocabulary


class _AcceptedRow(DescribedHead):
    """What the target accepts from one head over one set of prompts at one K."""

    head: str
    prompt_set: str
    num_speculative_tokens: int
    length: float  # acceptance length, in tokens per cycle
    low: float  # 95% interval of the length, by resampling the prompts
    high: float
    per_position: list[float]  # share of all cycles whose draft at position 1, 2, ... was accepted
    cycles: list[int]  # number of cycles for each prompt
    accepted: list[int]  # number of accepted draft tokens for each prompt

    @property
    def length_in_words(self) -> str:
        """Return the acceptance length with its interval, as tables show it."""
        return f"{self.length:.3f} ({self.low:.2f}-{self.high:.2f})"

    @property
    def rates(self) -> str:
        """Return the shares of accepted drafts by position, as tables show them."""
        return " ".join(f"{rate:.2f}" for rate in self.per_position)


class AcceptanceRow(_AcceptedRow):
    """What one drafter reached in the engine, at one temperature."""

    temperature: float
    tokens: int  # number of generated tokens
    equal: int | None  # number of answers that are the target's own, token for token; None if answers were sampled
    near_ties: int | None  # number of other answers whose first difference is a near tie
    largest_gap: float | None  # largest gap between the two tokens at a first difference, in nats

    @property
    def identical(self) -> str:
        """Return how many answers are the target's own, as tables show it."""
        same = "" if self.equal is None else f"{self.equal} of {len(self.cycles)}"
        return same + (f" ({self.near_ties} near ties)" if self.near_ties else "")


class _TargetResults(Results):
    """Results that were measured with one target."""

    target: str
    hidden_size: int
    vocab_size: int
    max_tokens: int


class AcceptanceResults(_TargetResults):
    """The results of ``slimspec bench acceptance``."""

    kind: Literal["acceptance"] = "acceptance"
    dtype: str
    rows: list[AcceptanceRow]


class StatesRow(_AcceptedRow):
    """What one head reaches on recorded head states: greedy cycles, and the overlap of sampled drafts."""

    accepted_of_full: float | None  # accepted drafts per cycle, relative to the head `full`; None without `full`
    accepted_of_full_low: float | None  # 95% interval, by resampling the same prompts for both heads
    accepted_of_full_high: float | None
    alpha: list[float]  # mean over all places of sum(min(p, q)) at temperature 1, for each draft step

    @property
    def cells(self) -> tuple[str, str]:
        """Return the share of accepted drafts with its interval and the mean alpha, as tables show them."""
        share, low, high = self.accepted_of_full, self.accepted_of_full_low or 0, self.accepted_of_full_high or 0
        words = "" if share is None else f"{share:.1%} ({low:.1%}-{high:.1%})"
        return words, f"{sum(self.alpha) / len(self.alpha):.3f}"


class StatesResults(_TargetResults):
    """The results of ``slimspec bench states``."""

    kind: Literal["states"] = "states"
    rows: list[StatesRow]


class ServeRow(Record):
    """What ``vllm bench serve`` counted for one drafter at one concurrency. The head ``none`` is the target alone."""

    head: str
    dtype: str | None = None  # None: vLLM's choice
    concurrency: int
    completed: int
    failed: int
    output_tokens: int
    duration_s: float
    tokens_per_s: float  # output tokens per second of all requests
    rounds_tokens_per_s: list[float] = []  # the same for each round in which the servers took turns
    ttft_ms_p50: float
    ttft_ms_p80: float
    itl_ms_p50: float
    itl_ms_p80: float
    tpot_ms_p50: float  # quantiles over requests of the mean time per token, in which all tokens of a cycle count
    tpot_ms_p80: float
    length: float | None  # acceptance length; None without a drafter

    @property
    def cells(self) -> tuple[str, ...]:
        """Return tokens per second, times, acceptance length and failed requests, as tables show them."""
        times = (f"{number:.1f}" for number in (self.tokens_per_s, self.ttft_ms_p50, self.itl_ms_p50, self.tpot_ms_p50))
        return *times, "" if self.length is None else f"{self.length:.2f}", str(self.failed or "")


class ServeResults(_TargetResults):
    """The results of ``slimspec bench serve``."""

    kind: Literal["serve"] = "serve"
    prompt_set: str
    num_speculative_tokens: int
    acceptance: str | None = None  # the target whose measured acceptance vLLM imitated; None: drafts were verified
    rows: list[ServeRow]


def grouped(rows: Iterable[R], *names: str) -> dict[tuple[Any, ...], list[R]]:
    """Return rows by their values of the fields ``names``, in the order of the first row of each group."""
    groups: dict[tuple[Any, ...], list[R]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return groups


def provenance(target: "Target | None" = None) -> dict[str, Any]:
    """Return the fields of results that say how a file was made, and for which target, if there is one."""
    versions = {}
    for name in ("vllm-slimspec", "torch", "triton", "vllm"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    found = {"command": command, "time": datetime.now(UTC).replace(microsecond=0), "versions": versions}
    if target is None:
        return found
    return found | {"target": target.name, "hidden_size": target.hidden_size, "vocab_size": target.vocab_size}

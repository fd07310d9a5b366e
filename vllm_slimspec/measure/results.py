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


PartName = Literal["down", "up", "choice", "rescoring", "whole"]


class PartRow(_Record):
    """One part of one head at one shape and batch, or the whole of it as it is served."""

    head: str
    shape: str
    batch: int
    part: PartName
    p50_us: float
    bytes: int  # of weights that it reads


class PartResults(Results):
    """``slimspec bench parts``."""

    kind: Literal["parts"] = "parts"
    threads: int
    repeats: int
    copy_gb_s: float  # as in HeadResults, of this run
    read_gb_s: float
    rows: list[PartRow]


class CycleRow(_Record):
    """One head in one engine: K draft steps and their verification, as the engine ran them."""

    head: str
    shape: str
    rank: int | None  # of a low-rank head
    num_speculative_tokens: int  # K
    batch: int
    context: int  # tokens of each prompt
    dtype: str
    cycles: int  # timed
    cycle_ms_p20: float
    cycle_ms_p50: float
    cycle_ms_p80: float
    # of the K draft heads of a cycle: cycle(this head) - cycle(a head that returns a constant id), medians
    head_ms: float
    # one call alone, with cold caches, in the same process: independent of the cycle
    head_alone_us_p50: float
    accepted: float  # draft tokens a request and cycle; near 0 with random weights, else by vLLM's synthetic acceptance
    # of all requests, at the imitated acceptance length and the median cycle; None without synthetic acceptance
    tokens_per_s: float | None = None
    kappa: float  # (cycle(full) - cycle(null)) / cycle(full), of this shape, K, batch and context
    nu: float | None  # head_alone_us_p50(full) / head_alone_us_p50; None for the constant id
    ratio: float  # cycle_ms_p50 / cycle_ms_p50(full)
    ratio_low: float  # 95%, by drawing rounds anew, the same for both heads
    ratio_high: float
    predicted_ratio: float | None  # 1 - kappa + kappa / nu: eq. 4 of arXiv 2605.10453 at equal acceptance
    # from one more round with clocks around the parts, where nothing is compiled: medians of a cycle
    verify_ms: float | None  # the target's forward pass and logits
    body_ms: float | None  # the drafter's K forward passes
    wrapped_head_ms: float | None  # the K heads


class CycleResults(Results):
    """``slimspec bench cycle``."""

    kind: Literal["cycle"] = "cycle"
    threads: int
    rounds: int
    acceptance: str | None = None  # whose acceptance rates vLLM imitated; None: those of random weights
    rows: list[CycleRow]


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


class CrossoverRow(_Record):
    """Both forms that a CPU keeps of one quantized `up`, multiplied by so many rows."""

    kind: str
    shape: str
    batch: int
    integer_us: float
    bfloat16_us: float


class CrossoverResults(Results):
    """``slimspec bench head --tune`` on a CPU; medians."""

    kind: Literal["crossover"] = "crossover"
    threads: int
    repeats: int
    rows: list[CrossoverRow]


class _AcceptedRow(_Record):
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


class ServeRow(_Record):
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

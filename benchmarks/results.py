"""The JSON files that the benchmarks of this folder write, built like those of ``slimspec bench``."""

from typing import Literal

from vllm_slimspec.measure.results import Record, Results

PartName = Literal["down", "up", "choice", "rescoring", "whole"]


class PartRow(Record):
    """The time of one part of one head at one shape and batch; the part "whole" is the head as it is served."""

    head: str
    shape: str
    batch: int
    part: PartName
    p50_us: float
    bytes: int  # bytes of weights that the part reads


class PartResults(Results):
    """The results of ``benchmarks/parts.py``."""

    kind: Literal["parts"] = "parts"
    threads: int
    repeats: int
    copy_gb_s: float  # 1e9 bytes read plus written, per second
    read_gb_s: float
    rows: list[PartRow]


class CycleRow(Record):
    """The time of a cycle with one head: K draft steps and their verification, as the engine ran them."""

    head: str
    shape: str
    rank: int | None  # None: the head has no factors
    num_speculative_tokens: int  # K
    batch: int  # requests at the same time
    context: int  # tokens of each prompt
    dtype: str
    cycles: int  # number of timed cycles
    cycle_ms_p20: float
    cycle_ms_p50: float
    cycle_ms_p80: float
    # The time of the K calls of the head in a cycle: the median cycle of this head minus that of the head `null`.
    head_ms: float
    # The time of one call of the head alone, in the same process, with cold caches.
    head_alone_us_p50: float
    accepted: float  # accepted draft tokens per request and cycle; near 0 with random weights, unless vLLM imitates
    # Of all requests, computed from the imitated acceptance length and the median cycle; None: nothing was imitated.
    tokens_per_s: float | None = None
    kappa: float  # (cycle(full) - cycle(null)) / cycle(full), at this shape, K, batch and context
    nu: float | None  # head_alone_us_p50(full) / head_alone_us_p50; None for the head `null`
    ratio: float  # cycle_ms_p50 / cycle_ms_p50(full)
    ratio_low: float  # 95% interval, by resampling the same rounds for both heads
    ratio_high: float
    predicted_ratio: float | None  # 1 - kappa + kappa / nu: eq. 4 of arXiv 2605.10453 at equal acceptance
    # Medians per cycle, from one more round with clocks around the parts. None where the engine captures graphs.
    verify_ms: float | None  # the target's forward pass and logits
    body_ms: float | None  # the drafter's K forward passes
    wrapped_head_ms: float | None  # the K calls of the head


class CycleResults(Results):
    """The results of ``benchmarks/cycle.py``."""

    kind: Literal["cycle"] = "cycle"
    threads: int
    rounds: int
    acceptance: str | None = None  # the target whose measured acceptance vLLM imitated; None: drafts were verified
    rows: list[CycleRow]

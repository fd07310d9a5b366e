"""What the benchmarks of this folder write, built like the results of ``slimspec bench``."""

from typing import Literal

from vllm_slimspec.measure.results import Record, Results

PartName = Literal["down", "up", "choice", "rescoring", "whole"]


class PartRow(Record):
    """One part of one head at one shape and batch, or the whole of it as it is served."""

    head: str
    shape: str
    batch: int
    part: PartName
    p50_us: float
    bytes: int  # of weights that it reads


class PartResults(Results):
    """``benchmarks/parts.py``."""

    kind: Literal["parts"] = "parts"
    threads: int
    repeats: int
    copy_gb_s: float  # as in HeadResults, of this run
    read_gb_s: float
    rows: list[PartRow]


class CycleRow(Record):
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
    """``benchmarks/cycle.py``."""

    kind: Literal["cycle"] = "cycle"
    threads: int
    rounds: int
    acceptance: str | None = None  # whose acceptance rates vLLM imitated; None: those of random weights
    rows: list[CycleRow]

"""What is timed: draft heads with random weights, at the shapes of public models."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Shape(NamedTuple):
    """The sizes of a head: D, V and R = D / 8."""

    hidden_size: int
    vocab_size: int
    rank: int


SHAPES = {
    "llama-3.1-8b": Shape(4096, 128256, 512),
    "llama-3.2-1b": Shape(2048, 128256, 256),
    "qwen3-8b": Shape(4096, 151936, 512),
    "qwen3-30b-a3b": Shape(2048, 151936, 256),
    "gpt-oss-20b": Shape(2880, 201088, 360),
}
"""Hidden size, vocabulary size and rank of the heads of public models."""

RERANK_K = 16
SPEC_VOCAB_K = 2048  # candidates of SpecVocab (arXiv 2602.13836, section 3.3)
TRIMMED = 32768  # rows of the smaller trimmed head

Family = Literal["null", "full", "trim", "spec-vocab", "low-rank"]


@dataclass(frozen=True)
class Head:
    """A draft head that can be measured. Its fields say what it is made of; the name is only a label."""

    name: str
    family: Family
    quantization: str | None = None  # of `up`, or of the dense rows of a full head
    rerank: int | None = None  # number of candidates that are scored again by the dense rows
    rows: int | None = None  # number of vocabulary rows that a trimmed head keeps; None: all
    packed: bool = False  # whether the dense rows are stored in the layout that a CPU reads fastest
    by_logits: bool = False  # whether vLLM asks the head for logits over the whole vocabulary instead of tokens
    devices: tuple[str, ...] = ("cpu", "cuda")  # devices that have a kernel for the head


HEADS = {
    head.name: head
    for head in (
        Head("full", "full", by_logits=True),
        Head("full-packed", "full", packed=True, devices=("cpu",)),
        Head("full-fp8", "full", quantization="fp8", devices=("cuda",)),
        Head("full-int8", "full", quantization="int8", packed=True, devices=("cpu",)),
        Head("trim-32k", "trim", rows=TRIMMED),
        Head("trim-32k-scatter", "trim", rows=TRIMMED, by_logits=True),
        Head("trim-64k", "trim", rows=2 * TRIMMED),
        Head("trim-64k-scatter", "trim", rows=2 * TRIMMED, by_logits=True),
        Head("spec-vocab", "spec-vocab"),
        Head("low-rank", "low-rank"),
        Head("low-rank-fp8", "low-rank", quantization="fp8"),
        Head("low-rank-int8", "low-rank", quantization="int8"),
        Head("low-rank-int4", "low-rank", quantization="int4"),
        Head("low-rank-rerank", "low-rank", rerank=RERANK_K),
        Head("low-rank-int8-rerank", "low-rank", quantization="int8", rerank=RERANK_K),
    )
}
"""Every head that ``slimspec bench head`` can time, by its name."""

"""Print the page `docs/rivals.md`: the ways to a cheaper draft head, what they read, and what is measured here."""

from collections.abc import Callable
from typing import NamedTuple

import typer

from heads import HEADS
from vllm_slimspec.head.spec import head_spec
from vllm_slimspec.measure.arms import RERANK_K, SPEC_VOCAB_K, TRIMMED
from vllm_slimspec.measure.shapes import SHAPES, Shape

_NANO_ROWS = 3000  # "under 3k tokens" in its abstract
_CORAL_GROUPS = 4  # assumed: the paper's number was not found in what is public of it


class Rival(NamedTuple):
    """A draft head of the literature or of practice."""

    name: str
    source: str
    mechanism: str
    vocabulary: str  # what it can draft
    training: str
    formula: str
    bytes: Callable[[Shape], int]  # of weights in bfloat16 that a draft step of one request reads, at the least
    heads: tuple[str, ...]  # its names in `slimspec bench head` and cycle.py; none: documented only
    remark: str


def low_rank_bytes(head: str) -> Callable[[Shape], int]:
    """Return what a low-rank head of this name reads for one row, re-ranked rows included, in a bfloat16 model."""

    def read(shape: Shape) -> int:
        d, v, r = shape
        spec = head_spec({"hidden_size": d, "vocab_size": v, **HEADS[head].low_rank_keys(r)})
        return spec.bytes(2) + 2 * d * (spec.rerank or 0)

    return read


def _rows(count: int) -> Callable[[Shape], int]:
    return lambda shape: 2 * min(count, shape.vocab_size) * shape.hidden_size


RIVALS = (
    Rival(
        "EAGLE-3, full vocabulary",
        "arXiv 2503.01840",
        "one dense product, then argmax",
        "all",
        "with the drafter",
        "2 V D",
        lambda shape: 2 * shape.vocab_size * shape.hidden_size,
        ("full", "full-argmax"),
        "stock vLLM, through logits and through `use_local_argmax_reduction`",
    ),
    Rival(
        "FR-Spec, VocabTrim",
        "arXiv 2502.14856, 2506.22694",
        "the rows of frequent tokens only; FR-Spec counts a corpus, VocabTrim the target's own answers",
        "32k, the same for every text",
        "none",
        "2 N D",
        _rows(TRIMMED),
        ("trim-32k", "trim-32k-scatter"),
        "stock vLLM: by default it scatters N logits into V of them and searches those; with "
        "`use_local_argmax_reduction` it searches the N",
    ),
    Rival(
        "full head in int8 or fp8",
        "vLLM 0.33 `draft_lm_head_quantization` (fp8)",
        "the dense product with one byte a weight",
        "all",
        "none",
        "V D + 4 V",
        lambda shape: shape.vocab_size * (shape.hidden_size + 4),
        ("full-int8", "full-fp8"),
        "int8 on a CPU by ATen's weight-only kernel, fp8 on a GPU by `torch._scaled_mm`",
    ),
    Rival(
        "SpecVocab",
        "arXiv 2602.13836",
        "a low-rank screen of all V, exact scores of its k best by the rows of the dense head",
        "all, through the screen's k best",
        "distilled, with an auxiliary loss",
        "2 R D + 2 V R + 2 k D",
        lambda shape: low_rank_bytes("low-rank")(shape) + 2 * SPEC_VOCAB_K * shape.hidden_size,
        ("spec-vocab",),
        f"k = {SPEC_VOCAB_K} is the paper's (section 3.3); with trained factors a small k is our re-rank",
    ),
    Rival(
        "SlimSpec",
        "arXiv 2605.10453",
        "two dense factors, R = D / 8",
        "all",
        "with the drafter, or converted",
        "2 R D + 2 V R",
        low_rank_bytes("low-rank"),
        ("low-rank",),
        "this package",
    ),
    Rival(
        "SlimSpec in int8",
        "this package",
        "`up` with one byte a weight",
        "all",
        "as above",
        "2 R D + V R + 4 V",
        low_rank_bytes("low-rank-int8"),
        ("low-rank-int8", "low-rank-fp8"),
        "",
    ),
    Rival(
        "SlimSpec in int4",
        "this package",
        "`up` with half a byte a weight",
        "all",
        "as above",
        "2 R D + V R / 2 + 4 V",
        low_rank_bytes("low-rank-int4"),
        ("low-rank-int4",),
        "",
    ),
    Rival(
        "SlimSpec, re-ranked",
        "this package",
        f"the {RERANK_K} best scored again by the rows of the dense head",
        "all",
        "none needed when converted",
        f"2 R D + 2 V R + {RERANK_K} x 2 D",
        low_rank_bytes("low-rank-rerank"),
        ("low-rank-rerank",),
        "",
    ),
    Rival(
        "SlimSpec in int8, re-ranked",
        "this package",
        "both",
        "all",
        "as above",
        f"2 R D + V R + 4 V + {RERANK_K} x 2 D",
        low_rank_bytes("low-rank-int8-rerank"),
        ("low-rank-int8-rerank",),
        "",
    ),
    Rival(
        "NanoSpec",
        "arXiv 2605.26444",
        "the rows of a small vocabulary made from the context at every step, gathered asynchronously",
        f"under {_NANO_ROWS:,} tokens, by the context",
        "none",
        f"2 x {_NANO_ROWS:,} D at most",
        _rows(_NANO_ROWS),
        (),
        "the fewest bytes of all, and newer than the SlimSpec paper; its gather comes on top",
    ),
    Rival(
        "DynaSpec",
        "arXiv 2510.13847",
        "a small classifier of the context chooses clusters of tokens, their rows are scored",
        "clusters chosen at every step",
        "the classifier",
        "2 S D, S rows in the chosen clusters",
        _rows(TRIMMED),
        (),
        f"S = {TRIMMED:,} is assumed, the size of the static lists that it replaces; its classifier comes on top",
    ),
    Rival(
        "CORAL",
        "arXiv 2502.16880",
        "the head in groups of rows, a router runs some of them",
        "one group a step",
        "router and drafter",
        "2 V D / G, G groups of which one runs",
        lambda shape: 2 * shape.vocab_size * shape.hidden_size // _CORAL_GROUPS,
        (),
        f"G = {_CORAL_GROUPS} is assumed, the paper's was not found in what is public of it; its router comes on top",
    ),
    Rival(
        "RDK, out-of-vocabulary sampling",
        "arXiv 2506.03206",
        "a trimmed head whose probabilities are spread over all tokens by an affinity of tokens",
        "all, when sampled",
        "none; affinities are counted",
        "2 N D + 8 V",
        lambda shape: _rows(TRIMMED)(shape) + 8 * shape.vocab_size,
        (),
        "8 V: its linear form, two float32 vectors of V, which is our reading; it changes sampled drafts only, and a "
        "greedy drafter, which vLLM's is by default, gains nothing",
    ),
)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python benchmarks/rivals.py > docs/rivals.md")
def rivals() -> None:
    """Print the page docs/rivals.md: mechanism, bytes and standing of every head of the literature and of practice."""
    typer.echo(rivals_page())


def rivals_page() -> str:
    """Return the page `docs/rivals.md`."""
    lines = [
        "# Rivals",
        "",
        "Made by `python benchmarks/rivals.py`. Every way to a cheaper draft head that we know of, SlimSpec",
        "among them: what it does, what it can draft, and the weights that a draft step of one request reads, in a",
        "bfloat16 model.",
        "Bytes are computed from the formulas (D hidden size, V vocabulary, R = D / 8); launches, top-k and what",
        "logits cost are not in them, and decide where bytes are few. What is not run is described from abstracts and",
        "summaries. Measurements stand in docs/results/.",
        "",
        "| head | source | does | can draft | training | measured here as |",
        "|---|---|---|---|---|---|",
    ]
    for rival in RIVALS:
        measured = ", ".join(f"`{head}`" for head in rival.heads) or "not run"
        cells = (rival.name, rival.source, rival.mechanism, rival.vocabulary, rival.training, measured)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Bytes of weights, MB, and how many times fewer than the full head's:",
        "",
        f"| head | formula | {' | '.join(SHAPES)} |",
        f"|---|---|{'---|' * len(SHAPES)}",
    ]
    for rival in RIVALS:
        read = {name: rival.bytes(shape) for name, shape in SHAPES.items()}
        sizes = (f"{read[name] / 1e6:.1f} ({RIVALS[0].bytes(SHAPES[name]) / read[name]:.1f}x)" for name in SHAPES)
        lines.append(f"| {rival.name} | {rival.formula} | {' | '.join(sizes)} |")
    lines += ["", "Remarks:", ""]
    lines += [f"- {rival.name}: {rival.remark}." for rival in RIVALS if rival.remark]
    return "\n".join(lines)


if __name__ == "__main__":
    app()

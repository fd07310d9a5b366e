"""Print the page `docs/rivals.md`: the known kinds of draft head, the bytes that they read, and what is measured."""

from collections.abc import Callable
from typing import NamedTuple

import typer

from engine_heads import HEADS
from vllm_slimspec.head.spec import head_spec
from vllm_slimspec.measure.shapes import RERANK_K, SHAPES, SPEC_VOCAB_K, TRIMMED, Shape

_NANO_ROWS = 3000  # the abstract of NanoSpec says "under 3k tokens"
_CORAL_GROUPS = 4  # assumed: the public text of CORAL does not give the number


class Rival(NamedTuple):
    """A kind of draft head from the literature or from practice."""

    name: str
    source: str
    mechanism: str
    vocabulary: str  # the tokens that it can draft
    training: str  # the training that it needs
    formula: str  # the formula of `bytes`
    bytes: Callable[[Shape], int]  # the fewest bytes of bfloat16 weights that a draft step of one request reads
    heads: tuple[str, ...]  # its names in `slimspec bench head` and cycle.py; empty: it is described and not run
    remark: str


def low_rank_bytes(head: str) -> Callable[[Shape], int]:
    """Return a function from a shape to the bytes that a low-rank head of a bfloat16 model reads for one row.

    The bytes include the dense rows that re-ranking reads.
    """

    def read(shape: Shape) -> int:
        d, v, r = shape
        return head_spec({"hidden_size": d, "vocab_size": v, **HEADS[head].low_rank_keys(r)}).bytes(2)

    return read


def _rows(count: int) -> Callable[[Shape], int]:
    return lambda shape: 2 * min(count, shape.vocab_size) * shape.hidden_size


RIVALS = (
    Rival(
        "EAGLE-3, full vocabulary",
        "arXiv 2503.01840",
        "multiplies the state with a dense matrix and takes the best token",
        "all tokens",
        "together with the drafter",
        "2 V D",
        lambda shape: 2 * shape.vocab_size * shape.hidden_size,
        ("full", "full-argmax"),
        "Both heads are vLLM's own code. `full` returns logits, and `full-argmax` returns tokens "
        "(`use_local_argmax_reduction`).",
    ),
    Rival(
        "FR-Spec, VocabTrim",
        "arXiv 2502.14856, 2506.22694",
        "keeps only the rows of frequent tokens, which FR-Spec counts in a corpus and VocabTrim in the target's own "
        "answers",
        "N = 32,768 tokens, the same for every text",
        "none",
        "2 N D",
        _rows(TRIMMED),
        ("trim-32k", "trim-32k-scatter"),
        "Both heads are vLLM's own code. By default vLLM scatters the N logits into a vector of V and searches that "
        "(`trim-32k-scatter`). With `use_local_argmax_reduction` it searches the N logits (`trim-32k`).",
    ),
    Rival(
        "full head in int8 or fp8",
        "vLLM 0.33 `draft_lm_head_quantization` (fp8)",
        "stores the dense matrix with one byte per weight",
        "all tokens",
        "none",
        "V D + 4 V",
        lambda shape: shape.vocab_size * (shape.hidden_size + 4),
        ("full-int8", "full-fp8"),
        "int8 runs on a CPU by ATen's weight-only kernel, and fp8 on a GPU by `torch._scaled_mm`.",
    ),
    Rival(
        "SpecVocab",
        "arXiv 2602.13836",
        "scores all tokens by two low-rank factors, and scores the k best of them again by the rows of the dense head",
        "all tokens",
        "distillation with an auxiliary loss",
        "2 R D + 2 V R + 2 k D",
        lambda shape: low_rank_bytes("low-rank")(shape) + 2 * SPEC_VOCAB_K * shape.hidden_size,
        ("spec-vocab",),
        f"k = {SPEC_VOCAB_K} is taken from section 3.3 of the paper. With trained factors and a small k, this is what "
        "this page calls a re-ranked SlimSpec head.",
    ),
    Rival(
        "SlimSpec",
        "arXiv 2605.10453",
        "scores all tokens by two low-rank factors, `down` and `up`, with R = D / 8",
        "all tokens",
        "together with the drafter, or none when converted from a dense head",
        "2 R D + 2 V R",
        low_rank_bytes("low-rank"),
        ("low-rank",),
        "This is the head that this package serves.",
    ),
    Rival(
        "SlimSpec in int8",
        "this package",
        "stores `up` with one byte per weight",
        "all tokens",
        "as SlimSpec",
        "2 R D + V R + 4 V",
        low_rank_bytes("low-rank-int8"),
        ("low-rank-int8", "low-rank-fp8"),
        "",
    ),
    Rival(
        "SlimSpec in int4",
        "this package",
        "stores `up` with half a byte per weight",
        "all tokens",
        "as SlimSpec",
        "2 R D + V R / 2 + 4 V",
        low_rank_bytes("low-rank-int4"),
        ("low-rank-int4",),
        "",
    ),
    Rival(
        "SlimSpec, re-ranked",
        "this package",
        f"scores the {RERANK_K} best tokens again by the rows of the dense head",
        "all tokens",
        "as SlimSpec",
        f"2 R D + 2 V R + {RERANK_K} x 2 D",
        low_rank_bytes("low-rank-rerank"),
        ("low-rank-rerank",),
        "",
    ),
    Rival(
        "SlimSpec in int8, re-ranked",
        "this package",
        f"stores `up` with one byte per weight, and scores the {RERANK_K} best tokens again by the rows of the dense "
        "head",
        "all tokens",
        "as SlimSpec",
        f"2 R D + V R + 4 V + {RERANK_K} x 2 D",
        low_rank_bytes("low-rank-int8-rerank"),
        ("low-rank-int8-rerank",),
        "",
    ),
    Rival(
        "NanoSpec",
        "arXiv 2605.26444",
        "makes a small vocabulary from the context at every step, and gathers its rows asynchronously",
        f"fewer than {_NANO_ROWS:,} tokens, which depend on the context",
        "none",
        f"2 x {_NANO_ROWS:,} D at most",
        _rows(_NANO_ROWS),
        (),
        "It reads the fewest bytes of all heads on this page, and is newer than the SlimSpec paper. The cost of "
        "gathering the rows is not counted.",
    ),
    Rival(
        "DynaSpec",
        "arXiv 2510.13847",
        "chooses clusters of tokens by a small classifier of the context, and scores the rows of those clusters",
        "the tokens of the clusters that are chosen at every step",
        "training of the classifier",
        "2 S D, with S rows in the chosen clusters",
        _rows(TRIMMED),
        (),
        f"S = {TRIMMED:,} is an assumption: the size of the fixed lists of tokens that DynaSpec replaces. The cost "
        "of the classifier is not counted.",
    ),
    Rival(
        "CORAL",
        "arXiv 2502.16880",
        "splits the rows of the head into groups, and a router chooses which groups run at each step",
        "the tokens of the groups that are chosen at every step",
        "training of the router and the drafter",
        "2 V D / G, with G groups of which one runs",
        lambda shape: 2 * shape.vocab_size * shape.hidden_size // _CORAL_GROUPS,
        (),
        f"That one of G = {_CORAL_GROUPS} groups runs is an assumption, because the numbers were not found in the "
        "public text of the paper. The cost of the router is not counted.",
    ),
    Rival(
        "RDK, out-of-vocabulary sampling",
        "arXiv 2506.03206",
        "spreads the probabilities of a trimmed head over all tokens, by counted affinities between tokens",
        "all tokens when drafts are sampled",
        "none, but affinities are counted",
        "2 N D + 8 V",
        lambda shape: _rows(TRIMMED)(shape) + 8 * shape.vocab_size,
        (),
        "The term 8 V stands for two float32 vectors of V entries. This is our reading of the linear form in the "
        "paper. RDK changes sampled drafts only. vLLM drafts greedily by default, and a greedy drafter gains nothing.",
    ),
)


app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command(epilog="Example: python benchmarks/rivals.py > docs/rivals.md")
def rivals() -> None:
    """Print the page docs/rivals.md: how each known kind of draft head works, and how many bytes it reads."""
    typer.echo(rivals_page())


def rivals_page() -> str:
    """Return the text of `docs/rivals.md`."""
    lines = [
        "# Rivals",
        "",
        "This page compares SlimSpec with other ways to make a [draft head](concepts.md#draft-head) cheaper. It says",
        "what each one does, which tokens it can draft, and how many bytes of weights a draft step of one request",
        "reads in a bfloat16 model. `python benchmarks/rivals.py` prints the page.",
        "",
        "The last column of the first table names the heads of [`slimspec bench head`](bench.md) or `cycle.py`. A head",
        'that is "not run" is described from abstracts and summaries only. The files in [results](results) hold the',
        "measurements.",
        "",
        "| head | source | what it does | tokens it can draft | training it needs | measured here as |",
        "|---|---|---|---|---|---|",
    ]
    for rival in RIVALS:
        measured = ", ".join(f"`{head}`" for head in rival.heads) or "not run"
        cells = (rival.name, rival.source, rival.mechanism, rival.vocabulary, rival.training, measured)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "The second table has the MB of weights that a draft step reads, and in parentheses how many times fewer they",
        "are than those of the full head. They are computed from the formulas: D is the hidden size, V the vocabulary",
        "size, R = D / 8 the [rank](concepts.md#rank), and N the number of rows of a trimmed head. The cost of kernel",
        "launches, of a top-k and of writing logits is not counted. Where a head reads few bytes, those costs decide.",
        "",
        f"| head | formula | {' | '.join(SHAPES)} |",
        f"|---|---|{'---|' * len(SHAPES)}",
    ]
    for rival in RIVALS:
        read = {name: rival.bytes(shape) for name, shape in SHAPES.items()}
        sizes = (f"{read[name] / 1e6:.1f} ({RIVALS[0].bytes(SHAPES[name]) / read[name]:.1f}x)" for name in SHAPES)
        lines.append(f"| {rival.name} | {rival.formula} | {' | '.join(sizes)} |")
    lines += ["", "Remarks on some of them:", ""]
    lines += [f"- {rival.name}: {rival.remark}" for rival in RIVALS if rival.remark]
    return "\n".join(lines)


if __name__ == "__main__":
    app()

"""One picture of `bench head`: how many times faster than the dense head each one drafts."""

from pathlib import Path

from vllm_slimspec.common.output import claim_file
from vllm_slimspec.errors import CheckpointError
from vllm_slimspec.measure.report.figures import reference
from vllm_slimspec.measure.results import HeadResults, HeadRow

# What a reader compares first, in the order of the picture; everything else stays in the tables. On a CPU the dense
# head to compare with is the one in the layout that ours have: plainly stored it is slower, and flatters them.
_SHOWN = {
    "full": "dense",
    "full-packed": "dense",
    "full-int8": "dense, int8",
    "trim-32k": "dense, 32k of the vocabulary",
    "low-rank": "low-rank",
    "low-rank-int8": "low-rank, int8",
    "low-rank-int8-rerank": "low-rank, int8, re-ranked",
}


def plot_heads(results: HeadResults, output: Path, batch: int = 1) -> None:
    """How many times faster than the dense head each one drafts, a panel for each shape: PNG or SVG by the suffix.

    Raises:
        ValueError: there is no dense head of that batch to compare with.
    """
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row.shape for row in results.rows))
    figure = Figure(figsize=(4.6 * len(shapes), 3.1), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        rows = {row.head: row for row in results.rows if row.shape == shape and row.batch == batch}
        dense = reference(list(rows.values()))
        if dense not in rows:
            raise CheckpointError(
                f"no row of head 'full' for {shape} at batch {batch}; measure it with `slimspec bench head`"
            )
        shown = [head for head in _SHOWN if head in rows and (head != "full" or dense == "full")]
        ratios = [rows[dense].p50_us / rows[head].p50_us for head in shown]
        bars = axes.barh(
            [_SHOWN[head] for head in shown],
            ratios,
            color=["#2a6f97" if head.startswith("low-rank") else "#b8bec4" for head in shown],
        )
        axes.bar_label(
            bars, labels=[_label(rows[h], r) for h, r in zip(shown, ratios, strict=True)], padding=3, fontsize=8
        )
        axes.set_xlim(0, max(ratios) * 1.3)
        axes.invert_yaxis()
        axes.set_title(f"{shape}, batch {batch}", fontsize=10)
        axes.set_xlabel("times faster than the dense head")
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_subplotspec().colspan.start:
            axes.set_yticks([])
    figure.supxlabel(f"{results.device}; medians of {results.repeats} calls, interleaved, cold caches", fontsize=8)
    with claim_file(output) as claim:
        claim.write(lambda new: figure.savefig(new, dpi=160))


def _label(row: HeadRow, ratio: float) -> str:
    return f"{ratio:.1f}x  ({row.p50_us / 1e3:.1f} ms)"

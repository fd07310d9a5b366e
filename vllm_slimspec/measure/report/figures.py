"""The pictures of a report. Each is drawn from rows, on a theme; what it shows in words is its text alternative.

The first is Fig. 1 of the SlimSpec paper (arXiv 2605.10453) with one's own numbers: the time of a head beside the full
one.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vllm_slimspec.common.theme import Theme
from vllm_slimspec.measure.results import AcceptanceRow, HeadRow, ServeRow, StatesRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NU, RHO = "\N{GREEK SMALL LETTER NU}", "\N{GREEK SMALL LETTER RHO}"
_WIDTH = 5.4  # inches, at which type has the size of the page's on a column of a wide screen
_MARKERS = "osD^vP*X"

Named = tuple[float, float, str, str]  # x, y, name, color


def _panels(height: float, count: int) -> "tuple[Figure, Sequence[Axes]]":
    """A figure of so many inches, and its panels from top to bottom."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(count, squeeze=False)[:, 0])


def _panel(height: float) -> "tuple[Figure, Axes]":
    figure, panels = _panels(height, 1)
    return figure, panels[0]


def _rows_of(count: int) -> float:
    return 0.75 + 0.27 * count


def head_time(rows: Sequence[HeadRow], theme: Theme) -> "Figure":
    """Fig. 1: the time of each head as a share of the full one's, a mark for each batch; the fastest at the top."""
    batches = sorted({row.batch for row in rows})
    full = {row.batch: row.p50_us for row in rows if row.head == reference(rows)}
    share = {(row.head, row.batch): row.p50_us / full[row.batch] for row in rows if row.batch in full}
    heads = sorted({row.head for row in rows}, key=lambda head: share.get((head, batches[0]), 9))
    figure, axes = _panel(_rows_of(len(heads)) + 0.2)
    axes.axvline(1, color=theme["muted"], linewidth=1)
    for place, batch in enumerate(batches):
        known = [head for head in heads if (head, batch) in share]
        faces = [theme.head(head) if place == 0 else theme["ground"] for head in known]
        axes.scatter(
            [share[head, batch] for head in known],
            [heads.index(head) for head in known],
            s=44 if place == 0 else 32,
            marker=_MARKERS[place],
            c=faces,
            edgecolors=[theme.head(head) for head in known],
            linewidths=1.2,
            zorder=3 + (place == 0),
        )
        axes.scatter([], [], marker=_MARKERS[place], color=theme["muted"], label=f"batch {batch}")
    axes.set_yticks(range(len(heads)), heads)
    axes.invert_yaxis()
    axes.set_xscale("log")
    _percent_ticks(axes, [share[key] for key in share])
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("head time, share of the full head's (log scale)")
    figure.legend(loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1.2)
    return figure


def reference(rows: Sequence[HeadRow]) -> str:
    """The full head to compare with: repacked where a CPU does that, which is the harder one."""
    return "full-packed" if any(row.head == "full-packed" for row in rows) else "full"


def acceptance(rows: Sequence[AcceptanceRow], theme: Theme) -> "Figure":
    """Acceptance length of each head with its 95% interval, the longest at the top."""
    rows = sorted(rows, key=lambda row: -row.length)
    figure, axes = _panel(_rows_of(len(rows)))
    for place, row in enumerate(rows):
        color = theme.head(row.head)
        axes.plot([row.low, row.high], [place, place], color=color, linewidth=3, alpha=0.45, solid_capstyle="round")
        axes.scatter(row.length, place, s=42, color=color, zorder=3)
        axes.annotate(
            f"{row.length:.2f}",
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize="small",
            color=theme["muted"],
        )
    full = next((row for row in rows if row.head == "full"), None)
    if full:
        axes.axvline(full.length, color=theme["muted"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(rows)), [row.head for row in rows])
    axes.invert_yaxis()
    left, right = min(row.low for row in rows), max(row.high for row in rows)
    axes.set_xlim(max(1.0, left - 0.1 * (right - left)) if left > 1.05 else 1.0, right + 0.05 * (right - left))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("acceptance length, tokens a cycle; bars: 95%")
    return figure


def frontier(rows: Sequence[StatesRow], theme: Theme) -> "Figure":
    """Accepted drafts a cycle against the bytes that a head reads, with 95% intervals."""
    figure, axes = _panel(4.6)
    for row in rows:
        x, color = row.head_bytes / 1e6, theme.head(row.head)
        axes.plot([x, x], [row.low - 1, row.high - 1], color=color, linewidth=2, alpha=0.35)
        axes.scatter(x, row.length - 1, s=30, color=color, zorder=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.2)
    axes.set_xlabel("MB that a draft step reads of the head (log scale)")
    axes.set_ylabel("accepted drafts a cycle")
    _label(figure, axes, [(row.head_bytes / 1e6, row.length - 1, row.head, theme.head(row.head)) for row in rows])
    return figure


def serving(rows: Sequence[ServeRow], theme: Theme) -> "Figure":
    """Tokens per second of the server against those of one request: a line for each head, a mark for each load."""
    figure, axes = _panel(3.8)
    for place, head in enumerate(dict.fromkeys(row.head for row in rows)):
        line = sorted((row for row in rows if row.head == head), key=lambda row: row.concurrency)
        axes.plot(
            [row.tokens_per_s for row in line],
            [1e3 / row.tpot_ms_p50 for row in line],
            color=theme.head(head),
            marker=_MARKERS[place % len(_MARKERS)],
            markersize=5,
            linewidth=1.5,
            label=head,
        )
    axes.set_xlabel("tokens per second of the server")
    axes.set_ylabel("tokens per second of one request (median)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.4, columnspacing=1.2)
    return figure


def _percent_ticks(axes: "Axes", shares: Sequence[float]) -> None:
    low, high = 0.85 * min(shares), 1.2 * max(shares)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low <= t <= high]
    axes.set_xticks(ticks, [f"{100 * t:g}%" for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(low, high)


def _places(figure: "Figure", axes: "Axes", points: Sequence[Named]) -> np.ndarray:
    """Where points are on the figure, in points of type from its lower left [N, 2]; axes and limits must be set."""
    figure.draw_without_rendering()
    return axes.transData.transform([(x, y) for x, y, _, _ in points]) * 72 / figure.dpi


def _label(figure: "Figure", axes: "Axes", points: Sequence[Named]) -> None:
    """Names beside points, moved up or down where they would cover one another."""
    if not points:
        return
    points = sorted(points)
    taken: list[tuple[float, float, float, float]] = []
    for (x, y, name, color), (px, py) in zip(points, _places(figure, axes, points), strict=True):
        width, height = 4.9 * len(name), 10.5  # of small type, roughly
        for step in (0, 11, -11, 22, -22, 33, -33, 44, -44):
            box = (px + 7, py + step - height / 2, px + 7 + width, py + step + height / 2)
            if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                break
        taken.append(box)
        axes.annotate(
            name,
            (x, y),
            xytext=(7, step),
            textcoords="offset points",
            va="center",
            fontsize="small",
            color=color,
            annotation_clip=False,
        )

"""``slimspec report``: show result files as one HTML page that loads nothing, or as one picture.

Result files may come from anywhere, so that nothing in them is trusted. The template escapes all text. Charts are
images, in which no script runs, without mathematical markup. Numbers that no measurement can have are refused.
"""

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllm_slimspec.common.output import claim_file, claim_folder
from vllm_slimspec.common.walk import acceptance_length
from vllm_slimspec.errors import CheckpointError, OutputError
from vllm_slimspec.measure import results as kinds

GENERATOR = "slimspec report"  # the page's <meta name="generator">, by which a later report recognizes an earlier one
_COLORS = ("#0b63a8", "#b8650a", "#8b4bb3", "#2e7d4f", "#a3264b", "#59626c")  # contrast of at least 4:1 on white
_MARKERS = "osD^vP"  # one for each series, so that series can be told apart without colors
_WIDTH = 5.2  # inches
LeftOut = tuple[Path, str]  # a file that the report does not show, and its kind
_STYLE: Any = {
    "text.usetex": False,
    "text.parse_math": False,  # a name such as $x$ must not become a formula
    "svg.fonttype": "none",  # keeps text as text, which can be searched
    "svg.hashsalt": "slimspec",  # makes equal charts equal files
    "font.size": 9.5,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#dfe3e8",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Section:
    """A section of the page: a title, paragraphs, a table, and a chart of the table."""

    title: str
    words: Sequence[str]  # paragraphs above the table
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    picture: str | None = None  # data: address of the chart; None: there is no chart
    alternative: str = ""  # description of the chart for readers who cannot see it
    names: int = 1  # number of leading columns that hold names instead of numbers


@dataclass(frozen=True)
class Source:
    """A result file and its sections of the page."""

    path: Path
    results: kinds.Results
    sections: Sequence[Section]


def write_report(paths: Sequence[Path], output: Path, *, mixed_devices: bool = False) -> list[LeftOut]:
    """Write ``index.html`` into the folder ``output``, and return the files that it does not show.

    Raises:
        CheckpointError: see :func:`read`.
        OutputError: ``output`` holds a page that is not an earlier report, or cannot be written.
    """
    devices, left_out = read(paths, mixed_devices=mixed_devices)
    loader = PackageLoader("vllm_slimspec.measure", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("report.html.jinja").render(generator=GENERATOR, devices=devices, left_out=left_out)
    with claim_folder(output, earlier="index.html") as claim:
        earlier = output / "index.html"
        if earlier.exists() and f'content="{GENERATOR}"' not in earlier.read_text(encoding="utf-8", errors="replace"):
            raise OutputError(f"{earlier}: was not written by this `slimspec report`; choose another output")
        claim.write(lambda new: (new / "index.html").write_text(page, "utf-8", "replace"), last="index.html")
    return left_out


def read(paths: Sequence[Path], *, mixed_devices: bool = False) -> tuple[dict[str, list[Source]], list[LeftOut]]:
    """Read result files; return those of each device, the device with the most files first, and the files left out.

    Raises:
        CheckpointError: a file is not a result file, two were measured on different devices and ``mixed_devices`` is
            False, or no file can be shown.
    """
    devices: dict[str, list[Source]] = {}
    left_out: list[LeftOut] = []
    for path in paths:
        kind = _kind(path)
        if kind not in KINDS:
            left_out.append((path, kind))
            continue
        model, render = KINDS[kind]
        results = _checked(path, model)
        try:
            with rc_context(_STYLE):
                source = Source(path, results, list(render(results)))
        except (ArithmeticError, ValueError) as error:
            raise CheckpointError(f"{path}: holds numbers that cannot be shown ({error}); measure again") from None
        devices.setdefault(results.device, []).append(source)
        if len(devices) > 1 and not mixed_devices:
            one, other = (sources[0] for sources in devices.values())
            raise CheckpointError(
                f"{one.path} was measured on {one.results.device!r} and {other.path} on {other.results.device!r}, "
                "which cannot be compared; give files of one device, or --allow-mixed-devices to report each by itself"
            )
    if not devices:
        names = ", ".join(f"{path} ({kind})" for path, kind in left_out) or "no files"
        raise CheckpointError(f"nothing to report in {names}; give files of the kinds {', '.join(KINDS)}")
    for sources in devices.values():
        sources.sort(key=lambda source: list(KINDS).index(source.results.kind))
    return dict(sorted(devices.items(), key=lambda item: -len(item[1]))), left_out


def _kind(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["kind"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        words = "no such file" if isinstance(error, FileNotFoundError) else "not what a `slimspec bench` command writes"
        raise CheckpointError(f"{path}: {words}; give files that were written with --json") from None


def _checked(path: Path, model: type[kinds.Results]) -> Any:
    """Read a result file, and return it if its numbers can have been measured."""
    results: Any = model.read(path)
    if not results.rows:
        raise CheckpointError(f"{path}: holds no rows; measure again")
    for number, row in enumerate(results.rows):
        for name, value in row:
            # These fields are divided by, or shown on logarithmic axes, so that they must not be 0.
            least = 1e-6 if name in ("p50_us", "head_bytes", "concurrency") else 0
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, int | float) and not least <= one < 1e15:
                    raise CheckpointError(
                        f"{path}: rows.{number}.{name} is {one}, which no measurement gives; measure again"
                    )
    return results


def head_sections(results: kinds.HeadResults) -> Iterator[Section]:
    """Yield a section for each shape: the time of every head, and how many times faster than the full head it is."""
    for (shape,), rows in kinds.grouped(results.rows, "shape").items():
        faster, batches = _faster(rows), sorted({row.batch for row in rows})
        columns = ["head", "MB read", *(c for batch in batches for c in (f"ms at batch {batch}", "times faster"))]
        table = []
        for head in dict.fromkeys(row.head for row in rows):
            mine = {row.batch: row for row in rows if row.head == head}
            cells = [head, f"{next(iter(mine.values())).bytes / 1e6:.1f}"]
            for batch in batches:
                cells.append(f"{mine[batch].p50_us / 1e3:.2f}" if batch in mine else "")
                cells.append(f"{faster[head, batch]:.2f}x" if (head, batch) in faster else "")
            table.append(cells)
        points = {(head, f"batch {batch}"): (x, x, x) for (head, batch), x in faster.items()}
        yield Section(
            f"Head time, {shape}",
            [
                'These are the times of the draft head alone. "Times faster" compares with the full-vocabulary head in '
                "bfloat16"
                + (", repacked as vLLM's CPU backend does it" if _reference(rows) == "full-packed" else "")
                + f". Times are medians of {results.repeats} calls with cold caches, for which the heads take turns. A "
                f"copy moves {results.copy_gb_s:.0f} GB/s on this machine."
            ],
            columns,
            table,
            _address(_dots(points, "times faster than the full head (log scale)", log=True)) if points else None,
            "A dot for each head and batch shows how many times faster than the full head it is, as in the table.",
        )


def _faster(rows: Sequence[kinds.HeadRow]) -> dict[tuple[str, int], float]:
    """Return how many times faster than the full head each head of one shape is at each batch."""
    full = {row.batch: row.p50_us for row in rows if row.head == _reference(rows)}
    return {(row.head, row.batch): full[row.batch] / row.p50_us for row in rows if row.batch in full}


def _reference(rows: Sequence[kinds.HeadRow]) -> str:
    """Return the full head to compare with: the repacked one where it was measured, since it is the faster one."""
    return "full-packed" if any(row.head == "full-packed" for row in rows) else "full"


def acceptance_sections(results: kinds.AcceptanceResults) -> Iterator[Section]:
    """Yield a section for each K and temperature: what the target accepts from every drafter, by prompt set."""
    for (k, temperature), rows in kinds.grouped(results.rows, "num_speculative_tokens", "temperature").items():
        full = {row.prompt_set: row for row in rows if row.head == "full"}
        table = []
        for row in rows:
            ratio = "" if row.head == "full" else _ratio(row, full.get(row.prompt_set))
            size = f"{row.head_bytes / 1e6:.3g}"
            table.append([row.head, row.prompt_set, row.length_in_words, ratio, row.rates, size, row.identical])
        words = [
            f"The acceptance length is the mean number of tokens that a cycle yields in the real engine. The target is "
            f"{results.target} (D={results.hidden_size}, V={results.vocab_size}) in {results.dtype}, and an answer has "
            f"at most {results.max_tokens} tokens. Intervals are 95% and come from resampling the prompts; the ratio "
            "to the full head uses the same prompts for both heads."
        ]
        if all(row.equal == len(row.cycles) for row in rows):
            words.append("Every greedy answer is the target's own, token for token, with every head.")
        columns = ["head", "prompts", "length (95%)", "of full (95%)", f"accepted at 1..{k}", "head MB", "target's own"]
        points = {(row.head, row.prompt_set): (row.length, row.low, row.high) for row in rows}
        yield Section(
            f"Acceptance, K={k}, temperature {temperature:g}",
            words,
            *_filled(columns, table),
            _address(_dots(points, "acceptance length, tokens a cycle; bars: 95%")),
            "A dot with an interval for each head and prompt set shows the acceptance lengths of the table below.",
            names=2,
        )


def _ratio(mine: kinds.AcceptanceRow, full: kinds.AcceptanceRow | None) -> str:
    """Return the ratio of the acceptance length to the full head's in words, none without it on the same prompts."""
    if full is None or len({*map(len, (mine.cycles, mine.accepted, full.cycles, full.accepted))}) > 1:
        return ""
    counts, of = (np.stack([row.cycles, row.accepted], axis=1) for row in (mine, full))
    ratio = acceptance_length(counts, of)
    return f"{ratio.value:.3f} ({ratio.low:.2f}-{ratio.high:.2f})"


def states_sections(results: kinds.StatesResults) -> Iterator[Section]:
    """Yield a section for each K: what is accepted from every head on head states, and the bytes that it reads."""
    last = results.rows[-1].prompt_set  # the last rows are those of all prompt sets together, if there are several
    for (k,), all_rows in kinds.grouped(results.rows, "num_speculative_tokens").items():
        rows = [row for row in all_rows if row.prompt_set == last]
        table = [[row.head, f"{row.head_bytes / 1e6:.3g}", row.length_in_words, *row.cells] for row in rows]
        words = (
            f"For each head, this is how many of its draft tokens {results.target} (D={results.hidden_size}, "
            f"V={results.vocab_size}) accepts, and how many bytes a draft step reads for them. It was computed from "
            f"recorded head states (prompts: {last}) of answers with at most {results.max_tokens} tokens. Accepted "
            "drafts of a cycle do not count the target's own token. alpha is the overlap of both distributions at "
            "temperature 1. Intervals are 95% and come from resampling the prompts, the same ones for both heads."
        )
        yield Section(
            f"Acceptance against bytes, K={k}",
            [words],
            ["head", "MB", "length (95%)", "accepted of full (95%)", "alpha"],
            table,
            _address(_against_bytes(rows)) if rows else None,
            "A labeled point for each head shows accepted drafts per cycle against megabytes read, as in the table.",
        )


def serve_sections(results: kinds.ServeResults) -> Iterator[Section]:
    """Yield a section for each data type: throughput, times and acceptance of every drafter under every load."""
    for (dtype,), rows in kinds.grouped(results.rows, "dtype").items():
        table = [[row.head, str(row.concurrency), *row.cells] for row in rows]
        words = [
            f"vllm bench serve loaded a server of {results.target} (D={results.hidden_size}, V={results.vocab_size}) "
            f"for each head, with the prompts {results.prompt_set}, K={results.num_speculative_tokens}, and "
            f"{results.max_tokens} tokens in each answer. Times are medians: TTFT is the time to the first token. The "
            "tokens of a cycle arrive together, so that ITL is the time of a cycle and TPOT that of a token."
        ]
        columns = ["head", "at once", "tokens/s", "TTFT ms", "ITL ms", "TPOT ms", "acceptance length", "failed"]
        if results.acceptance:
            words.append(f"vLLM imitated the acceptance that was measured with {results.acceptance}.")
        yield Section(
            "Served throughput" + (f", {dtype}" if dtype else ""),
            words,
            *_filled(columns, table),
            _address(_throughput(rows)),
            "A line for each head shows tokens per second of the server against requests at once, as in the table.",
        )


KINDS: dict[str, tuple[type[kinds.Results], Callable[[Any], Iterator[Section]]]] = {
    "head": (kinds.HeadResults, head_sections),
    "acceptance": (kinds.AcceptanceResults, acceptance_sections),
    "states": (kinds.StatesResults, states_sections),
    "serve": (kinds.ServeResults, serve_sections),
}


def _filled(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return the columns and rows of a table without the columns that are empty in every row."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _label(text: str) -> str:
    """Return text for a chart, at most 32 characters. Control characters, which an SVG must not have, are replaced."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= 32 else f"{text[:31]}\N{HORIZONTAL ELLIPSIS}"


def _address(figure: Figure) -> str:
    """Return the figure as an SVG image in a data: address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def _dots(points: Mapping[tuple[str, str], tuple[float, float, float]], title: str, *, log: bool = False) -> Figure:
    """Return a chart with a line for each head and a mark for each series.

    The points are (head, series) -> value, and both ends of its interval. The title is the label of the axis.
    """
    values = {head: max(value for (own, _), (value, _, _) in points.items() if own == head) for head, _ in points}
    heads = sorted(values, key=lambda head: -values[head])
    series = list(dict.fromkeys(name for _, name in points))
    figure = Figure(figsize=(_WIDTH, 1.0 + 0.27 * len(heads)), layout="constrained")
    axes = figure.subplots()
    for place, name in enumerate(series):
        shift = 0.6 * ((place + 0.5) / len(series) - 0.5)  # keeps equal values of two series apart
        found = [(heads.index(head) + shift, *point) for (head, own), point in points.items() if own == name]
        y, x, low, high = zip(*found, strict=True)
        color = _COLORS[place % len(_COLORS)]
        axes.hlines(y, low, high, color=color, alpha=0.5, linewidth=2)
        axes.scatter(x, y, s=30, marker=_MARKERS[place % len(_MARKERS)], color=color, zorder=3, label=_label(name))
    axes.set_yticks(range(len(heads)), [_label(head) for head in heads])
    axes.set_ylim(len(heads) - 0.4, -0.6)
    if log:
        axes.axvline(1, color=_COLORS[-1], linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel(title)
    _legend(figure, series)
    return figure


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """Write a legend above the axes, with as many columns as the names leave room for."""
    columns = max(1, 80 // (6 + max(len(_label(name)) for name in names)))
    figure.legend(loc="outside upper left", ncols=columns, handletextpad=0.3, columnspacing=1.2)


def _against_bytes(rows: Sequence[kinds.StatesRow]) -> Figure:
    """Return a chart of accepted drafts per cycle against the bytes that a head reads."""
    figure = Figure(figsize=(_WIDTH, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.2)
    whole = max(row.draft_vocab_size for row in rows)
    for row in rows:
        x, color = row.head_bytes / 1e6, _color(row, whole)
        axes.plot([x, x], [row.low - 1, row.high - 1], color=color, linewidth=2, alpha=0.35)
        axes.scatter(x, row.length - 1, s=30, color=color, zorder=3)
    axes.set(xlabel="MB that a draft step reads of the head (log scale)", ylabel="accepted drafts a cycle")
    _names(figure, axes, sorted((row.head_bytes / 1e6, row.length - 1, row.head, _color(row, whole)) for row in rows))
    return figure


def _color(head: kinds.DescribedHead, whole: int) -> str:
    """Return one color for low-rank heads, one for dense heads of fewer tokens than the ``whole``, and a third one."""
    return _COLORS[0 if head.rank is not None else 1 if head.draft_vocab_size < whole else -1]


def _names(figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names beside points, moved up or down where they would cover one another."""
    figure.draw_without_rendering()
    places = axes.transData.transform([(x, y) for x, y, *_ in points]) * 72 / figure.dpi
    taken = [(x - 4, x + 4, y) for x, y in places]  # left, right and middle of points and names, in points of type
    for (x, y, name, color), (place, middle) in zip(points, places, strict=True):
        left, right = place + 5, place + 12 + 4.9 * len(_label(name))
        for step in (0, 11, -11, 22, -22, 33, -33, 44, -44):
            if not any(left < r and a < right and abs(m - middle - step) < 10.5 for a, r, m in taken):
                break
        taken.append((left, right, middle + step))
        style: Any = {"textcoords": "offset points", "va": "center", "fontsize": "small", "color": color}
        axes.annotate(_label(name), (x, y), xytext=(7, step), annotation_clip=False, **style)


def _throughput(rows: Sequence[kinds.ServeRow]) -> Figure:
    """Return a chart of tokens per second against requests at once, with a line for each head."""
    figure = Figure(figsize=(_WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    heads = kinds.grouped(rows, "head")
    for place, ((head,), own) in enumerate(heads.items()):
        points = sorted((row.concurrency, row.tokens_per_s) for row in own)
        style: Any = {"color": _COLORS[place % len(_COLORS)], "marker": _MARKERS[place % len(_MARKERS)]}
        axes.plot(*zip(*points, strict=True), **style, markersize=5, linewidth=1.5, label=_label(head))
    loads = sorted({row.concurrency for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, map(str, loads))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set(xlabel="requests at once (log scale)", ylabel="tokens per second of the server")
    _legend(figure, [head for (head,) in heads])
    return figure


# The heads in the picture, with their labels. Of two dense heads it shows the faster one.
_SHOWN = {
    "full": "dense",
    "full-packed": "dense",
    "full-int8": "dense, int8",
    "trim-32k": "dense, 32k of the vocabulary",
    "low-rank": "low-rank",
    "low-rank-int8": "low-rank, int8",
    "low-rank-int8-rerank": "low-rank, int8, re-ranked",
}


def plot_heads(path: Path, output: Path, batch: int = 1) -> None:
    """Draw how many times faster than the dense head each head drafts, as a PNG or SVG by the suffix of ``output``.

    Raises:
        CheckpointError: the file holds results of another kind, or no dense head at ``batch``.
    """
    results: kinds.HeadResults = _checked(path, kinds.HeadResults)
    points: dict[tuple[str, str], tuple[float, float, float]] = {}
    for (shape,), rows in kinds.grouped(results.rows, "shape").items():
        faster = _faster([row for row in rows if row.batch == batch])
        if not faster:
            raise CheckpointError(f"no head 'full' for {shape} at batch {batch}; measure it with `slimspec bench head`")
        shown = [(head, x) for (head, _), x in faster.items() if head in _SHOWN and (head != "full" or x == 1)]
        points |= {(_SHOWN[head], shape): (x, x, x) for head, x in shown}
    with rc_context(_STYLE):
        figure = _dots(points, "times faster than the dense head (log scale)", log=True)
        note = f"{_label(results.device)}; batch {batch}, medians of {results.repeats} calls, cold caches"
        figure.supxlabel(note, fontsize="small")
        with claim_file(output) as claim:
            claim.write(lambda new: figure.savefig(new, dpi=160))

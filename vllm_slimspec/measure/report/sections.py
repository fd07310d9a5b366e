"""What a report says: a section for each picture, with its words and its numbers, from whatever was measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from vllm_slimspec.common.bootstrap import interval
from vllm_slimspec.common.speedup import least_ratio, speedup
from vllm_slimspec.common.theme import Theme
from vllm_slimspec.measure.report import figures
from vllm_slimspec.measure.report.figures import KAPPA, NU, NULL, RHO, TOLERANCE, Point
from vllm_slimspec.measure.report.material import Material
from vllm_slimspec.measure.results import AcceptanceRow, CycleRow, ServeResults, StatesRow
from vllm_slimspec.measure.shapes import SHAPES


@dataclass(frozen=True)
class Table:
    """Numbers as text; the first column names the row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A picture, what it says, and its numbers."""

    title: str
    name: str  # of its files and ids
    words: Sequence[str]  # paragraphs
    alternative: str  # the picture in words
    draw: Callable[[Theme], Any]
    table: Table


@dataclass(frozen=True)
class Tile:
    """A figure that the page shows first."""

    value: str
    label: str


@dataclass(frozen=True)
class Verdict:
    """Every head at one shape, K, batch and context, the fastest first."""

    title: str
    words: str
    table: Table


@dataclass
class Chapter:
    """Everything that was measured on one device."""

    device: str
    tiles: list[Tile] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what other figures would need


def chapter(material: Material, name: str) -> Chapter:
    """The sections that the material is enough for; ``name`` starts the names of their files."""
    made = Chapter(material.device)
    found = list(_cycles(material, name)) + list(_acceptance(material, name)) + list(_heads(material, name))
    found += list(_serving(material, name)) + list(_frontier(material, name))
    made.sections = found
    made.tiles = _tiles(material)
    made.verdicts = list(_verdicts(material))
    for kind, command, what in (
        (
            "cycle",
            "slimspec bench cycle",
            f"the cycle taken apart, the plane of {NU} and {RHO}, and eq. 4 against measurement",
        ),
        ("head", "slimspec bench head", "head times"),
        ("acceptance", "slimspec bench acceptance", "acceptance lengths"),
        ("serve", "slimspec bench serve", "latency and throughput of a server"),
    ):
        if not getattr(material, kind):
            made.missing.append(f"{what}: {command}")
    return made


_REFERENCES = {
    "full": "in bfloat16",
    "full-packed": "in bfloat16 and repacked, near what vLLM's CPU backend runs",
}


def _verdicts(material: Material) -> Iterable[Verdict]:
    for source in material.cycle:
        keys = dict.fromkeys(map(_measured_at, source.results.rows))
        several = len({dtype for *_, dtype in keys}) > 1
        for key in keys:
            rows = [row for row in source.results.rows if _measured_at(row) == key and row.ratio and row.head != NULL]
            shape, k, batch, context, dtype = key
            ratios, models = acceptance_ratios(material, shape, k)
            table = []
            for row in sorted(rows, key=lambda row: (row.ratio or 1) / ratios.get(row.head, (1.0,))[0]):
                rho = ratios.get(row.head)
                table.append(
                    [
                        row.head,
                        *([f"{rho[0] * figures.measured(row):.2f}x", f"{rho[0]:.3f}"] if rho else ["", ""]),
                        f"{figures.measured(row):.2f}x",
                        f"{figures.predicted(row):.2f}x" if row.predicted_ratio else "",
                        _maybe(row.nu, ".1f", "x"),
                        f"{row.cycle_ms_p50:.1f}",
                    ]
                )
            columns = ["head", "tokens/s", RHO, "cycle speedup", "by eq. 4", NU, "cycle ms"]
            words = f"All against the full head; tokens/s = {RHO} x cycle speedup, with the acceptance of {models}."
            if not ratios:
                columns, table = columns[:1] + columns[3:], [cells[:1] + cells[3:] for cells in table]
                words = (
                    "All against the full head, at equal acceptance: none was measured for models of this shape, so a "
                    "head that accepts less gives less than this."
                )
            where = f"{shape}, K={k}, batch {batch}, context {context}" + (f", {dtype}" if several else "")
            yield Verdict(f"Side by side, {where}", words, Table(columns, table))


def _heads(material: Material, name: str) -> Iterable[Section]:
    for source in material.head:
        results = source.results
        for shape in dict.fromkeys(row.shape for row in results.rows):
            rows = [row for row in results.rows if row.shape == shape]
            reference = figures.reference(rows)
            full = {row.batch: row.p50_us for row in rows if row.head == reference}
            batches = sorted(full)
            if not batches:
                continue
            first = sorted((r for r in rows if r.batch == batches[0]), key=lambda r: r.p50_us)
            share = [f"{row.head} {row.p50_us / full[batches[0]]:.0%}" for row in first]
            table = []
            for head in dict.fromkeys(row.head for row in rows):
                mine = {row.batch: row for row in rows if row.head == head}
                cells = [head, f"{next(iter(mine.values())).bytes / 1e6:.1f}"]
                for batch in batches:
                    row = mine.get(batch)
                    cells += [f"{row.p50_us / 1e3:.2f}", f"{full[batch] / row.p50_us:.2f}x"] if row else ["", ""]
                table.append(cells)
            columns = ["head", "MB read"]
            for batch in batches:
                columns += [f"ms at {batch}", f"{NU} at {batch}"]
            yield Section(
                f"Head time, {shape}",
                f"{name}head-{shape}",
                [
                    f"The draft head alone, beside the full-vocabulary head, {_REFERENCES[reference]} "
                    f"(the paper's Fig. 1). Medians of {results.repeats} calls, taken in turns, with cold caches; a "
                    f"copy moves {results.copy_gb_s:.0f} GB/s here."
                ],
                f"Dot plot of head time as a share of the full head's. At batch {batches[0]}: {', '.join(share)}.",
                partial(figures.head_time, rows),
                Table(columns, table),
            )


def _measured_at(row: CycleRow) -> tuple[str, int, int, int, str]:
    return row.shape, row.num_speculative_tokens, row.batch, row.context, row.dtype


def _cycles(material: Material, name: str) -> Iterable[Section]:
    for source in material.cycle:
        keys = dict.fromkeys((r.shape, r.num_speculative_tokens, r.context, r.dtype) for r in source.results.rows)
        several = len({dtype for *_, dtype in keys}) > 1
        for shape, k, context, dtype in keys:
            rows = [
                row
                for row in source.results.rows
                if (row.shape, row.num_speculative_tokens, row.context, row.dtype) == (shape, k, context, dtype)
            ]
            where = f"{shape}, K={k}, context {context}" + (f", {dtype}" if several else "")
            tag = f"{name}{shape}-k{k}-c{context}" + (f"-{dtype}" if several else "")
            yield _decomposition(rows, source.results.acceptance, where, tag)
            for batch in dict.fromkeys(row.batch for row in rows):
                chosen = [row for row in rows if row.batch == batch]
                if section := _plane(chosen, material, shape, k, f"{where}, batch {batch}", f"{tag}-b{batch}"):
                    yield section
            if figures.compared(rows):
                yield _prediction(rows, where, tag)


def _decomposition(rows: Sequence[CycleRow], acceptance: str | None, where: str, tag: str) -> Section:
    table = [
        [
            row.head,
            str(row.batch),
            f"{row.cycle_ms_p50:.1f}",
            f"{row.cycle_ms_p20:.1f}-{row.cycle_ms_p80:.1f}",
            f"{row.head_ms:.1f}",
            f"{row.ratio:.2f}x ({row.ratio_low:.2f}-{row.ratio_high:.2f})",
            *(_maybe(ms, ".1f") for ms in (row.verify_ms, row.body_ms, row.wrapped_head_ms)),
            *([f"{1 + row.accepted:.2f}", _maybe(row.tokens_per_s, ".0f")] if acceptance else []),
        ]
        for row in rows
    ]
    words = [
        "One draft-and-verify cycle in the real engine (the paper's Fig. 2): the draft heads of its K steps, and all "
        "else, which is what the cycle takes with a head that only returns a constant."
    ]
    first = min(row.batch for row in rows)
    parts = [row for row in rows if row.batch == first and row.head == "full" and row.verify_ms and row.body_ms]
    if parts:
        row = parts[0]
        words.append(
            f"With the full head at batch {first}, clocks around the parts saw the target's verification take "
            f"{row.verify_ms:.1f} ms of a cycle and the drafter without its head {row.body_ms:.1f} ms."
        )
    if acceptance:
        words.append(
            f"Tokens per second: vLLM accepted drafts as often as was measured with {acceptance}; at that acceptance "
            "length and the median cycle. Tokens a cycle were counted."
        )
    listed = ", ".join(f"{row.head} {row.cycle_ms_p50:.0f} ms" for row in rows if row.batch == first)
    return Section(
        f"A cycle taken apart, {where}",
        f"{tag}-cycle",
        words,
        f"Stacked bars of a cycle's time by head and batch. At batch {first}: {listed}.",
        partial(figures.decomposition, rows),
        Table(
            [
                "head",
                "batch",
                "cycle ms",
                "p20-p80",
                "heads ms",
                "of full (95%)",
                "verify ms",
                "body ms",
                "heads ms, clocked",
                *(["tokens a cycle", "tokens/s"] if acceptance else []),
            ],
            table,
        ),
    )


def _plane(rows: Sequence[CycleRow], material: Material, shape: str, k: int, where: str, tag: str) -> Section | None:
    kappa = next((row.kappa for row in rows if row.kappa), None)
    if kappa is None:
        return None
    ratios, models = acceptance_ratios(material, shape, k)
    points = []
    for row in rows:
        if row.nu and row.head not in (NULL, "full"):
            rho, low, high = ratios.get(row.head, (1.0, None, None))
            points.append(Point(row.head, row.nu, rho, low, high))
    if not points:
        return None
    table = [
        [
            point.head,
            f"{point.nu:.2f}x",
            "" if point.low is None else f"{point.rho:.3f} ({point.low:.3f}-{point.high:.3f})",
            f"{least_ratio(kappa, point.nu):.3f}",
            f"{speedup(1.0 if point.low is None else point.rho, kappa, point.nu):.2f}x",
        ]
        for point in sorted(points, key=lambda point: -point.nu)
    ]
    measured = [point.head for point in points if point.low is not None]
    words = [
        f"{KAPPA}, the full head's share of a cycle, is {kappa:.2f} here, so that no head can give more than "
        f"{1 / (1 - kappa):.2f}x at equal acceptance. Dashed: the same speedup, "
        f"{RHO} / (1 - {KAPPA} + {KAPPA} / {NU}) (the paper's eq. 4 and Fig. 3). "
        "In the shaded part a head is slower than the full one."
    ]
    if not measured:
        words.append(
            f"No acceptance was measured for models of this shape: every head is drawn, hollow, at {RHO} = 1. The "
            "distance down to the shaded part is what it may lose in acceptance before it stops paying."
        )
    elif len(measured) < len(points):
        words.append(f"Acceptance is that of {models}; hollow: not measured, drawn at {RHO} = 1.")
    else:
        words.append(f"Acceptance is that of {models}; bars: 95%.")
    listed = ", ".join(f"{p.head} at {NU} {p.nu:.1f} and {RHO} {p.rho:.2f}" for p in points)
    return Section(
        f"Faster head against acceptance, {where}",
        f"{tag}-plane",
        words,
        f"Plane of head acceleration and acceptance ratio with level curves of the speedup: {listed}.",
        partial(figures.plane, points, kappa),
        Table(["head", NU, RHO, f"pays while {RHO} is above", "speedup by eq. 4"], table),
    )


def _prediction(rows: Sequence[CycleRow], where: str, tag: str) -> Section:
    shown = figures.compared(rows)
    off = [row for row in shown if figures.off_the_line(row)]
    words = [
        f"Speedup over the full head at equal acceptance: measured in the engine, and predicted from {KAPPA} and "
        f"from the heads timed alone. The band is {TOLERANCE:.0%} wide to either side."
    ]
    if off:
        listed = "; ".join(
            f"{row.head} at batch {row.batch}: {figures.measured(row):.2f}x, predicted {figures.predicted(row):.2f}x"
            for row in off
        )
        slower = all((row.ratio or 0) > (row.predicted_ratio or 0) for row in off)
        why = (
            "overhead outside the head, which the head alone does not show"
            if slower
            else (
                "below it, overhead outside the head, which the head alone does not show; above it, a head that is "
                "faster between the other parts of a cycle than alone with cold caches"
            )
        )
        words.append(f"Off the line: {listed}. {why[0].upper()}{why[1:]}.")
    else:
        words.append("Every head is within the band: there is no overhead to speak of outside the head.")
    table = [
        [
            row.head,
            str(row.batch),
            _maybe(row.nu, ".2f", "x"),
            f"{figures.predicted(row):.2f}x",
            f"{figures.measured(row):.2f}x",
            f"{figures.measured(row) / figures.predicted(row) - 1:+.1%}",
        ]
        for row in shown
    ]
    return Section(
        f"Measured against predicted, {where}",
        f"{tag}-prediction",
        words,
        "Scatter of measured over predicted speedup with the diagonal. "
        + ", ".join(f"{r[0]} at batch {r[1]} {r[4]} measured, {r[3]} predicted" for r in table)
        + ".",
        partial(figures.prediction, rows),
        Table(["head", "batch", NU, "predicted", "measured", "measured / predicted - 1"], table),
    )


def _acceptance(material: Material, name: str) -> Iterable[Section]:
    for number, source in enumerate(material.acceptance):
        results = source.results
        for prompt_set, temperature in dict.fromkeys((r.prompt_set, r.temperature) for r in results.rows):
            rows = [r for r in results.rows if (r.prompt_set, r.temperature) == (prompt_set, temperature)]
            full = next((row for row in rows if row.head == "full"), None)
            table = []
            for row in rows:
                rho = ""
                if full and row is not full:
                    value, low, high = _ratio([row], [full])
                    rho = f"{value:.3f} ({low:.3f}-{high:.3f})"
                same = "" if row.equal is None else f"{row.equal} of {len(row.cycles)}"
                table.append(
                    [
                        row.head,
                        f"{row.length:.3f} ({row.low:.2f}-{row.high:.2f})",
                        rho,
                        " ".join(f"{rate:.2f}" for rate in row.per_position),
                        f"{row.head_bytes / 1e6:.3g}",
                        same + (f" ({row.near_ties} near ties)" if row.near_ties else ""),
                    ]
                )
            k = rows[0].num_speculative_tokens
            words = [
                f"Tokens that a cycle yields, over {len(rows[0].cycles)} prompts ({prompt_set}) at temperature "
                f"{temperature:g}, K={k}, in the real engine with {results.target} (D={results.hidden_size}, "
                f"V={results.vocab_size}) in {results.dtype}. Intervals: 95%, by drawing prompts anew, for {RHO} "
                "the same ones for both heads."
            ]
            if all(row.equal == len(row.cycles) for row in rows):
                words.append("Every greedy answer is the target's own, token for token, with every head.")
            listed = ", ".join(f"{row.head} {row.length:.2f}" for row in rows)
            yield Section(
                f"Acceptance, {prompt_set}, temperature {temperature:g}",
                f"{name}acceptance-{number}-{prompt_set}-t{temperature:g}",
                words,
                f"Dot plot of acceptance lengths with intervals: {listed}.",
                partial(figures.acceptance, rows),
                Table(
                    ["head", "length (95%)", f"{RHO} (95%)", f"accepted at 1..{k}", "head MB", "target's own"], table
                ),
            )


def _serving(material: Material, name: str) -> Iterable[Section]:
    for number, source in enumerate(material.serve):
        for dtype in dict.fromkeys(row.dtype for row in source.results.rows):
            yield _served(source.results, dtype, f"{name}serve-{number}" + (f"-{dtype}" if dtype else ""))


def _served(results: ServeResults, dtype: str | None, tag: str) -> Section:
    rows = [row for row in results.rows if row.dtype == dtype]
    best = {
        c: max((r for r in rows if r.concurrency == c), key=lambda r: r.tokens_per_s)
        for c in sorted({row.concurrency for row in rows})
    }
    table = [
        [
            row.head,
            str(row.concurrency),
            f"{row.tokens_per_s:.1f}",
            f"{row.ttft_ms_p50:.0f}",
            f"{row.itl_ms_p50:.1f}",
            f"{row.tpot_ms_p50:.1f}",
            _maybe(row.length, ".2f"),
        ]
        for row in rows
    ]
    return Section(
        "Served" + (f", {dtype}" if dtype else ""),
        tag,
        [
            f"vllm bench serve against a server for each head, K={results.num_speculative_tokens}, "
            f"{results.max_tokens} tokens an answer; from left to right ever more requests at once. A cycle's "
            "tokens arrive together: ITL is the time of a cycle, TPOT that of a token.",
            *([f"vLLM accepted as often as was measured with {results.acceptance}."] if results.acceptance else []),
        ],
        "Lines of server throughput against the speed of one request. "
        + ", ".join(f"at {c} at once {r.head} is first with {r.tokens_per_s:.0f} tokens/s" for c, r in best.items())
        + ".",
        partial(figures.serving, rows),
        Table(["head", "at once", "tokens/s", "TTFT ms", "ITL ms", "TPOT ms", "acceptance length"], table),
    )


def _frontier(material: Material, name: str) -> Iterable[Section]:
    for number, source in enumerate(material.states):
        results = source.results
        last = results.rows[-1].prompt_set  # all sets together, where there are several
        for k in dict.fromkeys(row.num_speculative_tokens for row in results.rows):
            rows = [r for r in results.rows if (r.prompt_set, r.num_speculative_tokens) == (last, k)]
            table = [
                [
                    row.head,
                    f"{row.head_bytes / 1e6:.3g}",
                    f"{row.length:.3f} ({row.low:.2f}-{row.high:.2f})",
                    _share(row),
                    f"{sum(row.alpha) / len(row.alpha):.3f}",
                ]
                for row in rows
            ]
            yield Section(
                f"Acceptance against bytes, K={k}",
                f"{name}frontier-{number}-k{k}",
                [
                    f"What each head accepts of the drafts of {results.target} (D={results.hidden_size}, "
                    f"V={results.vocab_size}), and the bytes that a draft step reads for it; {len(rows[0].cycles)} "
                    f"prompts ({last}), {results.max_tokens} tokens an answer, from head states. Accepted drafts are "
                    "those of a cycle without the target's own token. Bars: 95%, the same prompts drawn for both heads."
                ],
                "Acceptance against bytes read: "
                + ", ".join(f"{row.head} {row.head_bytes / 1e6:.3g} MB {row.length:.2f}" for row in rows)
                + ".",
                partial(figures.frontier, rows),
                Table(["head", "MB", "length (95%)", "accepted of full (95%)", "alpha"], table),
            )


def _share(row: StatesRow) -> str:
    if row.accepted_of_full is None:
        return ""
    return f"{row.accepted_of_full:.1%} ({row.accepted_of_full_low:.1%}-{row.accepted_of_full_high:.1%})"


def _tiles(material: Material) -> list[Tile]:
    tiles = []
    cycles = [
        row for source in material.cycle for row in source.results.rows if row.ratio and row.head not in (NULL, "full")
    ]
    if cycles:
        first = min(row.batch for row in cycles)
        best = min((row for row in cycles if row.batch == first), key=lambda row: row.ratio or 1)
        where = f"{best.shape}, K={best.num_speculative_tokens}, batch {best.batch}"
        tiles.append(
            Tile(
                f"{figures.measured(best):.2f}x",
                f"as fast a cycle as the full head's, 95%: {1 / best.ratio_high:.2f} to {1 / best.ratio_low:.2f}: "
                f"{best.head} ({where})",
            )
        )
        judged = [row for row in cycles if row.predicted_ratio]
        inside = sum(not figures.off_the_line(row) for row in judged)
        if judged:
            tiles.append(Tile(f"{inside} of {len(judged)}", f"measured cycles within {TOLERANCE:.0%} of eq. 4"))
    heads = [row for source in material.head for row in source.results.rows]
    if heads:
        batch = min(row.batch for row in heads)
        reference = figures.reference(heads)
        full = {row.shape: row.p50_us for row in heads if row.head == reference and row.batch == batch}
        low = [row for row in heads if row.head == "low-rank" and row.batch == batch and row.shape in full]
        if low:
            shown = low[-1]
            tiles.append(
                Tile(
                    f"{full[shown.shape] / shown.p50_us:.1f}x",
                    f"as fast as the full head: low-rank, the head alone ({shown.shape}, batch {batch})",
                )
            )
    greedy = [row for source in material.acceptance for row in source.results.rows if row.equal is not None]
    if greedy:
        equal, asked = sum(row.equal or 0 for row in greedy), sum(len(row.cycles) for row in greedy)
        tiles.append(Tile(f"{equal} of {asked}", "greedy answers are the target's own"))
    return tiles


def acceptance_ratios(material: Material, shape: str, k: int) -> tuple[dict[str, tuple[float, float, float]], str]:
    """rho of each head with its 95% interval, where greedy acceptance was measured for models of this shape, and which.

    Models of another hidden size or vocabulary are no witnesses: their heads lose other tokens.
    """
    wanted = SHAPES.get(shape)
    rows: dict[str, list[AcceptanceRow]] = {}
    targets: dict[str, None] = {}
    for source in material.acceptance:
        results = source.results
        if wanted is None or (results.hidden_size, results.vocab_size) != (wanted.hidden_size, wanted.vocab_size):
            continue
        for row in results.rows:
            if row.temperature == 0 and row.num_speculative_tokens == k:
                rows.setdefault(row.head, []).append(row)
                targets[results.target] = None
    full = rows.pop("full", [])
    sets = [row.prompt_set for row in full]
    ratios = {
        head: _ratio(mine, full) for head, mine in rows.items() if full and [row.prompt_set for row in mine] == sets
    }
    return ratios, ", ".join(targets)


def _ratio(mine: Sequence[AcceptanceRow], full: Sequence[AcceptanceRow]) -> tuple[float, float, float]:
    """tau / tau(full) over the same prompts, and its interval by drawing prompts for both together."""
    counts = np.array(
        [
            [n for row in rows for n in getattr(row, column)]
            for rows in (mine, full)
            for column in ("accepted", "cycles")
        ]
    )

    def ratio(drawn: np.ndarray) -> np.ndarray:
        accepted, cycles, full_accepted, full_cycles = counts[:, drawn].sum(-1)
        return (1 + accepted / cycles) / (1 + full_accepted / full_cycles)

    low, high = interval(counts.shape[1], ratio)
    return float(ratio(np.arange(counts.shape[1])[None])[0]), low, high


def _maybe(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"

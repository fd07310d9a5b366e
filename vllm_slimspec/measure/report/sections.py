"""What a report says: a section for each picture, with its words and its numbers, from whatever was measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from vllm_slimspec.common.bootstrap import interval
from vllm_slimspec.common.theme import Theme
from vllm_slimspec.measure.report import figures
from vllm_slimspec.measure.report.figures import NU, RHO
from vllm_slimspec.measure.report.material import Material
from vllm_slimspec.measure.results import AcceptanceRow, ServeResults, StatesRow


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


@dataclass
class Chapter:
    """Everything that was measured on one device."""

    device: str
    tiles: list[Tile] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what other figures would need


def chapter(material: Material, name: str) -> Chapter:
    """The sections that the material is enough for; ``name`` starts the names of their files."""
    made = Chapter(material.device)
    found = list(_acceptance(material, name)) + list(_heads(material, name))
    found += list(_serving(material, name)) + list(_frontier(material, name))
    made.sections = found
    made.tiles = _tiles(material)
    for kind, command, what in (
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

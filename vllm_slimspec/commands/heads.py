"""``slimspec bench head``: time draft heads side by side."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.measure.arms import HEADS
from vllm_slimspec.measure.head import measure
from vllm_slimspec.measure.options import choices, claim_results, device_of, positive_ints, turns
from vllm_slimspec.measure.results import HeadResults
from vllm_slimspec.measure.shapes import SHAPES

EXAMPLE = "Example: slimspec bench head --shapes llama-3.2-1b --batches 1,8,64 --json head.json"


def head(
    shapes: Annotated[
        str, typer.Option(help=f"Models whose head shapes are timed: all, or some of {', '.join(SHAPES)}.")
    ] = "llama-3.1-8b",
    heads: Annotated[str, typer.Option(help=f"Heads to time: all, or some of {', '.join(HEADS)}.")] = "all",
    batches: Annotated[
        str, typer.Option(help="Batch sizes: numbers of hidden states that one call drafts for, such as 1,8,64.")
    ] = "1,8,64",
    device: Annotated[
        str | None,
        typer.Option(help="Device to time on: cpu, cuda or cuda:N.", show_default="cuda where there is one, else cpu"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=3, help="Number of timed calls of each head.")] = 21,
    json: Annotated[Path | None, typer.Option(help="JSON file to write the results to.")] = None,
) -> None:
    """Check that each draft head drafts the right token, then time all of them in turns, with cold caches."""
    shape_names = choices(shapes, SHAPES, "--shapes")
    chosen = [HEADS[name] for name in choices(heads, HEADS, "--heads")]
    sizes = positive_ints(batches, "--batches", "batch sizes")
    with one_line_errors(), claim_results(json):
        where = device_of(device)
        count = len(shape_names) * len(sizes) * (repeats + 2)
        with turns(count, "Timing heads") as tick:
            results = measure(shape_names, chosen, sizes, device=where, repeats=repeats, tick=tick)
        if json:
            results.write(json)
    _print_heads(results)


def _print_heads(results: HeadResults) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{results.device}: copy {results.copy_gb_s} GB/s, read {results.read_gb_s} GB/s", highlight=False)
    for shape, batch in dict.fromkeys((row.shape, row.batch) for row in results.rows):
        rows = [row for row in results.rows if (row.shape, row.batch) == (shape, batch)]
        full = next((row.p50_us for row in rows if row.head == "full"), None)
        table = Table("head", title=f"{shape}, batch {batch}", title_justify="left")
        for column in ("p20 us", "p50 us", "p80 us", "MB", "% of copy", "x full"):
            table.add_column(column, justify="right")
        for row in rows:
            ratio = f"{full / row.p50_us:.2f}" if full else ""
            times = (f"{t:.0f}" if t >= 1000 else f"{t:.1f}" for t in (row.p20_us, row.p50_us, row.p80_us))
            table.add_row(row.head, *times, f"{row.bytes / 1e6:.1f}", f"{row.percent_of_copy_bandwidth:.0f}", ratio)
        console.print(table)

"""``slimspec bench head | roofline``: every draft head side by side, and how near each is to what memory allows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.common.device import device_name
from vllm_slimspec.common.output import claim_file
from vllm_slimspec.errors import OptionError
from vllm_slimspec.measure.arms import HEADS
from vllm_slimspec.measure.head import measure
from vllm_slimspec.measure.options import choices, claim_results, positive_ints, turns
from vllm_slimspec.measure.parts import parts_section
from vllm_slimspec.measure.results import HeadResults, PartResults, TunedTable
from vllm_slimspec.measure.roofline import roofline_page
from vllm_slimspec.measure.shapes import SHAPES
from vllm_slimspec.measure.tune import crossovers, tune

EXAMPLE = "Example: slimspec bench head --shapes llama-3.2-1b --batches 1,8,64 --json head.json"
ROOFLINE_EXAMPLE = "Example: slimspec bench roofline head.json --parts parts.json > roofline.md"


def head(
    shapes: Annotated[str, typer.Option(help=f"Shapes to time: all, or some of {', '.join(SHAPES)}.")] = "llama-3.1-8b",
    heads: Annotated[str, typer.Option(help=f"Heads to time: all, or some of {', '.join(HEADS)}.")] = "all",
    batches: Annotated[str, typer.Option(help="Batch sizes: rows that are drafted at once.")] = "1,8,64",
    device: Annotated[str, typer.Option(help="Device to time on: cpu, cuda or cuda:N.")] = "cuda"
    if torch.cuda.is_available()
    else "cpu",
    repeats: Annotated[int, typer.Option(min=3, help="Number of timed calls of every head.")] = 21,
    json: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    tune_kernels: Annotated[
        bool,
        typer.Option(
            "--tune", help="Find this GPU's tilings and write their table instead; on a CPU, time its crossovers."
        ),
    ] = False,
) -> None:
    """Time draft heads side by side in one run, with cold caches, after checking that each drafts the right token."""
    shape_names = choices(shapes, SHAPES, "--shapes")
    head_names = choices(heads, HEADS, "--heads")
    sizes = positive_ints(batches, "--batches", "batch sizes")
    with one_line_errors(), claim_results(json):
        where = _device(device)
        if tune_kernels:
            _tune(shape_names, where, repeats, json)
            return
        count = len(shape_names) * len(sizes) * (repeats + 2)
        with turns(count, "Timing heads") as tick:
            results = measure(shape_names, head_names, sizes, device=where, repeats=repeats, tick=tick)
        if json:
            results.write(json)
    _print_heads(results)


def _device(name: str) -> torch.device:
    """Return the device of that name; OptionError where this machine has none."""
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # the second: torch was built without CUDA
        raise OptionError(
            f"--device {name}: this machine cannot run on it ({str(error).splitlines()[0]}); give cpu"
        ) from None
    return found


def _tune(shapes: Sequence[str], device: torch.device, repeats: int, json: Path | None) -> None:
    if device.type == "cpu":
        with turns(None, "Timing crossovers") as tick:
            found = crossovers(shapes, repeats, tick)
        if json:
            found.write(json)
        for row in found.rows:
            faster = "integers" if row.integer_us < row.bfloat16_us else "bfloat16"
            typer.echo(
                f"{row.shape} {row.kind} rows={row.batch}: integers {row.integer_us:.0f} us, "
                f"bfloat16 {row.bfloat16_us:.0f} us: {faster}"
            )
        return
    from vllm_slimspec.kernels._tiles import tuned_path

    path = json or tuned_path(device_name(device))
    known = TunedTable.read(path) if path.is_file() else None
    with claim_file(path), turns(None, "Tuning kernels") as tick:
        for table in tune(shapes, device, tick, known):  # minutes each: what is known is kept
            table.write(path)
    typer.echo(f"{path}: what it had for these versions was kept, the rest was tuned; remove it to begin anew")


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


def roofline(
    results: Annotated[Path, typer.Argument(help="The file that `slimspec bench head --json` wrote.")],
    parts: Annotated[
        Path | None,
        typer.Option(
            help="The file that `slimspec bench parts --json` wrote: it says where the rest of the time goes."
        ),
    ] = None,
) -> None:
    """Derive, per shape and batch, the least bytes and time of every head, and print measured times against it."""
    with one_line_errors():
        page = roofline_page(HeadResults.read(results), " --parts ".join(p.as_posix() for p in (results, parts) if p))
        if parts is not None:
            page += "\n\n" + parts_section(PartResults.read(parts), parts.as_posix())
    typer.echo(page)

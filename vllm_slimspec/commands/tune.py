"""``slimspec tune``: find the fastest kernel tilings of a GPU, or time the two forms of quantized heads on a CPU."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_slimspec.commands.options import Device, Shapes, choices, claim_results, device_of
from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.common.output import claim_file
from vllm_slimspec.measure.shapes import SHAPES

EXAMPLE = "Example: slimspec tune --device cuda --shapes llama-3.1-8b,llama-3.2-1b"


def tune(
    shapes: Shapes = "llama-3.1-8b",
    device: Device = None,
    repeats: Annotated[
        int, typer.Option(min=3, help="Number of timed calls of each product. Used on a CPU only.")
    ] = 21,
    json: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write the results to.",
            show_default="on a GPU, the table that the kernels read",
        ),
    ] = None,
) -> None:
    """Find the fastest tilings of the kernels on a GPU, and write them to the table that the kernels read.

    On a CPU, time integer and bfloat16 products at several numbers of rows, and print which ones are faster.
    """
    names = choices(shapes, SHAPES, "--shapes")
    with one_line_errors(), claim_results(json) as write:
        from vllm_slimspec.measure import tune as bench

        where = device_of(device)
        if where.type == "cpu":
            found = bench.crossovers(names, repeats)
            write(found)
            for row in found.rows:
                faster = "integers" if row.integer_us < row.bfloat16_us else "bfloat16"
                typer.echo(
                    f"{row.shape} {row.kind} rows={row.batch}: integers {row.integer_us:.0f} us, "
                    f"bfloat16 {row.bfloat16_us:.0f} us: {faster}"
                )
            return
        from vllm_slimspec.common.device import device_name
        from vllm_slimspec.kernels._tiles import tuned_path
        from vllm_slimspec.measure.results import TunedTable

        path = json or tuned_path(device_name(where))
        known = TunedTable.read(path) if path.is_file() else None
        with claim_file(path):
            # Each table takes minutes, so that every one is written as soon as it is known.
            for table in bench.tune(names, where, known):
                table.write(path)
        typer.echo(
            f"{path}: entries for these versions were kept and the others tuned; remove the file to tune all again"
        )

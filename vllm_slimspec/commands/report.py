"""``slimspec report``: put the results of the `slimspec bench` commands on one page."""

from pathlib import Path
from typing import Annotated

import typer

from vllm_slimspec.errors import CheckpointError

EXAMPLE = "Example: slimspec report docs/results/head-cpu.json acceptance.json --output-path report"


def report(
    results: Annotated[
        list[Path], typer.Argument(help="Result files that the `slimspec bench` commands wrote with --json.")
    ],
    output_path: Annotated[
        Path,
        typer.Option(
            help="Folder to write index.html to. A .png or .svg file gets a picture of the head times of one file."
        ),
    ],
    batch: Annotated[int, typer.Option(help="Batch size, in rows, whose head times a .png or .svg file shows.")] = 1,
    allow_mixed_devices: Annotated[
        bool,
        typer.Option(
            "--allow-mixed-devices", help="Accept results of several devices, and report each device by itself."
        ),
    ] = False,
) -> None:
    """Write one page with tables and charts of head times, acceptance and served throughput."""
    from vllm_slimspec.measure.report import plot_heads, write_report

    if output_path.suffix in (".png", ".svg"):
        if len(results) > 1:
            raise CheckpointError(
                f"{output_path}: a picture shows one file of `slimspec bench head`, and {len(results)} are given; "
                "give one, or a folder as the output"
            )
        plot_heads(results[0], output_path, batch)
    else:
        for path, kind in write_report(results, output_path, mixed_devices=allow_mixed_devices):
            typer.echo(f"left out: {path} holds {kind!r}, which the report does not show", err=True)
        output_path /= "index.html"
    typer.echo(f"written: {output_path}")

"""The `slimspec` command: it puts the groups of commands together, and defines `inspect`, `doctor` and `report`.

Exit codes: 0 success, 1 failure (one line on stderr says why), 2 wrong usage, 130 interrupted by SIGINT, 143 ended by
SIGTERM.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from vllm_slimspec import __version__
from vllm_slimspec.commands.convert import EXAMPLE, convert
from vllm_slimspec.commands.train import app as train
from vllm_slimspec.commands.tune import EXAMPLE as TUNE_EXAMPLE
from vllm_slimspec.commands.tune import tune
from vllm_slimspec.common import console
from vllm_slimspec.common.console import json_object, one_line_errors
from vllm_slimspec.errors import CheckpointError


class _Commands(TyperGroup):
    """All commands: a failure of any of them is one line, and --verbose may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, sorted(args, key=lambda word: word != "--verbose"))

    def invoke(self, ctx: Any) -> Any:
        with one_line_errors():
            return super().invoke(ctx)


app = typer.Typer(
    name="slimspec",
    cls=_Commands,
    help="Convert, train, check and measure draft models with a low-rank head, for speculative decoding in vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=EXAMPLE)(convert)
app.add_typer(train, name="train")
app.command(epilog=TUNE_EXAMPLE)(tune)


def main() -> None:
    """Run the command line."""
    with one_line_errors():
        command = [word for word in sys.argv[1:] if word != "--verbose"][:1]
        console.verbose = "--verbose" in sys.argv
        if command in ([], ["-h"], ["--help"], ["bench"]):
            try:  # It imports torch, which would slow the other commands down.
                from vllm_slimspec.commands import measure

                words = "Measure draft heads: their time, the drafts that the target accepts, and the speed of servers."
                app.add_typer(measure.app, name="bench", help=words)
            except ModuleNotFoundError:
                if command == ["bench"]:
                    raise
        app(prog_name="slimspec")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"vllm-slimspec {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print the traceback of an error as well. May also follow the command.")
    ] = False,
) -> None:
    console.verbose = verbose


@app.command(epilog="Example: slimspec inspect ./my-drafter --json")
def inspect(
    drafter: Annotated[Path, typer.Argument(help="Folder of the drafter, with its config.json and safetensors files.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Describe a drafter: its format, the size of its head, and what would stop vLLM from serving it."""
    from vllm_slimspec.drafters.checkpoint import DraftCheckpoint

    found: dict[str, Any] = {"path": str(drafter), "servable": False, "problems": []}
    try:
        checkpoint = DraftCheckpoint.open(drafter)
        found |= _describe(checkpoint)
        checkpoint.check_values()
        found["servable"] = checkpoint.spec is not None
    except CheckpointError as error:
        found["problems"].append(str(error))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    if found["problems"]:
        raise typer.Exit(1)


@app.command(epilog="Example: slimspec doctor --target meta-llama/Llama-3.1-8B-Instruct --drafter ./my-drafter")
def doctor(
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "--verifier", help="Target model to check the drafter against: a folder or a Hugging Face id."
        ),
    ] = None,
    drafter: Annotated[str | None, typer.Option(help="Drafter to check: a folder or a Hugging Face id.")] = None,
    speculative_config: Annotated[
        str, typer.Option(help="JSON object that you will give to `vllm serve` as its --speculative-config.")
    ] = "{}",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of a table.")] = False,
) -> None:
    """Check this installation, a drafter, and a drafter with its target for problems before you serve them."""
    from vllm_slimspec.doctor import examine, table

    options = json_object(speculative_config, "--speculative-config")
    drafter = drafter or options.get("model")
    if target is not None and drafter is None:
        raise typer.BadParameter("give --drafter, or --speculative-config as a JSON object with a model in it")
    findings = list(examine(drafter, target, options))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        Console().print(table(findings))
    problems = sum(finding.level == "problem" for finding in findings)
    typer.echo(f"{problems} {'problem' if problems == 1 else 'problems'}", err=True)
    if problems:
        raise typer.Exit(1)


@app.command(epilog="Example: slimspec report docs/results/head-cpu.json acceptance.json --output-path report")
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


def _describe(checkpoint: Any) -> dict[str, Any]:
    spec = checkpoint.spec
    if spec is None:
        return {"format": checkpoint.format, "head": "dense", "head_bytes": checkpoint.head_bytes}
    return {
        "format": checkpoint.format,
        "family": checkpoint.family.name,
        "head": "low-rank",
        "hidden_size": spec.hidden_size,
        "rank": spec.rank,
        "draft_vocab_size": spec.draft_vocab_size,
        "vocab_size": spec.vocab_size,
        "head_bytes": checkpoint.head_bytes,
        "dense_bytes": checkpoint.dense_bytes,
        "quantization": spec.quantization,
        "rerank": spec.rerank,
    }


def _print(report: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in report.items():
        if key.endswith("_bytes"):
            value = f"{value / 1e6:.2f} MB"
        if key != "problems" and value is not None:
            table.add_row(key.replace("_", " "), str(value))
    if report.get("dense_bytes"):
        table.add_row("saves", f"{report['dense_bytes'] / report['head_bytes']:.2f}x")
    Console().print(table)
    if report.get("head") == "dense":
        typer.echo("A dense EAGLE-3 drafter: vLLM serves it without this package.")
    for problem in report["problems"]:
        typer.echo(f"error: {problem}", err=True)

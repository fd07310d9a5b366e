"""The `slimspec` command, which puts the commands together.

Exit codes: 0 success, 1 failure (one line on stderr says why), 2 wrong usage, 130 interrupted by SIGINT, 143 ended by
SIGTERM.
"""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vllm_slimspec import __version__
from vllm_slimspec.commands import bench, convert, doctor, inspect, report, train, tune
from vllm_slimspec.common import console
from vllm_slimspec.common.console import one_line_errors


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
app.command(epilog=convert.EXAMPLE)(convert.convert)
app.add_typer(train.app, name="train")
app.command(epilog=inspect.EXAMPLE)(inspect.inspect)
app.command(epilog=doctor.EXAMPLE)(doctor.doctor)
app.command(epilog=report.EXAMPLE)(report.report)
app.add_typer(bench.app, name="bench")
app.command(epilog=tune.EXAMPLE)(tune.tune)


def main() -> None:
    """Run the command line."""
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

import typer

from vllm_slimspec.convert.cli import convert

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(convert)
app()

"""What all commands share at the terminal."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within it, bad input ends the command with one line on stderr and exit code 1, and no traceback."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


def json_object(text: str, option: str) -> dict[str, Any]:
    """The value of ``option``; typer.BadParameter where it is not a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"not JSON ({error})", param_hint=option) from None
    if not isinstance(found, dict):
        raise typer.BadParameter("must be a JSON object", param_hint=option)
    return found

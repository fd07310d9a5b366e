"""What all commands share at the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Within it, bad input ends the command with one line on stderr and exit code 1, and no traceback."""
    try:
        yield
    except (ImportError, OSError, ValueError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None

"""What all commands share at the terminal."""

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, Any

import typer


class Dtype(StrEnum):
    """What ``--dtype`` takes; what it means is :mod:`vllm_slimspec.work_dtype`'s, which imports torch."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="What is computed in. [auto: bfloat16 where the CPU multiplies it, else float32; as stored on a GPU]",
    ),
]


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Within it, what this package logs, from information on, is printed to stderr."""
    log = logging.getLogger("vllm_slimspec")
    handler = logging.StreamHandler(sys.stderr)
    before, handlers = log.level, list(log.handlers)
    log.setLevel(logging.INFO)
    log.handlers = [handler]  # alone: commands call each other
    try:
        yield
    finally:
        log.setLevel(before)
        log.handlers = handlers


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

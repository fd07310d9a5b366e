"""Parsing of options that commands and benchmarks share."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_slimspec.common.output import claim_file
from vllm_slimspec.errors import OptionError
from vllm_slimspec.measure.shapes import SHAPES

if TYPE_CHECKING:
    import torch

    from vllm_slimspec.measure.results import Results

PROMPT_LINES = 'Each line is {"prompt": ...}, {"messages": [...]}, {"text": ...} or {"input_ids": [...]}.'
K = Annotated[
    int,
    typer.Option("-k", "--num-speculative-tokens", min=1, help="Number of tokens that are drafted in each cycle (K)."),
]
EngineArgs = Annotated[
    str, typer.Option(help="Further arguments of vllm.LLM, as a JSON object such as '{\"max_model_len\": 4096}'.")
]
Shapes = Annotated[
    str, typer.Option(help=f"Models whose head shapes are measured: all, or some of {', '.join(SHAPES)}.")
]
Device = Annotated[
    str | None,
    typer.Option(help="Device to measure on: cpu, cuda or cuda:N.", show_default="cuda where there is one, else cpu"),
]
Json = Annotated[Path | None, typer.Option(help="JSON file to write the results to.")]


def choices(given: str, allowed: Iterable[str], option: str) -> list[str]:
    """Return the names in a comma-separated list, or all ``allowed`` ones for "all", or raise BadParameter."""
    names = list(allowed) if given == "all" else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in allowed:
            raise typer.BadParameter(f"{name!r} is not one of: all, {', '.join(allowed)}", param_hint=option)
    return list(dict.fromkeys(names))


def positive_ints(given: str, option: str, what: str) -> list[int]:
    """Return the numbers in a comma-separated list, each 1 or more, or raise BadParameter."""
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{given!r} is not a list of {what} such as 1,8,64, each 1 or more", param_hint=option)
    return numbers


def named(given: Iterable[str] | None, option: str, form: str, reserved: Sequence[str] = ()) -> dict[str, str]:
    """Return the values of a repeated option of the form NAME=VALUE by their names.

    Raises:
        typer.BadParameter: a value is not of the form ``form``, or a name is given twice or ``reserved``.
    """
    found: dict[str, str] = {}
    for text in given or ():
        name, _, value = text.partition("=")
        if not name or not value:
            raise typer.BadParameter(f"{text!r} is not {form}", param_hint=option)
        if name in (*reserved, *found):
            words = f"{text!r} repeats a name; give each one with a name of its own"
            raise typer.BadParameter(", not ".join([words, *reserved]), param_hint=option)
        found[name] = value
    return found


def dtypes(given: str | None) -> list[str] | None:
    """Return the dtypes in the list of ``--dtypes``, or None if it was not given."""
    return None if given is None else choices(given, ("bfloat16", "float32", "float16"), "--dtypes")


def device_of(name: str | None) -> "torch.device":
    """Return the device that ``--device`` names; None means cuda if this machine has it, else cpu."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise OptionError(
            f"--device {name}: this machine cannot run on it ({str(error).splitlines()[0]}); give cpu"
        ) from None
    return found


@contextmanager
def claim_results(json: Path | None, *, run: Path | None = None) -> Iterator[Callable[["Results"], None]]:
    """Claim the file of ``--json``, if given, before anything is measured, and give the function that writes to it."""
    if json is None:
        yield lambda results: None
    else:
        with claim_file(json, run=run):
            yield lambda results: results.write(json)

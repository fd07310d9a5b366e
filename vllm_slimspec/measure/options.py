"""What the measuring commands share at the command line."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vllm_slimspec.common.output import claim_file
from vllm_slimspec.errors import OptionError

if TYPE_CHECKING:
    import torch


def choices(given: str, allowed: Iterable[str], option: str) -> list[str]:
    """The names of a comma-separated list, or all; typer.BadParameter names the one that is not ``allowed``."""
    names = list(allowed) if given == "all" else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in allowed:
            raise typer.BadParameter(f"{name!r} is not one of: all, {', '.join(allowed)}", param_hint=option)
    return list(dict.fromkeys(names))


def positive_ints(given: str, option: str, what: str) -> list[int]:
    """The numbers of a comma-separated list, each 1 or more; typer.BadParameter says ``what`` it should list."""
    try:
        numbers = [int(number) for number in given.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise typer.BadParameter(f"{given!r} is not a list of {what} such as 1,8,64", param_hint=option)
    return numbers


def dtypes(given: str | None) -> list[str] | None:
    """The dtypes of a comma-separated list; None where none is given."""
    return None if given is None else choices(given, ("bfloat16", "float32", "float16"), "--dtypes")


def device_of(name: str | None) -> "torch.device":
    """Return the device that ``--device`` names, or this machine's own; OptionError where this machine has none."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:  # the second: torch was built without CUDA
        raise OptionError(
            f"--device {name}: this machine cannot run on it ({str(error).splitlines()[0]}); give cpu"
        ) from None
    return found


def claim_results(json: Path | None, *, run: Path | None = None) -> AbstractContextManager[Any]:
    """Claim the file of ``--json``, where it is given, before anything is measured; see :func:`claim_file`."""
    return nullcontext() if json is None else claim_file(json, run=run)


@contextmanager
def turns(total: int | None, what: str) -> Iterator[Callable[[], None]]:
    """Show how many turns of a measurement are done; call what it gives after each."""
    from vllm_slimspec.common.progress import progress  # tqdm comes with vLLM, and `slimspec --help` works without

    with progress(what, total, "turn") as shown:
        yield shown.update

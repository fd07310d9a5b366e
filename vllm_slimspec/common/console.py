"""Terminal code that all commands share: errors printed as one line, and options whose value is JSON."""

import errno
import json
import logging
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from vllm_slimspec.common import memory
from vllm_slimspec.errors import SlimSpecError

verbose = False
"""Whether the traceback of an error is printed too. The option --verbose sets it."""

_DISK = ("no space left on device", "disk quota exceeded", "file too large", "pytorchstreamwriter failed writing")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXTRAS = {
    **dict.fromkeys(("speculators", "datasets", "tensorboard"), "pip install 'vllm-slimspec[train]'"),
    **dict.fromkeys(("matplotlib", "jinja2", "httpx", "openai", "pandas"), "pip install 'vllm-slimspec[bench]'"),
    **dict.fromkeys(("vllm", "torch", "transformers"), "install this package into the environment of vLLM"),
}
_CURES = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "give the path of a file",
    errno.ENOTDIR: "check the path",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
}


class Dtype(StrEnum):
    """The values of ``--dtype``. :mod:`vllm_slimspec.common.work_dtype`, which imports torch, gives them a meaning."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        help="Data type of the computation. auto is bfloat16 on a CPU that multiplies it, float32 on any other, and "
        "the stored one on a GPU.",
    ),
]


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Print what this package logs, at level INFO and above, to stderr while the context is open."""
    log = logging.getLogger("vllm_slimspec")
    handler = logging.StreamHandler(sys.stderr)
    before, handlers = log.level, list(log.handlers)
    log.setLevel(logging.INFO)
    log.handlers = [handler]  # One command may call another, and each line must be printed once.
    try:
        yield
    finally:
        log.setLevel(before)
        log.handlers = handlers


class Terminated(KeyboardInterrupt):
    """SIGTERM asked the command to end."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line on stderr if the code in the context raises.

    The exit code is 1 for an error, 130 for an interrupt and 143 for SIGTERM. SIGTERM raises an exception, as an
    interrupt does, so that the command can shut its engine down. Otherwise the engine would go on computing.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
    try:
        yield
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        _end(error, str(error) or ("terminated" if terminated else "interrupted"), 143 if terminated else 130)
    except Exception as error:
        if isinstance(error, typer.Abort) or hasattr(error, "exit_code"):  # typer handles its own
            raise
        _end(error, f"error: {describe(error)}", 1)
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def describe(error: Exception) -> str:
    """Return one line that says what went wrong and how to fix it.

    For an unexpected error, write the traceback to a file and name the file in the line.
    """
    text = " ".join(str(error).split())
    if missing := next(filter(memory.ran_out, _chain(error)), None):
        detail = " ".join(str(missing).split()) or type(missing).__name__
        return (
            f"memory ran out ({detail}); close other programs, raise the limit that is set (ulimit -v, a container's), "
            "or use smaller sizes or a machine with more memory"
        )
    if isinstance(error, SlimSpecError):
        return text
    if isinstance(error, ValueError | OSError | ImportError) and _is_ours(error):
        return text
    if (isinstance(error, OSError) and error.errno in _NO_ROOM) or any(phrase in text.lower() for phrase in _DISK):
        return f"{getattr(error, 'filename', None) or text}: the disk has no room; make room and run the command again"
    if isinstance(error, ModuleNotFoundError) and (cure := _EXTRAS.get((error.name or "").partition(".")[0])):
        return f"{text}; {cure}"
    if isinstance(error, OSError):
        place = f"{error.filename}: {error.strerror}" if error.filename else text
        return f"{place}; {_CURES[error.errno]}" if error.errno in _CURES else place
    words = text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}".rstrip(": ")
    return f"{words}; {_log(error)}"


def json_object(text: str, option: str) -> dict[str, Any]:
    """Parse the value of an option and return it.

    Args:
        text: the value, which must be a JSON object.
        option: the name of the option, for the error.

    Raises:
        typer.BadParameter: the value is not a JSON object.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON ({error})", param_hint=option) from None
    if not isinstance(found, dict):
        raise typer.BadParameter(f'{text!r} must be a JSON object, such as {{"a": 1}}', param_hint=option)
    return found


def _end(error: BaseException, line: str, code: int) -> NoReturn:
    if verbose:
        traceback.print_exception(error)
    typer.echo(line, err=True)
    raise SystemExit(code) from None


def _terminate(sign: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, then the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_ours(error: BaseException) -> bool:
    """Return whether this package raised the error, so that its text is already a complete message."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").partition(".")[0] == "vllm_slimspec"


def _log(error: Exception) -> str:
    """Write the traceback to a file, and return a phrase that says where the file is."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="slimspec-", suffix=".log", delete=False) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return "run it again with --verbose for the traceback"
    return f"the traceback is in {file.name}"

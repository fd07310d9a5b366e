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
from typing import Annotated, Any, Literal, NoReturn

import typer

from vllm_slimspec.common import memory
from vllm_slimspec.errors import SlimSpecError

verbose = False
"""Whether the traceback of an error is printed too. The option --verbose sets it."""

_DISK = ("no space left on device", "disk quota exceeded", "file too large", "pytorchstreamwriter failed writing")
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_EXTRAS = {
    **dict.fromkeys(("speculators", "datasets", "tensorboard"), "pip install 'vllm-slimspec[train]'"),
    **dict.fromkeys(
        ("matplotlib", "jinja2", "numpy", "httpx", "openai", "pandas"), "pip install 'vllm-slimspec[bench]'"
    ),
    **dict.fromkeys(("vllm", "torch", "transformers"), "install this package into the environment of vLLM"),
}
_CURES = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR), "check the path"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check its permissions"),
    errno.EISDIR: "give the path of a file",
}


# The values of ``--dtype``, to which :mod:`vllm_slimspec.common.work_dtype` gives a meaning.
Asked = Literal["auto", "float32", "bfloat16", "float16"]
DtypeOption = Annotated[
    Asked,
    typer.Option(
        "--dtype",
        help="Data type of the computation. auto is bfloat16 on a CPU with instructions for it, float32 on any other "
        "CPU, and the data type of the stored weights on a GPU.",
    ),
]


@contextmanager
def log_on_stderr() -> Iterator[None]:
    """Print what this package logs, at level INFO and above, to stderr while the context is open."""
    log = logging.getLogger("vllm_slimspec")
    level, handlers = log.level, log.handlers
    log.setLevel(logging.INFO)
    log.handlers = [logging.StreamHandler(sys.stderr)]  # One command may call another; each line is printed once.
    try:
        yield
    finally:
        log.setLevel(level)
        log.handlers = handlers


class Terminated(KeyboardInterrupt):
    """SIGTERM asked the command to end."""


def _terminate(*_: object) -> NoReturn:
    raise Terminated


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the command with one line on stderr if the code in the context raises.

    The exit code is 1 for an error, 130 for an interrupt and 143 for SIGTERM. SIGTERM raises an exception, so that the
    command can shut its engine down, which would otherwise go on computing.
    """
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if main_thread else None
    try:
        yield
    except Terminated as error:
        _end(error, "terminated", 143)
    except KeyboardInterrupt as error:
        _end(error, str(error) or "interrupted", 130)
    except Exception as error:
        if isinstance(error, typer.Abort) or hasattr(error, "exit_code"):  # typer handles its own
            raise
        _end(error, f"error: {describe(error)}", 1)
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


def describe(error: Exception) -> str:
    """Return one line that says what went wrong and how to fix it, or where the traceback of an unexpected error is."""
    text = " ".join(str(error).split())
    if missing := next(filter(memory.ran_out, _chain(error)), None):
        detail = " ".join(str(missing).split()) or type(missing).__name__
        return (
            f"memory ran out ({detail}); close other programs, raise the limit that is set (ulimit -v, a container's), "
            "or use smaller sizes or a machine with more memory"
        )
    if isinstance(error, ModuleNotFoundError) and (cure := _EXTRAS.get((error.name or "").partition(".")[0])):
        return f"{text}; {cure}"
    if isinstance(error, SlimSpecError) or (isinstance(error, ValueError | OSError | ImportError) and _is_ours(error)):
        return text
    if (isinstance(error, OSError) and error.errno in _NO_ROOM) or any(phrase in text.lower() for phrase in _DISK):
        return f"{getattr(error, 'filename', None) or text}: the disk has no room; make room and run the command again"
    if isinstance(error, OSError):
        place = f"{error.filename}: {error.strerror}" if error.filename else text
        return f"{place}; {_CURES[error.errno]}" if error.errno in _CURES else place
    words = text if text and isinstance(error, ValueError) else f"{type(error).__name__}: {text}".rstrip(": ")
    try:
        with tempfile.NamedTemporaryFile("w", prefix="slimspec-", suffix=".log", delete=False) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return f"{words}; run it again with --verbose for the traceback"
    return f"{words}; the traceback is in {file.name}"


def json_object(text: str, option: str) -> dict[str, Any]:
    """Return the JSON object that is the value of an option, or raise typer.BadParameter."""
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


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error, then the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_ours(error: BaseException) -> bool:
    """Return whether this package raised the error, so that its text is already a complete message."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").partition(".")[0] == "vllm_slimspec"

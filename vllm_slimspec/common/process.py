"""A vLLM in a process of its own: how it is run, how it is ended with all that it started, what it said of its end."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_EXCEPTION = re.compile(r"\b\w+(?:Error|Exception): \S.*")
_WRAPPER = "Engine core initialization failed"  # vLLM's front process says it last, and not why


def run_ticking(arguments: Sequence[str], log: Path, tick: Callable[[], None]) -> int:
    """Run ``python -m`` with these arguments in a process of its own, and return its exit code.

    Args:
        arguments: a module and what it takes; the number of a pipe's descriptor is added as the last one.
        log: gets all that the process says.
        tick: called for every byte that comes through the pipe.
    """
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as ticks:
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", *arguments, str(writing)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[writing],
                    start_new_session=True,  # with the processes of the engine, for stop()
                )
        finally:
            os.close(writing)
        try:
            while ticks.read(1):
                tick()
            return process.wait()
        except BaseException:
            stop(process)
            raise


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process that was started with ``start_new_session``, and everything in that session."""
    # The second round is for an engine that outlives the leader of its group, too.
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def how_it_ended(code: int) -> str:
    """Say how a process ended, by its exit code: "ended with code 1", or by which signal it was killed."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "was killed, as Linux does where memory runs out: close other programs, or use a larger machine"
    return f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def last_words(log: Path) -> str:
    """The exception that ended a process, or its last line, and where the rest is: for a message of one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raised = [found[0] for line in lines if (found := _EXCEPTION.search(line)) and _WRAPPER not in line]
    return f"({[*lines[-1:], *raised][-1] if lines else 'no word'}); see {log}"

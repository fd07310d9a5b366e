"""vLLM in a separate process: running it, stopping it with all its children, and reporting why it ended."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

_EXCEPTION = re.compile(r"\b\w+(?:Error|Exception): \S.*")
_WRAPPER = "Engine core initialization failed"  # the last exception of vLLM's front process, which gives no reason


def run_ticking(arguments: Sequence[str], log: Path, tick: Callable[[], None]) -> int:
    """Run ``python -m`` in a new process that writes its output to ``log``, and return its exit code.

    Args:
        arguments: the module and its arguments. The number of a pipe's file descriptor is added as the last one.
        tick: called for every byte that the process writes into the pipe.
    """
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=0) as ticks:
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", *arguments, str(writing)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[writing],
                    start_new_session=True,  # stop() ends this session, with the processes of the engine
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
    """Stop a process that was started with ``start_new_session``, and every process in that session."""
    # SIGKILL always follows, because an engine process may outlive the process that started it.
    for sign, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def how_it_ended(code: int) -> str:
    """Return how a process ended, from its exit code, such as "ended with code 1"."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "was killed, as Linux does where memory runs out: close other programs, or use a larger machine"
    return f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


def last_words(log: Path) -> str:
    """Return the last exception in a log, or else its last line, and the path of the log, for a one-line message."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raised = [found[0] for line in lines if (found := _EXCEPTION.search(line)) and _WRAPPER not in line]
    return f"({[*lines[-1:], *raised][-1] if lines else 'no output'}); see {log}"

"""A vLLM in a process of its own: how it is ended with all that it started, and what it said of its end."""

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

_EXCEPTION = re.compile(r"\b\w+(?:Error|Exception): \S.*")
_WRAPPER = "Engine core initialization failed"  # vLLM's front process says it last, and not why


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

"""What a vLLM in another process said of its end."""

import re
from pathlib import Path

_EXCEPTION = re.compile(r"\b\w+(?:Error|Exception): \S.*")
_WRAPPER = "Engine core initialization failed"  # vLLM's front process says it last, and not why


def last_words(log: Path) -> str:
    """The exception that ended a process, or its last line, and where the rest is: for a message of one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    raised = [found[0] for line in lines if (found := _EXCEPTION.search(line)) and _WRAPPER not in line]
    return f"({[*lines[-1:], *raised][-1] if lines else 'no word'}); see {log}"

"""Recognition of out-of-memory errors, which every library reports in its own words."""

from pathlib import Path

# The phrases of torch, numpy, safetensors, CUDA, C++, Python and the dynamic linker.
_PHRASES = (
    "out of memory",
    "cannot allocate memory",
    "can't allocate memory",
    "unable to allocate",
    "not enough memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
    "killed by signal: killed",  # a data loader's worker
    ") exited unexpectedly",  # a data loader's worker whose end was noticed late
)


def ran_out(error: BaseException) -> bool:
    """Return whether an error, of any class, says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in text for phrase in _PHRASES)


def raise_if_ran_out(error: BaseException, file: Path) -> None:
    """Raise a MemoryError that names ``file`` before an error is reported as damage of a file that may be sound."""
    if ran_out(error):
        raise MemoryError(f"{file}: {error}") from None

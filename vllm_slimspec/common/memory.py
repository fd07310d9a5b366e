"""Whether memory ran out, which every library says in words of its own."""

from pathlib import Path

# torch, numpy, safetensors, CUDA, C++, Python and the loader of libraries.
_PHRASES = (
    "out of memory",
    "cannot allocate memory",
    "can't allocate memory",
    "unable to allocate",
    "not enough memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
    "killed by signal: killed",  # a worker of a data loader
    ") exited unexpectedly",  # the same, where its end was seen too late
)


def ran_out(error: BaseException) -> bool:
    """Return whether an error, whatever its class, is one of memory."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in text for phrase in _PHRASES)


def raise_if_ran_out(error: BaseException, file: Path) -> None:
    """Raise a MemoryError that names the file, if ``error`` is one of memory and so says nothing against the file."""
    if ran_out(error):
        raise MemoryError(f"{file}: {error}") from None

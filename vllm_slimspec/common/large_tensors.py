"""Memory of large tensors on a CPU, kept for the next ones.

glibc maps every block of 32 MiB or more anew and unmaps it when it is freed, and Linux clears each of its pages at the
first touch, while the process's other threads wait for its memory map. Logits over a vocabulary are such blocks, and
training and scoring make a few dozen of them a step.
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let this process keep what large tensors give back, unless the environment tunes malloc itself.

    The peak of its memory grows by a quarter or so, because a tensor does not always fit where another one was. In work
    of many steps, call :func:`return_holes` now and then.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def return_holes() -> None:
    """Give Linux every page that no tensor uses now, so that places where none fits do not add up over hours."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    """Return glibc, or None where there is another C library or the environment tunes it."""
    tuned = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if tuned or not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None

"""Reuse of the memory of large CPU tensors.

By default glibc maps every block of 32 MiB or more anew, and unmaps it when it is freed. Linux then clears each page of
a new block at its first use, and the other threads of the process wait meanwhile. Logits over a vocabulary are blocks
of this size, and a step of training or scoring allocates a few dozen of them.
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed large tensors for new ones.

    This does nothing if environment variables tune malloc. Peak memory grows by about a quarter, because a new tensor
    does not always fit into the place of a freed one. In work of many steps, call :func:`return_holes` now and then.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def return_holes() -> None:
    """Return every unused page to Linux, so that gaps too small for a tensor do not add up over hours."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    """Return glibc; None if the C library is another one, or if environment variables tune malloc."""
    tuned = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if tuned or not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None

"""Reuse of the memory of large CPU tensors.

By default glibc maps every block of 32 MiB or more anew, and unmaps it when it is freed. Linux then clears each page of
a new block, while the other threads wait. A step of training or scoring allocates a few dozen logits of this size.
"""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed large tensors for new ones.

    Peak memory grows by about a quarter, because a new tensor does not always fit into the place of a freed one. In
    work of many steps, call :func:`return_holes` now and then.
    """
    if libc := _libc():
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def return_holes() -> None:
    """Return every unused page to Linux, so that gaps too small for a tensor do not add up over hours."""
    if libc := _libc():
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    """Return glibc; None if the C library is another one, or if environment variables tune malloc."""
    if any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None

"""The choice of the cores on which a vLLM engine for CPUs computes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
_CHOICES = (_RESERVED, "VLLM_CPU_OMP_THREADS_BIND")


@contextmanager
def every_core() -> Iterator[None]:
    """Let an offline engine that starts in this context compute on every core of a CPU.

    By default vLLM reserves one core for its front end. The front end of an offline engine has almost no work while the
    model computes, and on a machine with two cores the reserved one is half of it. Environment variables that the user
    has set stay as they are.
    """
    if any(name in os.environ for name in _CHOICES):
        yield
        return
    os.environ[_RESERVED] = "0"
    try:
        yield
    finally:
        del os.environ[_RESERVED]

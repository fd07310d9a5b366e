"""Which cores a vLLM engine for CPUs computes on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"
_CHOICES = (_RESERVED, "VLLM_CPU_OMP_THREADS_BIND")


@contextmanager
def every_core() -> Iterator[None]:
    """Start an offline engine in here, and on a CPU it computes on every core, unless the environment says otherwise.

    vLLM keeps one core for its front end. That of an offline engine has next to nothing to do while the model computes,
    and of two cores one is half of the machine.
    """
    if any(name in os.environ for name in _CHOICES):
        yield
        return
    os.environ[_RESERVED] = "0"
    try:
        yield
    finally:
        del os.environ[_RESERVED]

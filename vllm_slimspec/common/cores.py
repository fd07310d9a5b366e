"""The choice of the cores on which a vLLM engine for CPUs computes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"


@contextmanager
def every_core() -> Iterator[None]:
    """Let an offline engine that starts in this context compute on every core, unless the environment chooses them.

    By default vLLM reserves one core for its front end, which has almost no work while an offline engine computes.
    """
    if _RESERVED in os.environ or "VLLM_CPU_OMP_THREADS_BIND" in os.environ:
        yield
        return
    os.environ[_RESERVED] = "0"
    try:
        yield
    finally:
        del os.environ[_RESERVED]

"""The cores on which the engines and servers of vLLM's CPU backend run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def keep_apart(pid: int) -> set[int]:
    """Keep the front end of a running server off the cores of its workers, and return the cores that are left for it.

    vLLM pins the workers of its CPU backend, each thread to a core, and lets everything else run anywhere. The process
    that waits for a worker does so by polling, and takes the worker's core for a while whenever the scheduler moves it
    there. So the speed of a server on few cores changes from moment to moment. This function changes nothing if no
    process is pinned, or if the workers have all cores.

    Args:
        pid: the server's first process. It, its children and theirs are looked at.
    """
    import psutil

    every = os.sched_getaffinity(0)
    first = psutil.Process(pid)
    cores = {}
    for process in (first, *first.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended
            cores[process.pid] = set(process.cpu_affinity())
    workers = set().union(*(own for own in cores.values() if own < every))
    left = every - workers
    if not workers or not left:
        return every
    for one in (one for one, own in cores.items() if not own < every):
        for thread in Path(f"/proc/{one}/task").glob("*"):
            with suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread.name), left)
    return left

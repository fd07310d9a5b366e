"""The cores on which servers run."""

import os
import subprocess
import sys

import pytest

from vllm_slimspec.common.cores import keep_apart

FRONT_END = """
import os, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "input()"], preexec_fn=lambda: os.sched_setaffinity(0, {{{core}}}))
print(worker.pid, flush=True)
worker.wait()
"""


@pytest.fixture
def cores():
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("needs two cores")
    return cores


def served(core):
    """Start a front end whose worker is pinned to a core, and return it with the worker's process id."""
    command = [sys.executable, "-c", FRONT_END.format(core=core)]
    front_end = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return front_end, int(front_end.stdout.readline())


def test_front_end_leaves_the_cores_of_its_workers(cores):
    """Catches: a front end that polls on its worker's core, so that a server is now fast and now half as fast."""
    first = min(cores)
    front_end, worker = served(first)
    with front_end:
        assert keep_apart(front_end.pid) == cores - {first}
        assert os.sched_getaffinity(front_end.pid) == cores - {first}
        assert os.sched_getaffinity(worker) == {first}
        front_end.stdin.close()
    assert os.sched_getaffinity(0) == cores


def test_server_without_pinned_workers_keeps_all_cores(cores):
    """Catches: the server of a GPU squeezed onto fewer cores."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert keep_apart(process.pid) == cores
        assert os.sched_getaffinity(process.pid) == cores
        process.stdin.close()

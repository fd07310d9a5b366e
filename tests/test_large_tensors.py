"""Memory that large tensors give back stays in the process, and what the environment says of malloc is left alone."""

import ctypes
import os
import subprocess
import sys

import pytest

from vllm_slimspec.large_tensors import keep_freed_memory

# Page faults of a tensor of 64 MiB (16384 pages) that can lie where another one was.
CODE = """
import resource, torch
from vllm_slimspec.large_tensors import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(5)))
"""


def test_the_pages_of_a_large_tensor_are_used_again():
    """Catches: a third of a training step spent on clearing the same pages."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", CODE], env=clean, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_environments_own_tuning_of_malloc_is_left_alone(monkeypatch, name):
    """Catches: a limit that the user has set on purpose, and that is overridden."""
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("malloc is tuned"))
    keep_freed_memory()

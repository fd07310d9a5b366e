"""Freed memory of large tensors stays in the process for reuse, and malloc settings of the environment are left
alone."""

import ctypes
import os
import subprocess
import sys

import pytest

from vllm_slimspec.common.large_tensors import keep_freed_memory, return_holes

CODE = """
import ctypes, resource
from vllm_slimspec.common.large_tensors import keep_freed_memory, return_holes

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
SIZE = 64 << 20

def page_faults():
    block = libc.malloc(SIZE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    libc.memset(block, 1, SIZE)
    found = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    libc.free(block)
    return found

keep_freed_memory()
first, second = page_faults(), page_faults()
return_holes()
print(first, second, page_faults())
"""


def test_pages_of_a_large_block_are_reused_until_they_are_returned():
    """Catches: a third of each training step spent on clearing the same memory pages, or memory that is never given
    back."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", CODE], env=clean, capture_output=True, text=True, check=True)
    first, second, third = map(int, done.stdout.split())
    assert second < first / 2
    assert second < third / 2


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_malloc_settings_of_the_environment_are_left_alone(monkeypatch, name):
    """Catches: a malloc limit that the user has set on purpose and that this package overrides."""
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("malloc is tuned"))
    keep_freed_memory()
    return_holes()

"""What all tests share."""

import os

# Kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture
def injected(record_property):
    """injected(fault, times, answers): a fault that this test brought about, and the answers it then compared.

    `make faults` (faults_run.py) makes a table of them.
    """

    def record(fault: str, times: int = 1, answers: int = 0) -> None:
        for name, value in (("fault", fault), ("times", times), ("answers", answers)):
            record_property(name, value)

    return record

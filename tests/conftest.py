"""What all tests share: the choice of Triton's interpreter, a rule for docstrings, and a fixture."""

import os

# Kernels run in Triton's interpreter, which must be chosen before anything imports Triton.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def pytest_collection_modifyitems(items):
    """Refuse a run with a test whose docstring does not say which bug the test would catch."""
    tests = {(item.path, item.originalname): item.function for item in items if isinstance(item, pytest.Function)}
    silent = [
        f"{path}::{name}"
        for (path, name), function in tests.items()
        if not (function.__doc__ or "").lstrip().startswith("Catches:")
    ]
    if silent:
        raise pytest.UsageError("\n".join(['tests whose docstring does not begin with "Catches:"', *silent]))


@pytest.fixture
def injected(record_property):
    """injected(fault, times, answers): records a fault that the test caused, and how many answers it then compared.

    `make faults` (faults_run.py) makes a table of them.
    """

    def record(fault: str, times: int = 1, answers: int = 0) -> None:
        for name, value in (("fault", fault), ("times", times), ("answers", answers)):
            record_property(name, value)

    return record

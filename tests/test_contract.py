"""Versions of vLLM that were not run here still have every interface that this package relies on."""

import copy
import json
from pathlib import Path

import contract
import pytest

from vllm_slimspec import compat

CONTRACTS = {file.stem: json.loads(file.read_text()) for file in contract.CONTRACTS.glob("*.json")}


@pytest.mark.parametrize("version", sorted(CONTRACTS))
def test_interfaces(version):
    """Catches: a symbol, parameter or field used here that a supported vLLM does not have."""
    assert contract.missing(CONTRACTS[version]) == []
    assert CONTRACTS[version]["vllm"] == version


def test_ends_of_the_supported_range():
    """Catches: OLDEST or NEWEST moved without a look at that version."""
    assert {str(compat.OLDEST), str(compat.NEWEST)} <= set(CONTRACTS)


def test_installed_version():
    """Catches: a contract that the sources do not have; here they can be compared."""
    import vllm

    version = vllm.__version__.split("+")[0]
    found = contract.from_folder(Path(vllm.__file__).parent.parent, version)
    assert contract.missing(found) == []
    if version in CONTRACTS:
        assert {k: v for k, v in CONTRACTS[version].items() if k != "wheel"} == found


@pytest.mark.parametrize("name", contract.RELIED_ON)
def test_what_is_missing_is_said(name):
    """Catches: a check that would pass whatever a version has."""
    broken = copy.deepcopy(next(iter(CONTRACTS.values())))
    broken["symbols"][name] = None
    assert contract.missing(broken) == [f"{name} is missing"]
    for member in contract.RELIED_ON[name]:
        broken["symbols"][name] = [m for m in contract.RELIED_ON[name] if m != member]
        assert contract.missing(broken) == [f"{name} has no {member}"]


@pytest.mark.parametrize("what", contract.READ_WITHOUT_A_STRIDE)
def test_a_kernel_line_that_is_gone_is_said(what):
    """Catches: a version whose kernels read drafts in another way, taken for one that was looked at."""
    broken = copy.deepcopy(next(iter(CONTRACTS.values())))
    broken["read_without_a_stride"][what] = []
    line = contract.READ_WITHOUT_A_STRIDE[what]
    assert contract.missing(broken) == [f"V2 has no line {line}, which reads {what}"]


def test_names_are_read_from_source():
    """Catches: a symbol found by its name alone, wherever it stands."""
    files = {
        "vllm/m/__init__.py": "from .n import *\nif True:\n    from x import g\n",
        "vllm/m/n.py": "class A:\n    x: int = 1\n    def f(self, a, *, b): self.y = 1\n",
    }
    wanted = {"m.n:A": ["x"], "m.n:A.f": ["self", "a", "b"], "m.n:A.self": ["y"], "m:g": [], "m:A": []}
    wanted |= {"m.n:A.g": None, "m.n:f": None, "m.n:x": None, "m.other:A": None}
    names = [f"vllm.{name}" for name in wanted]
    assert list(contract.extract(files.get, [], names)["symbols"].values()) == list(wanted.values())

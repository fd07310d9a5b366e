"""Versions of vLLM that were not run here still have every interface that this package relies on."""

import copy
import json
from pathlib import Path

import contract
import pytest

from vllm_slimspec import compat

CONTRACTS = {file.stem: json.loads(file.read_text()) for file in contract.CONTRACTS.glob("*.json")}


@pytest.mark.parametrize("version", sorted(CONTRACTS))
def test_supported_vllm_has_every_interface(version):
    """Catches: a symbol, parameter or field used here that a supported vLLM does not have."""
    assert contract.missing(CONTRACTS[version]) == []
    assert CONTRACTS[version]["vllm"] == version


def test_oldest_and_newest_supported_vllm_have_a_contract():
    """Catches: OLDEST or NEWEST moved to a version whose interfaces nobody has recorded."""
    assert {str(compat.OLDEST), str(compat.NEWEST)} <= set(CONTRACTS)


def test_contract_of_the_installed_vllm_matches_its_sources():
    """Catches: a recorded contract that differs from the sources of that vLLM."""
    import vllm

    version = vllm.__version__.split("+")[0]
    found = contract.from_folder(Path(vllm.__file__).parent.parent, version)
    assert contract.missing(found) == []
    if version in CONTRACTS:
        assert {k: v for k, v in CONTRACTS[version].items() if k != "wheel"} == found


@pytest.mark.parametrize("name", contract.RELIED_ON)
def test_missing_interface_is_reported(name):
    """Catches: a check of interfaces that passes whatever a version has."""
    broken = copy.deepcopy(next(iter(CONTRACTS.values())))
    broken["symbols"][name] = None
    assert contract.missing(broken) == [f"{name} is missing"]
    for member in contract.RELIED_ON[name]:
        broken["symbols"][name] = [m for m in contract.RELIED_ON[name] if m != member]
        assert contract.missing(broken) == [f"{name} has no {member}"]


@pytest.mark.parametrize("what", contract.READ_WITHOUT_A_STRIDE)
def test_missing_kernel_line_is_reported(what):
    """Catches: a version whose kernels read drafts in another way, taken for one that was checked."""
    broken = copy.deepcopy(next(iter(CONTRACTS.values())))
    broken["read_without_a_stride"][what] = []
    line = contract.READ_WITHOUT_A_STRIDE[what]
    assert contract.missing(broken) == [f"V2 has no line {line}, which reads {what}"]


def test_symbol_is_looked_up_in_its_own_scope():
    """Catches: a symbol accepted because another one, somewhere else in the source, has its name."""
    files = {
        "vllm/m/__init__.py": "from .n import *\nif True:\n    from x import g\n",
        "vllm/m/n.py": "class A:\n    x: int = 1\n    def f(self, a, *, b): self.y = 1\n",
    }
    wanted = {"m.n:A": ["x"], "m.n:A.f": ["self", "a", "b"], "m.n:A.self": ["y"], "m:g": [], "m:A": []}
    wanted |= {"m.n:A.g": None, "m.n:f": None, "m.n:x": None, "m.other:A": None}
    names = [f"vllm.{name}" for name in wanted]
    assert list(contract.extract(files.get, [], names)["symbols"].values()) == list(wanted.values())

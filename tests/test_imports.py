"""Which parts of the package may import which: the table of docs/architecture.md, whose parts are files or folders."""

import ast
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "vllm_slimspec"
# A part may import those of the levels below its own, and nothing beside it on its level.
LEVELS = (
    {"errors"},
    {"common"},
    {"head"},
    {"target"},
    {"drafters"},
    {"engine"},
    {"convert", "train", "measure"},
    {"ops", "compat", "joint"},
    {"doctor"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
OUTSIDE = {"__init__", "kernels"}  # what vLLM calls, and a folder that imports nothing of the package


def imported(source: str) -> set[str]:
    """Return the names that a file imports, anywhere in it, each with its module: "a.b" for `from a import b`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(source: str) -> set[str]:
    """Return the names that a file imports from the package, without the package's name."""
    return {name.partition(".")[2] for name in imported(source) if name.startswith("vllm_slimspec.")}


def circles(modules: dict[str, set[str]]) -> list[str]:
    """Return the modules that import themselves through others, given the names that each of them imports."""
    graph = {name: {of_whom(target, modules) for target in targets} - {name} for name, targets in modules.items()}
    while leaves := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in leaves:
            del graph[name]
    return sorted(graph)


def of_whom(name: str, modules: dict[str, set[str]]) -> str | None:
    """Return the module that an imported name belongs to, or None if it is not one of ``modules``."""
    return next((part for part in (name, name.rpartition(".")[0]) if part in modules), None)


def broken(part: str, imported: set[str]) -> list[str]:
    """Return the parts of the package that this one imports and must not import."""
    others = {name.partition(".")[0] for name in imported} - {part, *OUTSIDE}
    return sorted(other for other in others if LEVEL.get(other, -1) >= LEVEL[part])


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(file for file in PACKAGE.rglob("*.py") if part_of(file) not in OUTSIDE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_package_imports_one_beside_or_above_it(file):
    """Catches: a sub-package that imports one beside or above it in docs/architecture.md, or a circle of
    sub-packages."""
    assert broken(part_of(file), imports(file.read_text())) == []


def test_no_module_imports_itself_through_others_of_its_package():
    """Catches: a circle of imports inside of a sub-package, which an import within a function hides."""
    graph = {}
    for file in FILES:
        name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imports(file.read_text())
    assert circles(graph) == []


BENCHMARKS = PACKAGE.parent / "benchmarks"


BENCHED = {file.stem: imported(file.read_text()) for file in BENCHMARKS.glob("*.py")}


def test_the_package_imports_no_benchmark():
    """Catches: a command that fails for users, whose wheel has no benchmarks."""
    assert "cycle" in BENCHED
    assert [str(file) for file in FILES if any(of_whom(name, BENCHED) for name in imported(file.read_text()))] == []


def test_no_benchmark_has_the_name_of_a_test_module():
    """Catches: a module of the tests that is imported in the place of a benchmark."""
    tests = {file.stem for file in Path(__file__).parent.glob("*.py")}
    assert BENCHED.keys() & tests == set()


def test_no_benchmark_imports_itself_through_others():
    """Catches: a circle among the benchmarks, which an import in a function hides."""
    assert circles(BENCHED) == []


def test_every_package_has_a_level_in_the_contract():
    """Catches: a new sub-package for which the contract of imports says nothing."""
    assert {part_of(file) for file in FILES} == set(chain.from_iterable(LEVELS))


def test_contract_of_imports_notices_a_forbidden_import():
    """Catches: a contract of imports that no import would ever break."""
    source = "def f():\n    from vllm_slimspec.train.launch import fit\nimport vllm_slimspec.cli\n"
    assert broken("convert", imports(source)) == ["cli", "train"]
    assert broken("head", imports("from vllm_slimspec.common import files")) == []

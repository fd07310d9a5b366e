"""`make faults`: run the tests that inject faults on purpose, and count the faults.

    python tools/faults_run.py --json docs/results/faults.json

A test reports the faults that it injected through the fixture ``injected``. The faults of a test that fails are not
counted; the test is listed as failed.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from pydantic import BaseModel

from vllm_slimspec.measure.results import Results, provenance

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    "tests/engine/test_faults.py",
    "tests/test_convert_kill.py",
    "tests/test_train.py",
    "tests/test_train_resume.py",
    "tests/test_train_errors.py",
]


class Fault(BaseModel):
    """The injected faults of one kind."""

    fault: str
    injected: int
    answers: int  # compared with the target's own afterwards
    files: list[str]  # of the tests


class Faults(Results):
    """The results of one run."""

    kind: str = "faults"
    passed: int  # tests that broke something, and saw what should come of it
    failed: list[str]
    rows: list[Fault]


def read(report: Path) -> tuple[list[Fault], int, list[str]]:
    """Read pytest's JUnit report; return the faults, the number of passed tests with faults, and the failed tests."""
    faults: dict[str, Fault] = {}
    passed, failed = 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        said = {item.get("name"): str(item.get("value")) for item in case.iter("property")}
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif "fault" in said:
            passed += 1
            fault = faults.setdefault(said["fault"], Fault(fault=said["fault"], injected=0, answers=0, files=[]))
            fault.injected += int(said["times"])
            fault.answers += int(said["answers"])
            file = str(case.get("classname")).replace(".", "/") + ".py"
            if file not in fault.files:
                fault.files.append(file)
    return list(faults.values()), passed, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="JSON file to write the results to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *FILES, "-q", f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        rows, passed, failed = read(report)
    if arguments.json:
        Faults(**provenance(), device="cpu", passed=passed, failed=failed, rows=rows).write(arguments.json)
    sys.exit(code)


if __name__ == "__main__":
    main()

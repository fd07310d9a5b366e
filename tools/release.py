"""`make release`: build the wheel and the sdist of the version in the package, write its notes, and tag the commit.

    python tools/release.py --url https://github.com/OWNER/REPOSITORY    # builds into dist/ and makes the tag v0.2.0
    python tools/release.py --check                                      # only says whether a release could be made

The address of the repository goes into the links of the README, which a package index shows without other files. The
notes are the section of CHANGELOG.md whose heading has the version and a date. Nothing is uploaded.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from vllm_slimspec import __version__
from vllm_slimspec.common.console import one_line_errors
from vllm_slimspec.errors import OptionError, SlimSpecError

ROOT = Path(__file__).resolve().parent.parent


def notes(changelog: str, version: str) -> str:
    """Return the section of a version in the changelog.

    Raises:
        OptionError: the version has no section, or its heading has no date.
    """
    found = re.search(rf"^## {re.escape(version)} \((.+?)\)\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    if found is None:
        raise OptionError(f"CHANGELOG.md: has no section '## {version} (DATE)'; write it")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", found[1]):
        raise OptionError(f"CHANGELOG.md: version {version} has no date but ({found[1]}); write one as 2026-01-31")
    return found[2].strip() + "\n"


def check_clean() -> None:
    """Check that all changes are committed, and that the tag of this version does not exist.

    Raises:
        SlimSpecError: a file has uncommitted changes, or the tag exists.
    """
    if changed := _git("status", "--porcelain"):
        raise SlimSpecError(f"{changed.splitlines()[0][3:]}: has changes that are not committed; commit them")
    if _git("tag", "--list", f"v{__version__}"):
        raise SlimSpecError(f"v{__version__}: the tag exists already; raise __version__ in vllm_slimspec/__init__.py")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build and tag a release.")
    parser.add_argument("--check", action="store_true", help="check whether a release can be made, and build nothing")
    parser.add_argument("--url", help="address of the repository, which is public under it")
    arguments = parser.parse_args()
    if not (arguments.check or re.match("https?://", arguments.url or "")):
        raise OptionError(f"--url {arguments.url}: must be the https:// address of the repository; give it")
    text = notes((ROOT / "CHANGELOG.md").read_text(), __version__)
    check_clean()
    if arguments.check:
        print(f"version {__version__} can be released")
        return
    dist = ROOT / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(ROOT)]
    subprocess.run(command, check=True, env={**os.environ, "SLIMSPEC_URL": arguments.url})
    (dist / f"NOTES-{__version__}.md").write_text(text)
    _git("tag", "--annotate", f"v{__version__}", "--message", f"Version {__version__}")
    print(f"written: {dist}; tagged: v{__version__}. Look at both, then push the tag and upload the files.")


if __name__ == "__main__":
    with one_line_errors():
        main()

"""The notes of a release, out of the changelog."""

import re
import subprocess
import sys

import pytest
from release import ROOT, notes

from vllm_slimspec.errors import OptionError

CHANGELOG = "# Changelog\n\n## 0.3.0 (unreleased)\n\n- New.\n\n## 0.2.0 (2026-01-31)\n\n- Old.\n- Older.\n"


def test_notes_are_the_section_of_the_version():
    """Catches: notes that go on into the section of another version, or that lose a line."""
    assert notes(CHANGELOG, "0.2.0") == "- Old.\n- Older.\n"


@pytest.mark.parametrize(("version", "words"), [("0.3.0", "has no date but"), ("0.4.0", "write it")])
def test_notes_refuse_a_version_without_a_dated_section(version, words):
    """Catches: a release whose notes are empty, or that the changelog still calls unreleased."""
    with pytest.raises(OptionError, match=words):
        notes(CHANGELOG, version)


@pytest.mark.parametrize("url", [None, "https://example.org/slimspec"])
def test_readme_of_a_release_links_to_the_repository(url):
    """Catches: links and pictures of the README that lead nowhere on the page of a package index."""
    given = {} if url is None else {"SLIMSPEC_URL": url}
    command = [sys.executable, "setup.py", "--quiet", "--long-description"]
    text = subprocess.run(command, cwd=ROOT, env=given, check=True, capture_output=True, text=True).stdout
    relative = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    if url is None:
        assert "docs/concepts.md" in relative
    else:
        assert not relative
        assert re.search(rf"(?<!!)\[[^]]+\]\({url}/blob/v[0-9.]+/docs/concepts.md", text)
        assert re.search(rf"!\[[^]]+\]\({url}/raw/v[0-9.]+/docs/head-cpu.png\)", text)

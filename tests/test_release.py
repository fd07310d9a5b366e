"""The notes of a release, out of the changelog."""

import pytest
from release import notes

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

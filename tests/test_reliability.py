"""docs/reliability.md says what was measured."""

import reliability


def test_tables_are_those_of_the_results():
    """Catches: a number typed by hand, or results of another run than the document's."""
    text = reliability.DOCUMENT.read_text()
    assert reliability.render(text) == text

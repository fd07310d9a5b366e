"""README.md and docs/ say what was measured."""

import documents
import pytest


@pytest.mark.parametrize("document", documents.DOCUMENTS)
def test_figures_are_those_of_the_results(document):
    """Catches: a number typed by hand, or results of another run than the document's (`make documents` mends it)."""
    text = (documents.ROOT / document).read_text()
    assert documents.render(document, text) == text


def test_the_roofline_is_of_the_results():
    """Catches: a roofline page of another run."""
    assert (documents.ROOT / "docs/roofline.md").read_text() == documents.roofline()


def test_a_figure_without_a_place_is_an_error():
    """Catches: a marker lost in an edit, and a figure that silently stays as it was."""
    with pytest.raises(ValueError, match=r"docs/convert\.md: no place for the figure real-size"):
        documents.render("docs/convert.md", "no markers")

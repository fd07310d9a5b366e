"""The figures in README.md and docs/ are those that were measured."""

import documents
import pytest


@pytest.mark.parametrize("document", documents.DOCUMENTS)
def test_figures_in_the_documents_are_those_of_the_results(document):
    """Catches: a number typed by hand, or results of another run than the document's (`make documents` mends it)."""
    text = (documents.ROOT / document).read_text()
    assert documents.render(document, text) == text


def test_roofline_page_is_made_from_the_results():
    """Catches: a roofline page made from another run than the results in docs/results."""
    assert (documents.ROOT / "docs/roofline.md").read_text() == documents.roofline()


def test_figure_without_markers_in_the_document_is_an_error():
    """Catches: a marker lost in an edit, after which its figure is silently never updated again."""
    with pytest.raises(ValueError, match=r"docs/convert\.md: no place for the figure real-size"):
        documents.render("docs/convert.md", "no markers")

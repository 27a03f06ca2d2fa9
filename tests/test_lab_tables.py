"""Tables in Markdown, and the generated parts of documents."""

import pytest

from hf_dropkey.lab.tables import markdown, with_part


DOCUMENT = "# x\n<!-- costs begin -->\nold\n<!-- costs end -->\nlast\n"


def test_a_table_has_a_line_for_each_row() -> None:
    assert markdown(["a", "b"], [["1", "2"], ["3", ""]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"


def test_the_part_between_the_markers_is_replaced() -> None:
    changed = with_part(DOCUMENT, "costs", "new")
    assert changed == "# x\n<!-- costs begin -->\nnew\n<!-- costs end -->\nlast\n"
    assert with_part(changed, "costs", "new") == changed


@pytest.mark.parametrize(
    "document",
    [
        "# x\n",
        DOCUMENT + DOCUMENT,
        "<!-- costs end -->\n<!-- costs begin -->\n",
        DOCUMENT.replace("costs", "evidence"),
    ],
)
def test_a_document_without_its_markers_is_an_error(document: str) -> None:
    with pytest.raises(ValueError, match="needs one line <!-- costs begin --> and, after it, one line <!-- costs end"):
        with_part(document, "costs", "new")

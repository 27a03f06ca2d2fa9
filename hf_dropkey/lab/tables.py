"""Tables in Markdown, and the parts of documents that are made from rows: between two markers, which stay."""

from collections.abc import Sequence


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def markers(name: str) -> tuple[str, str]:
    """The lines before and after a generated part."""
    return f"<!-- {name} begin -->", f"<!-- {name} end -->"


def with_part(document: str, name: str, text: str) -> str:
    """A document with the text between the two markers of a name replaced.

    Raises:
        ValueError: The document does not have one of each marker, in this order.
    """
    begin, end = markers(name)
    before, found, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed) or document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(
            f"the document needs one line {begin} and, after it, one line {end}; the generated text goes between them"
        )
    return f"{before}{begin}\n{text}\n{end}{after}"

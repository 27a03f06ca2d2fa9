"""The report of `apply_dropkey`, printed as a table."""

from dataclasses import dataclass

from .sites import Kind, Side, UnreachedAttention


@dataclass(frozen=True)
class RegularisedAttention:
    """One attention that drops keys.

    Attributes:
        name: Dotted name of the attention module.
        depth: Index in its stack of layers, in order of execution, from 0.
        kind: "self" or "cross".
        side: "encoder" or "decoder".
        ratio: Drop ratio, [0, 1).
        backend: Transformers' name of the attention implementation.
    """

    name: str
    depth: int
    kind: Kind
    side: Side
    ratio: float
    backend: str


@dataclass(frozen=True)
class DropKeyReport:
    """Every attention of a model: those that drop keys, and those that do not with the reason.

    Attributes:
        model: Class name of the model.
        pattern: The pattern of the masks.
        sites: The attentions that drop keys, in order of execution.
        unreached: The attentions that do not, with the reason.
        replaced: Whether settings of an earlier call were replaced.
    """

    model: str
    pattern: str
    sites: tuple[RegularisedAttention, ...]
    unreached: tuple[UnreachedAttention, ...]
    replaced: bool = False

    def __str__(self) -> str:
        lines = [f"DropKey on {self.model}, pattern {self.pattern!r}: {len(self.sites)} attentions drop keys"]
        if self.replaced:
            lines[0] += " (replaces the settings of an earlier call)"
        if all(site.ratio == 0 for site in self.sites):
            lines[0] += "; all ratios are 0, so nothing is dropped"
        lines += table(
            ("attention", "depth", "kind", "ratio", "backend"),
            [
                (site.name, str(site.depth), f"{site.side} {site.kind}", f"{site.ratio:.4g}", site.backend)
                for site in self.sites
            ],
        )
        if self.unreached:
            lines += ["not reached:", *(f"  {attention.name}: {attention.reason}" for attention in self.unreached)]
        return "\n".join(lines)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table in columns of equal width."""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]

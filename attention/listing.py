"""Which sites a forward pass meets, with their sizes: an edit that changes nothing, and a table of what it met."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .contract import AttentionEdit, Call, Residual


@dataclass(frozen=True)
class Met:
    """A site in a forward pass. ``heads`` and ``text`` are None where there are none; ``tokens`` are its queries."""

    name: str
    kind: str
    tokens: int
    grid: tuple[int, int, int] | None
    heads: int | None = None
    text: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ListSites(AttentionEdit):
    """Writes down the sites that the forward pass meets, in order; ``found`` is by name and kind."""

    found: dict[tuple[str, str], Met] = field(default_factory=dict)

    title = "Inspect Attention"
    kinds = frozenset({"self", "cross", "joint", "image", "residual"})

    def add(self, met: Met) -> None:
        self.found.setdefault((met.name, met.kind), met)

    def inputs(self, call: Call) -> Call:
        site, text = call.site, len(range(*call.site.text.indices(call.k.shape[2])))
        self.add(Met(site.name, site.kind, call.q.shape[2], site.grid, call.q.shape[1], text or None))
        return call

    def residual(self, block: Residual) -> Tensor:
        frames = block.h.shape[2] if block.h.ndim == 5 else 1
        height, width = block.h.shape[-2:]
        self.add(Met(block.site.name, "residual", frames * height * width, (frames, height, width)))
        return block.h


def table(found: dict[tuple[str, str], Met]) -> str:
    """The sites as lines of text in columns."""
    lines = [("name", "kind", "heads", "tokens", "text", "grid")]
    for met in found.values():
        frames, *sides = met.grid or (1,)
        grid = " x ".join(map(str, sides if frames == 1 else met.grid)) if met.grid else "none (merged tokens)"
        lines.append((met.name, met.kind, str(met.heads or ""), str(met.tokens), str(met.text or ""), grid))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

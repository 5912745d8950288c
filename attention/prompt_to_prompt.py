"""Prompt-to-Prompt inside the attention: edited rows of a batch take over maps of the source row, which is row 0.

Hertz et al., ICLR 2023, arXiv 2208.01626. On UNets the maps of cross-attention are made only here, for the rows that
need them, and the maps of self-attention are never made: equal q and k give equal maps. On transformers, where text and
image attend together, there is no separate map of the text: image tokens take q and k of the source (arXiv 2508.07519,
read in notes), and a word's weight scales its values as the image reads them, which is the paper's factor on the
probabilities without renormalisation (derived).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .contract import AttentionEdit, Call
from .mutual import SOURCE, shared
from .operations import Operation, edited_map


def folded(probabilities: Tensor, length: int) -> Tensor:
    """The map over ``length`` tokens ``[..., length]`` from that over their repetitions ``[..., n * length]``."""
    if probabilities.shape[-1] == length:
        return probabilities
    if probabilities.shape[-1] % length:
        raise ValueError(f"The model sees {probabilities.shape[-1]} text tokens and the prompt has {length}: another "
                         "node adds some. Remove that node, or use the positive of Source and Edits as it is.")
    return probabilities.unflatten(-1, (-1, length)).sum(-2)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextMaps(AttentionEdit):
    """Edited rows attend to their words as ``operations`` say.

    ``operations`` has one for each row, None where the row is left alone; ``inside`` the tokens where it acts,
    ``[tokens]`` each, None for all.
    """

    operations: Sequence[Operation | None] = ()
    inside: Sequence[Tensor | None] = ()
    renorm: str = "none"

    title = "attention to words"
    kinds = frozenset({"cross", "joint"})

    def output(self, call: Call, attend: Callable[..., Tensor]) -> Tensor:
        held = range(call.first, call.first + call.samples)
        rows = [row for row in held if self.operations[row] is not None]
        if call.site.kind == "joint":
            return self.weighted(call, attend, [row for row in rows if self.operations[row].weighs])
        if not rows:
            return attend()
        if call.samples < len(self.operations):
            raise ValueError(f"{self.title}: another edit of '{call.site.name}' sets the source apart from its edits, "
                             "which are compared here. Choose other blocks for it.")
        out = call.by_sample(attend().clone())
        source = call.only(SOURCE).probabilities()
        for row in rows:
            how, mine = self.operations[row], call.only(slice(row, row + 1))
            lengths = how.mapper.shape
            target = folded(mine.probabilities(), lengths[1])
            new = edited_map(folded(source, lengths[0]), target, how, self.renorm)
            if self.inside[row] is not None:
                new = torch.where(self.inside[row], new, target)
            out[:, row] = (new @ mine.v[:, :, : lengths[1]].float()).to(out.dtype)
        return out.flatten(0, 1)

    def weighted(self, call: Call, attend: Callable[..., Tensor], rows: Sequence[int]) -> Tensor:
        """Joint attention: what image tokens read of a word, times its weight. Text rows stay as they are."""
        if not rows:
            return attend()
        v, text = call.v.clone(), call.site.text
        for row in rows:
            weight, inside = self.operations[row].weight.to(v.dtype), self.inside[row]
            weight = weight if inside is None else torch.where(inside, weight, 1.0)
            values = call.by_sample(v)[:, row - call.first, :, text]
            folded(values[..., 0], len(weight))  # checks the length
            values *= weight.repeat(values.shape[2] // len(weight))[:, None]
        out = attend().clone()
        out[:, :, call.site.image] = attend(call.replace(v=v))[:, :, call.site.image]
        return out


@dataclass(frozen=True, kw_only=True, eq=False)
class SameLayout(AttentionEdit):
    """Image tokens of edited rows attend to each other as the source's do, in UNets at self sites of at most ``tokens``
    tokens, in transformers at all. ``seen`` learns the sizes of the sites where it "acted" and which it "skipped"."""

    tokens: int = 256
    seen: dict[str, set[int]] = field(default_factory=dict)

    title = "layout of the source"
    kinds = frozenset({"self", "joint"})

    def inputs(self, call: Call) -> Call:
        acts = not call.site.unet or call.q.shape[2] <= self.tokens
        self.seen.setdefault("acted" if acts else "skipped", set()).add(call.q.shape[2])
        return call.replace(q=shared(call, call.q), k=shared(call, call.k)) if acts else call

"""What an edit of the prompt does to the attention that a picture pays to its words.

Prompt-to-Prompt, Hertz et al., ICLR 2023, arXiv 2208.01626, section 3.2, and the operations that later work names. With
A_s, A_t the maps of the source and of the edit, row-stochastic over tokens, every one of them is

    A_j = w_j ((1 - own_j) (A_s M)_j + own_j A_t,j)

    exchange, "replace"    M carries the old word's map to the new one; n tokens to m as 1/m each (Replace, the paper)
    exchange, "refine"     the new word keeps its own map: own 1 (also how a word is added, in every mode but "degree")
    a degree word          an added word ("very") gets the map of the word that it is about; strengths are weights
    dropped words          their column is left out; padding that takes its place gets nothing
    stronger, weaker       w, the paper's -2 .. 2
    reordered words        M is a permutation
    "style"                own alpha everywhere (0.2, recalled from a survey): the source's map leads

The rows then sum to what the operation makes of them, as in the official code, or are renormalised (derived): "row"
divides them by their sum, "preserve" scales the exchanged and added words alone until the sum before weights is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .contract import TINY
from .words import Tokens, align, matched, runs

MODES = ("replace", "refine", "degree", "reorder", "style")
RENORM = ("none", "row", "preserve")
LEAST = 0.1  # a row's sum counts as this at least, so that large negative weights do not turn it round


@dataclass(frozen=True, eq=False)
class Operation:
    """``mapper`` ``[source tokens, tokens]``; ``own``, ``weight``, ``edited`` (exchanged or added) ``[tokens]``;
    ``weighs``: whether any weight was given, which a device need not be asked for."""

    mapper: Tensor
    own: Tensor
    weight: Tensor
    edited: Tensor
    weighs: bool = False

    @property
    def trivial(self) -> bool:
        """Whether it is that of equal prompts without weights. A word exchanged for another has the same mapper."""
        same = torch.equal(self.mapper, torch.eye(*self.mapper.shape)) and not bool(self.edited.any())
        return same and bool((self.weight == 1).all())

    def weighted(self, tokens: Sequence[int], weight: float) -> Operation:
        factor = torch.ones_like(self.weight)
        factor[list(tokens)] = weight
        return replace(self, weight=self.weight * factor, weighs=self.weighs or bool(tokens))

    def to(self, device: torch.device) -> Operation:
        return replace(self, **{name: getattr(self, name).to(device) for name in ("mapper", "own", "weight", "edited")})


def operation(
    source: Sequence[Tokens], target: Sequence[Tokens], mode: str = "replace", alpha: float = 0.2
) -> Operation:
    """How ``target`` follows from ``source``, encoder by encoder along the token axis."""
    parts = [_mapped(s, t, mode) for s, t in zip(source, target)]
    mapper, edited = torch.block_diag(*(part[0] for part in parts)), torch.cat([part[1] for part in parts])
    own = torch.full_like(edited, alpha, dtype=mapper.dtype) if mode == "style" else (
        edited & (mapper.sum(0) == 0)).to(mapper)
    return Operation(mapper, own, torch.ones_like(own), edited)


def _mapped(source: Tokens, target: Tokens, mode: str) -> tuple[Tensor, Tensor]:
    mapper = torch.zeros(len(source.keys), len(target.keys))
    edited = torch.zeros(len(target.keys), dtype=torch.bool)

    def carry(old: Sequence[int], new: Sequence[int]) -> None:
        a, b = ([t for word in words for t in tokens.of(word)] for tokens, words in ((source, old), (target, new)))
        if len(a) == len(b):
            mapper[a, b] = 1.0
        elif a and b:
            mapper[torch.tensor(a)[:, None], torch.tensor(b)] = 1.0 / len(b)

    places = {key: i for i, key in enumerate(source.keys) if isinstance(key, tuple)}
    for j, key in enumerate(target.keys):
        if key in places:
            mapper[places[key], j] = 1.0
    for old, new, kept in runs((matched if mode == "reorder" else align)(source.words, target.words)):
        if kept:
            carry(kept[:1], kept[1:])
        for word in new:
            edited[target.of(word)] = True
        if old and new and mode == "replace":
            for pair in zip(old, new) if len(old) == len(new) else [(old, new)]:
                carry(*((words,) if isinstance(words, int) else words for words in pair))
        elif new and kept and not old and mode == "degree":
            carry(kept[:1], new)
    return mapper, edited


def edited_map(source: Tensor, target: Tensor, how: Operation, renorm: str = "none") -> Tensor:
    """The edit's new map ``[..., tokens]`` from that of the source ``[..., source tokens]`` and its own."""
    new = (source @ how.mapper) * (1 - how.own) + target * how.own
    if renorm == "preserve":
        mine = torch.where(how.edited, new, 0.0).sum(-1, keepdim=True)
        rest = new.sum(-1, keepdim=True) - mine
        new = torch.where(how.edited, new * ((1 - rest).clamp_min(0) / mine.clamp_min(TINY)), new)
    new = new * how.weight
    return new / new.sum(-1, keepdim=True).clamp_min(LEAST) if renorm == "row" else new

"""Mutual self-attention: edited pictures look at the source picture with their own queries.

    out_edit = Attention(q_edit, k_source, v_source)

MasaCtrl. Cao et al., ICCV 2023, arXiv 2304.08465: in the decoder, from a step on, in the positive and in the negative
half, each with its own half's source. Its variants: union (k and v are [source; own]), here, and masks, see
``foreground.py``. RIVAL (arXiv 2305.18729) uses the first two forms at every block.

On transformers the keys and values of image tokens come from the source, those of the text stay. Blocks that carry
positions would print the source's layout: the 13 of Flux that carry content are FreeFlux's (Wei et al., ICCV 2025,
arXiv 2503.16153, official code); on other transformers (SD3, Qwen-Image, Lumina 2, Z-Image, Wan), for which no list is
published, a share of the depth stands in (derived).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import AttentionEdit, Call
from .sites import Site

FLUX_BLOCKS = 57
FLUX_CONTENT = frozenset({0, 7, 8, 9, 10, 18, 25, 28, 37, 42, 45, 50, 56})
SOURCE, EDITED = slice(0, 1), slice(1, None)  # of the samples of a chunk


def shared(call: Call, tokens: Tensor) -> Tensor:
    """``tokens`` (q, k or v) in which the image tokens of every sample are those of the first, ``[R, heads, T, D]``."""
    out = tokens.clone()
    rows, image = call.by_sample(out), call.site.image
    rows[:, EDITED, :, image] = rows[:, SOURCE, :, image]
    return out


@dataclass(frozen=True, kw_only=True)
class Mutual(AttentionEdit):
    """Samples after the first of a chunk attend to the first's image tokens.

    Args:
        depth: the share of the model's blocks, in their order, that are left alone; above 0 it means FreeFlux's list on
            a Flux of full size. Where ``blocks`` are named they count alone.
        union: attend to the own image tokens as well.
    """

    depth: float = 0.0
    union: bool = False

    title = "mutual self-attention"
    kinds = frozenset({"self", "joint"})

    def acts_at(self, site: Site) -> bool:
        if self.blocks or site.kind not in self.kinds:
            return super().acts_at(site)
        if site.kind == "joint" and site.count == FLUX_BLOCKS and self.depth > 0:
            return site.index in FLUX_CONTENT
        if site.name.startswith("refiner"):  # they come before the blocks
            return self.depth == 0
        return site.index >= int(self.depth * site.count)

    @property
    def alone(self) -> bool:
        """Whether the edits need a kernel call of their own. The source gets its plain one then, so that it stays what
        it is bit by bit."""
        return self.union

    def inputs(self, call: Call) -> Call:
        return call if self.alone else call.replace(k=shared(call, call.k), v=shared(call, call.v))

    def output(self, call: Call, attend: Callable[..., Tensor]) -> Tensor:
        if not self.alone:
            return attend()
        source, edited = call.only(SOURCE), self.edited(call)
        return torch.cat([part.by_sample(attend(part)) for part in (source, edited)], 1).flatten(0, 1)

    def edited(self, call: Call) -> Call:
        """The edits' call alone."""
        looking = call.replace(k=shared(call, call.k), v=shared(call, call.v)).only(EDITED)
        return joined(looking, call.only(EDITED)) if self.union else looking


def joined(call: Call, own: Call) -> Call:
    """``call`` whose queries also see the image tokens of ``own``. Where there is text beside them, both copies have
    half the weight, so that the text keeps its own (derived): two equal pictures are as one."""
    image = call.site.image
    k, v = (torch.cat([a, b[:, :, image]], 2) for a, b in ((call.k, own.k), (call.v, own.v)))
    if call.site.kind != "joint":
        return call.replace(k=k, v=v)  # the host has no mask there
    bias = additive(call.mask, call.q).expand(-1, -1, call.q.shape[2], call.k.shape[2])
    bias = torch.cat([bias, bias[..., image]], -1)
    bias[..., image] -= math.log(2)
    bias[..., call.k.shape[2] :] -= math.log(2)
    return call.replace(k=k, v=v, mask=bias)


def additive(mask: Tensor | None, like: Tensor) -> Tensor:
    """The host's mask as what is added to the logits, ``[1 or R, 1, 1 or queries, 1 or keys]``."""
    if mask is None:
        return like.new_zeros(1, 1, 1, 1)
    mask = mask[(None,) * (4 - mask.ndim)] if mask.ndim < 3 else mask.unsqueeze(1) if mask.ndim == 3 else mask
    hidden = torch.finfo(like.dtype).min
    return like.new_zeros(mask.shape).masked_fill_(~mask, hidden) if mask.dtype == torch.bool else mask.to(like)

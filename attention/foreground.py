"""Which tokens of the source an edited picture may see: the masks of MasaCtrl (arXiv 2304.08465).

    out = M_edit Attention(q; source where M_source) + (1 - M_edit) Attention(q; source where not M_source)

M_edit is 0 or 1 for every query, so both terms are one attention with a mask. The masks come from the user, or from
words, see ``word_masks.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import Call
from .mutual import Mutual, additive


@dataclass(frozen=True, eq=False)
class Masks:
    """The foreground, from 0.5 on: of the source ``[1, H, W]`` and of the edits ``[1 or N, H, W]``, of any size."""

    source: Tensor
    edits: Tensor

    def __call__(self, step: Any) -> Masks:
        """The same at every step."""
        return self


def tokens_of(mask: Tensor, call: Call) -> Tensor:
    """``[N, H, W]`` as image tokens of the call's grid that are foreground, ``[N, t * h * w]``."""
    frames, *size = call.site.grid
    small = F.interpolate(mask.to(call.q.device).float()[:, None], size, mode="area")
    return small.flatten(1).repeat(1, frames) >= 0.5


def apart(call: Call, masks: Masks) -> Tensor:
    """An additive mask ``[1 or R, 1, queries, keys]`` by which each part of the edits sees its part of the source's
    image tokens; a part that the source lacks sees all of it. Other keys are free, and text queries see everything.
    """
    image, (source, edits) = call.site.image, (tokens_of(mask, call) for mask in (masks.source, masks.edits))
    if len(edits) not in (1, call.samples):
        raise ValueError(f"edit_mask: it holds {len(edits)} masks, and {call.samples} pictures of the batch are edits. "
                         "Give one mask for all of them, or one for each.")
    seen = edits[:, :, None] == source[:, None, :]
    seen |= ~seen.any(-1, keepdim=True)
    bias = call.q.new_zeros(len(seen), 1, call.q.shape[2], call.k.shape[2])
    bias[:, 0, image, image].masked_fill_(~seen, torch.finfo(bias.dtype).min)  # not -inf, which makes NaN of no key
    return bias if len(bias) == 1 else bias.repeat(len(call.roles), 1, 1, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Masked(Mutual):
    """Mutual self-attention part by part; ``masks`` are those of a step, None while there are none."""

    masks: Callable[[Any], Masks | None]

    title = "masked mutual self-attention"
    needs_grid = True
    alone = True

    def edited(self, call: Call) -> Call:
        call, masks = super().edited(call), self.masks(call.step)
        if masks is None:
            return call
        if not call.of_whole_picture:
            raise ValueError(f"{self.title}: a part of the picture is evaluated by itself (a prompt has an area, or "
                             "another node works in tiles), and the masks are of the whole. Remove that, or the masks "
                             "and the words that make them.")
        return call.replace(mask=apart(call, masks) + additive(call.mask, call.q))

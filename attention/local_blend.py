"""Local blend of Prompt-to-Prompt (arXiv 2208.01626): where an edit's words are, so that the rest stays the source.

    M = [pool(A_s) / max > 0.3] or [pool(A_e) / max > 0.3],    x0_e <- x0_s + M (x0_e - x0_s)

A: the maps of chosen words in source and edit, summed over steps and small sites, averaged over heads. The official
code blends x_t; on x0 (ours) the end is the same outside of M, but x_t is not the source's there during the run, so the
inside may differ. M is enlarged from the finest grid, trilinear; in the official code from 16 x 16, nearest (recalled).
On transformers A is read from a few blocks, as arXiv 2508.07519 (read in notes), which names its own for each model;
where none is named they are spread over the depth, see ``word_masks.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import TINY, AttentionEdit, Call
from .prompt_to_prompt import folded
from .sites import Site
from .word_masks import paid, spread

Grid = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class WordMaps(AttentionEdit):
    """Sums up where the source and each edit look at chosen words; changes nothing.

    ``columns`` are for each edit the tokens in the source and in itself, ``lengths`` the tokens of each row's prompt.
    ``maps`` gets, by grid (t, h, w), the running sum over sites and steps, ``[2, edits, t * h * w]``.
    """

    columns: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
    lengths: Sequence[int] = ()
    tokens: int = 256
    maps: dict[Grid, Tensor] = field(default_factory=dict)
    seen: dict[str, set[int]] = field(default_factory=dict)

    title = "maps of words"
    kinds = frozenset({"cross", "joint"})
    needs_grid = True

    def acts_at(self, site: Site) -> bool:
        return super().acts_at(site) and (bool(self.blocks) or site.unet or spread(site))

    def output(self, call: Call, attend: Callable[..., Tensor]) -> Tensor:
        count = len(range(*call.site.image.indices(call.q.shape[2])))
        acts = not call.site.unet or count <= self.tokens
        self.seen.setdefault("acted" if acts else "skipped", set()).add(count)
        whole = call.latent == tuple(call.step.x.shape[2:]) and call.step.plain is None  # no area, no look ahead
        if acts and whole and "cond" in call.roles:
            chunk = list(call.roles).index("cond")
            seen = [folded(paid(call, chunk, row), length) for row, length in enumerate(self.lengths)]
            source = [seen[0][:, list(old)].sum(-1) for old, _ in self.columns]
            edits = [seen[row][:, list(new)].sum(-1) for row, (_, new) in enumerate(self.columns, 1)]
            maps = torch.stack([torch.stack(source), torch.stack(edits)])
            self.maps[call.site.grid] = self.maps.get(call.site.grid, 0.0) + maps
        return attend()


def masks(maps: Mapping[Grid, Tensor], threshold: float, size: Sequence[int]) -> Tensor:
    """Where each edit may differ from the source, 0 or 1, ``[edits, 1, (T,) H, W]``: ``size`` is that of the latents.
    The finest grid counts."""
    grid = max(maps, key=math.prod)
    seen = F.max_pool3d(maps[grid].unflatten(-1, grid), (1, 3, 3), 1, (0, 1, 1))
    whole = size if len(size) == 3 else (1, *size)
    seen = F.interpolate(seen, whole, mode="trilinear")
    seen = seen / seen.amax((2, 3, 4), keepdim=True).clamp_min(TINY)
    mask = (seen > threshold).any(0).float()[:, None]
    return mask if len(size) == 3 else mask[:, :, 0]


def blended(x0: Tensor, mask: Tensor) -> Tensor:
    """``x0`` ``[1 + edits, ...]`` with the source (row 0) in the edits where the mask is 0."""
    source = x0[:1]
    return torch.cat([source, torch.where(mask > 0, x0[1:], source)])

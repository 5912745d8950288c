"""What a model finds salient: the attention that image tokens get. Read for SAG, see ``guidance/sag.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .contract import AttentionEdit, Call, scores
from .sites import Site

AT_ONCE = 2**26  # probabilities that exist at a time


def received(q: Tensor, k: Tensor) -> Tensor:
    """Attention that each token gets from all, ``[R, tokens]``, 1 on average: the mean over heads; q and k are ``[R,
    heads, tokens, D]``. One head at a time, and of a video some of its rows: the maps are never held together."""
    stride = max(1, AT_ONCE // (len(q) * k.shape[2]))
    parts = ((part, k[:, i]) for i in range(q.shape[1]) for part in q[:, i].split(stride, 1))
    return sum(scores(*part).softmax(-1).sum(-2) for part in parts) / q.shape[1]


@dataclass(frozen=True, kw_only=True)
class Salience(AttentionEdit):
    """Reads one map in the rows of "cond" and of "uncond" and changes nothing.

    Appends ``[samples, t, h, w]`` to the role in the state of ``owner``, once for each prompt that plays it and sees
    the whole latent, not an area. At a joint site the map is that of image tokens to image tokens: the softmax
    over them alone is the joint one with each query's attention to the text left out (derived).
    """

    owner: Any

    title = "the map of self-attention guidance"
    kinds = frozenset({"self", "joint"})
    needs_grid = True

    def acts_at(self, site: Site) -> bool:
        """``blocks`` "" is the middle of a UNet, and of a transformer the block half-way."""
        if self.blocks:
            return super().acts_at(site)
        if site.unet:
            return site.name == "middle.0" and site.kind == "self"
        whole = site.kind == "joint" or site.kind == "self" and site.name.startswith("block")
        return whole and site.index == site.count // 2

    def output(self, call: Call, attend: Callable[..., Tensor]) -> Tensor:
        chunks = [i for i, role in enumerate(call.roles) if role in ("cond", "uncond")]
        own = call.step.plain is None  # the step's own call, not what a method evaluates elsewhere
        if chunks and own and call.latent == tuple(call.step.x.shape[2:]):
            q, k = (call.by_sample(t[:, :, call.site.image])[chunks].flatten(0, 1) for t in (call.q, call.k))
            seen = received(q, k).unflatten(0, (-1, call.samples)).unflatten(2, call.site.grid)
            for chunk, salience in zip(chunks, seen):
                call.step.state(self.owner).setdefault(call.roles[chunk], []).append(salience)
        return attend()

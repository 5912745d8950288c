"""NAG, normalised attention guidance. Chen et al., arXiv 2505.21179: a negative prompt inside the attention to text.

    Z~ = s Z+ - (s - 1) Z-                      (Z+, Z-: what the positive's queries get from either text)
    Z^ = Z~ min(r, tau) / r,   r = |Z~|_1 / |Z+|_1 per token
    Z  = alpha Z^ + (1 - alpha) Z+

so |Z|_1 <= (1 - alpha + alpha tau) |Z+|_1. The norm is over all heads of a token, L1 as in the official README; the
official file for Flux takes L2 (official code).

On cross-attention the negative's keys and values come from the block's own projections: no further evaluation. On joint
attention the negative is a branch of the same call; its image tokens get the positive's result, as in the official
code, so that it answers to the positive's picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .contract import TINY, AttentionEdit, Call
from .sites import Site


def nag(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """Z from Z+ and Z- ``[R, heads, tokens, D]``; computed in float32."""
    z, other = positive.float(), negative.float()
    pushed = scale * z - (scale - 1) * other
    ratio = pushed.abs().sum((1, 3), keepdim=True) / z.abs().sum((1, 3), keepdim=True).clamp_min(TINY)
    held = pushed * (ratio.clamp_max(tau) / ratio.clamp_min(TINY))
    return (z + alpha * (held - z)).to(positive.dtype)


@dataclass(frozen=True, kw_only=True)
class NormalisedGuidance(AttentionEdit):
    """``nag`` at cross-attention. ``negative`` is the branch of its prompt."""

    negative: Any
    scale: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25

    title = "normalised attention guidance"
    kinds = frozenset({"cross"})

    def guided(self, positive: Tensor, negative: Tensor) -> Tensor:
        return nag(positive, negative, self.scale, self.tau, self.alpha)

    def output(self, call: Call, attend: Callable[..., Tensor]) -> Tensor:
        return self.guided(attend(), call.to_text(call.q, self.negative))


@dataclass(frozen=True, kw_only=True)
class JointNormalisedGuidance(NormalisedGuidance):
    """``nag`` at joint attention, for image tokens, with the negative in the same forward pass."""

    kinds = frozenset({"joint"})

    @property
    def company(self) -> Sequence[Any]:
        return ("cond", self.negative)

    def output(self, call: Call, attend: Callable[..., Tensor]) -> Tensor:
        return attend()

    def across(self, site: Site, roles: Sequence[Any], results: Sequence[Tensor]) -> Sequence[Tensor]:
        if not {self.negative, "cond"} <= set(roles):
            raise ValueError(APART)
        if site.grid is None:
            raise ValueError(f"Negative at Any CFG (NAG): another node changes the image tokens of '{site.name}', so "
                             "where they are is not known. Remove that node.")
        outs, image = [result.clone() for result in results], site.image
        negative = results[list(roles).index(self.negative)][:, :, image]
        for role, out in zip(roles, outs):
            if role != self.negative:
                out[:, :, image] = self.guided(out[:, :, image], negative)
        outs[list(roles).index(self.negative)][:, :, image] = outs[list(roles).index("cond")][:, :, image]
        return outs


APART = (
    "Negative at Any CFG (NAG): the host evaluates the positive and NAG's negative in different forward passes, and on "
    "this model (joint attention of text and image) they must share one. It splits them when the prompts differ in "
    "token count, area, ControlNet or hooks. Encode both with the same node and settings, or remove the node. The text "
    "encoders of Qwen-Image, Lumina 2, Z-Image and Chroma do not pad: there the negative must have as many tokens as "
    "the positive (for Chroma, T5TokenizerOptions with a min_length above both pads them)."
)

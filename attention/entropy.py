"""Attention entropy scaling. Jin et al., NeurIPS 2023, arXiv 2306.08645 (formula recalled; the abstract confirms it).

    softmax(q k^T sqrt(log_T N / d)) v

N is how many tokens a query attends to now, T how many there were in training. More tokens spread the attention (its
entropy grows with ln N), fewer sharpen it; the factor sqrt(ln N / ln T) on q keeps it as the model learnt it.

For self-attention of UNets; cross-attention has as many text tokens as ever. On joint attention (derived): the rows of
image tokens only, and the text counts among the tokens of N and of T, or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .contract import AttentionEdit, Call


def factor(now: float, trained: float) -> float:
    """sqrt(ln N / ln T); 1 where either is a single token, which has no entropy to keep."""
    return math.sqrt(math.log(now) / math.log(trained)) if now > 1 and trained > 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class Entropy(AttentionEdit):
    """Scale the queries of image tokens for a picture of another size than ``trained``, (height, width) in cells of the
    latent. ``text``: whether the text counts among the tokens of joint attention."""

    trained: tuple[float, float]
    text: bool = True

    title = "attention entropy scaling"
    kinds = frozenset({"self", "joint"})

    def inputs(self, call: Call) -> Call:
        image = call.site.image
        tokens = len(range(*image.indices(call.k.shape[2])))
        others = call.k.shape[2] - tokens if self.text else 0
        height, width = call.latent[-2:]
        grown = height * width / math.prod(self.trained)
        scale = factor(tokens + others, tokens / grown + others)
        if scale == 1.0:
            return call
        q = call.q.clone()
        q[:, :, image] *= scale
        return call.replace(q=q)

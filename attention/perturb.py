"""PAG and SEG: a worse prediction from the model itself, by degrading its self-attention; guidance pushes away from it.

    D = D_cfg + s (D_c - D_perturbed)

PAG, perturbed attention guidance. Ahn et al., ECCV 2024, arXiv 2403.17377: the attention map becomes the identity,
every image token keeps its own value v. SEG, smoothed energy guidance. Hong, NeurIPS 2024, arXiv 2408.00760: the
queries are blurred over the token grid with a Gaussian, which blurs the attention logits; as in the official code it
reaches 3 sigma and at most half of the grid, and beyond sigma 9999 the queries become their mean.

On transformers (derived; neither paper has them): only the rows of image tokens change, text rows stay; and the blur is
of the queries before their rotary embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import AttentionEdit, Call

MEAN = 9999.0  # sigma beyond which the blur is the mean, as in SEG's code


@dataclass(frozen=True, kw_only=True)
class Identity(AttentionEdit):
    """Each image token attends to itself alone."""

    title = "perturbed attention"
    kinds = frozenset({"self", "joint"})
    needs_grid = True  # where tokens are merged, queries and values are no longer the same tokens

    def output(self, call: Call, attend: Callable[..., Tensor]) -> Tensor:
        image = call.site.image
        if call.v.shape[2] == len(range(*image.indices(call.v.shape[2]))):
            return call.v
        out = attend().clone()
        out[:, :, image] = call.v[:, :, image]
        return out


def smoothing(side: int, sigma: float, span: float, device: torch.device) -> Tensor:
    """The blur of :func:`gaussian` along one side as a matrix ``[side, side]``: a product with it is several times
    faster than a convolution of one channel."""
    reach = min(math.ceil(2 * span * sigma) // 2, side // 2)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=device) / sigma) ** 2)
    cells = F.pad(torch.eye(side, device=device)[:, None], (reach, reach), mode="reflect")
    return F.conv1d(cells, (weights / weights.sum())[None, None])[:, 0].T


def gaussian(planes: Tensor, sigma: float, span: float = 3.0) -> Tensor:
    """``planes`` ``[..., H, W]``, blurred over H and W with a Gaussian of ``sigma`` cells that is cut off at ``span``
    sigma, and at half of a side; the border is reflected. A constant stays what it is."""
    down, across = (smoothing(side, sigma, span, planes.device) for side in planes.shape[-2:])
    return down @ planes.float() @ across.T


def blur(tokens: Tensor, grid: tuple[int, int, int], sigma: float) -> Tensor:
    """``tokens`` ``[R, heads, t * h * w, D]``, blurred over h and w of each frame; beyond :data:`MEAN` its mean."""
    if sigma > MEAN:
        frames = tokens.unflatten(2, grid)
        return frames.mean((3, 4), keepdim=True).expand_as(frames).flatten(2, 4)
    return gaussian(tokens.movedim(2, 3).unflatten(3, grid), sigma).flatten(3).movedim(3, 2).to(tokens.dtype)


@dataclass(frozen=True, kw_only=True)
class Blur(AttentionEdit):
    """Blur the queries of image tokens with a Gaussian of ``sigma`` tokens; 0 changes nothing."""

    sigma: float = 100.0

    title = "smoothed attention"
    kinds = frozenset({"self", "joint"})
    needs_grid = True

    def inputs(self, call: Call) -> Call:
        if self.sigma == 0:
            return call
        image = call.site.image
        q = call.q.clone()
        blurred = blur(call.unrotated(q[:, :, image], image), call.site.grid, self.sigma)
        q[:, :, image] = call.rotated(blurred, image)
        return call.replace(q=q)

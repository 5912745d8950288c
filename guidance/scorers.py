"""Scorers of candidates for dynamic CFG (``dynamic.py``) that need no model. Derived: the paper's are not public.

What burns at a high weight is the spread of x0: it grows with every bit of push along the prediction, which is also
what RescaleCFG (Lin et al., arXiv 2305.08891, Sec. 3.4) measures and undoes. So the strongest candidate of which the
spread stays near that of the conditional prediction is as much guidance as this step takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import GuidanceError, Step
from .space import TINY, dot, norm


def spread(x0: Tensor) -> Tensor:
    """Standard deviation of a picture over all its values, ``[B]``."""
    values = x0.flatten(1)
    return norm(values - values.mean(1, keepdim=True)) / values.shape[1] ** 0.5  # four times as fast as torch.std


@dataclass(frozen=True)
class Overshoot:
    """More push to the prompt is better as long as the spread is at most ``limit`` times that of the conditional
    prediction; beyond, less is better."""

    limit: float = 1.1

    def __post_init__(self) -> None:
        if not 0 < self.limit < math.inf:
            raise GuidanceError(f"limit is {self.limit:g}; it must be above 0: 1.1 allows ten percent more contrast.")

    def __call__(self, x0: Tensor, step: Step) -> Tensor:
        cond, push = step.preds.cond, x0 - step.preds.cond
        ratio = spread(x0) / spread(cond).clamp_min(TINY)
        gain = norm(push) / norm(cond).clamp_min(TINY) * dot(push, cond - step.preds.uncond).sign()
        return torch.where(ratio <= self.limit, gain, -ratio)

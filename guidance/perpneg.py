"""Perp-Neg. Armandpour et al., arXiv 2304.04968, Sec. 4: only what a negative does not share with the positive pushes.

    p = D_c - D_u,  n_i = D_ni - D_u,  n_i' = n_i - (<n_i, p> / |p|^2) p
    D = D_u + w (p - sum_i a_i n_i')

D_u is the sampler's negative, best an empty prompt; the negatives to push from have weights a_i of their own.
Projections are per sample; the host's own Perp-Neg takes one over the whole batch and fails where p = 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import Branch, Guidance, GuidanceError, Predictions, Prompt, Setup, Step
from .negative import check_negatives
from .space import cosine, perpendicular


@dataclass(frozen=True, kw_only=True)
class PerpNeg(Guidance):
    """Push from ``negatives`` by ``weights`` (a_i), perpendicular to the positive. 2 evaluations a step and one for
    each negative with a weight; rests where the guidance weight is 1."""

    negatives: tuple[Prompt, ...]
    weights: tuple[float, ...] = (1.0,)

    title = "Safe Negatives (Perp-Neg)"
    claims = frozenset({"negatives beside the sampler's"})
    rank = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.negatives or len(self.negatives) != len(self.weights):
            raise GuidanceError(f"{self.title}: give one weight for each negative, and at least one negative.")
        if not all(map(math.isfinite, self.weights)):
            raise GuidanceError(f"{self.title}: the weights are {self.weights}; give finite numbers, 0 for none.")

    def prompts(self) -> Sequence[Branch]:
        return self.negatives

    def check(self, setup: Setup) -> None:
        check_negatives(self.title, self.negatives, setup)

    def branches(self, step: Step) -> Sequence[Branch]:
        return [prompt for prompt, a in zip(self.negatives, self.weights) if a] if step.weight != 1.0 else ()

    def push(self, preds: Predictions, prompt: Prompt) -> Tensor:
        """n_i, 0 where that negative has no say."""
        return preds.said(prompt, preds[prompt] - preds.uncond)

    def away(self, preds: Predictions, push: Tensor) -> Tensor:
        """sum_i a_i n_i', the part that is subtracted from the push, each by its projections where it has a say."""
        pushes = [a * perpendicular(self.push(preds, prompt), preds.said(prompt, push))
                  for prompt, a in zip(self.negatives, self.weights) if a]
        return torch.stack(pushes).sum(0) if pushes else torch.zeros_like(push)

    def direction(self, step: Step, delta: Tensor) -> Tensor:
        if step.weight == 1.0 or not any(self.weights):
            return delta
        first = next(prompt for prompt, a in zip(self.negatives, self.weights) if a)
        step.log(overlap=cosine(self.push(step.preds, first), step.preds.said(first, delta)))
        # D = D_u + w (p - q) is D_c + (w - 1) (p - w / (w - 1) q)
        return delta - step.weight / (step.weight - 1) * self.away(step.preds, delta)

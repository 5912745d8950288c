"""AAPB, adaptive auxiliary prompt blending. Lee, Cha, Ahn, Oh, Koh, Kim, CVPR 2026, arXiv 2603.19158.

    D~(gamma) = D_u + w [ (1 - gamma) D_T + gamma D_A - D_u ]                       (Eq. 8)
    gamma*    = argmin |D~(gamma) - D_T|^2                                          (Eq. 12)
              = (1 - w) / w * <D_T - D_u, D_A - D_T> / |D_A - D_T|^2                (Eq. 13)

T is the rare target prompt (the positive), A a frequent anchor that keeps the rare attribute and generalises the noun,
u the negative, w the guidance weight. Unclamped, the result is D_T + (w - 1) (d - proj_a d) with d = D_T - D_u and
a = D_A - D_T: the guidance push made orthogonal to the anchor-target axis. gamma* is the same for x0, eps, v and score
because it is invariant to any affine map that the three predictions share.

The official code takes one gamma for the whole batch; here it is per sample, so a batch of two equals two batches of
one. It also clamps gamma to [0.01, 0.99], which the paper's formula does not: kept as the default, and an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .blend import blend, require_distinct
from .cfg import require_guidance
from .contract import Branch, Guidance, Predictions, Prompt, Setup, Step
from .space import dot

EPS = 1e-12  # official code: below this w^2 |a|^2 the anchor says nothing and the step is plain CFG
CLAMP = (0.01, 0.99)


def optimal_gamma(target: Tensor, anchor: Tensor, uncond: Tensor, weight: float, clamp: bool = True) -> Tensor:
    """gamma* of Eq. 13 per sample, ``[B]``; 0 where anchor and target agree, and at weight 0, where D~ is D_u anyway.

    Args:
        target, anchor, uncond: predictions ``[B, ...]`` in any one parametrisation.
        weight: guidance weight, > 1 to have an effect.
        clamp: limit gamma to [0.01, 0.99] as the official code does.
    """
    a = anchor - target
    length = dot(a, a)
    strength = (1 - weight) / weight if weight else 0.0
    gamma = strength * dot(target - uncond, a) / length.clamp_min(torch.finfo(a.dtype).tiny)
    if clamp:
        gamma = gamma.clamp(*CLAMP)
    return torch.where(weight**2 * length > EPS, gamma, torch.zeros_like(gamma))


@dataclass(frozen=True, kw_only=True)
class AAPB(Guidance):
    """Blend the target with the anchor by the closed-form gamma of each step and sample. 3 evaluations a step."""

    anchor: Prompt
    clamp: bool = True

    title = "Rare Concept Blend (AAPB)"
    claims = frozenset({"blend of the positive with an anchor"})
    rank = 5  # gamma* is right for the negative that is used in the end

    def prompts(self) -> Sequence[Branch]:
        return (self.anchor,)

    def check(self, setup: Setup) -> None:
        require_guidance(
            self.title, setup, "use 'Rare Concept Schedule (R2F)' in blend mode or 'Prompt Blend (fixed)' there."
        )
        require_distinct(self.title, "anchor", self.anchor, setup)

    def branches(self, step: Step) -> Sequence[Branch]:
        return (self.anchor,) if step.weight != 1.0 else ()

    def refine(self, step: Step, preds: Predictions) -> Predictions:
        if step.weight == 1.0 or preds.uncond is None:  # gamma* is 0: without guidance there is nothing to repair
            return preds
        anchor = preds[self.anchor]
        gamma = step.guided_only(optimal_gamma(preds.cond, anchor, preds.uncond, step.weight, self.clamp))
        step.log(gamma=gamma)
        return preds.replace(cond=blend(preds.cond, anchor, gamma))

"""ANSWER, a negative that the prompt finds itself. Desai & Vasconcelos, ICCV 2025, arXiv 2508.02973. EXPERIMENTAL.

The paper's idea: no negative is written; a short chain of diffusion-negative sampling (DNS, arXiv 2411.05473, the
prompt in the negative's place) from the current latent finds it, at most K iterations. Its pseudo-code and scales could
not be read, so what follows is DERIVED. At (x, s_0), with s_k the noise levels to come and y_0 = x:

    D-_k    = D_p(y_k) + s_n (D_u(y_k) - D_p(y_k))               (away from the prompt)
    y_{k+1} = y_k + (s_{k+1} - s_k) (y_k - D-_k) / s_k           (an Euler step; for flow and for eps and v alike)
    D_neg   = x - s_0 * (mean of (y_k - D-_k) / s_k, weighted with s_k - s_{k+1}, over k < K)
    D       = D_neg + w (D_p(x) - D_neg)

(y - D) / s is dx/ds in every parametrisation, so the mean is the slope at which the chain left x. The chain itself is
thrown away. K = 1 is only CFG at 1 + (w - 1) s_n, while the cap does not act: the displacement, K >= 2, is the method.
For the same reason s_n is 1 and not w, as in DNS: the weights multiply, 7.5 and 7.5 guide like about 50. At s_n = 1 the
chain needs D_u alone.

The path bends even where D_p = D_u, and w amplifies that; the cap bounds |D_p - D_neg| by ``cap`` |D_p - D_u|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cfg import require_guidance
from .contract import Guidance, GuidanceError, Predictions, Setup, Step
from .space import TINY, cosine, expand, norm, shrink


def away(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """D-, ``[B, ...]``: ``uncond`` at scale 1, beyond it above."""
    return cond + scale * (uncond - cond)


def found(x: Tensor, first: Tensor, levels: Sequence[float], predict: Callable[[Tensor, float], Tensor]) -> Tensor:
    """D_neg, ``[B, ...]``, from a chain through ``levels`` s_0 > s_1 > ... (the last may be 0, one more than K).

    ``first`` is D- at (x, s_0) and ``predict(y, s)`` D- further on; with fewer than three levels ``first`` is the
    answer.
    """
    if len(levels) < 3:
        return first
    y, negative, total = x, first, torch.zeros_like(x)
    for k, (sigma, after) in enumerate(zip(levels, levels[1:])):
        negative = predict(y, sigma) if k else first
        move = (after - sigma) / sigma * (y - negative)
        y, total = y + move, total + move
    return x + levels[0] / (levels[0] - levels[-1]) * total


@dataclass(frozen=True, kw_only=True)
class ANSWER(Guidance):
    """Put the found negative in the place of D_u. Evaluations a step: K + 1 at ``negative_scale`` 1, else 2 K; fewer in
    the last K - 1 steps, where the chain ends at the clean picture; 2 outside the window.

    Args:
        chain: K, at least 1.
        negative_scale: s_n; 1 is along the sampler's negative, above 1 further away from the prompt.
        cap: largest norm of the push from the found negative, times that of CFG's; 0 is none.
    """

    chain: int = 2
    negative_scale: float = 1.0
    cap: float = 2.0

    title = "Self-found Negative (ANSWER)"
    claims = frozenset({"prediction of the negative"})
    rank = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chain < 1:
            raise GuidanceError(f"{self.title}: chain is {self.chain}; use 2 or 3 (1 is only another cfg).")
        if not math.isfinite(self.negative_scale):
            raise GuidanceError(f"{self.title}: negative_scale is {self.negative_scale}; use 1, or a finite number.")
        if not self.cap >= 0.0:
            raise GuidanceError(f"{self.title}: norm_cap is {self.cap:g}; use 0 for none, or more. Usual: 2.")

    def check(self, setup: Setup) -> None:
        require_guidance(self.title, setup, "use a method for negatives at cfg 1 there (NAG), or a better prompt.")

    def levels(self, step: Step) -> list[float]:
        """s_0 .. s_K, fewer near the end of the run."""
        return [step.level, *(s for s in step.sigmas.tolist()[step.index + 1:] if s < step.level)][: self.chain + 1]

    def refine(self, step: Step, preds: Predictions) -> Predictions:
        if preds.uncond is None or step.weight == 1.0:
            return preds

        def predict(y: Tensor, sigma: float) -> Tensor:
            if self.negative_scale == 1.0:
                return step.evaluate(y, sigma, "uncond")[0]
            return away(*step.evaluate(y, sigma, "cond", "uncond"), self.negative_scale)

        first = away(preds.cond, preds.uncond, self.negative_scale)
        push = preds.cond - found(step.x, first, self.levels(step), predict)
        plain = preds.cond - preds.uncond
        step.log(found_push=norm(push) / norm(plain).clamp_min(TINY), found_cosine=cosine(push, plain))
        if self.cap:
            push = push * expand(shrink(push, self.cap * norm(plain)), push)
        return preds.replace(uncond=preds.cond - push)

"""beta-CFG. Malarz et al., arXiv 2502.10574, and the official code.

    eps = eps_u + B(tau; a, b) w d / |d|^gamma,   d = eps_c - eps_u,   tau = step / (steps - 1)

B is the density of the Beta distribution (mean 1): no guidance at both ends, most in the middle, and gamma takes the
varying length of d out of the weight. B(0) = B(1) = 0 if a, b > 1: the first and the last step are the unconditional
prediction. With gamma 0 and a = b = 1 it is CFG.

|d| is per sample, in eps: |D_c - D_u| / sigma, which for flow is the length in v. With gamma > 0 the weight would
depend on the size of the latent, so |d| is scaled to the official 4x64x64 latents by sqrt(16384 / numbers) (derived).
Defaults of the command line: a = b = 2, gamma 1, w 7.5; the readme has b = 3.

With Perp-Neg d is what is left of the push, negatives included. With AAPB the blend decides where d points and not how
long it is: gamma* is that of CFG at B w, since no closed form is known for the normalised push (derived).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from .cfg import require_guidance
from .contract import Guidance, GuidanceError, Setup, Step
from .curve import beta_density
from .space import TINY, expand, norm

OFFICIAL = 4 * 64 * 64  # numbers in the latents of the official code


def eps_length(delta: Tensor, sigma: Tensor) -> Tensor:
    """|eps_c - eps_u| per sample, ``[B]``, of x0 differences ``[B, ...]``, as it would be in a 4x64x64 latent."""
    return norm(delta) / sigma.to(delta).clamp_min(TINY) * (OFFICIAL / delta[0].numel()) ** 0.5


@dataclass(frozen=True, kw_only=True)
class BetaCFG(Guidance):
    """Guide in the middle of the run, with the push brought to one length. 2 evaluations a step."""

    alpha: float = 2.0
    beta: float = 2.0
    gamma: float = 1.0

    title = "Normalised Guidance (beta-CFG)"
    claims = frozenset({"course of the guidance weight", "norm of the guidance"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (1.0 <= self.alpha <= 100.0 and 1.0 <= self.beta <= 100.0 and 0.0 <= self.gamma <= 1.0):
            raise GuidanceError(
                f"{self.title}: alpha is {self.alpha:g}, beta {self.beta:g}, gamma {self.gamma:g}; alpha and beta must "
                "lie in [1, 100], gamma in [0, 1]."
            )

    def check(self, setup: Setup) -> None:
        if len(setup.weights) < 3 and (self.alpha > 1 or self.beta > 1):
            raise GuidanceError(
                f"{self.title}: its first and last step are unconditional, so {len(setup.weights)} steps would hold no "
                "guidance at all. Use at least 3 steps, better 10."
            )
        last = max(len(setup.weights) - 1, 1)
        ones = [beta_density(i / last, self.alpha, self.beta) for i in range(len(setup.weights))]
        if all(w == 1.0 or math.isclose(w, one, rel_tol=1e-5) for w, one in zip(setup.weights, ones)):
            setup = replace(setup, weights=[1.0])  # the weight was 1 before the schedule
        require_guidance(
            self.title, setup, "there is no weight to shape, but 'Structure Guidance (PAG)' brings a push of its own."
        )

    def scale(self, step: Step, weight: float) -> float:
        weight *= beta_density(step.progress, self.alpha, self.beta)
        return weight if not self.gamma or not math.isclose(weight, 1.0) else 1.0 + 1e-6  # 1 would drop the negative

    def direction(self, step: Step, delta: Tensor) -> Tensor:
        """What turns w d of the CFG formula into w d / |d|^gamma. d is the whole push from D_u: the executor's formula,
        D_c + (w - 1) delta, is D_u + w d, and delta is what other methods (Perp-Neg) made of D_c - D_u."""
        if step.weight in (0.0, 1.0) or not self.gamma:
            return delta
        pair, w = step.preds.cond - step.preds.uncond, step.weight
        d = (pair + (w - 1) * delta) / w
        length = eps_length(d, step.sigma)
        step.log(eps_norm=length)
        return (expand(w * length.clamp_min(TINY) ** -self.gamma, d) * d - pair) / (w - 1)

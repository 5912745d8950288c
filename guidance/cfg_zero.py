"""CFG-Zero*. Fan et al., arXiv 2503.18886, Eq. 11 and Alg. 1, and the official code.

    s = <v_c, v_u> / |v_u|^2                  (the scale at which v_u explains most of v_c)
    v = s v_u + w (v_c - s v_u)
    v = 0 in the first K steps                (zero-init: early velocities of flow models are worse than none)

s and the rule are for the velocity, so here they act on the residual e = x - x0, which is sigma v for flow and sigma
eps for eps and v models: D = x - [s e_u + w (e_c - s e_u)]. (ComfyUI's own CFGZeroStar takes s from e and scales x0,
which leaves (1 - s)(w - 1) x in the result.) v = 0 is D = x: the latent stays, sigma goes on.

Zero-init is published for flow models that start from pure noise. An eps model would be told a lower noise level than
its latent has, so it rests there, and in the second half of a split run. (Equation numbers recalled.)
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor

from .cfg import require_guidance
from .contract import Guidance, GuidanceError, Predictions, Setup, Step
from .space import TINY, Parametrisation, dot, expand, residual

PURE_NOISE = 0.99  # a flow's sigma above which a run starts from noise


def optimal_scale(cond: Tensor, uncond: Tensor) -> Tensor:
    """s per sample, ``[B]``, from residuals or velocities ``[B, ...]``; 0 where ``uncond`` is zero."""
    return dot(cond, uncond) / dot(uncond, uncond).clamp_min(TINY)


@dataclass(frozen=True, kw_only=True)
class CFGZero(Guidance):
    """Scale the negative's velocity and skip the first ``zero_steps`` steps. 2 evaluations a step, 1 in the skipped."""

    zero_steps: int = 1

    title = "Flow Guidance Fix (CFG-Zero*)"
    claims = frozenset({"prediction of the negative"})
    rank = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_steps < 0:
            raise GuidanceError(f"{self.title}: zero_init_steps is {self.zero_steps}; use 0 for none, 1 as the paper.")

    def check(self, setup: Setup) -> None:
        if all(map(self.zeroed, setup.steps)):
            raise GuidanceError(
                f"{self.title}: zero_init_steps is {self.zero_steps} in a run of {len(setup.weights)} steps, so the "
                "model would never act. Use 1, or 0 in very short runs."
            )
        require_guidance(
            self.title, setup, "this method has no meaning there, 'Sharper Content (TAG)' can correct steps instead."
        )
        skipped = [step for step in setup.steps if self.zeroed(step)]
        why = "it is for flow models (SD3, Flux, Wan)" if setup.parametrisation is not Parametrisation.FLOW else (
            f"its steps lie before start_percent {self.start:g}" if skipped else "")
        if self.zero_steps and why and not any(step.within(self.start, self.end) for step in skipped):
            logging.getLogger("rudder").warning(
                "Rudder: %s: zero-init rests here: %s. The scale of the negative acts. Set zero_init_steps to 0 to say "
                "so.", self.title, why,
            )

    def zeroed(self, step: Step) -> bool:
        """Whether zero-init takes this step."""
        flow = step.parametrisation is Parametrisation.FLOW and float(step.sigmas[0]) > PURE_NOISE
        return flow and step.index < self.zero_steps

    def scale(self, step: Step, weight: float) -> float:
        return 1.0 if self.zeroed(step) else weight  # no prediction counts, so one is enough

    def refine(self, step: Step, preds: Predictions) -> Predictions:
        if preds.uncond is None or step.weight == 1.0:
            return preds
        e_uncond = residual(step.x, preds.uncond)
        s = optimal_scale(residual(step.x, preds.cond), e_uncond)
        step.log(negative_scale=s)
        return preds.replace(uncond=step.x - expand(s, e_uncond) * e_uncond)

    def finish(self, step: Step, x0: Tensor) -> Tensor:
        return step.x if self.zeroed(step) else x0

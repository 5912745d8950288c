"""Adaptive Guidance. Castillo et al., AAAI 2025, arXiv 2312.12487, Sec. 4.

    guide until cos(eps_c, eps_u) >= gamma, from then on the conditional prediction alone, for good

Late in a run the two predictions agree and the second evaluation says little. The cosine is taken on x - x0 (sigma eps,
or sigma v for flow), per sample; on x0 itself it would be near 1 far too early. Every sample switches by itself: from
the step after its cosine reached gamma its picture gets the conditional prediction. Once all have switched, the weight
is 1 and the negative is no longer evaluated.

gamma 0.991 is the paper's for 20 steps at cfg 7.5 and saves about a quarter of the evaluations (recalled, not
re-checked). LinearAG, which predicts eps_u from earlier steps, needs coefficients fitted for one model and schedule
and is not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cfg import require_guidance
from .contract import Guidance, GuidanceError, Predictions, Setup, Step
from .space import cosine, expand, residual


@dataclass(frozen=True, kw_only=True)
class AdaptiveGuidance(Guidance):
    """Stop guiding where it no longer matters. 2 evaluations a step, 1 after all samples of the batch have switched."""

    gamma: float = 0.991

    title = "Faster Guidance (Adaptive)"
    claims = frozenset({"step at which guidance ends"})
    rank = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.gamma):
            raise GuidanceError(f"{self.title}: threshold is {self.gamma:g}; give a cosine, the paper's is 0.991.")

    def check(self, setup: Setup) -> None:
        require_guidance(self.title, setup, "they already take one evaluation a step; remove the node.")

    def scale(self, step: Step, weight: float) -> float:
        return 1.0 if step.state(self).get("all switched") else weight

    def refine(self, step: Step, preds: Predictions) -> Predictions:
        """Remember what the switched samples get; after this step, switch those whose cosine has reached gamma."""
        state = step.state(self)
        state.pop("now", None)
        if preds.uncond is None or step.weight == 1.0:  # off anyway: nothing to measure
            step.log(switched=float(state.get("all switched", False)))
            return preds
        if "switched" in state:
            state["now"] = (state["switched"], preds.cond)
        switched = cosine(residual(step.x, step.plain.cond), residual(step.x, step.plain.uncond)) >= self.gamma
        step.log(switched=state.get("switched", torch.zeros_like(switched)).float())
        state["switched"] = switched | state.get("switched", switched)
        state["all switched"] = bool(state["switched"].all())
        return preds

    def finish(self, step: Step, x0: Tensor) -> Tensor:
        if "now" not in step.state(self):
            return x0
        switched, cond = step.state(self)["now"]
        return torch.where(expand(switched, x0) > 0, cond, x0)

"""Adaptive Guidance. Castillo et al., AAAI 2025, arXiv 2312.12487, Sec. 4.

    guide until cos(eps_c, eps_u) >= gamma, from then on the conditional prediction alone, for good

Late in a run the two predictions agree and the second evaluation says little. The cosine is taken on x - x0 (sigma eps,
or sigma v for flow), per sample; on x0 itself it would be near 1 far too early. Every sample switches by itself: from
the model call after its cosine reached gamma its picture gets what it would at weight 1: the conditional prediction,
and the terms that do not need guidance. Once all have switched, the weight is 1 and no negative is evaluated any more.

gamma 0.991 is the paper's for 20 steps at cfg 7.5 and saves about a quarter of the evaluations (recalled, not
re-checked). It belongs to those models: on others the cosine may start above it or never reach it. A run that gamma did
not decide says so at its end and names the cosine that it had half-way (derived). The paper's LinearAG, which predicts
eps_u in the early steps, is in ``linear_ag.py``; the two go together.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .cfg import require_guidance
from .contract import Guidance, GuidanceError, Predictions, Setup, Step
from .space import cosine, residual


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

    def left(self, step: Step) -> Tensor | None:
        switched = step.state(self).get("switched")
        return switched if switched is not None and step.weight != 1.0 and switched.any() else None

    def refine(self, step: Step, preds: Predictions) -> Predictions:
        """After this step, switch the samples whose cosine has reached gamma."""
        state = step.state(self)
        if preds.uncond is None or step.weight == 1.0:  # off anyway: nothing to measure
            step.log(switched=float(state.get("all switched", False)))
        else:
            step.log(switched=state.get("switched", torch.zeros(len(step.x))).float())
            if step.plain.uncond is not None:  # evaluated, not predicted from earlier steps
                self.measure(step, state)
        if step.sigma_next < step.percent_to_sigma(self.end) or step.index == step.steps - 1:
            self.advise(state)
        return preds

    def measure(self, step: Step, state: dict) -> None:
        cosines = cosine(residual(step.x, step.plain.cond), residual(step.x, step.plain.uncond))
        state["switched"] = (cosines >= self.gamma) | state.get("switched", torch.zeros_like(cosines, dtype=torch.bool))
        state["all switched"] = bool(state["switched"].all())
        state.setdefault("cosines", []).append(float(cosines.mean()))

    def advise(self, state: dict) -> None:
        """Tell the user, once, when gamma had no say: no picture reached it, or all as soon as this method looked."""
        cosines = [] if state.get("advised") else state.get("cosines", [])
        state["advised"] = True  # solvers of several calls a step come to the last level more than once
        if len(cosines) > 1 and not state["switched"].any():
            logging.getLogger("rudder").warning(
                "Rudder: %s: the cosine went from %.4f to %.4f and did not reach the threshold %g, so every step was "
                "guided. On this model %.4f would stop guiding about half-way.",
                self.title, cosines[0], cosines[-1], self.gamma, max(cosines[: len(cosines) // 2 + 1]) - 5e-5,
            )
        elif len(cosines) == 1 and state["all switched"]:
            logging.getLogger("rudder").warning(
                "Rudder: %s: the cosine was %.4f at the first step that it looked at, above the threshold %g, so "
                "start_percent alone decided. Set the threshold above 1 once to be told the cosines of this model.",
                self.title, cosines[0], self.gamma,
            )

"""LinearAG, the second method of Adaptive Guidance. Castillo et al., AAAI 2025, arXiv 2312.12487.

    eps_u(k) = sum_{i <= k} b_i eps_c(i) + sum_{i < k} b'_i eps_u(i)

In the first half of the run the negative is evaluated in every second step only; in the others its prediction is an
affine combination of what was predicted so far. (The rule and "every second step of the first half" are recalled; the
abstract confirms affine transformations of past scores.) Here eps is (x - x0) / sigma, the velocity for flow, and only
evaluated negatives enter the sum, so that errors do not feed on themselves (both derived). The eps_c are one prompt's:
where another plays the positive (R2F), each prompt has its own steps and its own past (derived).

The b belong to one model and one list of noise levels and were not published: ``linear_fit.py`` finds them. Without
them the last push is held: eps_u(k) = eps_c(k) + eps_u(j) - eps_c(j), j the last evaluated step (derived).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .cfg import require_guidance
from .contract import Guidance, GuidanceError, Predictions, Setup, Step
from .linear_fit import Coefficients
from .space import expand, residual


@dataclass(frozen=True, kw_only=True)
class LinearAG(Guidance):
    """Predict the negative instead of evaluating it. 2 evaluations in every ``every``-th step of the window, 1 else."""

    every: int = 2
    coefficients: Coefficients | None = None

    title = "Faster Guidance (LinearAG)"
    claims = frozenset({"steps in which the negative is evaluated"})
    rank = 1  # the calibrations of the negative then see a plain pair

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 2:
            raise GuidanceError(f"{self.title}: every is {self.every}; use 2 (paper) or more. 1 saves nothing.")
        if self.coefficients is not None and (self.start > 0 or self.every != self.coefficients.every):
            raise GuidanceError(
                f"{self.title}: the coefficients were fitted for every {self.coefficients.every} from the first step "
                f"on, and this is every {self.every} from {self.start:g} on. Fit them again, or run without them."
            )

    def check(self, setup: Setup) -> None:
        require_guidance(self.title, setup, "they already take one evaluation a step; remove the node.")
        acting = [step.within(self.start, self.end) for step in setup.steps]
        needed = [weight for weight, acts in zip(setup.weights, acting) if acts][:: self.every]
        if self.coefficients is not None and 1.0 in needed and not setup.overridden:
            raise GuidanceError(
                f"{self.title}: its coefficients need the negative of every {self.every}. step, and another node "
                "turns guidance off in some of them (an interval, a schedule, zero-init). Run it without coefficients."
            )

    def memory(self, step: Step) -> dict:
        """What is known of the prompt that plays the positive at this step."""
        return step.state(self).setdefault(step.player, {})

    def position(self, step: Step) -> int:
        """Fitted: the step at this noise level. Held: how many model calls of this prompt came before, whatever the
        solver does."""
        if self.coefficients is None:
            return self.memory(step).get("calls", 0)
        if step.player is not None:
            raise GuidanceError(f"{self.title}: its coefficients belong to one prompt, and '{step.player.name}' plays "
                                "the positive in some steps (R2F). Run without coefficients, or remove one of the two.")
        found = self.coefficients.step(step.level)
        if found is None:
            raise GuidanceError(
                f"{self.title}: its coefficients were fitted for {len(self.coefficients.sigmas)} steps at other noise "
                f"levels than this run's; {step.level:.4g} is not among them. Fit them with the sampler's own steps "
                "and scheduler and a sampler of one evaluation a step, or run without coefficients."
            )
        return found

    def past(self, step: Step) -> list[tuple[float, Tensor]] | None:
        """(b, eps of an earlier step) ... for this step's prediction; None where the negative must be evaluated."""
        pairs: dict[int, tuple[Tensor, Tensor | None]] = self.memory(step).get("pairs", {})
        now = self.position(step)
        if self.coefficients is None:
            last = max(pairs, default=-self.every)
            return None if now - last >= self.every else [(-1.0, pairs[last][0]), (1.0, pairs[last][1])]
        needed = range(0, now, self.every)
        if now % self.every == 0 or any(i not in pairs for i in range(now)) or any(pairs[i][1] is None for i in needed):
            return None
        rows = self.coefficients.cond[now].tolist()[:now], self.coefficients.uncond[now].tolist()
        return [(b, pairs[i][kind]) for kind, row in enumerate(rows) for i, b in enumerate(row) if b]

    def predicts_uncond(self, step: Step) -> bool:
        past = self.memory(step)["past"] = None if step.weight == 1.0 else self.past(step)
        return past is not None

    def refine(self, step: Step, preds: Predictions) -> Predictions:
        state, now = self.memory(step), self.position(step)
        past = state["past"]
        sigma = expand(step.sigma, step.x)
        cond = residual(step.x, preds.cond) / sigma
        uncond = None if preds.uncond is None else residual(step.x, preds.uncond) / sigma  # a sampler may ask for it
        step.log(predicted=float(bool(past) and uncond is None))
        pairs = state.setdefault("pairs", {})
        if self.coefficients is None and uncond is not None:
            pairs.clear()  # only the last push is held
        if self.coefficients is not None or uncond is not None:
            pairs[now] = (cond, uncond)
        state["calls"] = now + 1
        if not past or uncond is not None:
            return preds
        own = 1.0 if self.coefficients is None else float(self.coefficients.cond[now, now])
        return preds.replace(uncond=step.x - sigma * (own * cond + sum(b * eps for b, eps in past)))

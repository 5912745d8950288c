"""The course of the guidance weight over a run: weak-strong-weak and curves drawn by hand.

    w(t) = 1 + (w - 1) f(t),   f(t) = low + (1 - low) shape(u),   u = (t - start) / (end - start)

t is the share of the model's timesteps, 0 (pure noise) .. 1 (clean), as in every start and end percent. f = 1 is the
sampler's cfg, f = 0 no guidance and one evaluation less; outside of start .. end f is ``low``. Every shape has mean 1:

    interval  1                       step      1, also after end
    triangle  2 (1 - |2u - 1|)        cosine    1 - cos(2 pi u)       beta      density of Beta(a, b) at u

Weak-strong-weak: stage-wise guidance (arXiv 2509.22007, ICLR 2026) finds that early guidance shifts the mean, middle
guidance separates the modes and late guidance contracts them, and ramps the weight from 1 to 2 w - 1 and back: the
triangle with low 0. It keeps the time average of the weight at w, sum w_i dt_i = w; ``keep_average`` does that for any
curve by scaling f, so that the ends of the triangle stay at 1 exactly (the official code scales w). Its t is a flow's
time; on flow models with a shifted schedule the average here is over the unshifted timesteps. The beta shape is the
schedule of beta-CFG (arXiv 2502.10574) without its unconditional ends.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from .cfg import require_guidance
from .contract import Guidance, GuidanceError, Setup, Step
from .curve import Points, beta_density, interpolate

TITLE = "Guidance Schedule"
MOST = 200.0  # beyond any weight that makes a picture
SHAPES = ("triangle", "cosine", "beta", "interval", "step", "curve")


@dataclass(frozen=True, kw_only=True)
class Schedule(Guidance):
    """Multiply the push, weight - 1, by a curve over the run. 2 evaluations a step, 1 where the curve is 0.

    ``first`` and ``last`` are the curve's start and end ("step" ignores the second, "curve" both); ``low`` its factor
    outside and at the feet, 0 .. 1.
    """

    shape: str = "triangle"
    low: float = 0.0
    first: float = 0.0
    last: float = 1.0
    alpha: float = 2.0
    beta: float = 2.0
    points: Points = ()
    keep_average: bool = True

    title = TITLE
    claims = frozenset({"course of the guidance weight"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape not in SHAPES or (self.shape == "curve") != bool(self.points):
            raise GuidanceError(f"{TITLE}: the shape is '{self.shape}'; use one of {', '.join(SHAPES)}, a curve with "
                                "points.")
        if self.shape not in ("step", "curve") and not 0.0 <= self.first < self.last <= 1.0:
            raise GuidanceError(
                f"{TITLE}: start {self.first:g} and end {self.last:g} must satisfy 0 <= start < end <= 1."
            )
        if not (0.0 <= self.low <= 1.0 and 1.0 <= self.alpha <= 100.0 and 1.0 <= self.beta <= 100.0):
            raise GuidanceError(
                f"{TITLE}: low is {self.low:g}, alpha {self.alpha:g}, beta {self.beta:g}; low must lie in [0, 1], "
                "alpha and beta in [1, 100]."
            )

    def factor(self, t: float) -> float:
        """f(t), before the average is restored."""
        if self.shape == "curve":
            return interpolate(self.points, t)
        if self.shape == "step":
            return self.low if t < self.first else 1.0
        if not self.first <= t <= self.last:
            return self.low
        u = (t - self.first) / (self.last - self.first)
        shapes = {"triangle": 2 - 2 * abs(2 * u - 1), "cosine": 1 - math.cos(2 * math.pi * u)}
        shape = beta_density(u, self.alpha, self.beta) if self.shape == "beta" else shapes.get(self.shape, 1.0)
        return self.low + (1 - self.low) * shape

    def average(self, step: Step) -> float:
        """The mean of f over the timesteps that the run covers, each step weighing what it covers."""
        times = [step.percent_of(float(sigma)) for sigma in step.sigmas]
        spans = [abs(t1 - t0) for t0, t1 in zip(times, times[1:])]
        return sum(self.factor(t) * span for t, span in zip(times, spans)) / max(sum(spans), 1e-12)

    def check(self, setup: Setup) -> None:
        if setup.cfg != 1.0 and setup.has_negative and all(weight == 1.0 for weight in setup.weights):
            raise GuidanceError(
                f"{TITLE}: no step of this run has guidance: the curve is 0 at all of them, or another node turned it "
                "off. Widen the curve, raise low, or use more steps."
            )
        require_guidance(
            TITLE, setup, "there is no weight to schedule, but 'Structure Guidance (PAG)' acts, with start and end."
        )
        if setup.guided and setup.steps and all(abs(self.scale(step, 2.0) - 2) < 1e-6 for step in setup.steps):
            logging.getLogger("rudder").warning(
                "Rudder: %s: the weight is the sampler's at every step of this run%s, so the node changes nothing.",
                TITLE, " once the average is kept" if self.keep_average else "",
            )
        if max(setup.weights) > MOST:
            raise GuidanceError(
                f"{TITLE}: the curve is so narrow that keeping the average takes a weight of {max(setup.weights):.0f}. "
                "Widen it, raise low, or turn keep_average off."
            )

    def scale(self, step: Step, weight: float) -> float:
        state = step.state(self)
        if "average" not in state:
            state["average"] = (self.average(step) if self.keep_average else 1.0) or 1.0  # 0: check refuses the run
        factor = self.factor(step.percent_of(step.level))
        return 1.0 + (weight - 1.0) * factor / state["average"] if factor else 1.0

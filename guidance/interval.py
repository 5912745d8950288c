"""Guidance in a limited interval of noise levels. Kynkaanniemi et al., NeurIPS 2024, arXiv 2404.07724, Eq. 4.

    w(sigma) = w inside (sigma_low, sigma_high], 1 outside

Outside the interval the negative is not evaluated at all: 1 evaluation instead of 2.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from .contract import Guidance, GuidanceError, Setup, Step

log = logging.getLogger("rudder")

OTHER_LEVELS = ("Flow models (SD3, Flux, Wan) count sigma from 1 to 0, there the paper's interval is about 0.22 to "
                "0.84; start_percent and end_percent mean the same on every model.")


def interval_weight(sigma: float, low: float, high: float, weight: float) -> float:
    """The guidance weight at noise level ``sigma``: ``weight`` in (low, high], else 1."""
    return weight if low < sigma <= high else 1.0


@dataclass(frozen=True, kw_only=True)
class LimitedInterval(Guidance):
    """Guide only while ``sigma_low < sigma <= sigma_high`` (the paper's SDXL: 0.28 .. 5.42) and between ``first`` and
    ``last`` in percent of the model's timesteps, 0 (noise) .. 1 (clean); the weight is 1 elsewhere."""

    sigma_low: float = 0.0
    sigma_high: float = float("inf")
    first: float = 0.0
    last: float = 1.0

    title = "Guidance Interval"
    rank = 1  # a gate: it acts on whatever weight the other methods chose, however they are wired

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.sigma_low < self.sigma_high:
            raise GuidanceError(
                f"{self.title}: sigma_low {self.sigma_low:g} must be at least 0 and below sigma_high "
                f"{self.sigma_high:g}."
            )
        if not 0.0 <= self.first <= self.last <= 1.0:
            raise GuidanceError(
                f"{self.title}: start {self.first:g} and end {self.last:g} must satisfy 0 <= start <= end <= 1."
            )

    def check(self, setup: Setup) -> None:
        if setup.cfg == 1.0 and not setup.guided:
            raise GuidanceError(
                f"{self.title}: cfg is 1, so there is no guidance to limit. Raise cfg in the sampler, or use "
                "'Structure Guidance (PAG)', which acts at cfg 1 and has a start and an end of its own."
            )
        self.advise(setup.steps)

    def advise(self, steps: Sequence[Step]) -> None:
        """Tell the user of limits that cut off no step of this run, or all: those of another model, most often."""
        inside = [self.scale(step, 2.0) != 1.0 for step in steps]
        if not steps:
            return
        levels = f"whose steps have noise levels from {steps[0].level:.4g} to {steps[-1].level:.4g}"
        if not any(inside):
            log.warning("Rudder: %s: no step of this run, %s, lies in it, so nothing is guided. %s", self.title, levels,
                        OTHER_LEVELS)
            return
        idle = [f"sigma_high {self.sigma_high:g}"] if inside[0] and math.isfinite(self.sigma_high) else []
        idle += [f"sigma_low {self.sigma_low:g}"] if inside[-1] and self.sigma_low > 0 else []
        if idle or all(inside):
            log.warning(
                "Rudder: %s: %s in this run, %s.%s %s",
                self.title, f"{' and '.join(idle)} cut off no step" if idle else "every step is inside", levels,
                " All are guided: the node changes nothing." if all(inside) else "", OTHER_LEVELS,
            )

    def scale(self, step: Step, weight: float) -> float:
        inside = step.within(self.first, self.last)
        return interval_weight(step.level, self.sigma_low, self.sigma_high, weight if inside else 1.0)

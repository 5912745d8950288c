"""Guidance in a limited interval of noise levels. Kynkaanniemi et al., NeurIPS 2024, arXiv 2404.07724, Eq. 4.

    w(sigma) = w inside (sigma_low, sigma_high], 1 outside

Outside the interval the negative is not evaluated at all: 1 evaluation instead of 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from .contract import Guidance, GuidanceError, Setup, Step


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
                f"{self.title}: cfg is 1, so there is no guidance to limit. Raise cfg in the sampler, or "
                "remove the node."
            )

    def scale(self, step: Step, weight: float) -> float:
        inside = step.within(self.first, self.last)
        return interval_weight(step.level, self.sigma_low, self.sigma_high, weight if inside else 1.0)

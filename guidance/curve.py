"""Curves over a run: a number for every share t of the model's timesteps, 0 (pure noise) .. 1 (clean)."""

from __future__ import annotations

import math

from .contract import GuidanceError

Points = tuple[tuple[float, float], ...]


def beta_density(u: float, a: float, b: float) -> float:
    """Density of the Beta distribution at ``u`` in [0, 1]; ``a``, ``b`` at least 1. Its mean over u is 1."""
    return u ** (a - 1) * (1 - u) ** (b - 1) * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))


def parse(text: str) -> Points:
    """Points "t:f, t:f, ..." in rising order of t in [0, 1], f at least 0; commas, semicolons or lines between them."""
    entries = [entry.strip() for entry in text.replace(";", ",").replace("\n", ",").split(",") if entry.strip()]
    points = []
    for entry in entries:
        try:
            t, f = map(float, entry.split(":"))
        except ValueError:
            raise GuidanceError(
                f"'{entry}' is not a point of the curve. Write time:factor, for example 0:0, 0.5:2, 1:0; time "
                "0 is noise and 1 the clean picture, factor 1 is the sampler's cfg."
            ) from None
        if not (0 <= t <= 1 and 0 <= f < math.inf and (not points or points[-1][0] < t)):
            raise GuidanceError(
                f"The curve's point '{entry}' does not fit: times must rise within 0 .. 1, factors be 0 or more."
            )
        points.append((t, f))
    if not points:
        raise GuidanceError("The curve has no point. Write time:factor, for example 0:0, 0.5:2, 1:0.")
    return tuple(points)


def interpolate(points: Points, t: float) -> float:
    """Straight lines between the points, constant before the first and after the last."""
    for (t0, f0), (t1, f1) in zip(points, points[1:]):
        if t0 <= t <= t1:
            return f0 + (f1 - f0) * (t - t0) / (t1 - t0)
    return points[0][1] if t < points[0][0] else points[-1][1]

"""How far samples are from the true law of a prompt.

* ``w2``: the 2-Wasserstein distance between as many samples as true samples, by exact optimal transport (an assignment
  problem). In the units of the world, whose overall standard deviation is 1 a dimension. It is never 0: two sets of
  true samples differ as well, and that distance is the floor to read it against.
* ``sliced``: the same along the directions of random bases, root mean square over them, times sqrt(D) so that a mere
  shift has its own length. Never above ``w2``, blind to much of the shape, but its floor hardly grows with D.
* ``coverage``: total variation between how often samples and true samples fall to each mode, 0 .. 1.
* ``right``: the share of samples whose likeliest mode is one of the target's: what a judge of pictures would say.
* ``inside``: the share of samples within the 99 % ellipsoid of such a mode: what was pushed out of it does not count.
* ``spread``: standard deviation of the right samples around the centre of those of their mode, over the true one; 1 is
  right, 0 is one picture a mode, and strays between the modes make it large.

A sample belongs to the mode under which it is likeliest, all modes being given the same weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from .worlds import World

LEVEL = 0.99  # of the ellipsoid that "inside" means
DIRECTIONS = 256  # at least, in whole bases


def w2(a: Tensor, b: Tensor) -> float:
    """Exact 2-Wasserstein distance of two point sets ``[N, D]`` of the same size; N^3, so keep N below about 1000."""
    cost = torch.cdist(a, b).square().numpy()
    return float(cost[scipy.optimize.linear_sum_assignment(cost)].mean() ** 0.5)


def sliced_w2(a: Tensor, b: Tensor, directions: Tensor) -> float:
    """Root mean square over ``directions`` ``[M, D]`` of the 2-Wasserstein distance along them, times sqrt(D)."""
    moved = (a @ directions.T).sort(0).values - (b @ directions.T).sort(0).values
    return float((moved.square().mean() * a.shape[1]).sqrt())


def total_variation(p: Tensor, q: Tensor) -> float:
    """Half the sum of absolute differences of two distributions ``[K]``."""
    return float((p - q).abs().sum() / 2)


@dataclass(frozen=True)
class Ruler:
    """Measures samples of one world; the same directions and true frequencies for everything that it measures."""

    world: World
    frequencies: Tensor  # how often a true sample falls to each mode, [K]
    directions: Tensor  # [M, D], rows of orthonormal bases

    @classmethod
    def of(cls, world: World, generator: torch.Generator, count: int = 50_000) -> Ruler:
        """``count`` true samples tell the frequencies: where modes overlap they are not quite the weights."""
        nearest, _ = assigned(world, world.true_samples(count, generator))
        dimensions = world.modes.means.shape[1]
        bases = torch.randn(-(-DIRECTIONS // dimensions), dimensions, dimensions, generator=generator).double()
        directions = torch.linalg.qr(bases).Q.mT.flatten(0, 1)
        return cls(world, frequencies(world, nearest), directions)

    def measure(self, samples: Tensor, truth: Tensor) -> dict[str, float]:
        """The distances in the module docstring of ``[N, C, H, W]`` samples to as many true ones; spread may be nan."""
        nearest, inside = assigned(self.world, samples)
        right = self.world.right[nearest]
        a, b = samples.flatten(1).double(), truth.flatten(1).double()
        return {
            "w2": w2(a, b),
            "sliced": sliced_w2(a, b, self.directions),
            "coverage": total_variation(frequencies(self.world, nearest), self.frequencies),
            "right": float(right.double().mean()),
            "inside": float((right & inside).double().mean()),
            "spread": spread(self.world, a[right], nearest[right]),
        }


def frequencies(world: World, nearest: Tensor) -> Tensor:
    """How often each mode is met, ``[K]``, float64."""
    return torch.bincount(nearest, minlength=len(world.modes)).double() / len(nearest)


def assigned(world: World, samples: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest mode of each sample ``[N]``, and whether the sample lies in that mode's ellipsoid."""
    flat = samples.flatten(1).double()
    clean = torch.ones(len(flat), dtype=flat.dtype)
    nearest = world.modes.log_likelihoods(flat, clean, 0 * clean).argmax(1)
    distance = world.modes.distances(flat).gather(1, nearest[:, None])[:, 0]
    return nearest, distance <= scipy.stats.chi2.ppf(LEVEL, flat.shape[1])


def spread(world: World, flat: Tensor, nearest: Tensor) -> float:
    """Standard deviation of ``flat`` ``[N, D]`` around the centres of their modes over the true one; nan where no mode
    has two samples."""
    found = expected = 0.0
    for mode in nearest.unique():
        mine = flat[nearest == mode]
        found += float((mine - mine.mean(0)).square().sum())
        expected += float(world.modes.traces[mode]) * (len(mine) - 1)
    return (found / expected) ** 0.5 if expected else float("nan")

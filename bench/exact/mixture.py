"""Gaussian mixtures under noise, in closed form: densities, posteriors, and the denoised estimate E[x0 | x].

A noised sample is x = scale * x0 + sigma * noise, with scale 1 for EPS and 1 - sigma for FLOW (``guidance/space.py``).
Under it mode k is N(scale * m_k, scale^2 C_k + sigma^2 I), so with r_k(x) the posterior of the modes

    E[x0 | x] = sum_k r_k(x) (m_k + scale C_k (scale^2 C_k + sigma^2 I)^-1 (x - scale m_k))

and everything else that a network may be asked for (eps, v, score) follows by ``guidance/space.py``. Covariances are
C_k = floor_k I + sum_r variances_kr a_kr a_kr^T with few orthonormal axes, so no D x D matrix is ever formed. The
arithmetic is float64: what is called exact here is exact to about 1e-12.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rudder.guidance.space import Parametrisation


def scale_of(sigma: Tensor, kind: Parametrisation) -> Tensor:
    """What x0 is multiplied by at noise level ``sigma``, same shape."""
    return 1 - sigma if kind is Parametrisation.FLOW else torch.ones_like(sigma)


@dataclass(frozen=True)
class Modes:
    """K Gaussians in D dimensions with R axes each, float64. Weights are given to every call: a prompt is weights.

    Attributes:
        means: ``[K, D]``; floor: ``[K]``, variance in every direction.
        axes: ``[K, R, D]``, orthonormal within a mode; variances: ``[K, R]``, what they add to the floor.
    """

    means: Tensor
    axes: Tensor
    variances: Tensor
    floor: Tensor

    def __len__(self) -> int:
        return len(self.means)

    @property
    def traces(self) -> Tensor:
        """Total variance of every mode, ``[K]``."""
        return self.means.shape[1] * self.floor + self.variances.sum(1)

    def moved(self, shift: Tensor, factor: float) -> Modes:
        """The modes of (x0 + shift) * factor."""
        return Modes((self.means + shift) * factor, self.axes, self.variances * factor**2, self.floor * factor**2)

    def moments(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[D]`` and total variance of the mixture with ``weights`` ``[K]``."""
        mean = weights @ self.means
        return mean, weights @ (self.traces + (self.means - mean).square().sum(1))

    def covariances(self, scale: float = 1.0, sigma: float = 0.0) -> Tensor:
        """Dense covariances under noise, ``[K, D, D]``: for tests and pictures only."""
        dense = torch.einsum("kr,krd,kre->kde", self.variances, self.axes, self.axes)
        eye = torch.eye(self.means.shape[1], dtype=dense.dtype)
        return scale**2 * (dense + self.floor[:, None, None] * eye) + sigma**2 * eye

    def sample(self, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``count`` clean draws ``[count, D]``."""
        which = torch.multinomial(weights, count, replacement=True, generator=generator)
        white = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        along = torch.randn(count, self.variances.shape[1], generator=generator, dtype=self.means.dtype)
        axes = torch.einsum("nr,nrd->nd", along * self.variances[which].sqrt(), self.axes[which])
        return self.means[which] + self.floor[which, None].sqrt() * white + axes

    def _under(self, x: Tensor, scale: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What densities and estimates share: isotropic variance ``[B, K]``, variance along the axes ``[B, K, R]``,
        projections of x - scale * m on the axes ``[B, K, R]``, and its squared length off the axes ``[B, K]``."""
        s, s2, n2 = scale[:, None], scale.square()[:, None], sigma.square()[:, None]
        iso = s2 * self.floor + n2
        along = s2[..., None] * self.variances + iso[..., None]
        offsets = torch.einsum("krd,kd->kr", self.axes, self.means)
        projections = (x @ self.axes.flatten(0, 1).T).unflatten(1, offsets.shape) - s[..., None] * offsets
        length = x.square().sum(1, keepdim=True) - 2 * s * (x @ self.means.T) + s2 * self.means.square().sum(1)
        return iso, along, projections, length - projections.square().sum(2)

    def _logs(self, iso: Tensor, along: Tensor, projections: Tensor, rest: Tensor) -> Tensor:
        """log p(x | mode) ``[B, K]`` of what :meth:`_under` gives."""
        dimensions, axes = self.means.shape[1], self.axes.shape[1]
        constant = (dimensions - axes) * iso.log() + along.log().sum(2) + dimensions * math.log(2 * math.pi)
        return -0.5 * (rest / iso + (projections.square() / along).sum(2) + constant)

    def log_likelihoods(self, x: Tensor, scale: Tensor, sigma: Tensor) -> Tensor:
        """log p(x | mode) ``[B, K]`` of noised ``x`` ``[B, D]``; scale and sigma ``[B]``."""
        return self._logs(*self._under(x, scale, sigma))

    def distances(self, x: Tensor) -> Tensor:
        """Squared Mahalanobis distance of clean ``x`` to every mode, ``[B, K]``: chi-squared with D degrees."""
        clean = torch.ones(len(x), dtype=x.dtype)
        iso, along, projections, rest = self._under(x, clean, 0 * clean)
        return rest / iso + (projections.square() / along).sum(2)

    def log_density(self, x: Tensor, scale: Tensor, sigma: Tensor, weights: Tensor) -> Tensor:
        """log p(x) ``[B]`` under noise; ``weights`` ``[K]`` or ``[B, K]``."""
        return torch.logsumexp(self.log_likelihoods(x, scale, sigma) + weights.log(), 1)

    def posterior(self, x: Tensor, scale: Tensor, sigma: Tensor, weights: Tensor) -> Tensor:
        """p(mode | x) ``[B, K]``."""
        return torch.softmax(self.log_likelihoods(x, scale, sigma) + weights.log(), 1)

    def denoise(self, x: Tensor, scale: Tensor, sigma: Tensor, weights: Tensor) -> Tensor:
        """E[x0 | x] ``[B, D]``: the prediction of a perfect network. sigma > 0, or scale > 0."""
        iso, along, projections, rest = self._under(x, scale, sigma)
        r = torch.softmax(self._logs(iso, along, projections, rest) + weights.log(), 1)
        gain = scale[:, None] * self.floor / iso  # of x - scale m in a direction that is no axis
        more = scale[:, None, None] * (self.variances + self.floor[:, None]) / along - gain[..., None]
        shrunk = r * gain
        plain = r @ self.means + shrunk.sum(1, keepdim=True) * x - scale[:, None] * (shrunk @ self.means)
        return plain + (r[..., None] * more * projections).flatten(1) @ self.axes.flatten(0, 1)

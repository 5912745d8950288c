"""The one place where predictions change their meaning: x0, eps, v, score and residual.

Everywhere else a prediction is the denoised estimate ``x0``. ``x`` is the sampler's tensor and ``sigma`` the
sampler's noise level, broadcastable to ``x`` (shape ``[B]`` or a number):

* ``EPS``  x = x0 + sigma * eps (variance exploding; the network sees x / sqrt(1 + sigma^2)).
* ``V``    the same x, the network answers v = (eps - sigma * x0) / sqrt(1 + sigma^2), Salimans & Ho 2202.00512
  written for the variance-exploding x (alpha = 1 / sqrt(1 + sigma^2)).
* ``FLOW`` x = (1 - sigma) * x0 + sigma * noise with sigma in [0, 1]; the network answers v = noise - x0.

The residual ``x - x0`` is sigma * eps for EPS and V, and sigma * v for FLOW: it is what ComfyUI hands to CFG
functions. Inner products, norms and cosines are per sample over every non-batch dimension, so a batch item never
sees its neighbours and video latents ``[B, C, T, H, W]`` need no special case.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

TINY = 1e-12


class Parametrisation(Enum):
    """What ``sigma`` means for the model that is being sampled."""

    EPS = "eps"
    V = "v"
    FLOW = "flow"


def expand(value: float | Tensor, like: Tensor) -> Tensor:
    """A number or a ``[B]`` tensor as ``[B, 1, ...]``, broadcastable to ``like``."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value


def signal(sigma: float | Tensor, kind: Parametrisation) -> float | Tensor:
    """The share of x0 in x at ``sigma``: 1 for EPS and V, 1 - sigma for FLOW."""
    return 1.0 - sigma if kind is Parametrisation.FLOW else 1.0


def residual(x: Tensor, x0: Tensor) -> Tensor:
    """``x - x0``, the part of x that the model calls noise (scaled by sigma)."""
    return x - x0


def noise_from_x0(x: Tensor, x0: Tensor, sigma: float | Tensor, kind: Parametrisation) -> Tensor:
    """The noise that x holds if x0 is right: eps for EPS and V, the flow's end point for FLOW."""
    s = expand(sigma, x)
    if kind is Parametrisation.FLOW:
        return x0 + (x - x0) / s
    return (x - x0) / s


def x0_from_noise(x: Tensor, noise: Tensor, sigma: float | Tensor, kind: Parametrisation) -> Tensor:
    """Inverse of :func:`noise_from_x0`; FLOW needs sigma < 1."""
    s = expand(sigma, x)
    if kind is Parametrisation.FLOW:
        return (x - s * noise) / (1 - s)
    return x - s * noise


def v_from_x0(x: Tensor, x0: Tensor, sigma: float | Tensor, kind: Parametrisation) -> Tensor:
    """The velocity: (eps - sigma x0) / sqrt(1 + sigma^2) for EPS and V, noise - x0 for FLOW."""
    s = expand(sigma, x)
    if kind is Parametrisation.FLOW:
        return (x - x0) / s
    return ((x - x0) / s - s * x0) * torch.rsqrt(1 + s * s)


def x0_from_v(x: Tensor, v: Tensor, sigma: float | Tensor, kind: Parametrisation) -> Tensor:
    """Inverse of :func:`v_from_x0`."""
    s = expand(sigma, x)
    if kind is Parametrisation.FLOW:
        return x - s * v
    return x / (1 + s * s) - v * s * torch.rsqrt(1 + s * s)


def score_from_x0(x: Tensor, x0: Tensor, sigma: float | Tensor, kind: Parametrisation) -> Tensor:
    """grad_x log p(x): (x0 - x) / sigma^2 for EPS and V, ((1 - sigma) x0 - x) / sigma^2 for FLOW."""
    s = expand(sigma, x)
    mean = (1 - s) * x0 if kind is Parametrisation.FLOW else x0
    return (mean - x) / (s * s)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Per-sample inner product of ``[B, ...]`` tensors: ``[B]``."""
    return (a * b).flatten(1).sum(1)


def norm(a: Tensor) -> Tensor:
    """Per-sample L2 norm of a ``[B, ...]`` tensor: ``[B]``."""
    return torch.linalg.vector_norm(a.flatten(1), dim=1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per-sample cosine of ``[B, ...]`` tensors: ``[B]``; 0 where either is zero."""
    return dot(a, b) / (norm(a) * norm(b)).clamp_min(TINY)


def shrink(vector: Tensor, radius: float | Tensor) -> Tensor:
    """The factor, ``[B]``, that brings the norm of each sample of ``vector`` down to ``radius``, a number or ``[B]``; 1
    where it is less."""
    return (radius / norm(vector).clamp_min(TINY)).clamp_max(1.0)


def along(vector: Tensor, axis: Tensor) -> Tensor:
    """The projection of ``vector`` on ``axis``, per sample, ``[B, ...]``; 0 where ``axis`` is."""
    unit = axis / expand(norm(axis).clamp_min(TINY), axis)
    return expand(dot(vector, unit), vector) * unit


def perpendicular(vector: Tensor, axis: Tensor) -> Tensor:
    """``vector`` without its part along ``axis``, per sample, ``[B, ...]``; unchanged where ``axis`` is 0."""
    return vector - along(vector, axis)

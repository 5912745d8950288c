"""The net that reads the noise level of a latent, for temporal TAG (``temporal.py``); ``temporal_fit.py`` trains it.

Park et al., arXiv 2510.11057, use a small convolutional classifier of the timestep. Places on a quarter turn stand for
the timestep here, so that one net serves eps, v and flow models of one latent space (derived).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import GuidanceError
from .space import Parametrisation, signal


def place(sigma: Tensor, kind: Parametrisation) -> tuple[Tensor, Tensor]:
    """Where a noise level lies between signal (0) and noise (1), in shares of a quarter turn, and the length that x is
    divided by to keep unit variance: x / length = cos(q) x0 + sin(q) noise, q = place pi / 2."""
    share = torch.ones_like(sigma) * signal(sigma, kind)
    return torch.atan2(sigma, share) * (2 / math.pi), torch.hypot(sigma, share)


@dataclass(frozen=True, eq=False)
class TimePredictor:
    """A small convolutional net that tells the noise level of a latent; all about it is in ``weights``:
    ``conv<i>.weight [out, in, 3, 3]`` with stride 2, ``out.weight [bins, 2 channels]``, biases."""

    weights: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        wanted = {f"{layer}.{part}" for layer in (*self.convs, "out") for part in ("weight", "bias")}
        if not self.convs or {*self.weights} != wanted:
            found = ", ".join(sorted(self.weights)[:4]) or "nothing"
            raise GuidanceError(f"This is no time predictor: it holds {found} ... Make one with Train Time Predictor.")

    @property
    def convs(self) -> list[str]:
        return sorted({name.split(".")[0] for name in self.weights if name.startswith("conv")})

    @property
    def channels(self) -> int:
        return self.weights["conv0.weight"].shape[1]

    def fits(self, x: Tensor) -> bool:
        """Whether it can read latents ``[B, C, (T,) H, W]``."""
        return x.ndim in (4, 5) and x.shape[1] == self.channels

    def to(self, like: Tensor) -> TimePredictor:
        return TimePredictor({name: weight.to(like.device, torch.float32) for name, weight in self.weights.items()})

    def logits(self, x: Tensor) -> Tensor:
        """Of every bin, ``[B, bins]``, from unit-variance latents ``[B, C, (T,) H, W]``; bins are even places."""
        h = x if x.ndim == 4 else x.movedim(2, 1).flatten(0, 1)
        for layer in self.convs:
            h = F.silu(F.conv2d(h, self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"], 2, 1))
        pooled = torch.cat((h.mean((2, 3)), h.square().mean((2, 3))), 1).unflatten(0, (len(x), -1)).mean(1)
        return F.linear(pooled, self.weights["out.weight"], self.weights["out.bias"])

    def read(self, x: Tensor) -> Tensor:
        """The expected place of latents, ``[B]``."""
        return expected(self.logits(x))


def expected(logits: Tensor) -> Tensor:
    """The mean place of logits ``[B, bins]``."""
    return logits.softmax(1) @ torch.linspace(0, 1, logits.shape[1], device=logits.device)


def log_probability(logits: Tensor, places: Tensor) -> Tensor:
    """log p(place | x), ``[B]``, linear between neighbouring bins."""
    position = places.clamp(0, 1) * (logits.shape[1] - 1)
    low = position.floor().long().clamp_max(logits.shape[1] - 2)
    both = logits.log_softmax(1).gather(1, torch.stack((low, low + 1), 1))
    return torch.lerp(both[:, 0], both[:, 1], position - low)


def alignment(predictor: TimePredictor, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """grad_x log p(place | x) at unit-variance latents, and the place that the predictor reads, ``[B]``."""
    with torch.inference_mode(False), torch.enable_grad():  # the host samples in inference mode
        x = x.detach().clone().float().requires_grad_()
        logits = predictor.logits(x)
        gradient, = torch.autograd.grad(log_probability(logits, places.clone().float()).sum(), x)
    return gradient, expected(logits.detach())

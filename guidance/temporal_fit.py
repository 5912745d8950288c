"""The time predictor of temporal TAG (``temporal.py``), trained on clean latents.

    min  - E log p(q | cos(q) x0 + sin(q) n),   q even in 0 .. pi / 2,  n normal

Park et al., arXiv 2510.11057, train a small net by cross-entropy on forward-noised data without telling it t. The size
of the net, crops, mirroring and the soft targets between two bins are derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .space import expand
from .temporal_net import TimePredictor, log_probability

BINS, WIDTHS = 64, (32, 64)
LEAST = 16  # latents: with fewer none are held back to tell how good the net is


def fresh(channels: int, generator: torch.Generator, bins: int = BINS, widths: tuple[int, ...] = WIDTHS) -> dict:
    """Weights before training, by He's rule; the last layer starts even."""
    weights = {}
    for i, (inside, out) in enumerate(zip((channels, *widths), widths)):
        weights[f"conv{i}.weight"] = torch.randn(out, inside, 3, 3, generator=generator) * math.sqrt(2 / (9 * inside))
        weights[f"conv{i}.bias"] = torch.zeros(out)
    return weights | {"out.weight": torch.zeros(bins, 2 * widths[-1]), "out.bias": torch.zeros(bins)}


def noised(latents: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
    """Unit-variance latents ``[B, C, H, W]`` at ``places [B]``."""
    q = expand(places * (math.pi / 2), latents)
    return q.cos() * latents + q.sin() * torch.randn(latents.shape, generator=generator)


def cropped(latents: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """One random window of at most ``side``, mirrored half of the time."""
    top, left = (int(torch.randint(n - min(n, side) + 1, (), generator=generator)) for n in latents.shape[2:])
    latents = latents[:, :, top:top + side, left:left + side]
    return latents.flip(3) if torch.rand((), generator=generator) < 0.5 else latents


def train(
    latents: Tensor, steps: int = 1000, seed: int = 0, batch: int = 64, rate: float = 4e-3, side: int = 32,
    each: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[TimePredictor, float]:
    """A predictor for clean latents ``[N, C, (T,) H, W]`` in model space; the same every time for a seed.

    Args:
        side: latents are cut to at most this many cells a side.
        each: called after each step with its number from 1 and its loss; may raise to stop.

    Returns:
        The predictor, and how far off it is on the last eighth of the latents, which it has not seen (mean error of
        the place, 0 .. 1; on all where there are fewer than 16).
    """
    with torch.inference_mode(False), torch.enable_grad():
        data = latents.detach().float().cpu().clone()
        data = data.movedim(2, 1).flatten(0, 1) if data.ndim == 5 else data
        held = max(len(data) // 8, 1) if len(data) >= LEAST else 0
        known = data[: len(data) - held]
        generator = torch.Generator().manual_seed(seed)
        weights = {k: w.requires_grad_() for k, w in fresh(data.shape[1], generator).items()}
        predictor = TimePredictor(weights)
        adam = torch.optim.AdamW(weights.values(), rate, betas=(0.9, 0.97), weight_decay=1e-4)
        for step in range(steps):
            adam.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * math.cos(step / steps * 1.57))
            x0 = cropped(known[torch.randint(len(known), (batch,), generator=generator)], side, generator)
            places = torch.rand(batch, generator=generator)
            loss = -log_probability(predictor.logits(noised(x0, places, generator)), places).mean()
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            adam.step()
            each(step + 1, float(loss.detach()))
        with torch.no_grad():
            x0 = cropped(data[-held:][:256] if held else data, side, generator)
            places = torch.rand(len(x0), generator=generator)
            error = float((predictor.read(noised(x0, places, generator)) - places).abs().mean())
        return TimePredictor({k: w.detach() for k, w in weights.items()}), error

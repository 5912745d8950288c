"""Where each backbone attends: one small file a family. A family derives the sites and their token layout from what
ComfyUI's own modules are called with; nothing is guessed from sizes.

A family module has ``MODELS`` (classes of ``diffusion_model``), ``taps(model)`` and ``start(model, x)``. A tap is a
module of the model, the sites that its forward runs through (in order), and a function that reads the token layout from
the forward's arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ...attention.sites import Site, numbered


@dataclass
class Layout:
    """The tokens of one forward pass: the grid (t, h, w) of the picture's, how many text tokens come before them, and
    the rotary embedding of all. None: not known, or not there."""

    grid: tuple[int, int, int] | None = None
    text: int | None = None
    rope: torch.Tensor | None = None


@dataclass(frozen=True)
class Tap:
    module: torch.nn.Module
    sites: tuple[Site, ...] = ()
    read: Callable[[Layout, tuple, dict[str, Any]], None] | None = None


def patched(x: torch.Tensor, patch: int) -> tuple[int, int, int]:
    """The token grid of latents ``[B, C, (T,) H, W]`` that are cut into patches."""
    height, width = x.shape[-2:]
    return x.shape[2] if x.ndim == 5 else 1, math.ceil(height / patch), math.ceil(width / patch)


def family(model: torch.nn.Module) -> ModuleType | None:
    from . import flux, sd3, unet

    return next((module for module in (unet, flux, sd3) if isinstance(model, module.MODELS)), None)


def taps_of(model: torch.nn.Module) -> list[Tap]:
    """The taps of a diffusion model with their sites numbered; empty for a family that is not known."""
    module = family(model)
    taps = [] if module is None else module.taps(model)
    sites = iter(numbered(site for tap in taps for site in tap.sites))
    return [Tap(tap.module, tuple(next(sites) for _ in tap.sites), tap.read) for tap in taps]


def sites_of(model: torch.nn.Module) -> list[Site]:
    return [site for tap in taps_of(model) for site in tap.sites]

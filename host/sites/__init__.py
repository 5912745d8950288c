"""Where each backbone attends: one small file a family. A family derives the sites and their token layout from what
ComfyUI's own modules are called with; nothing is guessed from sizes.

A family module has ``MODELS`` (classes of ``diffusion_model``), ``taps(model)`` and ``start(model, x)``. A tap is a
module of the model, the sites that its forward runs through (in order), and a function that reads the token layout from
the forward's arguments. A cross tap also says what keys and values a text has there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from ...attention.sites import Site, numbered


@dataclass
class Layout:
    """The tokens of one forward pass: the grid (t, h, w) of the picture's, how many text tokens come first, and the
    rotary embedding of all, in the form of ``attention.contract.Call.rope``. None: not known, or not there.

    ``image``: where the picture's tokens begin, in a family that puts others around them (padding, references). None:
    right after the text at joint sites; elsewhere there are no others.
    """

    grid: tuple[int, int, int] | None = None
    text: int | None = None
    rope: torch.Tensor | None = None
    image: int | None = None


@dataclass(frozen=True)
class Tap:
    module: torch.nn.Module
    sites: tuple[Site, ...] = ()
    read: Callable[[Layout, tuple, dict[str, Any]], None] | None = None
    text: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None  # features -> k, v of a cross site


def argument(args: tuple, kwargs: dict[str, Any], position: int, name: str) -> Any:
    """What a forward was called with, by place or by name."""
    return args[position] if len(args) > position else kwargs[name]


def patched(x: torch.Tensor, patch: int | tuple[int, int, int]) -> tuple[int, int, int]:
    """The token grid of latents ``[B, C, (T,) H, W]`` that are cut into patches."""
    sizes = (x.shape[2] if x.ndim == 5 else 1, *x.shape[-2:])
    return tuple(math.ceil(n / p) for n, p in zip(sizes, (1, patch, patch) if isinstance(patch, int) else patch))


def family(model: torch.nn.Module) -> ModuleType | None:
    from . import flux, lumina, qwen, sd3, unet, wan

    return next((module for module in (unet, flux, sd3, qwen, lumina, wan) if isinstance(model, module.MODELS)), None)


def taps_of(model: torch.nn.Module) -> list[Tap]:
    """The taps of a diffusion model with their sites numbered; empty for a family that is not known."""
    module = family(model)
    taps = [] if module is None else module.taps(model)
    sites = iter(numbered(site for tap in taps for site in tap.sites))
    return [dataclasses.replace(tap, sites=tuple(next(sites) for _ in tap.sites)) for tap in taps]


def sites_of(model: torch.nn.Module) -> list[Site]:
    return [site for tap in taps_of(model) for site in tap.sites]

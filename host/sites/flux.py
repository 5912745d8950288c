"""Flux and Chroma: joint attention over text and image tokens, in double and then in single blocks."""

from __future__ import annotations

import torch
from comfy.ldm.chroma.model import Chroma
from comfy.ldm.flux.model import Flux

from ...attention.sites import Site
from . import Layout, Tap, patched

MODELS = (Flux, Chroma)


def start(model: Flux, x: torch.Tensor) -> Layout:
    return Layout(patched(x, model.patch_size))


def read_double(layout: Layout, args: tuple, kwargs: dict) -> None:
    """The host calls blocks with keywords: img, txt, vec, pe, ..."""
    layout.text, layout.rope = kwargs["txt"].shape[1], kwargs["pe"]


def read_single(layout: Layout, args: tuple, kwargs: dict) -> None:
    """Text and image come in one tensor; the double blocks have told where the text ends."""
    layout.rope = kwargs["pe"]


def taps(model: Flux) -> list[Tap]:
    double = [Tap(b, (Site(f"double.{i}", "joint"),), read_double) for i, b in enumerate(model.double_blocks)]
    return double + [Tap(b, (Site(f"single.{i}", "joint"),), read_single) for i, b in enumerate(model.single_blocks)]

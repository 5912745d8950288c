"""Lumina 2 and Z-Image (NextDiT): the picture's tokens among themselves in the noise refiner, then joint attention.

Z-Image pads text and picture to a multiple of 32 tokens each, after their own. Reference pictures, with their captions,
come before the prompt's picture. The context refiner sees text alone and is no site.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from comfy.ldm.lumina.model import NextDiT

from ...attention.sites import Site
from . import Layout, Tap, argument, patched

MODELS = (NextDiT,)


def start(model: NextDiT, x: torch.Tensor) -> Layout:
    return Layout(patched(x, model.patch_size))


def padded(model: NextDiT, tokens: int) -> int:
    return tokens + -tokens % (model.pad_tokens_multiple or 1)


def read_caption(layout: Layout, args: tuple, kwargs: dict) -> None:
    """cap_embedder.forward(features [B, tokens, width]), once for each caption."""
    layout.text = argument(args, kwargs, 0, "input").shape[1]


def readers(model: NextDiT) -> tuple[Callable, Callable]:
    def read_captions(layout: Layout, args: tuple, kwargs: dict) -> None:
        """JointTransformerBlock.forward(x, mask, freqs), of all captions in a row: with references, all are text."""
        tokens = argument(args, kwargs, 0, "x").shape[1]
        if layout.text is None or padded(model, layout.text) != tokens:
            layout.text = tokens

    def read(layout: Layout, args: tuple, kwargs: dict) -> None:
        """The same of the picture, or of all: the picture comes last. Its freqs are [1, tokens, 1, D / 2, 2, 2]."""
        layout.rope = argument(args, kwargs, 2, "freqs_cis").transpose(1, 2)
        layout.image = argument(args, kwargs, 0, "x").shape[1] - padded(model, math.prod(layout.grid))

    return read_captions, read


def taps(model: NextDiT) -> list[Tap]:
    read_captions, read = readers(model)
    blocks = [(f"refiner.{i}", "self", block) for i, block in enumerate(model.noise_refiner)]
    blocks += [(f"joint.{i}", "joint", block) for i, block in enumerate(model.layers)]
    return [Tap(model.cap_embedder, read=read_caption), Tap(model.context_refiner[0], read=read_captions),
            *(Tap(block, (Site(name, kind),), read) for name, kind, block in blocks)]

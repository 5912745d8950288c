"""Wan 2.1 and 2.2: self-attention of the video, then cross-attention to the text, in every block.

Image-to-video models of Wan 2.1 look at the features of the start picture before they look at the text, by the same
queries: a site of kind "image", at which nothing that is about text acts. The tokens of a reference latent come before
the video's, those of other references after them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.ldm.wan.model import SCAILWanModel, WanI2VCrossAttention, WanModel

from ...attention.sites import Site
from . import Layout, Tap, argument, patched

MODELS = (WanModel,)


def start(model: WanModel, x: torch.Tensor) -> Layout:
    return Layout(patched(x, model.patch_size), image=0)


def read_self(layout: Layout, args: tuple, kwargs: dict) -> None:
    """WanSelfAttention.forward(x, freqs [1, tokens, 1, D / 2, 2, 2])."""
    layout.rope = argument(args, kwargs, 1, "freqs").transpose(1, 2)


def read_cross(layout: Layout, args: tuple, kwargs: dict) -> None:
    layout.rope = None


def keys_values(model: WanModel, attention: torch.nn.Module) -> Callable:
    """The text goes through the model's embedding before the blocks see it."""
    def of(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        text = model.text_embedding(text)
        return attention.norm_k(attention.k(text)), attention.v(text)

    return of


def taps(model: WanModel) -> list[Tap]:
    if isinstance(model, SCAILWanModel):  # its references are frames of the video: not told apart here
        return []

    def read_reference(layout: Layout, args: tuple, kwargs: dict) -> None:
        """Conv2d.forward(reference [B, C, H, W]): a whole patch a token."""
        height, width = argument(args, kwargs, 0, "input").shape[-2:]
        layout.image = (height // model.patch_size[1]) * (width // model.patch_size[2])

    out = [] if model.ref_conv is None else [Tap(model.ref_conv, read=read_reference)]
    for i, block in enumerate(model.blocks):
        cross = (Site(f"block.{i}", "cross"),)
        if isinstance(block.cross_attn, WanI2VCrossAttention):
            cross = (Site(f"block.{i}", "image"), *cross)
        out.append(Tap(block.self_attn, (Site(f"block.{i}", "self"),), read_self))
        out.append(Tap(block.cross_attn, cross, read_cross, keys_values(model, block.cross_attn)))
    return out

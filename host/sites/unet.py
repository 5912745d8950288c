"""SD1.5, SD2 and SDXL: self- and cross-attention in the transformers of a UNet, and its residual blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

from ...attention.sites import Site
from . import Layout, Tap

MODELS = (UNetModel,)


def start(model: UNetModel, x: torch.Tensor) -> Layout:
    return Layout()


def read_grid(layout: Layout, args: tuple, kwargs: dict) -> None:
    """SpatialTransformer.forward(x [B, C, H, W], ...)."""
    x = args[0] if args else kwargs["x"]
    layout.grid = (1, *x.shape[-2:])


def keys_values(attention: torch.nn.Module) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    return lambda text: (attention.to_k(text), attention.to_v(text))


def taps(model: UNetModel) -> list[Tap]:
    blocks = [(f"input.{i}", block) for i, block in enumerate(model.input_blocks)]
    blocks += [("middle", model.middle_block)] if model.middle_block is not None else []
    blocks += [(f"output.{i}", block) for i, block in enumerate(model.output_blocks)]
    out = []
    for name, block in blocks:
        for layer in block:
            if isinstance(layer, ResBlock):  # its last convolution: some kinds call the layers before it one by one
                out.append(Tap(layer.out_layers[-1], (Site(name, "residual"),)))
            # A video transformer's own blocks attend over frames too; its tokens are not those of a picture.
            if isinstance(layer, SpatialTransformer) and not isinstance(layer, SpatialVideoTransformer):
                out.append(Tap(layer, read=read_grid))
                for i, inner in enumerate(layer.transformer_blocks):
                    kind = "cross" if inner.disable_self_attn else "self"
                    out.append(Tap(inner.attn1, (Site(f"{name}.{i}", kind),), text=keys_values(inner.attn1)))
                    if inner.attn2 is not None:
                        out.append(Tap(inner.attn2, (Site(f"{name}.{i}", "cross"),), text=keys_values(inner.attn2)))
    return out

"""SD3 and SD3.5: joint attention over text and image tokens; some blocks of SD3.5 medium add self-attention of the
image."""

from __future__ import annotations

import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT

from ...attention.sites import Site
from . import Layout, Tap, patched

MODELS = (MMDiT,)


def start(model: MMDiT, x: torch.Tensor) -> Layout:
    return Layout(patched(x, model.patch_size))


def read(layout: Layout, args: tuple, kwargs: dict) -> None:
    """JointBlock.forward(context, x, c=..., ...). Registers come first in the context and count as text."""
    context = args[0] if args else kwargs["context"]
    layout.text = context.shape[1]


def taps(model: MMDiT) -> list[Tap]:
    out = []
    for i, block in enumerate(model.joint_blocks):
        sites = (Site(f"joint.{i}", "joint"),)
        if block.x_block.x_block_self_attn:
            sites += (Site(f"joint.{i}", "self"),)
        out.append(Tap(block, sites, read))
    return out

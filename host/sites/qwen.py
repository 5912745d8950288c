"""Qwen-Image and Qwen-Image-Edit: joint attention over text and image tokens, then those of reference pictures."""

from __future__ import annotations

import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

from ...attention.sites import Site
from . import Layout, Tap, patched

MODELS = (QwenImageTransformer2DModel,)


def start(model: QwenImageTransformer2DModel, x: torch.Tensor) -> Layout:
    return Layout(patched(x, model.patch_size))


def read(layout: Layout, args: tuple, kwargs: dict) -> None:
    """The host calls blocks with keywords: hidden_states, encoder_hidden_states, image_rotary_emb, ..."""
    layout.text, layout.rope = kwargs["encoder_hidden_states"].shape[1], kwargs["image_rotary_emb"]


def taps(model: QwenImageTransformer2DModel) -> list[Tap]:
    return [Tap(b, (Site(f"joint.{i}", "joint"),), read) for i, b in enumerate(model.transformer_blocks)]

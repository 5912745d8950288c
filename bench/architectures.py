"""The networks of full-size checkpoints, as the host's own classes build them; without weights they cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import comfy.ldm.flux.model as flux
import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

UNET = {
    "image_size": 32, "use_spatial_transformer": True, "legacy": False, "in_channels": 4, "out_channels": 4,
    "model_channels": 320, "use_temporal_attention": False,
}
SD15 = UNET | {
    "adm_in_channels": None, "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    "channel_mult": [1, 2, 4, 4], "context_dim": 768, "use_linear_in_transformer": False,
}
SDXL = UNET | {
    "num_classes": "sequential", "adm_in_channels": 2816, "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10, "channel_mult": [1, 2, 4], "context_dim": 2048, "use_linear_in_transformer": True,
}
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 768,
    "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19,
    "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}
FLUX = {key: value for key, value in FLUX.items() if key in {f.name for f in fields(flux.FluxParams)} | {"image_model"}}
SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 24, "input_size": None, "adm_in_channels": 2048, "num_patches": 36864,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}},
    "pos_embed_max_size": 192, "pos_embed_scaling_factor": None,
}


@dataclass(frozen=True)
class Network:
    """``build(dtype=, device=, operations=)``; latent channels, text ``(tokens, width)``, width of the pooled vector or
    None; ``more``: names of further inputs ``[B]``."""

    build: Callable[..., torch.nn.Module]
    channels: int
    text: tuple[int, int]
    pooled: int | None
    more: tuple[str, ...] = ()

    def on_meta(self, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """The network on the device that has shapes and no numbers."""
        return self.build(dtype=dtype, device="meta", operations=comfy.ops.disable_weight_init)

    def inputs(self, rows: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        out = {"context": torch.zeros(rows, *self.text, device="meta", dtype=dtype)}
        if self.pooled:
            out["y"] = torch.zeros(rows, self.pooled, device="meta", dtype=dtype)
        return out | {name: torch.zeros(rows, device="meta", dtype=dtype) for name in self.more}


NETWORKS = {
    "SD1.5": Network(lambda **k: UNetModel(**SD15, num_heads=8, num_head_channels=-1, **k), 4, (77, 768), None),
    "SDXL": Network(lambda **k: UNetModel(**SDXL, num_heads=-1, num_head_channels=64, **k), 4, (77, 2048), 2816),
    "Flux": Network(lambda **k: flux.Flux(**FLUX, **k), 16, (256, 4096), 768, ("guidance",)),
    "SD3 medium": Network(lambda **k: MMDiT(**SD3, **k), 16, (154, 4096), 2048),
}

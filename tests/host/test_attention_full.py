"""Attention edits on architectures of full size: how often they are met, and that they change nothing when they should.

The counts come from forwards of the whole networks on the meta device, which has shapes and no numbers. The numbers
come from networks of full width with random weights, all of SD1.5 and few blocks of the others, at small latents.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import comfy.ldm.flux.model as flux
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models as supported
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from rudder.attention.contract import AttentionEdit
from rudder.host import add_guidance
from rudder.host.attention import Attention

from .models import evaluate
from .test_attention import Editing, Same, SameMap

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
FEW_SDXL = SDXL | {
    "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
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


# ---------------------------------------------------------------- how often


@dataclass(frozen=True, kw_only=True, eq=False)
class Count(AttentionEdit):
    """Counts the sites, and spares the kernel, which needs numbers."""

    seen: Counter = field(default_factory=Counter)

    title = "count"

    def output(self, call, attend):
        self.seen[call.site.kind, call.site.name.split(".")[0]] += 1
        return torch.zeros_like(call.q)


META = {"dtype": torch.float32, "device": "meta", "operations": comfy.ops.disable_weight_init}
NETWORKS = {
    "SD1.5": (lambda: UNetModel(**SD15, num_heads=8, num_head_channels=-1, **META), 4, (77, 768), None),
    "SDXL": (lambda: UNetModel(**SDXL, num_heads=-1, num_head_channels=64, **META), 4, (77, 2048), 2816),
    "Flux": (lambda: flux.Flux(**FLUX, **META), 16, (256, 4096), 768),
    "SD3 medium": (lambda: MMDiT(**SD3, **META), 16, (154, 4096), 2048),
}
HITS = {
    "SD1.5": {"self": 16, "cross": 16},
    "SDXL": {"self": 70, "cross": 70},
    "Flux": {"double": 19, "single": 38},
    "SD3 medium": {"joint": 24},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_hits_of_one_forward(name):
    build, channels, text, pooled = NETWORKS[name]
    network, x = build(), torch.zeros(2, channels, 64, 64, device="meta")
    inputs = {"context": torch.zeros(2, *text, device="meta")}
    if pooled:
        inputs["y"] = torch.zeros(2, pooled, device="meta")
    if name == "Flux":
        inputs["guidance"] = torch.zeros(2, device="meta")
    attention = Attention()
    attention.who, attention.step = {0: ("uncond",), 1: ("cond",)}, SimpleNamespace(x=x[:1])
    edit = Count()
    attention.acting = [(edit, ())]

    def forward(x, t, transformer_options):
        return network(x, t, transformer_options=transformer_options, **inputs)

    forward.class_obj = SimpleNamespace(diffusion_model=network)
    out = attention.apply_model(forward, x, torch.zeros(2, device="meta"), transformer_options={"uuids": [0, 1]})
    assert out.shape == x.shape
    seen = edit.seen
    by_block = Counter({block: sum(n for (_, b), n in seen.items() if b == block) for _, block in seen})
    by_kind = Counter({kind: sum(n for (k, _), n in seen.items() if k == kind) for kind, _ in seen})
    assert {key: (by_kind | by_block)[key] for key in HITS[name]} == HITS[name]
    assert sum(seen.values()) == sum(HITS[name].values())


# ---------------------------------------------------------------- numbers


def heads(config: type, **extra) -> type:
    return type("Full", (config,), {"unet_extra_config": extra})


FULL = {  # configuration, family for the latents, text width, pooled width, sites
    "SD1.5": (heads(supported.SD15, num_heads=8, num_head_channels=-1), SD15, "unet", 768, 768, 32),
    "SDXL width": (heads(supported.SDXL, num_heads=-1, num_head_channels=64), FEW_SDXL, "unet", 2048, 1280, 14),
    "Flux width": (supported.Flux, FLUX | {"depth": 1, "depth_single_blocks": 1}, "flux", 4096, 768, 2),
    "SD3 width": (supported.SD3, SD3 | {"num_blocks": 2, "pos_embed_max_size": 32, "num_patches": 1024}, "sd3", 4096,
                  2048, 2),
}  # fmt: skip


def built(kind: type, config: dict, dtype: torch.dtype):
    """A network with random weights of the usual size, quickly: one noise, laid out again and again."""
    config = kind(dict(config))
    config.set_inference_dtype(dtype, None)
    noise = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode(False), torch.no_grad():
        model = config.get_model({}, "", device=None)
        for parameter in [*model.parameters(), *model.diffusion_model.buffers()]:  # SD3 keeps positions in a buffer
            scale = 1 / math.sqrt(max(parameter[0].numel(), 1)) if parameter.ndim > 1 else 0.05
            flat = parameter.data.view(-1)
            for start in range(0, len(flat), len(noise)):
                part = flat[start : start + len(noise)]
                torch.mul(noise[: len(part)], scale, out=part)
        model.eval()
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(model, management.get_torch_device(), management.unet_offload_device())


@pytest.fixture
def freed():
    yield
    comfy.model_management.unload_all_models()
    gc.collect()


def prompt(seed: int, width: int, pooled: int) -> list:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 9, width, generator=generator)
    return [[features, {"pooled_output": torch.randn(1, pooled, generator=generator)}]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", FULL)
def test_an_identity_edit_is_bit_identical_at_full_width(name, dtype, freed):
    """Maps that are made and handed back change the rounding alone: 1e-4 of the result in fp32, 2 % in bf16."""
    kind, config, family, width, pooled, sites = FULL[name]
    model, prompts = built(kind, config, dtype), (prompt(1, width, pooled), prompt(2, width, pooled))
    edit, maps = Same(), Editing(edit=SameMap(), on=("cond",))
    plain = evaluate(model, family, *prompts)["denoised"]
    assert plain.isfinite().all() and plain.std() > 0
    assert torch.equal(evaluate(add_guidance(model, Editing(edit=edit)), family, *prompts)["denoised"], plain)
    assert len(edit.met) == sites and {call.q.dtype for call in edit.met} == {dtype}
    found = evaluate(add_guidance(model, maps), family, *prompts)["denoised"]
    assert (found - plain).abs().max() <= (1e-4 if dtype == torch.float32 else 0.02) * plain.abs().max()

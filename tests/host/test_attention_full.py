"""Attention edits on architectures of full size: how often they are met, and that they change nothing when they should.

The counts come from forwards of the whole networks on the meta device, which has shapes and no numbers. The numbers
come from networks of full width with random weights, all of SD1.5 and few blocks of the others, at small latents.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models as supported
import pytest
import torch

from rudder.attention.contract import AttentionEdit
from rudder.bench.architectures import FLUX, NETWORKS, SD3, SD15, SDXL
from rudder.host import add_guidance
from rudder.host.attention import Attention

from .models import evaluate
from .test_attention import Editing, Same, SameMap

FEW_SDXL = SDXL | {
    "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
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


HITS = {
    "SD1.5": {"self": 16, "cross": 16},
    "SDXL": {"self": 70, "cross": 70},
    "Flux": {"double": 19, "single": 38},
    "SD3 medium": {"joint": 24},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_hits_of_one_forward(name):
    whole = NETWORKS[name]
    network, inputs, x = whole.on_meta(), whole.inputs(2), torch.zeros(2, whole.channels, 64, 64, device="meta")
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

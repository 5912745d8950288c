"""Tiny models with random weights, built from the host's own classes: one UNet (eps), one Flux (flow).

They are seeded and keep their full machinery (cross-attention, pooled vectors, the host's cond batching), so what holds
for them holds for their large siblings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import comfy.latent_formats
import comfy.ldm.flux.model as flux
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

CONTEXT = 32
POOLED = 16

torch.set_num_threads(1)  # tensors this small only lose time to a thread pool


def _patcher(config: comfy.supported_models.supported_models_base.BASE, factory) -> comfy.model_patcher.ModelPatcher:
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(1234)
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "", device=None)
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.05
        for name, buffer in model.named_buffers():
            if name.endswith("pos_embed"):  # SD3's: a checkpoint fills it, nothing else does
                buffer.copy_(torch.randn_like(buffer) * 0.05)
        model.eval()
    management = comfy.model_management
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
    patcher.cached_patcher_init = (factory, ())
    return patcher


def tiny_unet(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """SD1.5 in small: epsilon prediction, 4 latent channels, cross-attention to CONTEXT features."""

    class Tiny(comfy.supported_models.SD15):
        unet_extra_config = {"num_heads": 2, "num_head_channels": -1}

    unet = {
        "image_size": 32, "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None, "in_channels": 4,
        "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "channel_mult": [1, 2],
        "context_dim": CONTEXT, "use_linear_in_transformer": False, "use_temporal_attention": False,
    }
    return _patcher(Tiny(unet), tiny_unet)


def tiny_flux(disable_dynamic: bool = False, **options) -> comfy.model_patcher.ModelPatcher:
    """Flux in small, undistilled: rectified flow, 16 latent channels, joint attention, pooled vectors."""

    class Tiny(comfy.supported_models.FluxSchnell):
        pass

    unet = {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": POOLED,
        "context_in_dim": CONTEXT, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000,
        "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [], **options,
    }
    known = {field.name for field in fields(flux.FluxParams)}
    return _patcher(Tiny({key: value for key, value in unet.items() if key in known | {"image_model"}}), tiny_flux)


def tiny_chroma(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Chroma in small: Flux without pooled vectors, its modulations (always 344, of which the first count) from one
    network for all blocks."""

    class Tiny(comfy.supported_models.Chroma):
        pass

    unet = {
        "image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2, "vec_in_dim": POOLED,
        "context_in_dim": CONTEXT, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True, "txt_ids_dims": [],
        "in_dim": 64, "out_dim": 64, "hidden_dim": 64, "n_layers": 1,
    }
    return _patcher(Tiny(unet), tiny_chroma)


def tiny_sd3(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """SD3 in small: rectified flow, joint attention with learned positions at the input, pooled vectors."""

    class Tiny(comfy.supported_models.SD3):
        pass

    unet = {
        "in_channels": 16, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": POOLED,
        "context_embedder_config": {"target": "torch.nn.Linear",
                                    "params": {"in_features": CONTEXT, "out_features": 128}},
        "num_patches": 1024, "pos_embed_max_size": 32, "pos_embed_scaling_factor": None,
    }
    return _patcher(Tiny(unet), tiny_sd3)


WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 32, "ffn_dim": 64, "freq_dim": 32, "in_dim": 16, "out_dim": 16,
    "text_dim": CONTEXT, "text_len": 512, "num_heads": 2, "num_layers": 2, "patch_size": (1, 2, 2),
    "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}


def tiny_wan(disable_dynamic: bool = False, **options) -> comfy.model_patcher.ModelPatcher:
    """Wan 2.1 in small: rectified flow on 5-D video latents of 16 channels, self- and cross-attention."""

    class Tiny(comfy.supported_models.WAN21_T2V):
        pass

    return _patcher(Tiny({**WAN, **options}), tiny_wan)


def tiny_wan_i2v(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The same for image-to-video: it also looks at 1280 features of a start picture."""

    class Tiny(comfy.supported_models.WAN21_I2V):
        pass

    return _patcher(Tiny({**WAN, "model_type": "i2v", "in_dim": 36}), tiny_wan_i2v)


def tiny_vace(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """VACE in small: beside the video's blocks others attend over a control video."""

    class Tiny(comfy.supported_models.WAN21_Vace):
        pass

    return _patcher(Tiny({**WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}), tiny_vace)


def tiny_scail(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """SCAIL in small, a Wan whose attention Rudder does not know."""

    class Tiny(comfy.supported_models.WAN21_SCAIL):
        pass

    return _patcher(Tiny({**WAN, "model_type": "scail", "in_dim": 20}), tiny_scail)


def tiny_qwen(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Qwen-Image in small: rectified flow on 5-D latents of one frame, joint attention."""

    class Tiny(comfy.supported_models.QwenImage):
        pass

    unet = {
        "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 2, "joint_attention_dim": CONTEXT, "axes_dims_rope": (8, 12, 12),
    }
    return _patcher(Tiny(unet), tiny_qwen)


NEXTDIT = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 64, "n_layers": 2, "n_refiner_layers": 2,
    "n_heads": 2, "qk_norm": True, "cap_feat_dim": CONTEXT, "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512],
}


def tiny_lumina(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Lumina 2 in small: rectified flow, refiners of text and picture, joint attention with fewer keys than queries."""

    class Tiny(comfy.supported_models.Lumina2):
        pass

    return _patcher(Tiny({**NEXTDIT, "n_kv_heads": 1}), tiny_lumina)


def tiny_zimage(disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """Z-Image in small: Lumina 2 with text and picture padded to 32 tokens each."""

    class Tiny(comfy.supported_models.ZImage):
        pass

    unet = {"dim": 256, "n_heads": 8, "n_kv_heads": 8, "z_image_modulation": True, "time_scale": 1000.0,
            "pad_tokens_multiple": 32}  # the host's modulation is 256 wide
    return _patcher(Tiny({**NEXTDIT, **unet}), tiny_zimage)


MODELS = {"unet": tiny_unet, "flux": tiny_flux}  # the two that most tests run on
FAMILIES = {**MODELS, "sd3": tiny_sd3, "chroma": tiny_chroma}  # for what differs between kinds of attention
MORE = {"wan": tiny_wan, "qwen": tiny_qwen, "lumina": tiny_lumina, "zimage": tiny_zimage}  # by the same tests
CHANNELS = {"unet": 4, "flux": 16, "sd3": 16, "chroma": 16, **dict.fromkeys(MORE, 16)}
FRAMES = {"wan": 2, "qwen": 1}  # of latents that have them


def conditioning(seed: int, tokens: int = 7, **options) -> list:
    """A CONDITIONING as text encode nodes give it: random features and pooled vector, distinct by seed."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, tokens, CONTEXT, generator=generator)
    return [[features, {"pooled_output": torch.randn(1, POOLED, generator=generator), **options}]]


def having(prompt: list, **options) -> list:
    """A CONDITIONING with more settings, as the host's set-area, set-mask, apply-ControlNet ... nodes give it."""
    return [[features, {**settings, **options}] for features, settings in prompt]


LORA_KEYS = ("attn2.to_k.weight", "attn2.to_v.weight", "attn.qkv.weight", "attn.to_k.weight", "attention.qkv.weight",
             "cross_attn.k.weight", "cross_attn.v.weight")


def lora(model, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA file's content for the attention weights of a model."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, weight in model.model.state_dict().items():
        if key.endswith(LORA_KEYS):
            name = key.removesuffix(".weight")
            weights[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=generator) * 0.3
            weights[f"{name}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=generator) * 0.3
    assert weights
    return weights


def latent(kind: str, batch: int = 1, size: int = 8) -> torch.Tensor:
    frames = (FRAMES[kind],) if kind in FRAMES else ()
    return torch.zeros(batch, CHANNELS[kind], *frames, size, size)


def sample(
    model, kind: str, positive, negative, *, cfg: float = 4.0, steps: int = 4, batch: int = 1, seed: int = 7,
    sampler: str = "euler", image: torch.Tensor | None = None, noise: torch.Tensor | None = None, **options,
) -> torch.Tensor:
    """What the KSampler node does."""
    image = latent(kind, batch) if image is None else image
    noise = comfy.sample.prepare_noise(image, seed) if noise is None else noise
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "normal", positive, negative, image, disable_pbar=True, seed=seed, **options
    )


class ByHand(comfy.samplers.CFGGuider):
    """Guidance without Rudder, the oracle of whole runs: ``combine(predict, sigma)`` gives the guided x0, and
    ``predict`` evaluates one conditioning by its name."""

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (the host's signature)
        def predict(name: str) -> torch.Tensor:
            return comfy.samplers.calc_cond_batch(self.inner_model, [self.conds[name]], x, timestep, model_options)[0]

        return self.combine(predict, float(timestep[0]))


def sample_by_hand(
    model, kind: str, conditionings: dict, combine: Callable, *, steps: int = 4, batch: int = 1, seed: int = 7,
    sampler: str = "euler", image: torch.Tensor | None = None, denoise: float = 1.0,
    noise_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What :func:`sample` does, with a :class:`ByHand` guider."""
    image = latent(kind, batch) if image is None else image
    guider = ByHand(model)
    guider.inner_set_conds(conditionings)
    guider.combine = combine
    run = comfy.samplers.KSampler(model, steps, model.load_device, sampler, "normal", denoise)
    noise, solver = comfy.sample.prepare_noise(image, seed), comfy.samplers.sampler_object(sampler)
    return guider.sample(noise, image, solver, run.sigmas, noise_mask, disable_pbar=True, seed=seed)


def evaluate(
    model, kind: str, positive, negative, third=None, *, sigma: float = 0.7, cfg: float = 4.0, batch: int = 1
) -> dict:
    """One model call at ``sigma`` in an otherwise ordinary run: what the host then tells post-CFG functions.

    ``["denoised"]`` is the guided x0, ``["cond_denoised"]`` and ``["uncond_denoised"]`` what it was made of,
    ``["third"]`` the prediction of a third conditioning, which the host prepares and evaluates on its own.
    """
    seen = {}

    def remember(args: dict) -> torch.Tensor:
        seen.update(args)
        return args["denoised"]

    def call_once(inner, x, sigmas, extra_args, callback, disable):
        x0 = inner(x, sigmas[0].repeat(len(x)), **extra_args)
        if third is not None:
            options = {**extra_args["model_options"], "sampler_post_cfg_function": []}
            conds = [guider.conds["third"]]
            seen["third"] = comfy.samplers.calc_cond_batch(guider.inner_model, conds, x, seen["sigma"], options)[0]
        return x0

    model = model.clone()
    model.set_model_sampler_post_cfg_function(remember)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    if third is not None:
        guider.inner_set_conds({"third": third})
    guider.set_cfg(cfg)
    image = latent(kind, batch)
    noise, sigmas = comfy.sample.prepare_noise(image, 7), torch.tensor([sigma, 0.0])
    guider.sample(noise, image, comfy.samplers.KSAMPLER(call_once), sigmas, disable_pbar=True, seed=7)
    return seen


def calls(model) -> tuple[comfy.model_patcher.ModelPatcher, dict[str, list]]:
    """A clone of ``model`` that writes down every call of the host's cond batching and of the network.

    ``batching`` gets the number of conds of each call, ``network`` the number of rows of each forward.
    """
    seen = {"batching": [], "network": []}
    types = comfy.patcher_extension.WrappersMP

    def batching(executor, inner, conds, *args):
        seen["batching"].append(sum(cond is not None for cond in conds))
        return executor(inner, conds, *args)

    def network(executor, x, *args, **kwargs):
        seen["network"].append(len(x))
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(types.CALC_COND_BATCH, "calls", batching)
    model.add_wrapper_with_key(types.APPLY_MODEL, "calls", network)
    return model, seen

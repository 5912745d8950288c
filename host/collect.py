"""Run the host's sampler once and keep what the model predicted: data for methods that are fitted to a model."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.sample
import torch
from torch import Tensor

# What an empty latent says of its cells. ComfyUI 0.18 knows the first alone.
RATIOS = [key for key in ("downscale_ratio_spacial", "downscale_ratio_temporal")
          if key in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters]


def empty_as_sampled(model: Any, latent: dict) -> Tensor:
    """The samples of a LATENT as KSampler takes them: an empty one with the cells and channels of this model."""
    ratios = {key: latent[key] for key in RATIOS if key in latent}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)


def predictions(
    model: Any, positive: list, negative: list, latent: dict, seed: int, steps: int, cfg: float, sampler: str,
    scheduler: str, denoise: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What KSampler does, with both predictions of every model call.

    Returns:
        Noise levels ``[N]``, falling, and eps = (x - x0) / sigma of positive and negative, each ``[N, B, ...]`` on the
        CPU.

    Raises:
        ValueError: the sampler evaluates the model more than once a step.
    """
    seen: list[tuple[float, Tensor, Tensor]] = []
    run: list[Tensor] = []

    def keep(args: dict) -> Tensor:
        x, sigma = args["input"], float(args["sigma"].max())
        eps = (((x - args[name]) / sigma).float().cpu() for name in ("cond_denoised", "uncond_denoised"))
        seen.append((sigma, *eps))
        run[:] = [args["model_options"]["transformer_options"]["sample_sigmas"]]
        return args["denoised"]

    model = model.clone()
    model.set_model_sampler_post_cfg_function(keep, disable_cfg1_optimization=True)
    image = empty_as_sampled(model, latent)
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, image, denoise=denoise,
        noise_mask=latent.get("noise_mask"), seed=seed,
    )
    levels, conds, unconds = map(list, zip(*seen))
    if len(levels) >= len(run[0]) or levels != sorted(set(levels), reverse=True):
        raise ValueError(f"The sampler '{sampler}' evaluates the model more than once a step. Choose one of a single "
                         "evaluation for fitting and for sampling, such as euler or dpmpp_2m.")
    return torch.tensor(levels), torch.stack(conds), torch.stack(unconds)

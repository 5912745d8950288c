"""A world as a ComfyUI MODEL: the host's own classes around a network that answers exactly.

Everything between a node and the network is the host's: schedules, cond batching, the guiders and samplers. Only two
things are ours: the network, which looks up a prompt's mode weights and returns the mixture's eps (``EPS``, the noise
schedule of SD1.5 and SDXL) or velocity (``FLOW``, SD3's shift of 3), and a continuous timestep for ``EPS``. The host
rounds a noise level to one of 1000 trained timesteps on its way to the network, and what a network then gets wrong is
no part of guidance: :class:`Continuous` gives it the level itself.
"""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.supported_models_base
import torch
from torch import Tensor

from rudder.guidance.space import Parametrisation, noise_from_x0, v_from_x0

from .worlds import World


class Continuous(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
    """SD's schedule with a timestep that is the exact inverse of the host's ``sigma``, which interpolates."""

    def timestep(self, sigma: Tensor) -> Tensor:
        logs = self.log_sigmas.double()
        log = sigma.double().log().to(logs)
        low = (torch.searchsorted(logs, log) - 1).clamp(0, len(logs) - 2)
        return (low + (log - logs[low]) / (logs[low + 1] - logs[low])).to(sigma)


class Network(torch.nn.Module):
    """What the host calls: ``forward(x, timestep, context)``; ``context`` ``[B, 1, P]`` weighs the prompts.

    It has no weights and always computes on the CPU in float64; its answer is float32 on x's device.
    """

    dtype = torch.float32

    def __init__(self, world: World, kind: Parametrisation, sampling: torch.nn.Module) -> None:
        super().__init__()
        self.world, self.kind = world, kind
        self.table = torch.stack(list(world.prompts.values()))  # [P, K]
        self.sigma_of = sampling.sigma if kind is Parametrisation.EPS else lambda t: t / sampling.multiplier

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, **kwargs) -> Tensor:
        weights = context[:, 0].double().cpu() @ self.table
        sigma, inside = self.sigma_of(timestep).double().cpu(), x.double().cpu()
        flow = self.kind is Parametrisation.FLOW
        noisy = inside if flow else inside * (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)  # EPS.calculate_input, undone
        x0 = self.world.denoise(noisy, sigma, weights, self.kind)
        answer = (v_from_x0 if flow else noise_from_x0)(noisy, x0, sigma, self.kind)
        return answer.to(x)


def model_of(world: World, kind: Parametrisation) -> comfy.model_patcher.ModelPatcher:
    """The MODEL of a world in a parametrisation, EPS or FLOW."""
    flow = kind is Parametrisation.FLOW

    class Latents(comfy.latent_formats.LatentFormat):
        latent_channels = world.shape[0]
        spacial_downscale_ratio = 1

    class Config(comfy.supported_models_base.BASE):
        latent_format = Latents
        unet_extra_config = {}
        sampling_settings = {"shift": 3.0} if flow else {}
        memory_usage_factor = 0.01

    config = Config({"disable_unet_model_creation": True, "in_channels": world.shape[0]})
    base = comfy.model_base.BaseModel(
        config, comfy.model_base.ModelType.FLOW if flow else comfy.model_base.ModelType.EPS
    )
    if not flow:
        base.model_sampling = Continuous(config)
    base.diffusion_model = Network(world, kind, base.model_sampling)
    management = comfy.model_management
    return comfy.model_patcher.ModelPatcher(
        base.eval(), load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )


def conditioning(world: World, prompt: str) -> list:
    """The CONDITIONING that names a prompt, as a text encode node would give it."""
    features = torch.zeros(1, 1, len(world.prompts))
    features[..., list(world.prompts).index(prompt)] = 1.0
    return [[features, {}]]

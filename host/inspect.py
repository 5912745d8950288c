"""Evaluate a model once through an ordinary run of the host, with edits that watch its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch

from ..attention.contract import AttentionEdit
from ..guidance.contract import Edits, Guidance, GuidanceError, Step
from .collect import empty_as_sampled
from .conds import lies_in
from .patch import add_guidance
from .run import KEY


@dataclass(frozen=True, kw_only=True, eq=False)
class Watch(Guidance):
    """Brings the watching edits to the positive."""

    watching: tuple[AttentionEdit, ...]

    title = "Inspect Attention"

    def edits(self, step: Step) -> Edits:
        return [(edit, ("cond",)) for edit in self.watching]


def look(
    model: Any, positive: list, latent: dict, seed: int, percent: float, watching: Sequence[AttentionEdit]
) -> None:
    """One step of Euler without guidance, from the noise level at ``percent`` of the model's timesteps; the noisy
    latent is ``latent`` with the noise of ``seed``. Other Rudder methods on ``model`` rest.

    Raises:
        GuidanceError: no part of ``positive`` acts there.
    """
    watched = model.clone()
    watched.model_options.pop(KEY, None)
    watched = add_guidance(watched, Watch(watching=tuple(watching)))
    image = empty_as_sampled(model, latent)
    noise = comfy.sample.prepare_noise(image, seed, latent.get("batch_index"))
    sampling = model.get_model_object("model_sampling")
    level = min(max(float(sampling.percent_to_sigma(percent)), float(sampling.sigma_min)), float(sampling.sigma_max))
    acting = [c for c in positive if lies_in(c[1], percent)]
    if not acting:
        raise GuidanceError(f"Inspect Attention: no part of the positive acts at {percent:g} of the run. Choose a "
                            "'percent' inside its timestep range.")
    guider = comfy.samplers.CFGGuider(watched)
    guider.inner_set_conds({"positive": acting[:1]})  # the host evaluates several in an order of its own
    guider.set_cfg(1.0)
    guider.sample(
        noise, image, comfy.samplers.sampler_object("euler"), torch.tensor([level, 0.0]), latent.get("noise_mask"),
        disable_pbar=True, seed=seed,
    )

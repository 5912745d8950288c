"""TAG, temporal alignment guidance. Park, Jung, Bae, Yun, arXiv 2510.11057.

    x <- x + omega_t grad_x log p(t | x),  omega_t = omega_0 (1 - abar_t),  then an ordinary step at t

Errors take x off the noise level that the sampler tells the model. A small classifier p that reads the noise level from
x pulls it back. x is the variance-preserving one, abar its signal's share of the variance.

Derived here: places on a quarter turn stand for t (``temporal_net.place``), so that 1 - abar is sin^2; log p between
two bins is interpolated; the length of the shift is limited. The model is evaluated at the shifted x. The sampler keeps
its own x, so its estimate is moved by r / (1 - r) times the shift, r = sigma' / sigma, which for euler and ddim is
exactly the step from the shifted x. Samplers that weigh the estimate more (ancestral, SDE, CFG++) are pulled further.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .contract import Guidance, GuidanceError, Step
from .space import TINY, expand, norm, shrink
from .temporal_net import TimePredictor, alignment, place


@dataclass(frozen=True, kw_only=True)
class TemporalTAG(Guidance):
    """Pull x to the noise level of the step. No model evaluations; one small forward and backward of the predictor.

    Args:
        strength: omega_0; the paper searches it for each task, 0.2 to 200.
        limit: the longest shift, as a share of the length of x (derived).
    """

    predictor: TimePredictor
    strength: float = 1.0
    limit: float = 0.02

    title = "Noise Level Alignment (TAG)"
    claims = frozenset({"latent that the model sees"})
    rank = 10  # after all that read the estimate: what it adds is for the sampler

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("strength", self.strength), ("limit", self.limit)):
            if not 0 <= value < math.inf:
                raise GuidanceError(f"{self.title}: {name} is {value:g}; it must be 0 (changes nothing) or more.")

    def latent(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        state = step.state(self)
        if "predictor" not in state:
            if not self.predictor.fits(x):
                raise GuidanceError(f"{self.title}: the predictor reads latents of pictures or video with "
                                    f"{self.predictor.channels} channels, and this model's are "
                                    f"{'x'.join(map(str, x.shape[1:]))}. Train one on this model's latents; for sound "
                                    "there is none.")
            with torch.inference_mode(False):
                state["predictor"] = self.predictor.to(x)
        places, length = place(step.sigma.float(), step.parametrisation)
        scaled = x / expand(length, x)
        gradient, seen = alignment(state["predictor"], scaled, places)
        shift = gradient * expand(self.strength * torch.sin(places * math.pi / 2) ** 2, x)
        shift = shift * expand(shrink(shift, self.limit * norm(scaled)), x)
        step.log(time_gap=seen - places, shift=norm(shift) / norm(scaled).clamp_min(TINY))
        state["shift"] = shift * expand(length, x)
        return x + state["shift"]

    def finish(self, step: Step, x0: torch.Tensor) -> torch.Tensor:
        if step.level == 0:  # a look at the clean picture, of which the sampler goes nowhere (autoregressive video)
            return x0
        r = step.sigma_next / step.level
        away = math.copysign(max(abs(1 - r), 0.001), 1 - r)  # below 0 in a run towards noise
        return x0 + r / away * step.state(self)["shift"]

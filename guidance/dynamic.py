"""Dynamic CFG by feedback. Papalampidi et al., ICLR 2026, arXiv 2509.16131.

    at every step: w = argmax over s in S of score(D_c + (s - 1)(D_c - D_u), c)

The candidates come from the same two predictions, so the model is evaluated no more often; each picture chooses for
itself. The paper's S is {1, 3, 7.5, 11, 15} for latent diffusion (read in notes of the paper). Its scorers (CLIP, a
discriminator, rewards) are trained on noisy latents and are not public, and neither are their weights in the sum: here
a scorer is whatever the user wires (``scorers.py``, ``host/score.py``) and looks at the candidates' x0 (derived).

The choice scales the push as the other methods leave it, so a candidate is what would really be used (derived).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .cfg import require_guidance
from .contract import Guidance, GuidanceError, Setup, Step
from .space import expand


class Scorer(Protocol):
    """Judges candidates: x0 predictions ``[B, C, (T,) H, W]`` in model space -> one number a sample, ``[B]``, more is
    better. ``step`` has the noise level and the predictions. Nothing of it may be changed."""

    def __call__(self, x0: Tensor, step: Step) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class DynamicCFG(Guidance):
    """Guide every picture by whichever of ``weights`` scores best at this step. 2 evaluations a step, and as many calls
    of the scorer as there are weights."""

    weights: tuple[float, ...] = (1.0, 3.0, 7.5, 11.0, 15.0)
    scorer: Scorer

    title = "Self-tuning CFG (dynamic)"
    claims = frozenset({"guidance weight", "course of the guidance weight"})
    rank = 6  # the push as it will be used

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.weights or not all(math.isfinite(w) for w in self.weights):
            raise GuidanceError(f"{self.title}: weights must be finite numbers, such as 1, 3, 7.5, 11, 15 (paper).")

    def check(self, setup: Setup) -> None:
        require_guidance(
            self.title, setup, "there is no push to scale there; 'Structure Guidance (PAG)' brings one of its own."
        )

    def direction(self, step: Step, delta: Tensor) -> Tensor:
        if step.weight == 1.0:  # another method turned guidance off
            return delta
        best = torch.full((len(delta),), -math.inf, device=delta.device)
        weights = sorted(self.weights, key=lambda w: (abs(w - step.weight), w))  # ties: nearest to the sampler's
        chosen = torch.full_like(best, weights[0])
        for weight in weights:
            score = self.scored(step.preds.cond + (weight - 1) * delta, step)
            better = score > best
            best, chosen = torch.where(better, score, best), torch.where(better, weight, chosen)
        step.log(chosen_weight=chosen)
        return delta * expand((chosen - 1) / (step.weight - 1), delta)

    def scored(self, x0: Tensor, step: Step) -> Tensor:
        score = torch.as_tensor(self.scorer(x0, step))
        if score.shape != (len(x0),) or bool(score.isnan().any()):
            what = "NaN" if score.shape == (len(x0),) else f"numbers of shape {tuple(score.shape)}"
            raise GuidanceError(
                f"{self.title}: the scorer {type(self.scorer).__name__} gave {what} for {len(x0)} pictures; it must "
                "give one number for each. Wire another scorer, or none."
            )
        return score.to(x0.device, torch.float32)

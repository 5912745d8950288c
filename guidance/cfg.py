"""Classifier-free guidance. Ho & Salimans, arXiv 2207.12598, Eq. 6 (their w is this weight minus 1).

    D = D_u + w (D_c - D_u)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .contract import Guidance, GuidanceError, Setup, Step, check_finite


def cfg(cond: Tensor, uncond: Tensor, weight: float) -> Tensor:
    """The guided x0; weight 1 is no guidance, 0 the unconditional prediction. Shapes as the inputs."""
    return uncond + (cond - uncond) * weight


def require_guidance(title: str, setup: Setup, instead: str) -> None:
    """Refuse a run without classifier-free guidance, where a method that shapes it could do nothing.

    ``instead`` is a sentence: what to use on models that run at cfg 1.
    """
    if not setup.guided:
        why = "the weight is 1 at every step" if setup.has_negative else "there is no negative"
        raise GuidanceError(
            f"{title}: it shapes classifier-free guidance and this run has none ({why}; the sampler's cfg is "
            f"{setup.cfg:g}). Set cfg above 1 in the sampler with a negative (an empty prompt will do), and let no "
            f"other node lower it to 1. Models with distilled guidance (Flux-dev, few-step models) run at cfg 1: "
            f"{instead}"
        )


@dataclass(frozen=True, kw_only=True)
class CFG(Guidance):
    """Replace the sampler's cfg by ``weight`` inside the window. 2 evaluations a step, 1 where the weight is 1."""

    weight: float

    title = "Guidance Weight (CFG)"
    claims = frozenset({"guidance weight"})
    rank = -1  # schedules and gates act on the weight that this sets

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self.title, "weight", self.weight, "1 for no guidance")

    def check(self, setup: Setup) -> None:
        if self.weight != 1.0 and not setup.has_negative:
            raise GuidanceError(
                f"{self.title}: weight {self.weight:g} needs a negative conditioning and this guider has none. "
                "Use KSampler or CFGGuider with a negative (an empty prompt will do), or set weight to 1."
            )

    def scale(self, step: Step, weight: float) -> float:
        return self.weight

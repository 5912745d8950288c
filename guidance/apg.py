"""APG, adaptive projected guidance. Sadat, Hilliges, Weber, ICLR 2025, arXiv 2410.02416, Sec. 4 and Alg. 1.

    g <- (D_c - D_u) + beta g_previous                       (reverse momentum, beta < 0)
    g <- g min(1, r / |g|)                                   (norm threshold)
    D  = D_c + (w - 1) (g_orthogonal + eta g_parallel)       (split along D_c)

The part of the push along D_c mostly raises contrast and saturation; eta = 0 drops it. All of it happens on x0, as in
the paper. With eta 1, no threshold and no momentum it is CFG at the same w; the host's own APG node is CFG at w + 1.

Defaults eta 0, r 15, beta -0.5 are the paper's for SDXL (recalled, not re-checked). The norm of a latent grows with its
size, so r is meant for SDXL's 4x128x128 and scaled by sqrt(numbers in the latent / 65536) (derived).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .cfg import require_guidance
from .contract import Guidance, GuidanceError, Setup, Step
from .space import along, cosine, expand, shrink

SDXL = 4 * 128 * 128  # numbers in the latent that the paper's threshold is for


def projected(push: Tensor, axis: Tensor, eta: float) -> Tensor:
    """``push`` with its part along ``axis`` multiplied by ``eta``, per sample; ``push`` itself at eta 1."""
    return push + (eta - 1) * along(push, axis)


def radius(threshold: float, x: Tensor) -> float:
    """The norm threshold for latents of the size of ``x``."""
    return threshold * (x[0].numel() / SDXL) ** 0.5


@dataclass(frozen=True, kw_only=True)
class APG(Guidance):
    """Guide without over-saturation at high weights. 2 evaluations a step, as CFG.

    Args:
        eta: share of the parallel part, 0 .. 1; above 1 saturates more than CFG.
        threshold: largest norm of the push in an SDXL latent; 0 is none.
        momentum: beta in (-1, 1); negative damps what the last steps pushed already, 0 is off.
    """

    eta: float = 0.0
    threshold: float = 15.0
    momentum: float = -0.5

    title = "High CFG without Burn (APG)"
    claims = frozenset({"norm of the guidance"})
    rank = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.eta <= 100.0:
            raise GuidanceError(f"{self.title}: eta is {self.eta:g}; 0 drops the parallel part, 1 keeps it as CFG.")
        if not self.threshold >= 0.0:
            raise GuidanceError(f"{self.title}: norm_threshold is {self.threshold:g}; use 0 for none, or more.")
        if not -1.0 < self.momentum < 1.0:
            raise GuidanceError(
                f"{self.title}: momentum is {self.momentum:g}; it must lie between -1 and 1, or the running average "
                "would grow without end. Paper: -0.5."
            )

    def check(self, setup: Setup) -> None:
        require_guidance(self.title, setup, "lower the value of FluxGuidance there if pictures burn.")

    def direction(self, step: Step, delta: Tensor) -> Tensor:
        push, state = delta, step.state(self)
        if self.momentum:
            push = state["average"] = delta + self.momentum * state["average"] if "average" in state else delta
        cond = step.preds.cond
        step.log(parallel=cosine(push, cond))
        if self.threshold > 0:
            factor = shrink(push, radius(self.threshold, push))
            step.log(clipped=factor)
            push = push * expand(factor, push)
        return projected(push, cond, self.eta)

"""What the methods of this folder share: the denoiser, and one Euler step, which has the same form for every model.

In the sampler's coordinates (see ``guidance/space.py``) every model is followed along dx / dsigma = (x - D) / sigma,
whether x = x0 + sigma eps or x = (1 - sigma) x0 + sigma noise. So an Euler step, forward or in reverse, needs no
parametrisation; only what speaks of the *noise* in x does, through the share of x0 in x (``space.signal``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from ..guidance.contract import GuidanceError

Denoiser = Callable[[Tensor, float], Tensor]
"""(x ``[B, C, (T,) H, W]``, sigma) -> x0, both in model space, float32."""

Report = Callable[[int, Tensor, Tensor], None]
"""(index of the step, x before it, x0): for previews and progress bars."""


def euler(x: Tensor, x0: Tensor, sigma: float, to: float) -> Tensor:
    """x at the level ``to``: x0 + (to / sigma) (x - x0). Rising levels step in reverse; shapes as the inputs."""
    return x0 + (to / sigma) * (x - x0)


def check_falling(title: str, sigmas: Sequence[float]) -> None:
    """Refuse noise levels along which nothing can be sampled."""
    if any(not math.isfinite(s) for s in sigmas) or any(to >= s for s, to in zip(sigmas, sigmas[1:])):
        raise GuidanceError(
            f"{title}: the sampler's sigmas must fall at every step, and these do not: "
            f"{', '.join(f'{s:.4g}' for s in sigmas)}. Use a scheduler's sigmas, not flipped and not joined twice."
        )

"""TAG, tangential amplifying guidance. Cho, Ahn, Hong et al., ICML 2026, arXiv 2510.04533.

With xh = x / |x|, every update of the sampler splits into a radial part along xh, which sets the noise level, and a
tangential part, which holds the content. TAG amplifies the second by eta >= 1:

    D' = D_par + eta D_perp                             along xh

On x0 that equals scaling the update of any linear one-step solver (derived); of multistep solvers (dpmpp_2m) it scales
the newest prediction only. No prompt, no guidance and no evaluation is needed.

C-TAG, the form for guidance (published for eps; read in notes of the paper, not in code):

    g = eps_c - eps_u,  t = P_perp g,  eps = eps_u + w g + eta (<eps_c, t> / |t|^2) t

Here on the residuals e = x - x0, the same for eps models; for flow e is sigma v (derived). The added vector is eta
times the projection of e_c on t, so it stays bounded where t vanishes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from .cfg import require_guidance
from .contract import Guidance, GuidanceError, Predictions, Setup, Step
from .space import TINY, along, norm, perpendicular, residual


def check_eta(title: str, eta: float, least: float, neutral: str) -> None:
    if not least <= eta < math.inf:
        raise GuidanceError(f"{title}: eta is {eta:g}; it must be {least:g} or more, {neutral}.")


@dataclass(frozen=True, kw_only=True)
class TAG(Guidance):
    """Amplify the tangential part of the result by ``eta``. No evaluation of its own; works at cfg 1 as well."""

    eta: float = 1.15

    title = "Sharper Content (TAG)"
    claims = frozenset({"tangential part of the update"})
    rank = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eta(self.title, self.eta, 1.0, "1 changes nothing, the paper's are 1.05 to 1.25")

    def finish(self, step: Step, x0: Tensor) -> Tensor:
        if self.eta == 1.0:
            return x0
        tangent = perpendicular(x0, step.x)
        step.log(tangential=norm(tangent) / norm(x0).clamp_min(TINY))
        return x0 + (self.eta - 1) * tangent


@dataclass(frozen=True, kw_only=True)
class CTAG(Guidance):
    """Add the conditional residual's part along the tangential guidance, times ``eta``. 2 evaluations a step."""

    eta: float = 2.5

    title = "Sharper Content (C-TAG)"
    claims = frozenset({"tangential part of the update"})
    rank = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eta(self.title, self.eta, 0.0, "0 changes nothing, the paper's is 2.5 at cfg 2.5")

    def check(self, setup: Setup) -> None:
        require_guidance(self.title, setup, "use the mode 'tangential' there.")

    def term(self, step: Step, preds: Predictions) -> Tensor | None:
        if preds.uncond is None or step.weight == 1.0 or not self.eta:
            return None
        tangent = perpendicular(preds.cond - preds.uncond, step.x)
        added = along(residual(step.x, preds.cond), tangent)
        step.log(tangential=norm(added) / norm(residual(step.x, preds.cond)).clamp_min(TINY))
        return -self.eta * step.guided_only(added)  # x0 = x - e

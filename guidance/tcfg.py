"""TCFG, tangential damping classifier-free guidance. Kwon et al., CVPR 2025, arXiv 2503.18137, Sec. 4.

    [s_u; s_c] = U S V^T,   v1 the top right singular vector (a combination of the two scores)
    s_u~ = <s_u, v1> v1,    then CFG with s_u~ in place of s_u

What the unconditional score does not share with the conditional one pushes off the data and is removed. Scores are
taken as the residuals e = x - x0 (the sign does not matter), per sample over every dimension; on x0 itself it would be
another method.

The SVD of two long rows is the eigenvalue problem of their 2x2 Gram matrix (derived): with the top eigenvector
(a, b) = (cos t, sin t), tan 2t = 2 <u,c> / (<u,u> - <c,c>), it follows that s_u~ = a^2 s_u + a b s_c.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .cfg import require_guidance
from .contract import Guidance, Predictions, Setup, Step
from .space import TINY, dot, expand, norm, residual


def damped(uncond: Tensor, cond: Tensor) -> Tensor:
    """``uncond`` projected on the top singular vector of the pair, ``[B, ...]``.

    Where the pair has no top vector (orthogonal and of one length) it stays as it is.
    """
    uu, cc, uc = dot(uncond, uncond), dot(cond, cond), dot(uncond, cond)
    length = torch.hypot(uu - cc, 2 * uc)
    clear = length > TINY * (uu + cc)
    length = length.clamp_min(torch.finfo(length.dtype).tiny)
    a2 = torch.where(clear, (1 + (uu - cc) / length) / 2, torch.ones_like(length))
    ab = torch.where(clear, uc / length, torch.zeros_like(length))
    return expand(a2, uncond) * uncond + expand(ab, uncond) * cond


@dataclass(frozen=True, kw_only=True)
class TCFG(Guidance):
    """Remove from the negative's score what it does not share with the positive's. 2 evaluations a step, as CFG."""

    title = "Cleaner Negative (TCFG)"
    claims = frozenset({"prediction of the negative"})
    rank = 2

    def check(self, setup: Setup) -> None:
        require_guidance(
            self.title, setup, "remove the node there; for a negative use 'Negative at Any CFG (NAG)' in its place."
        )

    def refine(self, step: Step, preds: Predictions) -> Predictions:
        if preds.uncond is None or step.weight == 1.0:
            return preds
        uncond = residual(step.x, preds.uncond)
        kept = damped(uncond, residual(step.x, preds.cond))
        step.log(removed=norm(kept - uncond) / norm(uncond).clamp_min(TINY))
        return preds.replace(uncond=step.x - kept)

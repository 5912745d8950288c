"""SAG, self-attention guidance. Hong et al., ICCV 2023, arXiv 2210.00939, and the official code.

    M      = [attention that a token gets, mean over heads, summed over queries, > 1]      (1 is the average token)
    D~     = M blur(D) + (1 - M) D                (what the model itself finds salient, blurred)
    x~     = x + a (D~ - D)                       (D~ with the noise that x holds; a is the share of signal)
    D_sag  = D_cfg + s (D~ - D(x~))

This is eps(x~) + (1 + s) (eps(x) - eps(x~)) written for x0; the official flag guide_scale is 1 + s. a is 1 for eps and
v models and 1 - sigma for flow (derived: x~ = (1 - sigma) D~ + sigma n with the n of x; the last line is then also that
rule for n). D is the negative's prediction where one was made for guidance, else the positive's. While guidance has
left a part of the pictures of a batch, both are evaluated.

The second pass depends on the first, so it cannot share its call. On joint attention (derived; the paper has UNets)
the map is that of image tokens to image tokens, each query's attention to the text left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.perturb import gaussian
from ..attention.salience import Salience
from .contract import Edits, Guidance, GuidanceError, Predictions, Setup, Step, check_finite
from .space import expand, norm, signal

AVERAGE = 1 + 1e-5  # an even map is 1 everywhere but for rounding, and finds nothing salient


def salient(salience: Tensor, like: Tensor) -> Tensor:
    """M from ``[B, t, h, w]``, 0 or 1, ``[B, 1, (T,) H, W]`` of ``like``."""
    size = like.shape[2:] if like.ndim == 5 else (1, *like.shape[2:])
    mask = torch.nn.functional.interpolate((salience > AVERAGE).to(like)[:, None], size)
    return mask if like.ndim == 5 else mask[:, :, 0]


@dataclass(frozen=True, kw_only=True)
class SelfAttentionGuidance(Guidance):
    """Push away from what the model predicts when its salient areas are blurred. One evaluation a step, after the
    others.

    Args:
        strength: s; 0 changes nothing and costs nothing. Official code: 0.5 alone, 0.1 beside a classifier.
        sigma: of the blur, in cells of the latent. 2 in ComfyUI's own node; officially 9 at 256 pixels, 3 at 128.
        blocks: the one block whose map it reads, see ``attention.sites.selected``; "" is the UNet's middle, and of a
            transformer the block half-way.
    """

    strength: float = 0.5
    sigma: float = 2.0
    blocks: str = ""

    title = "Salient Detail Guidance (SAG)"
    rank = 11

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self.title, "strength", self.strength, "0 for none")
        if not 0 < self.sigma < math.inf:
            raise GuidanceError(f"{self.title}: blur_sigma is {self.sigma:g}; it must be above 0. Usual: 2.")

    @property
    def reader(self) -> Salience:
        return Salience(blocks=self.blocks, owner=self)

    def check(self, setup: Setup) -> None:
        names = list(dict.fromkeys(site.name for site in setup.sites if self.reader.acts_at(site)))
        if self.strength and len(names) > 1:
            raise GuidanceError(f"{self.title}: it reads the map of one block, and '{self.blocks}' names "
                                f"{len(names)}: {', '.join(names)}. Write one of them.")

    def edits(self, step: Step) -> Edits:
        return [(self.reader, ("cond", "uncond"))] if self.strength else []

    def salience(self, step: Step, role: str) -> Tensor:
        """``[B, t, h, w]``, the mean over the prompts that play the role together."""
        maps = step.state(self).get(role)
        if not maps:
            raise GuidanceError(
                f"{self.title}: it needs the attention of whole pictures, and the "
                f"{'positive' if role == 'cond' else 'negative'} is evaluated in parts or not at all. Combine it with "
                "a prompt without an area, or remove the node that cuts the latent into windows or skips the model."
            )
        return torch.stack(maps).mean(0)

    def term(self, step: Step, preds: Predictions) -> Tensor | None:
        if self.strength == 0:
            return None
        guided = step.plain.uncond is not None and not math.isclose(step.weight, 1.0)
        roles = ("cond",) if not guided else ("uncond",) if step.left is None else ("uncond", "cond")

        def own(values: Sequence[Tensor]) -> Tensor:
            """Of one value for each of ``roles`` that of each picture: guidance has left those of the second."""
            first, *rest = values
            return torch.where(expand(step.left, first) > 0, rest[0], first) if rest else first

        x0 = own([getattr(step.plain, role) for role in roles])
        mask = salient(own([self.salience(step, role) for role in roles]), x0)
        step.state(self).clear()
        step.log(salient=mask.flatten(1).mean(1))
        if not mask.any():
            return None
        blurred = x0 + mask * (gaussian(x0, self.sigma, span=2) - x0)
        x = step.x + signal(step.level, step.parametrisation) * (blurred - x0)
        worse = own(step.evaluate(x, step.level, *roles))
        some = expand(mask.flatten(1).any(1).to(x0), x0)  # a picture without salient areas stays as it is
        push = some * (blurred - worse)
        step.log(sag_norm=norm(push))
        return self.strength * push

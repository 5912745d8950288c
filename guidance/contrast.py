"""Guidance away from a worse prediction of the same model: PAG and SEG as terms beside CFG.

    D = D_cfg + s (D_c - D_worse)

PAG: Ahn et al., ECCV 2024, arXiv 2403.17377. SEG: Hong, NeurIPS 2024, arXiv 2408.00760. What makes the prediction worse
is an edit of the attention, see ``attention/perturb.py``. The worse prediction rides in the step's batched call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..attention.contract import AttentionEdit
from ..attention.perturb import Blur, Identity
from .contract import Branch, Guidance, GuidanceError, Predictions, Step, Variant
from .space import norm


@dataclass(frozen=True, kw_only=True)
class Contrast(Guidance):
    """Push away from the positive's prediction with degraded attention. One evaluation a step.

    Args:
        strength: s; 0 changes nothing and costs nothing.
        blocks: at which sites, see ``attention.sites.selected``.
    """

    strength: float = 3.0
    blocks: str = "middle"

    rank: ClassVar[int] = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.strength):
            raise GuidanceError(f"{self.title}: strength is {self.strength:g}; it must be a finite number.")

    @property
    def edit(self) -> AttentionEdit:
        raise NotImplementedError

    @property
    def worse(self) -> Variant:
        return Variant("cond", edits=(self.edit,))

    def prompts(self) -> Sequence[Branch]:
        return () if self.strength == 0 else (self.worse,)

    def branches(self, step: Step) -> Sequence[Branch]:
        return self.prompts()

    def term(self, step: Step, preds: Predictions) -> Tensor | None:
        if self.strength == 0:
            return None
        push = self.strength * (preds.cond - preds[self.worse])
        step.log(contrast=norm(push))
        return push


@dataclass(frozen=True, kw_only=True)
class PerturbedAttention(Contrast):
    """PAG. The paper: s 3 with CFG 4, s 5 alone, in the middle block of SD1.5 and SDXL."""

    title = "Structure Guidance (PAG)"

    @property
    def edit(self) -> AttentionEdit:
        return Identity(blocks=self.blocks)


@dataclass(frozen=True, kw_only=True)
class SmoothedEnergy(Contrast):
    """SEG. The paper fixes s at 3 and turns sigma; above 9999 every query is the mean."""

    sigma: float = 100.0

    title = "Smoothness Guidance (SEG)"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma >= 0:
            raise GuidanceError(f"{self.title}: sigma is {self.sigma:g}; it must be 0 (changes nothing) or more.")

    @property
    def edit(self) -> AttentionEdit:
        return Blur(blocks=self.blocks, sigma=self.sigma)

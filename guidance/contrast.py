"""Guidance away from a worse prediction of the same model: PAG and SEG as terms beside CFG.

    D = D_cfg + s (D_c - D_worse)

PAG: Ahn et al., ECCV 2024, arXiv 2403.17377. SEG: Hong, NeurIPS 2024, arXiv 2408.00760. What makes the prediction worse
is an edit of the attention, see ``attention/perturb.py``. The worse prediction rides in the step's batched call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..attention.contract import AttentionEdit
from ..attention.perturb import Blur, Identity
from .contract import Branch, Guidance, GuidanceError, Predictions, Step, Variant, check_finite
from .space import cosine, norm

#: The blocks that are degraded, whatever family the model is of. "middle", the UNet's, is that of both papers,
#: "joint.1" the default of a public implementation for SD3. PROVISIONAL, no publication has one: "joint.1" of Qwen-
#: Image, Lumina 2 and Z-Image, which nobody has tried; "double.1" of Flux, which of the demo Flux's four blocks does
#: the least harm at s 3 (`bench blocks`; a large one has 57); "block.9" of Wan, of the blocks that users of skip-
#: layer guidance leave out (8 to 10).
BLOCKS = "middle, joint.1, double.1, block.9"


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What the two share: a push away from the positive's prediction with degraded attention. One evaluation a step.

    Args:
        strength: s; 0 changes nothing and costs nothing.
        blocks: at which sites, see ``attention.sites.selected``.
    """

    strength: float = 3.0
    blocks: str = BLOCKS

    title: ClassVar[str]
    short: ClassVar[str]  # what its quantities in the trace begin with

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self.title, "strength", self.strength, "0 for none")

    @property
    def edit(self) -> AttentionEdit:
        raise NotImplementedError

    @property
    def off(self) -> bool:
        return self.strength == 0

    @property
    def worse(self) -> Variant:
        return Variant("cond", edits=(self.edit,))

    def prompts(self) -> Sequence[Branch]:
        return () if self.off else (self.worse,)

    def branches(self, step: Step) -> Sequence[Branch]:
        return self.prompts()

    def term(self, step: Step, preds: Predictions) -> Tensor | None:
        """s (D_c - D_worse), both as the model predicts them: a blend of the positive is no part of the contrast."""
        if self.off:
            return None
        contrast = step.plain.cond - preds[self.worse]
        step.log(**{f"{self.short}_norm": norm(contrast)})
        if step.plain.uncond is not None:
            step.log(**{f"{self.short}_cosine": cosine(contrast, step.plain.cond - step.plain.uncond)})
        return self.strength * contrast


@dataclass(frozen=True, kw_only=True)
class PerturbedAttention(Contrast, Guidance):
    """PAG. The paper: s 3 with CFG 4, s 5 alone, in the middle block of SD1.5 and SDXL."""

    title = "Structure Guidance (PAG)"
    short = "pag"
    rank = 9

    @property
    def edit(self) -> AttentionEdit:
        return Identity(blocks=self.blocks)


@dataclass(frozen=True, kw_only=True)
class SmoothedEnergy(Contrast, Guidance):
    """SEG. The paper fixes s at 3 and turns sigma; above 9999 every query is the mean."""

    sigma: float = 100.0

    title = "Smoothness Guidance (SEG)"
    short = "seg"
    rank = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma >= 0:
            raise GuidanceError(f"{self.title}: sigma is {self.sigma:g}; it must be 0 (changes nothing) or more.")

    @property
    def off(self) -> bool:
        return self.strength == 0 or self.sigma == 0

    @property
    def edit(self) -> AttentionEdit:
        return Blur(blocks=self.blocks, sigma=self.sigma)

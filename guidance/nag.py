"""NAG: a negative prompt at any cfg, also at 1, for few-step and distilled models.

Chen et al., arXiv 2505.21179. What it does inside attention is in ``attention/nag.py``. On UNets (SD1.5, SD2, SDXL)
and on Wan it costs no model evaluation, only a second attention to text; on joint attention (Flux, SD3, Qwen-Image,
Lumina 2, Z-Image) one evaluation a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..attention.nag import JointNormalisedGuidance, NormalisedGuidance
from .contract import Branch, Edits, Guidance, GuidanceError, Prompt, Setup, Step, Variant


@dataclass(frozen=True, kw_only=True)
class NAG(Guidance):
    """Push the positive's attention away from what the negative's text gives.

    Args:
        negative: the prompt to push away from.
        strength: s; 1 changes nothing and costs nothing. Official: 5; 3 for DMD2-SDXL.
        tau: the largest growth of a token's norm, at least 1. Official: 2.5.
        alpha: how much of the result is used; 0 changes nothing and costs nothing. Official: 0.25 for Flux and SD3.5,
            0.38 for SD1.5 with CFG 7, 0.5 for DMD2-SDXL.
        blocks: at which sites, "" for all.
    """

    negative: Prompt
    strength: float = 5.0
    tau: float = 2.5
    alpha: float = 0.25
    blocks: str = ""

    title = "Negative at Any CFG (NAG)"
    claims = frozenset({"negative inside attention"})
    rank = 3  # pushes what the edits leave

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.strength) and self.strength >= 1):
            raise GuidanceError(f"{self.title}: scale is {self.strength:g}; it must be 1 (off) or more. Usual: 3 to 6.")
        if not self.tau >= 1:
            raise GuidanceError(f"{self.title}: tau is {self.tau:g}; it must be 1 or more. Usual: 2.5.")
        if not 0 <= self.alpha <= 1:
            raise GuidanceError(f"{self.title}: alpha is {self.alpha:g}; it must be from 0 (off) to 1. Usual: 0.25.")

    @property
    def off(self) -> bool:
        return self.strength == 1 or self.alpha == 0

    @property
    def branch(self) -> Branch:
        """Not the prompt itself: another method's prediction of it must stay what it is."""
        return Variant(self.negative)

    def check(self, setup: Setup) -> None:
        if not self.off and (limits := setup.limits(self.negative)):
            raise GuidanceError(f"{self.title}: the negative has {' and '.join(limits)}, and inside attention only its "
                                "text counts, everywhere and at full strength. Wire the prompt without; for a part of "
                                "the run set start_percent and end_percent here, for less of it alpha.")
        if not self.off and setup.likeness(self.negative) == "positive":
            raise GuidanceError(f"{self.title}: the negative is identical to the positive, so nothing would change. "
                                "Write what the picture should not show.")
        if not self.off and setup.parts > 1 and any(site.kind == "joint" for site in setup.sites):
            raise GuidanceError(f"{self.title}: the positive has {setup.parts} parts at a time (combined prompts), and "
                                "on this model (joint attention of text and image) the negative can ride with one "
                                "only. Write them as one prompt.")

    def prompts(self) -> Sequence[Branch]:
        return () if self.off else (self.branch,)

    def branches(self, step: Step) -> Sequence[Branch]:
        return self.prompts() if joint(step) else ()

    def edits(self, step: Step) -> Edits:
        if self.off:
            return []
        edit = JointNormalisedGuidance if joint(step) else NormalisedGuidance
        where = {"negative": self.branch, "blocks": self.blocks}
        return [(edit(scale=self.strength, tau=self.tau, alpha=self.alpha, **where), ("cond", self.branch))]


def joint(step: Step) -> bool:
    """Whether the model attends to text and image together."""
    return any(site.kind == "joint" for site in step.sites)

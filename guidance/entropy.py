"""Attention entropy scaling for pictures of another size than the model was trained on, see ``attention/entropy.py``.

Jin et al., NeurIPS 2023, arXiv 2306.08645.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..attention.entropy import Entropy
from .contract import Edits, Guidance, GuidanceError, Step


@dataclass(frozen=True, kw_only=True)
class AttentionEntropy(Guidance):
    """Sharpen the attention of larger pictures and soften that of smaller ones. No evaluation of its own.

    Args:
        trained: (height, width) that the model was trained on, in cells of the latent.
        text: whether text counts among the tokens of joint attention.
        blocks: at which sites, see ``attention.sites.selected``; "" is all.
    """

    trained: tuple[float, float]
    text: bool = True
    blocks: str = ""

    title = "Other Sizes (attention entropy)"
    claims = frozenset({"sharpness of the attention"})
    rank = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < side < math.inf for side in self.trained):
            height, width = self.trained
            raise GuidanceError(f"{self.title}: the trained size is {width:g} x {height:g} cells of the latent; both "
                                "sides must be above 0. SD1.5: 64 x 64, SDXL, SD3 and Flux: 128 x 128.")

    def edits(self, step: Step) -> Edits:
        return [(Entropy(blocks=self.blocks, trained=self.trained, text=self.text), ())]

"""Two strengths, one for the image and one for the text. InstructPix2Pix, Brooks et al., CVPR 2023, arXiv 2211.09800,
Eq. 3:

    D = D(0, 0) + s_I (D(I, 0) - D(0, 0)) + s_T (D(I, T) - D(I, 0))

D(I, T) is the sampler's positive, D(I, 0) its negative, s_T its cfg; D(0, 0) is the negative without the image that it
shows the model. So it is CFG and a term, (s_I - 1) (D(I, 0) - D(0, 0)), and s_I = 1 is plain CFG. Official s_T 7.5 and
s_I 1.5, from 1 to 1.5; more keeps more of the image.

With a ``base`` of one's own for (0, 0) it is the same chain for any two conditions: base, base + first, base + both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .cfg import require_guidance
from .contract import Branch, Guidance, GuidanceError, Predictions, Prompt, Setup, Step, Variant, check_finite
from .space import cosine

IMAGELESS = Variant("uncond", image=False)


@dataclass(frozen=True, kw_only=True)
class InstructGuidance(Guidance):
    """Weigh what the negative has over ``base`` (None: itself without its image) by ``weight``, s_I. 3 evaluations a
    step, 2 at ``weight`` 1."""

    weight: float = 1.5
    base: Prompt | None = None

    title = "Image and Text Strength (InstructPix2Pix)"
    claims = frozenset({"strength of the image"})
    rank = 8

    @property
    def needs_uncond(self) -> bool:  # also at cfg 1
        return self.weight != 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self.title, "image_scale", self.weight, "1 for none")

    @property
    def branch(self) -> Branch:
        return self.base or IMAGELESS

    def prompts(self) -> Sequence[Branch]:
        return (self.branch,)

    def check(self, setup: Setup) -> None:
        if not setup.has_negative:
            require_guidance(self.title, setup, "give CFGGuider a negative; at cfg 1 the image's strength acts alone.")
        if self.base and setup.likeness(self.base) == "negative":
            raise GuidanceError(
                f"{self.title}: the base conditioning is identical to the sampler's negative, so there is nothing "
                "between them to weigh. Give the negative what the base lacks (the image, or the first prompt)."
            )

    def branches(self, step: Step) -> Sequence[Branch]:
        return (self.branch,) if self.weight != 1.0 else ()

    def term(self, step: Step, preds: Predictions) -> Tensor | None:
        if self.weight == 1.0:
            return None
        push = preds.said(self.branch, step.plain.uncond - preds[self.branch])
        step.log(image_cosine=cosine(push, step.plain.cond - step.plain.uncond))
        return (self.weight - 1) * push

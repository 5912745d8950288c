"""AutoGuidance. Karras et al., NeurIPS 2024, arXiv 2406.02507, Eq. 4 (recalled): guide by a bad version of the model.

    D = D_bad + w (D_good - D_bad)                           (both at the same conditioning)

The bad model errs where the good one does, only more, so the difference points away from the error; unlike CFG it does
not trade variety for the prompt. It must be worse in the same way: smaller and trained less. Paper, EDM2-S with XS at a
sixteenth of the training: w 2.1 for FID. Nothing is published for SD, SDXL or Flux; there, earlier checkpoints, smaller
siblings and weakened copies are what one can try (derived).

Together with CFG at weight w_c it is added on top (derived; the two pushes are independent):

    D = D_u + w_c (D_good - D_u) + (w - 1) (D_good - D_bad)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .contract import Branch, Guidance, Predictions, Step, Variant, check_finite
from .space import cosine, norm


@dataclass(frozen=True, kw_only=True)
class AutoGuidance(Guidance):
    """Push away from what ``bad``, a worse MODEL, predicts for the positive. 1 evaluation of that model a step, beside
    1 of the good one at cfg 1 or 2 with CFG."""

    bad: Any
    weight: float = 2.0

    title = "Guide with a Worse Model (AutoGuidance)"
    claims = frozenset({"worse model"})
    rank = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self.title, "weight", self.weight, "1 for none. Paper: 2.1")

    @property
    def branch(self) -> Variant:
        return Variant("cond", model=self.bad)

    def prompts(self) -> Sequence[Branch]:
        return (self.branch,)

    def branches(self, step: Step) -> Sequence[Branch]:
        return (self.branch,) if self.weight != 1.0 else ()

    def term(self, step: Step, preds: Predictions) -> Tensor | None:
        if self.weight == 1.0:
            return None
        push = step.plain.cond - preds[self.branch]
        step.log(bad_norm=norm(push))
        if step.plain.uncond is not None:
            step.log(bad_cosine=cosine(push, step.plain.cond - step.plain.uncond))
        return (self.weight - 1) * push

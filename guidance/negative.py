"""An extra negative with a weight of its own, beside the sampler's negative, which stays D_u.

    D = D_u + w (D_c - D_u) - w_n (D_n - D_u)

The explicit form of the negative prompt (from the survey notes). With w_n = w - 1 it is the usual negative in the place
of D_u (derived), but here its strength does not grow with cfg.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .cfg import require_guidance
from .contract import Branch, Guidance, GuidanceError, Predictions, Prompt, Setup, Step, check_finite
from .space import cosine

WHY = {
    "positive": "identical to the positive; it would push from what you ask for. Write what the picture should not "
    "have.",
    "negative": "identical to the sampler's negative, so the node could not change anything. Give the sampler an empty "
    "negative, and this node yours.",
    "empty": "empty (all zeros), so there is nothing to push from. Write what the picture should not have.",
}


def check_negatives(title: str, negatives: Sequence[Prompt], setup: Setup) -> None:
    """Refuse a run without guidance, and negatives that equal another prompt of the run or say nothing."""
    require_guidance(title, setup, "use a method for negatives at cfg 1 there (NAG), or change the positive prompt.")
    for prompt in negatives:
        same = setup.likeness(prompt)
        if same:
            raise GuidanceError(f"{title}: the {prompt.name} conditioning is {WHY[same]}")


@dataclass(frozen=True, kw_only=True)
class ExtraNegative(Guidance):
    """Push from ``negative`` by ``weight`` (w_n). 3 evaluations a step; rests where the guidance weight is 1."""

    negative: Prompt
    weight: float = 2.0

    title = "Extra Negative"
    claims = frozenset({"negatives beside the sampler's"})
    rank = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self.title, "weight", self.weight, "0 for none")

    def prompts(self) -> Sequence[Branch]:
        return (self.negative,)

    def check(self, setup: Setup) -> None:
        check_negatives(self.title, (self.negative,), setup)

    def branches(self, step: Step) -> Sequence[Branch]:
        return (self.negative,) if self.weight and step.weight != 1.0 else ()

    def term(self, step: Step, preds: Predictions) -> Tensor | None:
        if not self.weight or step.weight == 1.0 or preds.uncond is None:
            return None
        push = preds.said(self.negative, preds[self.negative] - preds.uncond)
        step.log(overlap=cosine(push, preds.cond - preds.uncond))
        return -self.weight * step.guided_only(push)

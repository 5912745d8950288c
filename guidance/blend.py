"""Fixed prompt blending, Lee et al., arXiv 2603.19158, Eq. 8 with a constant gamma, which AAPB computes instead.

    D~ = D_u + w [ (1 - gamma) D_T + gamma D_A - D_u ]

T is the target prompt (the sampler's positive), A the anchor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .contract import Branch, Guidance, GuidanceError, Predictions, Prompt, Setup, Step
from .space import expand


def blend(target: Tensor, anchor: Tensor, gamma: float | Tensor) -> Tensor:
    """(1 - gamma) * target + gamma * anchor; gamma is a number or ``[B]``, exact at 0 and 1."""
    gamma = expand(gamma, target)
    return (1 - gamma) * target + gamma * anchor


def require_distinct(title: str, role: str, prompt: Prompt, setup: Setup) -> None:
    """Refuse a second prompt that says nothing new: same as the positive, or nothing at all."""
    same = setup.likeness(prompt)
    if same == "positive":
        raise GuidanceError(
            f"{title}: the {role} conditioning is identical to the positive, so the node could not change anything. "
            f"Encode a different {role} prompt (a more frequent wording of the same thing), or remove the node."
        )
    if same in ("negative", "empty"):
        what = "identical to the negative" if same == "negative" else "empty (all zeros)"
        raise GuidanceError(
            f"{title}: the {role} conditioning is {what}; it would cancel the guidance instead of helping the target. "
            f"Write a {role} prompt: keep the rare attribute and generalise the noun ('hairy frog' -> 'hairy animal')."
        )


@dataclass(frozen=True, kw_only=True)
class FixedBlend(Guidance):
    """Blend the target's prediction with the anchor's by a constant ``gamma`` in [0, 1]. 3 evaluations a step."""

    anchor: Prompt
    gamma: float = 0.4

    title = "Prompt Blend (fixed)"
    claims = frozenset({"blend of the positive with an anchor"})
    rank = 3  # the calibrations of the negative see the plain pair

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.gamma <= 1.0:
            raise GuidanceError(
                f"{self.title}: gamma is {self.gamma:g}; it must lie in [0, 1], 0 for the target, 1 for the anchor."
            )

    def prompts(self) -> Sequence[Branch]:
        return (self.anchor,)

    def check(self, setup: Setup) -> None:
        require_distinct(self.title, "anchor", self.anchor, setup)

    def branches(self, step: Step) -> Sequence[Branch]:
        return (self.anchor,) if self.gamma > 0 else ()

    def refine(self, step: Step, preds: Predictions) -> Predictions:
        if self.gamma == 0:
            return preds
        step.log(gamma=self.gamma)
        return preds.replace(cond=blend(preds.cond, preds[self.anchor], self.gamma))

"""The host's own way with a negative, as a row of the tables: the anchor plays the unconditional prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rudder.guidance.contract import Branch, Guidance, Prompt, Step


@dataclass(frozen=True, kw_only=True)
class AsUncond(Guidance):
    """D_n + w (D_c - D_n): what connecting ``negative`` to the sampler does. 2 evaluations a step."""

    negative: Prompt

    title = "Negative as uncond"

    def prompts(self) -> Sequence[Branch]:
        return (self.negative,)

    def sources(self, step: Step) -> Mapping[str, Branch]:
        return {"uncond": self.negative}

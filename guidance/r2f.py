"""R2F, rare-to-frequent prompt scheduling. Park et al., ICLR 2025, arXiv 2410.22376, Sec. 4 and the official code.

The rare prompt is the sampler's positive; a frequent prompt takes its place in part of the early steps:

* alternate (SD3, SDXL): until the stop step, even steps (0, 2, ...) use the frequent prompt and odd steps the rare one.
* blend (few-step models such as Flux-schnell): until the stop step the embeddings are mixed,
  amount * frequent + (1 - amount) * rare; the amount starts at 0.3 and halves every quarter of the run, which is the
  official [0.3, 0.15] at 4 steps.

The stop step follows from the visual detail level of the rare attribute: 1 rough shape, 2 action, 3 body parts such as
horns, 4 texture or material, 5 fine detail such as hair; 0 means the rare prompt alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .blend import require_distinct
from .contract import Branch, Guidance, GuidanceError, Mix, Prompt, Setup, Step

STOP_OF_50 = {"SD3": (0, 5, 10, 20, 30, 40), "SDXL": (0, 3, 5, 10, 20, 30)}  # official stop steps by level
STOP_BLEND = (0, 0.25, 0.25, 0.25, 0.5, 0.5)  # official: step 0 of 4 for levels 1-3, steps 0 and 1 for 4 and 5
MODES = ("alternate", "blend")


def stop_fraction(level: int, mode: str = "alternate", family: str = "SD3") -> float:
    """The share of the run, 0 .. 1, in which the frequent prompt has a say at a visual detail level 0 .. 5."""
    return STOP_BLEND[level] if mode == "blend" else STOP_OF_50[family][level] / 50


def stop_step(stop: float, steps: int) -> int:
    """``stop`` of ``steps`` steps, rounded; a short run of a low level keeps its first step, or R2F would be silent."""
    return max(int(stop * steps + 0.5), 1) if stop > 0 else 0


def uses_frequent(index: int, stop: int) -> bool:
    """Whether step ``index`` of an alternating run belongs to the frequent prompt; ceil(stop / 2) steps do."""
    return index < stop and index % 2 == 0


@dataclass(frozen=True, kw_only=True)
class R2F(Guidance):
    """Let ``frequent`` play the positive in part of the first ``stop`` share of the run. Costs what CFG costs."""

    frequent: Prompt
    stop: float = 0.4
    mode: str = "alternate"
    amount: float = 0.3

    title = "Rare Concept Schedule (R2F)"
    claims = frozenset({"positive prompt of a step"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in MODES:
            raise GuidanceError(f"{self.title}: mode is '{self.mode}'; use one of {', '.join(MODES)}.")
        for name in ("stop", "amount"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise GuidanceError(f"{self.title}: {name} is {getattr(self, name):g}; it must lie in [0, 1].")

    def _mixes(self) -> list[Mix]:
        return [Mix(self.frequent, self.amount * 0.5**quarter) for quarter in range(4)]

    def prompts(self) -> Sequence[Branch]:
        return (self.frequent,) if self.mode == "alternate" else self._mixes()

    def check(self, setup: Setup) -> None:
        require_distinct(self.title, "frequent", self.frequent, setup)
        if self.stop == 0 or (self.mode == "blend" and self.amount == 0):
            logging.getLogger("rudder").warning(
                "Rudder: %s: level 0, or a blend amount of 0, leaves the rare prompt alone; the node changes nothing.",
                self.title,
            )

    def sources(self, step: Step) -> Mapping[str, Branch]:
        stop = stop_step(self.stop, step.steps)
        if self.mode == "alternate":
            frequent = uses_frequent(step.index, stop)
            step.log(frequent=float(frequent))
            return {"cond": self.frequent} if frequent else {}
        mix = self._mixes()[4 * step.index // step.steps]
        step.log(frequent=mix.amount if step.index < stop else 0.0)
        return {"cond": mix} if step.index < stop and mix.amount > 0 else {}

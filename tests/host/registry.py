"""Every guidance method of the pack with settings that act in a short run, and what it must cost: for generated tests.

A method that is not in here is found by ``test_pairs.test_every_method_is_in_the_registry``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rudder.guidance.aapb import AAPB
from rudder.guidance.adaptive import AdaptiveGuidance
from rudder.guidance.apg import APG
from rudder.guidance.beta_cfg import BetaCFG
from rudder.guidance.blend import FixedBlend
from rudder.guidance.cfg import CFG
from rudder.guidance.cfg_zero import CFGZero
from rudder.guidance.contract import Guidance, Prompt
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.negative import ExtraNegative
from rudder.guidance.perpneg import PerpNeg
from rudder.guidance.r2f import R2F
from rudder.guidance.schedule import Schedule
from rudder.guidance.tag import CTAG, TAG
from rudder.guidance.tcfg import TCFG

from .models import conditioning

POSITIVE, NEGATIVE = conditioning(1), conditioning(2)
INTERVAL = (0.3, 3.0)


def prompt(seed: int, name: str) -> Prompt:
    return Prompt(conditioning(seed), name)


@dataclass(frozen=True)
class Entry:
    """A method, the evaluations that it adds in a guided and in an unguided step, and whether it lets a step be guided.

    ``gate(index, sigma, kind)`` is False where the method turns guidance off.
    """

    method: Guidance
    extra: tuple[int, int] = (0, 0)
    gate: Callable[[int, float, str], bool] = lambda index, sigma, kind: True


METHODS = {
    "CFG": Entry(CFG(weight=3.0)),
    "interval": Entry(
        LimitedInterval(sigma_low=INTERVAL[0], sigma_high=INTERVAL[1]),
        gate=lambda index, sigma, kind: INTERVAL[0] < sigma <= INTERVAL[1],
    ),
    "schedule": Entry(Schedule(), gate=lambda index, sigma, kind: index > 0 and (kind != "unet" or sigma > 0.03)),
    "R2F": Entry(R2F(frequent=prompt(4, "frequent"), stop=0.5)),
    "blend": Entry(FixedBlend(anchor=prompt(3, "anchor")), (1, 1)),
    "AAPB": Entry(AAPB(anchor=prompt(3, "anchor")), (1, 0)),
    "Perp-Neg": Entry(PerpNeg(negatives=(prompt(5, "negative"), prompt(6, "negative 2")), weights=(1.0, 0.5)), (2, 0)),
    "extra negative": Entry(ExtraNegative(negative=prompt(5, "negative"), weight=1.0), (1, 0)),
    "APG": Entry(APG(threshold=100.0)),
    "TCFG": Entry(TCFG()),
    "CFG-Zero*": Entry(CFGZero(), gate=lambda index, sigma, kind: kind != "flux" or index > 0),
    "beta-CFG": Entry(BetaCFG()),
    "adaptive": Entry(AdaptiveGuidance(gamma=-1.0)),  # one guided step, see evaluations()
    "TAG": Entry(TAG()),
    "C-TAG": Entry(CTAG()),
}
EXCLUSIVE = [  # everything else goes together, whatever the wiring
    {"AAPB", "blend"}, {"TCFG", "CFG-Zero*"}, {"Perp-Neg", "extra negative"}, {"schedule", "beta-CFG"},
    {"APG", "beta-CFG"}, {"TAG", "C-TAG"},
]  # fmt: skip


def evaluations(names: Iterable[str], kind: str, sigmas: Sequence[float]) -> list[int]:
    """What every step of a run with these methods must cost, by rules of their own, not by the executor's."""
    entries = [METHODS[name] for name in names]
    left, costs = False, []
    for index, sigma in enumerate(sigmas):
        guided = not left and all(entry.gate(index, sigma, kind) for entry in entries)
        costs.append(1 + guided + sum(entry.extra[0 if guided else 1] for entry in entries))
        left |= guided and any(isinstance(entry.method, AdaptiveGuidance) for entry in entries)
    return costs

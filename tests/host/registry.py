"""Every guidance method of the pack with settings that act in a short run, and what it must cost: for generated tests.

A method that is not in here is found by ``test_pairs.test_every_method_is_in_the_registry``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import comfy.sd
import torch

from rudder.guidance.aapb import AAPB
from rudder.guidance.adaptive import AdaptiveGuidance
from rudder.guidance.answer import ANSWER
from rudder.guidance.apg import APG
from rudder.guidance.autoguidance import AutoGuidance
from rudder.guidance.beta_cfg import BetaCFG
from rudder.guidance.blend import FixedBlend
from rudder.guidance.cfg import CFG
from rudder.guidance.cfg_zero import CFGZero
from rudder.guidance.contract import Guidance, Prompt
from rudder.guidance.contrast import PerturbedAttention, SmoothedEnergy
from rudder.guidance.dynamic import DynamicCFG
from rudder.guidance.entropy import AttentionEntropy
from rudder.guidance.features import PlugAndPlay
from rudder.guidance.instruct import InstructGuidance
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.linear_ag import LinearAG
from rudder.guidance.local_blend import LocalBlend
from rudder.guidance.mutual import MasaCtrl
from rudder.guidance.nag import NAG
from rudder.guidance.negative import ExtraNegative
from rudder.guidance.perpneg import PerpNeg
from rudder.guidance.prompt_to_prompt import PromptToPrompt
from rudder.guidance.r2f import R2F
from rudder.guidance.rival import RIVAL
from rudder.guidance.sag import SelfAttentionGuidance
from rudder.guidance.schedule import Schedule
from rudder.guidance.scorers import Overshoot
from rudder.guidance.tag import CTAG, TAG
from rudder.guidance.tcfg import TCFG
from rudder.guidance.temporal import TemporalTAG
from rudder.guidance.temporal_fit import fresh
from rudder.guidance.temporal_net import TimePredictor
from rudder.host import companion

from .models import conditioning, lora

POSITIVE, NEGATIVE = conditioning(1), conditioning(2)
INTERVAL = (0.3, 3.0)


def prompt(seed: int, name: str) -> Prompt:
    return Prompt(conditioning(seed), name)


class Untrained:
    """A time predictor with random weights for whatever latents come."""

    def fits(self, x: torch.Tensor) -> bool:
        return True

    def to(self, like: torch.Tensor) -> TimePredictor:
        generator = torch.Generator().manual_seed(0)
        weights = fresh(like.shape[1], generator, bins=8, widths=(8, 8))
        return TimePredictor({**weights, "out.weight": torch.randn(8, 16, generator=generator)})


@dataclass(frozen=True)
class Entry:
    """A method, the evaluations that it adds in a guided and in an unguided step, and whether it lets a step be guided.

    ``gate(index, sigma, kind)`` is False where the method turns guidance off; ``ahead``: further evaluations in guided
    steps, one for each of so many noise levels ahead.
    """

    method: Guidance
    extra: tuple[int, int] = (0, 0)
    gate: Callable[[int, float, str], bool] = lambda index, sigma, kind: True
    ahead: int = 0


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
    "ANSWER": Entry(ANSWER(chain=3), ahead=2),
    "AutoGuidance": Entry(AutoGuidance(bad=None), (1, 1)),  # see fitted()
    "InstructPix2Pix": Entry(InstructGuidance(base=prompt(6, "base")), (1, 1)),
    "PAG": Entry(PerturbedAttention(strength=1.0, blocks="middle, double"), (1, 1)),
    "SEG": Entry(SmoothedEnergy(strength=1.0, blocks="middle, double"), (1, 1)),
    "SAG": Entry(SelfAttentionGuidance(sigma=1.0), (1, 1)),
    "entropy": Entry(AttentionEntropy(trained=(4, 4))),
    "NAG": Entry(NAG(negative=prompt(8, "negative"))),  # and one on joint attention, see evaluations()
    "beta-CFG": Entry(BetaCFG()),
    "adaptive": Entry(AdaptiveGuidance(gamma=-1.0)),  # one guided step, see evaluations()
    "LinearAG": Entry(LinearAG()),  # every second guided step, see evaluations()
    "dynamic": Entry(DynamicCFG(weights=(2.0, 5.0, 9.0), scorer=Overshoot())),
    "TAG": Entry(TAG()),
    "C-TAG": Entry(CTAG()),
    "temporal TAG": Entry(TemporalTAG(predictor=Untrained(), strength=5.0)),
}
#: They need a batch of a source and its edits, so they are no part of the plain runs of generated tests.
NEED_A_SOURCE = {LocalBlend, MasaCtrl, PlugAndPlay, PromptToPrompt, RIVAL}
EXCLUSIVE = [  # everything else goes together, whatever the wiring
    {"AAPB", "blend"}, {"TCFG", "CFG-Zero*"}, {"Perp-Neg", "extra negative"}, {"schedule", "beta-CFG"},
    {"APG", "beta-CFG"}, {"TAG", "C-TAG"}, {"ANSWER", "TCFG"}, {"ANSWER", "CFG-Zero*"}, {"CFG", "dynamic"},
    {"schedule", "dynamic"}, {"beta-CFG", "dynamic"},
]  # fmt: skip


def worse(model):
    """``model`` with a LoRA that it was never trained for, and weights of its own."""
    return companion(model, comfy.sd.load_lora_for_models(model, None, lora(model, 9), 3.0, 0.0)[0], "bad_model")


def fitted(name: str, model) -> Guidance:
    """The method of that name for ``model``: a second MODEL must be of its kind."""
    method = METHODS[name].method
    return replace(method, bad=worse(model)) if isinstance(method, AutoGuidance) else method


def evaluations(names: Iterable[str], kind: str, sigmas: Sequence[float]) -> list[int]:
    """What every step of a run with these methods must cost, by rules of their own, not by the executor's."""
    entries = [METHODS[name] for name in names]
    left, costs = False, []
    calls, last = {False: 0, True: 0}, {False: -2, True: -2}  # of each prompt that plays the positive
    linear, turns = (any(isinstance(entry.method, one) for entry in entries) for one in (LinearAG, R2F))
    for index, sigma in enumerate(sigmas):
        frequent = turns and index % 2 == 0 and index < len(sigmas) / 2
        guided = not left and all(entry.gate(index, sigma, kind) for entry in entries)
        evaluated = guided and not (linear and calls[frequent] - last[frequent] < 2)
        evaluated |= any(entry.method.needs_uncond for entry in entries)
        last[frequent] = calls[frequent] if evaluated else last[frequent]
        calls[frequent] += 1
        costs.append(1 + evaluated + (kind != "unet") * any(isinstance(entry.method, NAG) for entry in entries))
        costs[-1] += sum(entry.extra[0 if guided else 1] for entry in entries)
        costs[-1] += guided * sum(min(entry.ahead, len(sigmas) - 1 - index) for entry in entries)
        left |= guided and any(isinstance(entry.method, AdaptiveGuidance) for entry in entries)
    return costs

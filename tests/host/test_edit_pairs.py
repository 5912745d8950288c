"""Each editing method with every other method of the pack, on a batch of a source and its edit: one result whatever the
wiring, or a refusal that names both. The other pairs are in test_pairs.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch

from rudder.attention.foreground import Masks
from rudder.guidance.contract import Guidance, GuidanceError
from rudder.guidance.features import PlugAndPlay
from rudder.guidance.local_blend import LocalBlend
from rudder.guidance.mutual import MasaCtrl
from rudder.guidance.prompt_to_prompt import PromptToPrompt
from rudder.guidance.rival import RIVAL

from .registry import METHODS, NEED_A_SOURCE, fitted
from .test_mutual import HALF
from .test_prompt_to_prompt import CAT, SOURCE, batch, run

POSITIVE, PROMPTS = batch(SOURCE, CAT)
EDITS = {
    "Prompt-to-Prompt": PromptToPrompt(edit=PROMPTS, cross_end=1.0, words=(("cat", 2.0),)),
    "Local Blend": LocalBlend(edit=PROMPTS, blocks="middle, output, double", threshold=0.9999),  # the maps are even
    "MasaCtrl": MasaCtrl(start=0.0, depth=0.0, union=True),
    "MasaCtrl, masks": MasaCtrl(start=0.0, depth=0.0, masks=Masks(HALF, HALF)),
    "PnP": PlugAndPlay(attention_until=1.0, feature_until=1.0),
    "RIVAL": RIVAL(),
}
PAIRS = [*itertools.product(sorted({*EDITS} - {"MasaCtrl, masks"}), METHODS), *itertools.combinations(EDITS, 2)]
ALONE = [{"Prompt-to-Prompt", "R2F"}, {"MasaCtrl", "MasaCtrl, masks"}, {"MasaCtrl", "RIVAL"},
         {"MasaCtrl, masks", "RIVAL"}]
STEPS = 3  # the fewest with a step in the middle, where schedules guide


def made(name: str, model) -> Guidance:
    return EDITS[name] if name in EDITS else fitted(name, model)


@pytest.fixture(scope="module")
def alone(model, kind) -> Callable[[str], torch.Tensor]:
    """The batch with one method."""
    return cache(lambda name: run(model, kind, POSITIVE, made(name, model), steps=STEPS))


def test_every_editing_method_is_here():
    assert {type(method) for method in EDITS.values()} == NEED_A_SOURCE


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if set(pair) not in ALONE], ids=" + ".join)
def test_a_pair_gives_one_result_whatever_the_wiring(model, kind, alone, pair):
    methods = [made(name, model) for name in pair]
    out = run(model, kind, POSITIVE, *methods, steps=STEPS)
    assert out.isfinite().all()
    assert torch.equal(run(model, kind, POSITIVE, *reversed(methods), steps=STEPS), out)
    edits, other = map(alone, pair)
    assert torch.equal(out[0], other[0]), "the source is what it is without the editing method"
    assert not torch.equal(out[1], other[1]) and not torch.equal(out[1], edits[1]), "both act"


@pytest.mark.parametrize("pair", ALONE, ids=lambda pair: " + ".join(sorted(pair)))
def test_a_pair_that_decides_the_same_thing_is_refused(model, kind, pair):
    for methods in itertools.permutations([made(name, model) for name in pair]):
        with pytest.raises(GuidanceError) as error:
            run(model, kind, POSITIVE, *methods, steps=STEPS)
        assert all(f"'{method.title}'" in str(error.value) for method in methods)

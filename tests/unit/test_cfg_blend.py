"""Classifier-free guidance and the fixed blend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance import space
from rudder.guidance.blend import FixedBlend, blend
from rudder.guidance.cfg import CFG, cfg
from rudder.guidance.contract import GuidanceError

from .tensors import guided, kinds, levels, predictions, prompt, setup, step, weights

close = torch.testing.assert_close
gammas = st.floats(0, 1)


@given(predictions(2), weights)
def test_cfg_identities(tensors, weight):
    cond, uncond = tensors
    close(cfg(cond, uncond, 1.0), cond, rtol=0, atol=1e-14)
    assert torch.equal(cfg(cond, uncond, 0.0), uncond)
    assert torch.equal(cfg(cond, cond, weight), cond)
    close(cfg(cond, uncond, weight), cond + (weight - 1) * (cond - uncond))


@given(predictions(3), weights, kinds)
def test_cfg_is_the_same_in_every_space(tensors, weight, kind):
    x, cond, uncond = tensors
    sigma = levels(len(x), kind)
    for there in (space.noise_from_x0, space.v_from_x0, space.score_from_x0):
        guided_there = cfg(there(x, cond, sigma, kind), there(x, uncond, sigma, kind), weight)
        close(guided_there, there(x, cfg(cond, uncond, weight), sigma, kind), rtol=1e-9, atol=1e-9)


def test_cfg_gives_the_step_its_weight():
    assert CFG(weight=3.5).scale(step(weight=7.0), 7.0) == 3.5
    assert CFG(weight=3.5).branches(step()) == () and CFG(weight=3.5).prompts() == ()


def test_cfg_needs_a_negative_unless_its_weight_is_one():
    with pytest.raises(GuidanceError, match="needs a negative"):
        CFG(weight=3.5).check(setup(has_negative=False))
    CFG(weight=1.0).check(setup(has_negative=False))
    CFG(weight=3.5).check(setup())


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_cfg_refuses_a_weight_that_is_no_number(weight):
    with pytest.raises(GuidanceError, match=r"Guidance Weight \(CFG\): weight is"):
        CFG(weight=weight)


@given(predictions(2), gammas)
def test_blend_is_exact_at_its_ends_and_between_them_elsewhere(tensors, gamma):
    target, anchor = tensors
    assert torch.equal(blend(target, anchor, 0.0), target)
    assert torch.equal(blend(target, anchor, 1.0), anchor)
    middle = blend(target, anchor, gamma)
    close(middle, target + gamma * (anchor - target))
    assert torch.equal(blend(target, target, 0.5), target)
    each = torch.full((len(target),), gamma, dtype=target.dtype)
    assert torch.equal(blend(target, anchor, each), middle)


@given(predictions(3), weights, gammas)
def test_fixed_blend_is_cfg_of_the_blended_target(tensors, weight, gamma):
    target, anchor, uncond = tensors
    result = guided(FixedBlend(anchor=prompt(), gamma=gamma), step(weight=weight), target, uncond, anchor=anchor)
    between = (1 - gamma) * cfg(target, uncond, weight) + gamma * cfg(anchor, uncond, weight)
    close(result, between, rtol=1e-9, atol=1e-9)


@given(predictions(3), weights)
def test_fixed_blend_at_its_ends_is_cfg(tensors, weight):
    target, anchor, uncond = tensors
    for gamma, expected in ((0.0, target), (1.0, anchor)):
        result = guided(FixedBlend(anchor=prompt(), gamma=gamma), step(weight=weight), target, uncond, anchor=anchor)
        assert torch.equal(result, cfg(expected, uncond, weight))


def test_fixed_blend_works_without_guidance():
    target, anchor = torch.randn(2, 1, 4, 3, 3)
    method = FixedBlend(anchor=prompt(), gamma=0.25)
    close(guided(method, step(weight=1.0), target, None, anchor=anchor), 0.75 * target + 0.25 * anchor)
    method.check(setup(cfg=1.0))


def test_fixed_blend_asks_for_the_anchor_only_if_it_counts():
    anchor = prompt()
    assert FixedBlend(anchor=anchor, gamma=0.4).branches(step()) == (anchor,)
    assert FixedBlend(anchor=anchor, gamma=0.0).branches(step()) == ()
    now = step()
    guided(FixedBlend(anchor=anchor, gamma=0.4), now, *torch.zeros(2, 1, 4, 2, 2), anchor=torch.zeros(1, 4, 2, 2))
    assert now.record == {"gamma": 0.4}


@pytest.mark.parametrize("gamma", [-0.1, 1.01, math.nan])
def test_fixed_blend_refuses_gamma_outside_0_and_1(gamma):
    with pytest.raises(GuidanceError, match=r"gamma is .*\[0, 1\]"):
        FixedBlend(anchor=prompt(), gamma=gamma)


@pytest.mark.parametrize(
    ("likeness", "says"), [("positive", "identical to the positive"), ("negative", "identical to the negative"),
                           ("empty", r"empty \(all zeros\)")]
)
def test_an_anchor_that_says_nothing_new_is_refused(likeness, says):
    with pytest.raises(GuidanceError, match=f"the anchor conditioning is {says}"):
        FixedBlend(anchor=prompt()).check(setup(likeness=likeness))
    FixedBlend(anchor=prompt()).check(setup())

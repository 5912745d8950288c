"""AutoGuidance: the push away from a worse model's prediction, alone and together with CFG."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from rudder.guidance.autoguidance import AutoGuidance
from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions, Variant
from rudder.guidance.space import cosine, norm

from .tensors import at, predictions, run_step, weights

close = torch.testing.assert_close


def method(weight: float = 2.0) -> AutoGuidance:
    return AutoGuidance(bad="a worse model", weight=weight)


def given_bad(cond, uncond, bad) -> Predictions:
    return Predictions(cond, uncond, {Variant("cond", model="a worse model"): bad})


@given(predictions(3), weights)
def test_without_cfg_it_is_the_papers_rule(tensors, weight):
    x, good, bad = tensors
    out = run_step(at(x, weight=1.0), given_bad(good, None, bad), method(weight))
    close(out, bad + weight * (good - bad), rtol=1e-9, atol=1e-9)


@given(predictions(4), weights, weights)
def test_with_cfg_the_two_pushes_add(tensors, weight, guidance):
    x, good, uncond, bad = tensors
    out = run_step(at(x, weight=guidance), given_bad(good, uncond, bad), method(weight))
    close(out, cfg(good, uncond, guidance) + (weight - 1) * (good - bad), rtol=1e-9, atol=1e-9)


@given(predictions(3), weights)
def test_degenerate_cases(tensors, weight):
    x, good, uncond = tensors
    now = at(x, weight=7.0)
    close(run_step(now, given_bad(good, uncond, good), method(weight)), cfg(good, uncond, 7.0))  # bad = good
    assert torch.equal(run_step(now, Predictions(good, uncond), method(1.0)), cfg(good, uncond, 7.0))
    assert method(1.0).branches(now) == () and len(method().branches(now)) == 1


def test_the_push_is_that_of_the_model_not_of_other_methods():
    """What others make of the positive does not count: both predictions are of the same prompt."""
    x, good, changed, bad = torch.randn(4, 1, 2, 3, 3)
    now = at(x)
    now.plain = given_bad(good, None, bad)
    close(method(3.0).term(now, given_bad(changed, None, bad)), 2 * (good - bad))


def test_the_trace_tells_how_far_the_models_differ():
    now = at(torch.zeros(2, 2, 3, 3))
    run_step(now, given_bad(*torch.randn(3, 2, 2, 3, 3)), method())
    assert now.record["bad_norm"].shape == now.record["bad_cosine"].shape == (2,)


def test_bad_input():
    with pytest.raises(GuidanceError, match="weight is inf; give a finite number, 1 for none"):
        method(float("inf"))


def test_the_trace_has_good_minus_bad():
    x, good, uncond, bad = torch.randn(4, 2, 2, 3, 3)
    now = at(x)
    run_step(now, Predictions(good, uncond, {Variant("cond", model="m"): bad}), AutoGuidance(bad="m"))
    close(now.record["bad_norm"], norm(good - bad))
    close(now.record["bad_cosine"], cosine(good - bad, good - uncond))

"""Perp-Neg and the extra negative."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.negative import ExtraNegative
from rudder.guidance.perpneg import PerpNeg, perpendicular
from rudder.guidance.space import cosine, dot, norm

from .tensors import at, predictions, prompt, run_step, setup, step, weights

close = torch.testing.assert_close
ONE, TWO = prompt("negative"), prompt("negative 2")
strengths = st.floats(-2, 5)


@given(predictions(2))
def test_the_part_that_pushes_is_perpendicular(tensors):
    negative, push = tensors
    rest = perpendicular(negative, push)
    close(dot(rest, push), torch.zeros(len(push), dtype=push.dtype), rtol=0, atol=1e-9)
    assert (norm(rest) <= norm(negative) * (1 + 1e-9)).all()
    close(perpendicular(negative, torch.zeros_like(push)), negative)


@given(predictions(5), weights.filter(lambda w: w > 1), strengths, strengths)
def test_it_is_the_papers_rule(tensors, weight, a, b):
    x, cond, uncond, first, second = tensors
    method = PerpNeg(negatives=(ONE, TWO), weights=(a, b))
    preds = Predictions(cond, uncond, {ONE: first, TWO: second})
    p = cond - uncond
    expected = uncond + weight * (p - a * perpendicular(first - uncond, p) - b * perpendicular(second - uncond, p))
    close(run_step(at(x, weight=weight), preds, method), expected, rtol=1e-7, atol=1e-7)


@given(predictions(3), weights, st.floats(-3, 3))
def test_a_negative_parallel_to_the_positive_is_cfg(tensors, weight, ratio):
    x, cond, uncond = tensors
    preds = Predictions(cond, uncond, {ONE: uncond + ratio * (cond - uncond)})
    result = run_step(at(x, weight=weight), preds, PerpNeg(negatives=(ONE,)))
    close(result, cfg(cond, uncond, weight), rtol=1e-7, atol=1e-7)


@given(predictions(4), weights.filter(lambda w: w > 1))
def test_a_negative_for_a_part_of_the_picture_leaves_the_rest_alone(tensors, weight):
    """The executor hands out the positive where a negative has no say: measured from the negative that is a push."""
    x, cond, uncond, negative = tensors
    quiet = torch.zeros_like(cond[:, :1], dtype=torch.bool)
    quiet[..., :1] = True
    preds = Predictions(cond, uncond, {ONE: torch.where(quiet, cond, negative)}, {ONE: quiet})
    for method in (PerpNeg(negatives=(ONE,)), ExtraNegative(negative=ONE)):
        rest = run_step(at(x, weight=weight), preds, method)[..., :1]
        close(rest, cfg(cond, uncond, weight)[..., :1], rtol=1e-7, atol=1e-7)


@given(predictions(4), weights)
def test_a_weight_of_zero_is_cfg_and_costs_nothing(tensors, weight):
    x, cond, uncond, negative = tensors
    none = PerpNeg(negatives=(ONE, TWO), weights=(0.0, 0.0))
    assert none.branches(step()) == [] and PerpNeg(negatives=(ONE, TWO), weights=(0.0, 1.0)).branches(step()) == [TWO]
    close(run_step(at(x, weight=weight), Predictions(cond, uncond), none), cfg(cond, uncond, weight))
    extra = ExtraNegative(negative=ONE, weight=0.0)
    assert extra.branches(step()) == ()
    assert torch.equal(run_step(at(x, weight=weight), Predictions(cond, uncond), extra), cfg(cond, uncond, weight))


@given(predictions(4), weights)
def test_a_batch_is_so_many_single_runs(tensors, weight):
    x, cond, uncond, negative = tensors
    method = PerpNeg(negatives=(ONE,), weights=(1.5,))
    rows = []
    for i in range(len(x)):
        one = Predictions(cond[i:i + 1], uncond[i:i + 1], {ONE: negative[i:i + 1]})
        rows.append(run_step(at(x[i:i + 1], weight=weight), one, method))
    close(run_step(at(x, weight=weight), Predictions(cond, uncond, {ONE: negative}), method), torch.cat(rows))


@given(predictions(4), weights.filter(lambda w: w > 1), strengths)
def test_the_extra_negative_pushes_by_its_own_weight(tensors, weight, strength):
    x, cond, uncond, negative = tensors
    method, preds = ExtraNegative(negative=ONE, weight=strength), Predictions(cond, uncond, {ONE: negative})
    expected = cfg(cond, uncond, weight) - strength * (negative - uncond)
    close(run_step(at(x, weight=weight), preds, method), expected)
    usual = run_step(at(x, weight=weight), preds, ExtraNegative(negative=ONE, weight=weight - 1))
    close(usual, cfg(cond, negative, weight), rtol=1e-9, atol=1e-9)  # the sampler's negative in the place of D_u
    same = Predictions(cond, uncond, {ONE: uncond})
    close(run_step(at(x, weight=weight), same, method), cfg(cond, uncond, weight))


def test_they_rest_without_guidance():
    x, cond = torch.randn(2, 2, 4, 3, 3)
    for method in (PerpNeg(negatives=(ONE,)), ExtraNegative(negative=ONE)):
        assert method.branches(step(weight=1.0)) == () and list(method.prompts()) == [ONE]
        assert torch.equal(run_step(at(x, weight=1.0), Predictions(cond, None), method), cond)
        assert torch.equal(run_step(at(x, weight=1.0), Predictions(cond, cond), method), cond)


def test_they_record_how_much_the_prompts_share():
    x, cond, uncond, negative = torch.randn(4, 2, 4, 3, 3)
    for method in (PerpNeg(negatives=(ONE,)), ExtraNegative(negative=ONE)):
        now = at(x)
        run_step(now, Predictions(cond, uncond, {ONE: negative}), method)
        assert now.record["overlap"].shape == (2,)


@pytest.mark.parametrize("make", [lambda: PerpNeg(negatives=(ONE,)), lambda: ExtraNegative(negative=ONE)])
def test_negatives_that_say_nothing_new_are_refused(make):
    method = make()
    reasons = {"positive": "push from what you ask for", "negative": "empty negative", "empty": "all zeros"}
    for same, says in reasons.items():
        with pytest.raises(GuidanceError, match=f"the negative conditioning is .*{says}") as error:
            method.check(setup(likeness=same))
        assert method.title in str(error.value)
    with pytest.raises(GuidanceError, match=r"cfg is 1\).*NAG"):
        method.check(setup(cfg=1.0))
    method.check(setup())


def test_bad_input():
    for fields, says in (({"negatives": ()}, "at least one"), ({"negatives": (ONE, TWO)}, "one weight for each"),
                         ({"negatives": (ONE,), "weights": (math.nan,)}, "finite")):
        with pytest.raises(GuidanceError, match=says):
            PerpNeg(**fields)
    with pytest.raises(GuidanceError, match="weight is inf"):
        ExtraNegative(negative=ONE, weight=math.inf)


@pytest.mark.parametrize("kind", [PerpNeg, ExtraNegative])
def test_the_trace_has_the_overlap(kind):
    one = prompt("negative")
    method = PerpNeg(negatives=(one,)) if kind is PerpNeg else ExtraNegative(negative=one)
    x, cond, uncond, negative = torch.randn(4, 2, 4, 3, 3)
    now = at(x)
    run_step(now, Predictions(cond, uncond, {one: negative}), method)
    close(now.record["overlap"], cosine(negative - uncond, cond - uncond))

"""Adaptive Guidance: the cosine of residuals, per sample, one way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from rudder.guidance.adaptive import AdaptiveGuidance
from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.space import cosine, residual

from .tensors import at, predictions, run_step, setup, weights

close = torch.testing.assert_close


def with_cosine(x: torch.Tensor, cosines: list[float]) -> Predictions:
    """Predictions whose residuals have these cosines, one a sample: e_u along the first axis."""
    e_u, e_c = torch.zeros_like(x), torch.zeros_like(x)
    for i, c in enumerate(cosines):
        e_u[i].view(-1)[0] = 1.0
        e_c[i].view(-1)[0], e_c[i].view(-1)[1] = c, math.sqrt(1 - c * c)
    return Predictions(x - e_c, x - e_u)


def run(method: AdaptiveGuidance, x: torch.Tensor, course: list[list[float]], weight: float = 3.0):
    """What each step gives, and its weight; the negative is there only if the weight asks for it."""
    states, results, used = {}, [], []
    for index, cosines in enumerate(course):
        now = at(x, index, steps=len(course), states=states)
        now.weight = method.scale(now, weight)
        preds = with_cosine(x, cosines)
        given = Predictions(preds.cond, preds.uncond if now.weight != 1.0 else None)
        results.append((run_step(now, given, method), preds))
        used.append(now.weight)
    return results, used


@given(predictions(3), weights)
def test_above_1_it_is_cfg_for_ever(tensors, weight):
    x, cond, uncond = tensors
    method, states = AdaptiveGuidance(gamma=1.001), {}
    for index in range(3):
        now = at(x, index, weight=weight, states=states)
        assert method.scale(now, weight) == weight
        assert torch.equal(run_step(now, Predictions(cond, uncond), method), cfg(cond, uncond, weight))


def test_below_minus_1_only_the_first_step_is_guided():
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    results, used = run(AdaptiveGuidance(gamma=-1.0), x, [[0.5, -0.5]] * 4)
    assert used == [3.0, 1.0, 1.0, 1.0]
    for i, (x0, preds) in enumerate(results):
        assert torch.equal(x0, preds.cond if i else cfg(preds.cond, preds.uncond, 3.0))


def test_every_sample_switches_by_itself_and_never_back():
    x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    course = [[0.5, 0.5, 0.5], [0.99, 0.5, 0.5], [0.1, 0.5, 0.99], [0.1, 0.99, 0.1], [0.1, 0.1, 0.1]]
    results, used = run(AdaptiveGuidance(gamma=0.9), x, course)
    assert used == [3.0, 3.0, 3.0, 3.0, 1.0]  # all three have switched after the fourth
    since = {0: 2, 1: 4, 2: 3}  # the first step on the conditional prediction alone
    for index, (x0, preds) in enumerate(results):
        for sample, first in since.items():
            expected = preds.cond if index >= first else cfg(preds.cond, preds.uncond, 3.0)
            close(x0[sample], expected[sample])


def test_a_batch_is_so_many_single_runs():
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    course = [[0.5, 0.95], [0.95, 0.2], [0.2, 0.2]]
    together, _ = run(AdaptiveGuidance(gamma=0.9), x, course)
    for i in range(2):
        alone, _ = run(AdaptiveGuidance(gamma=0.9), x[i:i + 1], [[c[i]] for c in course])
        for (a, _), (b, _) in zip(together, alone):
            close(a[i:i + 1], b)


@given(predictions(3))
def test_the_cosine_is_of_residuals_not_of_x0(tensors):
    x, cond, uncond = tensors
    value = cosine(residual(x, cond), residual(x, uncond))
    method, states = AdaptiveGuidance(gamma=float(value.max()) + 1e-9), {}
    now = at(x, 0, states=states)
    run_step(now, Predictions(cond, uncond), method)
    assert not now.state(method)["switched"].any()


def test_it_measures_only_while_there_is_guidance():
    x = torch.randn(1, 4, 2, 2)
    now = at(x, weight=1.0)
    method = AdaptiveGuidance(gamma=-1.0)
    assert torch.equal(run_step(now, Predictions(x, None), method), x)
    assert method.scale(now, 5.0) == 5.0 and now.record == {"switched": 0.0}


def test_bad_input():
    with pytest.raises(GuidanceError, match="threshold is nan"):
        AdaptiveGuidance(gamma=math.nan)
    with pytest.raises(GuidanceError, match=r"\(Adaptive\).*above 1.*already take one evaluation"):
        AdaptiveGuidance().check(setup(cfg=1.0))

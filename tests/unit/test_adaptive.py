"""Adaptive Guidance: the cosine of residuals, per sample, one way. LinearAG: affine in the past, by least squares."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given

from rudder.guidance.adaptive import AdaptiveGuidance
from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.linear_ag import LinearAG
from rudder.guidance.linear_fit import Coefficients, errors, fit, gram
from rudder.guidance.space import cosine, residual

from .tensors import at, predictions, prompt, run_step, setup, weights

close = torch.testing.assert_close
METHOD = AdaptiveGuidance(gamma=0.9)


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


# ---------------------------------------------------------------- when gamma has no say


def test_a_threshold_that_is_never_reached_is_announced_with_one_that_fits(caplog):
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    course = [[0.5], [0.6], [0.7], [0.8], [0.9]]
    with caplog.at_level(logging.WARNING, "rudder"):
        run(AdaptiveGuidance(gamma=0.991), x, course)
    assert "from 0.5000 to 0.9000 and did not reach the threshold 0.991" in caplog.text
    suggested = float(caplog.text.split("On this model ")[1].split()[0])
    caplog.clear()
    _, used = run(AdaptiveGuidance(gamma=suggested), x, course)
    assert used == [3.0, 3.0, 3.0, 1.0, 1.0] and not caplog.records


def test_a_threshold_that_is_passed_at_once_is_announced(caplog):
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "rudder"):
        run(AdaptiveGuidance(gamma=0.5), x, [[0.9]] * 4)
    assert "was 0.9000 at the first step that it looked at" in caplog.text and len(caplog.records) == 1


# ---------------------------------------------------------------- LinearAG


def linear(method: LinearAG, x: torch.Tensor, pairs: list, weight: float = 3.0, *others):
    """x0 of every step, and in which the negative was evaluated, with the weights and steps of a real run."""
    states, results, evaluated = {}, [], []
    for index, (cond, uncond) in enumerate(pairs):
        now = at(x, index, steps=len(pairs), states=states)
        now.weight = method.scale(now, weight)
        evaluated.append(not method.predicts_uncond(now))
        results.append(run_step(now, Predictions(cond, uncond if evaluated[-1] else None), method, *others))
        assert now.weight == weight and now.record["predicted"] == (not evaluated[-1])
    return results, evaluated


def in_eps(x: torch.Tensor, eps: torch.Tensor, index: int, steps: int) -> torch.Tensor:
    return x - at(x, index, steps=steps).level * eps


@given(predictions(4))
def test_a_push_that_stays_is_predicted_exactly(tensors):
    x, push, *conds = tensors
    conds = [*conds, *conds]
    pairs = [tuple(in_eps(x, e, i, 4) for e in (cond, cond - push)) for i, cond in enumerate(conds)]
    results, evaluated = linear(LinearAG(), x, pairs)
    assert evaluated == [True, False, True, False]
    for x0, (cond, uncond) in zip(results, pairs):
        close(x0, cfg(cond, uncond, 3.0), rtol=1e-6, atol=1e-6)


def test_every_is_how_often_the_negative_is_evaluated():
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    for every in (2, 3, 5):
        _, evaluated = linear(LinearAG(every=every), x, [(x + 1, x - 1)] * 7)
        assert evaluated == [index % every == 0 for index in range(7)]


def affine_run(x: torch.Tensor, steps: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """eps of a model whose odd negatives are affine in its past, ``[steps, *x.shape]``."""
    generator = torch.Generator().manual_seed(seed)
    cond = torch.randn(steps, *x.shape, generator=generator, dtype=x.dtype)
    uncond = torch.randn(steps, *x.shape, generator=generator, dtype=x.dtype)
    for k in range(1, steps, 2):
        uncond[k] = 0.7 * cond[k] + 0.2 * cond[k - 1] - 0.5 * uncond[k - 1] + 0.1 * cond[0]
    return cond, uncond


def fitted(x: torch.Tensor, steps: int, ridge: float = 1e-12) -> tuple[Coefficients, torch.Tensor]:
    products = sum(gram(torch.cat(affine_run(x, steps, seed)).flatten(1), chunk=7) for seed in range(3))
    sigmas = torch.tensor([at(x, index, steps=steps).level for index in range(steps)])
    return fit(products, sigmas, 2, ridge), products


def test_what_is_affine_in_the_past_is_found_and_predicted():
    steps, x = 6, torch.randn(2, 4, 3, 5, dtype=torch.float64)
    found, products = fitted(x, steps)
    assert found.cond[1:6:2].abs().amax() < 1 and not found.cond[::2].any() and not found.uncond[:, 1::2].any()
    ours, held = errors(products, found)
    assert ours < 1e-8 < held
    pairs = [tuple(in_eps(x, e, i, steps) for e in both) for i, both in enumerate(zip(*affine_run(x, steps, seed=9)))]
    results, evaluated = linear(LinearAG(coefficients=found), x, pairs)
    assert evaluated == [True, False] * 3
    for x0, (cond, uncond) in zip(results, pairs):
        close(x0, cfg(cond, uncond, 3.0), rtol=1e-4, atol=1e-4)


def test_a_strong_ridge_holds_the_last_push():
    found, products = fitted(torch.randn(1, 4, 3, 5, dtype=torch.float64), 6, ridge=1e12)
    ours, held = errors(products, found)
    assert ours == pytest.approx(held, rel=1e-6)
    assert found.cond[5, 5] == 1 and found.cond[5, 4] == -1 and found.uncond[5, 4] == 1


def test_coefficients_as_a_file_holds_them():
    found, _ = fitted(torch.randn(1, 4, 3, 5, dtype=torch.float64), 4)
    again = Coefficients.read(found.tensors())
    assert again.every == 2 and all(torch.equal(again.tensors()[k], v) for k, v in found.tensors().items())
    for bad in ({}, {"a": torch.ones(1)}, {**found.tensors(), "cond": torch.ones(2, 2)}):
        with pytest.raises(ValueError, match="instead of LinearAG's coefficients"):
            Coefficients.read(bad)


@given(predictions(3))
def test_a_batch_of_linear_ag_is_so_many_single_runs(tensors):
    x, cond, uncond = tensors
    pairs = [(cond, uncond), (cond * 0.9, uncond), (cond * 0.8, uncond * 1.1), (cond, uncond)]
    together, _ = linear(LinearAG(), x, pairs)
    for i in range(len(x)):
        alone, _ = linear(LinearAG(), x[i:i + 1], [(c[i:i + 1], u[i:i + 1]) for c, u in pairs])
        for a, b in zip(together, alone):
            close(a[i:i + 1], b)


def test_a_sampler_that_wants_the_negative_gets_the_real_one():
    x, cond, uncond = torch.randn(3, 1, 4, 2, 2, dtype=torch.float64)
    method, states = LinearAG(), {}
    for index in range(3):
        now = at(x, index, states=states)
        now.weight = method.scale(now, 3.0)
        method.predicts_uncond(now)
        assert torch.equal(run_step(now, Predictions(cond, uncond), method), cfg(cond, uncond, 3.0))
        assert now.record["predicted"] == 0


def test_predicted_negatives_do_not_decide_when_guidance_ends():
    x = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    method, stop = LinearAG(), AdaptiveGuidance(gamma=0.9)
    pairs = [(p.cond, p.uncond) for c in (0.5, 0.5, 0.99, 0.99) for p in [with_cosine(x, [c])]]
    results, _ = linear(method, x, pairs, 3.0, stop)
    assert torch.equal(results[3], pairs[3][0])  # stopped after the third


def test_bad_input_of_linear_ag():
    with pytest.raises(GuidanceError, match="every is 1"):
        LinearAG(every=1)
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    found, _ = fitted(x, 4)
    with pytest.raises(GuidanceError, match="fitted for every 2 from the first step on, and this is every 3 from 0 on"):
        LinearAG(every=3, coefficients=found)
    with pytest.raises(GuidanceError, match="2 from 0.2 on"):
        LinearAG(coefficients=found, start=0.2)
    with pytest.raises(GuidanceError, match="fitted for 4 steps at other noise levels than this run's; 0.9 is not"):
        now = at(x, 1, steps=10)
        now.weight = 3.0
        LinearAG(coefficients=found).predicts_uncond(now)
    with pytest.raises(GuidanceError, match=r"\(LinearAG\).*another node turns guidance off"):
        LinearAG(coefficients=found).check(setup(weights=[1.0, 3.0, 3.0, 3.0]))
    LinearAG(coefficients=found, end=0.5).check(setup(weights=[3.0] * 7 + [1.0] * 3))  # off after its own window
    with pytest.raises(GuidanceError, match=r"\(LinearAG\).*above 1.*already take one evaluation"):
        LinearAG().check(setup(cfg=1.0))


def test_coefficients_may_meet_steps_without_guidance_where_they_predict():
    found, _ = fitted(torch.randn(1, 4, 3, 5, dtype=torch.float64), 4)
    LinearAG(coefficients=found).check(setup(weights=[3.0, 1.0, 3.0, 1.0]))  # off where it predicts anyway


def test_a_run_that_begins_later_evaluates_first():
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    found, _ = fitted(x, 4)
    assert not LinearAG(coefficients=found).predicts_uncond(at(x, 1, steps=4))  # a run that starts at its second step


def test_advice_comes_at_the_end_of_the_window(caplog):
    x, method, states = torch.randn(1, 4, 2, 2, dtype=torch.float64), AdaptiveGuidance(end=0.45), {}
    with caplog.at_level(logging.WARNING, "rudder"):
        for index in range(5):  # the executor asks no more after the window
            run_step(at(x, index, weight=3.0, states=states), with_cosine(x, [0.5]), method)
    assert "did not reach the threshold" in caplog.text


def test_a_solver_of_two_calls_a_step_is_advised_once(caplog):
    """Heun: the last level is the corrector's of the step before and the last step's own."""
    x, states = torch.randn(1, 4, 2, 2, dtype=torch.float64), {}
    with caplog.at_level(logging.WARNING, "rudder"):
        for index in (0, 1, 1, 2, 2):
            run_step(at(x, index, steps=3, weight=3.0, states=states), with_cosine(x, [0.5 + 0.1 * index]), METHOD)
    assert len(caplog.records) == 1 and "from 0.5000 to 0.7000 and did not reach" in caplog.text


def test_a_picture_that_switched_is_not_said_to_have_been_guided_to_the_end(caplog):
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    with caplog.at_level(logging.WARNING, "rudder"):
        run(AdaptiveGuidance(gamma=0.9), x, [[0.95, 0.5]] * 4)
    assert not caplog.records


def test_linear_ag_never_holds_the_push_of_another_prompt():
    """Two prompts in turn, as R2F has them: each evaluates in every second step of its own."""
    x, method, states, frequent = torch.randn(1, 4, 2, 2, dtype=torch.float64), LinearAG(), {}, prompt("frequent")
    evaluated = []
    for index in range(8):
        push = 1.0 if index % 2 else -3.0
        now = at(x, index, steps=8, weight=3.0, states=states, player=None if index % 2 else frequent)
        cond, uncond = (in_eps(x, torch.full_like(x, value), index, 8) for value in (2.0 + index, 2.0 + index - push))
        evaluated.append(not method.predicts_uncond(now))
        x0 = run_step(now, Predictions(cond, uncond if evaluated[-1] else None), method)
        close(x0, cfg(cond, uncond, 3.0), rtol=1e-6, atol=1e-6)
    assert evaluated == [True, True, False, False] * 2


def test_coefficients_of_one_prompt_are_refused_for_two():
    x = torch.randn(1, 4, 3, 5, dtype=torch.float64)
    found, _ = fitted(x, 4)
    with pytest.raises(GuidanceError, match=r"belong to one prompt, and 'frequent' plays the positive"):
        LinearAG(coefficients=found).predicts_uncond(at(x, 0, steps=4, weight=3.0, player=prompt("frequent")))


def test_the_ridge_is_relative_to_the_data():
    _, products = fitted(torch.randn(1, 4, 3, 5, dtype=torch.float64), 6)
    sigmas = torch.linspace(1, 0.1, 6)
    close(fit(100 * products, sigmas, 2, ridge=0.1).cond, fit(products, sigmas, 2, ridge=0.1).cond)


def test_errors_are_shares_of_the_push():
    products = gram(torch.tensor([[0.0], [3.0], [0.0], [1.0]]))  # eps_c of two steps, eps_u
    none = Coefficients(torch.tensor([1.0, 0.5]), torch.zeros(2, 2), torch.zeros(2, 2), 2)
    assert errors(products, none) == (1 / 4, 1.0)  # of |eps_u - eps_c|^2 = 4: 1 is left with 0, 4 with the held push

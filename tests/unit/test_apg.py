"""APG: projection, threshold, reverse momentum."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance.apg import APG, SDXL, projected, radius
from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.space import cosine, dot, norm, shrink

from .tensors import at, predictions, run_step, setup, weights

close = torch.testing.assert_close
etas = st.floats(0, 2)
NEUTRAL = APG(eta=1.0, threshold=0.0, momentum=0.0)


@given(predictions(3), weights)
def test_neutral_settings_are_cfg_at_the_same_weight(tensors, weight):
    x, cond, uncond = tensors
    result = run_step(at(x, weight=weight), Predictions(cond, uncond), NEUTRAL)
    close(result, cfg(cond, uncond, weight), rtol=0, atol=1e-11)


@given(predictions(2), etas)
def test_the_push_splits_into_a_part_along_cond_and_the_rest(tensors, eta):
    cond, push = tensors
    rest, whole, some = projected(push, cond, 0.0), projected(push, cond, 1.0), projected(push, cond, eta)
    assert torch.equal(whole, push)
    close(dot(rest, cond), torch.zeros(len(cond), dtype=cond.dtype), atol=1e-10, rtol=0)
    close(some, rest + eta * (push - rest))
    assert (norm(rest) <= norm(push) * (1 + 1e-12)).all()


@given(predictions(3), weights, etas, st.floats(0.01, 30))
def test_the_result_stays_within_the_threshold_of_cond(tensors, weight, eta, threshold):
    x, cond, uncond = tensors
    method = APG(eta=eta, threshold=threshold, momentum=0.0)
    moved = norm(run_step(at(x, weight=weight), Predictions(cond, uncond), method) - cond)
    assert (moved <= (weight - 1) * max(1, eta) * radius(threshold, x) + 1e-9).all()


@given(predictions(1), st.floats(0.01, 30))
def test_only_long_pushes_are_shrunk(tensors, limit):
    (push,) = tensors
    short = push * shrink(push, limit).reshape(-1, *[1] * (push.ndim - 1))
    assert (norm(short) <= limit * (1 + 1e-12)).all()
    assert torch.equal(short[norm(push) <= limit], push[norm(push) <= limit])


def test_the_threshold_follows_the_size_of_the_latent():
    assert radius(15.0, torch.empty(2, 4, 128, 128)) == 15.0
    assert radius(15.0, torch.empty(1, 4, 64, 64)) == 7.5
    assert radius(15.0, torch.empty(1, 16, 3, 128, 128)) == pytest.approx(15.0 * math.sqrt(16 * 3 * 128 * 128 / SDXL))


@given(predictions(4), st.floats(-0.9, 0.9))
def test_momentum_sums_the_pushes_of_the_run(tensors, beta):
    x, cond, first, second = tensors
    method, states = APG(eta=1.0, threshold=0.0, momentum=beta), {}
    for index, uncond in enumerate((first, second, first)):
        result = run_step(at(x, index, weight=3.0, states=states), Predictions(cond, uncond), method)
    sums = (cond - first) + beta * ((cond - second) + beta * (cond - first))
    close(result, cond + 2.0 * sums, rtol=1e-9, atol=1e-9)
    fresh = run_step(at(x, 3, weight=3.0), Predictions(cond, first), method)
    close(fresh, cond + 2.0 * (cond - first))  # another run remembers nothing


@given(predictions(4))
def test_a_batch_is_so_many_single_runs(tensors):
    x, cond, first, second = tensors
    results = []
    for rows in [slice(None), *(slice(i, i + 1) for i in range(len(x)))]:
        states = {}
        for index, uncond in enumerate((first, second)):
            now = at(x[rows], index, states=states)
            result = run_step(now, Predictions(cond[rows], uncond[rows]), METHOD)
        results.append(result)
    close(results[0], torch.cat(results[1:]))


METHOD = APG()


def test_nothing_to_push_and_nothing_to_project_on():
    cond, zero = torch.randn(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)
    assert torch.equal(run_step(at(cond), Predictions(cond, cond), METHOD), cond)
    assert run_step(at(cond), Predictions(zero, cond), METHOD).isfinite().all()


def test_what_it_records():
    x = torch.randn(2, 4, 3, 3)
    now = at(x)
    run_step(now, Predictions(x + 1, x - 1), METHOD)
    assert now.record["parallel"].shape == now.record["clipped"].shape == (2,)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"eta": -0.1}, "eta"), ({"eta": math.nan}, "eta"), ({"threshold": -1.0}, "norm_threshold"),
     ({"threshold": math.nan}, "norm_threshold"), ({"momentum": 1.0}, "momentum"),
     ({"momentum": math.nan}, "momentum")],
)
def test_values_out_of_range_are_refused(fields, says):
    with pytest.raises(GuidanceError, match=says):
        APG(**fields)


def test_a_run_without_guidance_is_refused():
    for run in (setup(cfg=1.0), setup(has_negative=False), setup(weights=[1.0] * 4)):
        with pytest.raises(GuidanceError, match=r"\(APG\).*above 1.*FluxGuidance"):
            METHOD.check(run)
    METHOD.check(setup())


def test_momentum_remembers_the_whole_push():
    x, cond, first, second = torch.randn(4, 1, 4, 3, 3, dtype=torch.float64)
    method, states = APG(eta=1.0, threshold=0.01, momentum=-0.5), {}
    for index, uncond in enumerate((first, second)):
        result = run_step(at(x, index, weight=2.0, states=states), Predictions(cond, uncond), method)
    push = (cond - second) - 0.5 * (cond - first)
    close(result, cond + push * radius(0.01, x) / norm(push))


def test_the_trace_has_the_push_with_its_momentum():
    x, cond, first, second = torch.randn(4, 2, 4, 3, 3)
    method, states = APG(), {}
    for index, uncond in enumerate((first, second)):
        now = at(x, index, states=states)
        run_step(now, Predictions(cond, uncond), method)
    push = (cond - second) - 0.5 * (cond - first)
    close(now.record["parallel"], cosine(push, cond))
    close(now.record["clipped"], shrink(push, radius(15.0, x)))


def test_momentum_of_minus_one_is_refused():
    with pytest.raises(GuidanceError, match="momentum"):
        APG(momentum=-1.0)

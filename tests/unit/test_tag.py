"""TAG and C-TAG: radial and tangential parts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.space import along, dot, norm, perpendicular
from rudder.guidance.tag import CTAG, TAG

from .tensors import at, predictions, run_step, setup, weights

close = torch.testing.assert_close


@given(predictions(2), st.floats(1, 3))
def test_only_the_tangential_part_grows(tensors, eta):
    x, x0 = tensors
    result = TAG(eta=eta).finish(at(x), x0)
    close(dot(x, result), dot(x, x0), rtol=1e-8, atol=1e-8)
    close(norm(perpendicular(result, x)), eta * norm(perpendicular(x0, x)), rtol=1e-8, atol=1e-8)
    assert torch.equal(TAG(eta=1.0).finish(at(x), x0), x0)


@given(predictions(2), st.floats(1, 3), st.floats(0.1, 0.9))
def test_on_x0_it_is_the_update_of_an_euler_step(tensors, eta, ratio):
    x, x0 = tensors

    def update(x0: torch.Tensor) -> torch.Tensor:
        return (ratio - 1) * (x - x0)  # sigma_next / sigma = ratio

    plain, tangent = update(x0), perpendicular(update(x0), x)
    close(update(TAG(eta=eta).finish(at(x), x0)), plain + (eta - 1) * tangent, rtol=1e-8, atol=1e-8)


@given(predictions(3), weights.filter(lambda w: w > 1), st.floats(0, 4))
def test_c_tag_is_the_rule_on_eps(tensors, weight, eta):
    x, cond, uncond = tensors
    e_c, e_u = x - cond, x - uncond
    t = perpendicular(e_c - e_u, x)
    coefficient = (dot(e_c, t) / dot(t, t).clamp_min(1e-12)).reshape(-1, *[1] * (x.ndim - 1))
    expected = x - (e_u + weight * (e_c - e_u) + eta * coefficient * t)
    result = run_step(at(x, weight=weight), Predictions(cond, uncond), CTAG(eta=eta))
    if x[0].numel() > 1:  # a single number has no tangent
        close(result, expected, rtol=1e-6, atol=1e-6)


@given(predictions(3), weights)
def test_c_tag_at_zero_and_at_its_edges(tensors, weight):
    x, cond, uncond = tensors
    plain = cfg(cond, uncond, weight)
    assert torch.equal(run_step(at(x, weight=weight), Predictions(cond, uncond), CTAG(eta=0.0)), plain)
    assert torch.equal(run_step(at(x, weight=1.0), Predictions(cond, None), CTAG()), cond)
    close(run_step(at(x, weight=weight), Predictions(cond, cond), CTAG()), cond)  # no tangent, no blow-up
    moved = run_step(at(x, weight=weight), Predictions(cond, uncond), CTAG()) - plain
    assert (norm(moved) <= 2.5 * norm(x - cond) * (1 + 1e-9) + 1e-9).all()


def test_axes_of_no_length():
    x, zero = torch.randn(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)
    close(perpendicular(x, zero), x)
    assert torch.equal(along(x, zero), zero)


@given(predictions(3))
def test_a_batch_is_so_many_single_runs(tensors):
    x, cond, uncond = tensors
    for method in (TAG(), CTAG()):
        rows = [run_step(at(x[i:i + 1]), Predictions(cond[i:i + 1], uncond[i:i + 1]), method) for i in range(len(x))]
        close(run_step(at(x), Predictions(cond, uncond), method), torch.cat(rows))


def test_bad_input():
    for make in (lambda: TAG(eta=0.9), lambda: TAG(eta=math.nan), lambda: CTAG(eta=-1.0), lambda: CTAG(eta=math.inf)):
        with pytest.raises(GuidanceError, match="eta is"):
            make()
    TAG().check(setup(cfg=1.0))
    with pytest.raises(GuidanceError, match="'tangential'"):
        CTAG().check(setup(cfg=1.0))


def test_the_trace_has_the_tangential_share():
    x, x0 = torch.randn(2, 2, 4, 3, 3)
    now = at(x)
    TAG().finish(now, x0)
    close(now.record["tangential"], norm(perpendicular(x0, x)) / norm(x0))

"""CFG-Zero*: the scale of the negative's velocity, and zero-init."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from rudder.guidance.cfg import cfg
from rudder.guidance.cfg_zero import CFGZero, optimal_scale
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.space import Parametrisation, dot, expand, residual, v_from_x0, x0_from_v

from .tensors import at, kinds, levels, predictions, run_step, setup, step, weights

close = torch.testing.assert_close
FLOW = Parametrisation.FLOW
SCALED = CFGZero(zero_steps=0)


@given(predictions(3), weights)
def test_it_is_the_papers_rule_on_velocities(tensors, weight):
    x, cond, uncond = tensors
    sigma = levels(len(x), FLOW)
    v_c, v_u = v_from_x0(x, cond, sigma, FLOW), v_from_x0(x, uncond, sigma, FLOW)
    s = expand(optimal_scale(v_c, v_u), v_u)
    expected = x0_from_v(x, s * v_u + weight * (v_c - s * v_u), sigma, FLOW)
    close(run_step(at(x, weight=weight), Predictions(cond, uncond), SCALED), expected, rtol=1e-8, atol=1e-8)


@given(predictions(3), kinds)
def test_the_scale_is_the_same_in_eps_velocity_and_residual(tensors, kind):
    x, cond, uncond = tensors
    s = optimal_scale(residual(x, cond), residual(x, uncond))
    sigma = expand(levels(len(x), kind), x)
    close(optimal_scale((x - cond) / sigma, (x - uncond) / sigma), s, rtol=1e-9, atol=1e-9)


@given(predictions(2))
def test_what_is_left_is_orthogonal_to_the_negative(tensors):
    cond, uncond = tensors
    left = cond - expand(optimal_scale(cond, uncond), cond) * uncond
    close(dot(left, uncond), torch.zeros(len(cond), dtype=cond.dtype), rtol=0, atol=1e-9)


@given(predictions(3), weights)
def test_degenerate_cases(tensors, weight):
    x, cond, uncond = tensors
    one = x - residual(x, uncond) - 0.0  # e_c = e_u + something orthogonal to it: s is 1
    extra = residual(x, cond) - expand(optimal_scale(residual(x, cond), residual(x, uncond)), x) * residual(x, uncond)
    cond_one = one - extra
    close(run_step(at(x, weight=weight), Predictions(cond_one, uncond), SCALED), cfg(cond_one, uncond, weight),
          rtol=1e-8, atol=1e-8)
    close(run_step(at(x, weight=1.0), Predictions(cond, uncond), SCALED), cond)
    assert torch.equal(run_step(at(x, weight=1.0), Predictions(cond, None), SCALED), cond)
    assert run_step(at(x, weight=weight), Predictions(cond, x), SCALED).isfinite().all()  # e_u is zero


@given(predictions(3))
def test_a_batch_is_so_many_single_runs(tensors):
    x, cond, uncond = tensors
    rows = [run_step(at(x[i:i + 1]), Predictions(cond[i:i + 1], uncond[i:i + 1]), SCALED) for i in range(len(x))]
    close(run_step(at(x), Predictions(cond, uncond), SCALED), torch.cat(rows))


def test_zero_init_keeps_the_latent_and_costs_one_evaluation():
    x, cond = torch.randn(2, 2, 4, 3, 3)
    method = CFGZero(zero_steps=2)
    for index in range(5):
        now = at(x, index, parametrisation=FLOW)
        zeroed = index < 2
        assert method.scale(now, 7.0) == (1.0 if zeroed else 7.0)
        now.weight = method.scale(now, 7.0)
        assert torch.equal(run_step(now, Predictions(cond, None if zeroed else cond), method), x) == zeroed


def test_zero_init_is_for_flow_from_pure_noise():
    late = step(0, parametrisation=FLOW)
    late.sigmas = late.sigmas[3:]
    assert CFGZero().zeroed(step(0, parametrisation=FLOW))
    assert not CFGZero().zeroed(late) and not CFGZero().zeroed(step(0))
    assert not CFGZero(zero_steps=0).zeroed(step(0, parametrisation=FLOW))


def test_resting_zero_init_is_announced(caplog):
    with caplog.at_level(logging.WARNING, "rudder"):
        CFGZero(zero_steps=0).check(setup())
        assert not caplog.records
        CFGZero().check(setup())
    assert "zero-init rests here: it is for flow models" in caplog.text
    caplog.clear()
    flow = replace(setup(), parametrisation=FLOW, steps=[step(i, parametrisation=FLOW) for i in range(10)])
    with caplog.at_level(logging.WARNING, "rudder"):
        CFGZero().check(flow)
        CFGZero(start=0.1, zero_steps=2).check(flow)  # the second of the two is inside
        assert not caplog.records
        CFGZero(start=0.15, zero_steps=1).check(flow)
    assert "zero-init rests here: its steps lie before start_percent 0.15" in caplog.text


def test_a_short_run_in_which_zero_init_rests_is_no_error():
    CFGZero(zero_steps=4).check(setup(steps=4))  # an eps model
    late = [step(3, 4, parametrisation=Parametrisation.FLOW)]
    late[0].sigmas = torch.tensor([0.2, 0.0])  # the last step of a run that another sampler began
    CFGZero().check(replace(setup(steps=1), steps=late, parametrisation=Parametrisation.FLOW))


def test_bad_input():
    with pytest.raises(GuidanceError, match="zero_init_steps is -1"):
        CFGZero(zero_steps=-1)
    with pytest.raises(GuidanceError, match="zero_init_steps is 4 in a run of 4 steps"):
        flow = [step(i, 4, parametrisation=Parametrisation.FLOW) for i in range(4)]
        CFGZero(zero_steps=4).check(replace(setup(steps=4), steps=flow, parametrisation=Parametrisation.FLOW))
    with pytest.raises(GuidanceError, match=r"CFG-Zero\*.*cfg above 1.*no meaning"):
        CFGZero().check(setup(cfg=1.0))


def test_zero_init_is_for_pure_noise_alone():
    late = step(0, parametrisation=FLOW)
    late.sigmas = late.sigmas[1:]  # 0.9
    assert not CFGZero().zeroed(late)


def test_the_trace_has_the_scale():
    x, cond, uncond = torch.randn(3, 2, 4, 3, 3)
    now = at(x)
    run_step(now, Predictions(cond, uncond), CFGZero(zero_steps=0))
    close(now.record["negative_scale"], optimal_scale(residual(x, cond), residual(x, uncond)))

"""beta-CFG: the schedule and the length of the push."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance.aapb import AAPB, optimal_gamma
from rudder.guidance.beta_cfg import BetaCFG, eps_length
from rudder.guidance.blend import blend
from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions, Prompt
from rudder.guidance.curve import beta_density
from rudder.guidance.perpneg import PerpNeg
from rudder.guidance.space import cosine, expand, norm, perpendicular

from .tensors import at, predictions, run_step, setup, step, weights

close = torch.testing.assert_close
PLAIN = BetaCFG(alpha=1, beta=1, gamma=0)


def guided(method: BetaCFG, x, cond, uncond, weight: float, index: int = 4):
    now = at(x, index)
    now.weight = method.scale(now, weight)
    return run_step(now, Predictions(cond, uncond), method)


@given(predictions(3), weights)
def test_flat_and_unnormalised_is_cfg(tensors, weight):
    x, cond, uncond = tensors
    assert torch.equal(guided(PLAIN, x, cond, uncond, weight), cfg(cond, uncond, weight))


@given(predictions(3), weights, st.floats(0, 1), st.integers(0, 9))
def test_it_is_the_papers_rule_on_eps(tensors, weight, gamma, index):
    x, cond, uncond = tensors
    method, sigma = BetaCFG(alpha=2, beta=3, gamma=gamma), float(step(index).level)
    d = ((x - cond) - (x - uncond)) / sigma
    length = expand(norm(d) * math.sqrt(4 * 64 * 64 / d[0].numel()), d)
    density = 12 * (index / 9) * (1 - index / 9) ** 2  # of Beta(2, 3)
    eps = (x - uncond) / sigma + density * weight * d / length**gamma
    close(guided(method, x, cond, uncond, weight, index), x - sigma * eps, rtol=1e-5, atol=1e-5)


@given(predictions(4), weights, st.integers(1, 8), st.floats(0.5, 1))
def test_with_perp_neg_the_whole_push_has_the_papers_length(tensors, weight, index, gamma):
    x, cond, uncond, bad = tensors
    negative, method = Prompt([], "negative"), BetaCFG(gamma=gamma)
    now = at(x, index)
    now.weight = method.scale(now, weight)
    beside = PerpNeg(negatives=(negative,), weights=(2.0,))
    ours = run_step(now, Predictions(cond, uncond, {negative: bad}), method, beside)
    d = cond - uncond - 2 * perpendicular(bad - uncond, cond - uncond)
    close(ours, uncond + now.weight * expand(eps_length(d, now.sigma) ** -gamma, d) * d, rtol=1e-5, atol=1e-5)


@given(predictions(4), weights, st.integers(1, 8))
def test_with_aapb_the_blend_turns_the_push_and_its_length_stays(tensors, weight, index):
    x, cond, uncond, other = tensors
    anchor, method = Prompt([], "anchor"), BetaCFG()
    now = at(x, index)
    now.weight = method.scale(now, weight)
    ours = run_step(now, Predictions(cond, uncond, {anchor: other}), method, AAPB(anchor=anchor))
    blended = blend(cond, other, optimal_gamma(cond, other, uncond, now.weight))  # of CFG at B w, not of the normalised
    close(cosine(ours - uncond, blended - uncond), torch.ones(len(x), dtype=x.dtype), rtol=1e-5, atol=1e-5)
    close(eps_length(ours - uncond, now.sigma), torch.full((len(x),), now.weight, dtype=x.dtype), rtol=1e-5, atol=1e-5)


@given(predictions(3), weights)
def test_the_ends_of_the_run_are_unconditional(tensors, weight):
    x, cond, uncond = tensors
    for index in (0, 9):
        close(guided(BetaCFG(), x, cond, uncond, weight, index), uncond)


def test_the_weight_averages_to_the_samplers():
    steps = 1001
    total = sum(BetaCFG(alpha=2, beta=3).scale(step(i, steps), 7.5) for i in range(steps))
    assert total / steps == pytest.approx(7.5, rel=2e-3)


def test_a_weight_of_one_keeps_the_negative_where_the_push_is_normalised():
    one = 1 / beta_density(step(4).progress, 2, 2)
    assert math.isclose(PLAIN.scale(step(4), 1.0), 1.0)
    assert not math.isclose(BetaCFG().scale(step(4), one), 1.0)


def test_no_push_and_a_gate():
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(guided(BetaCFG(), x, x, x, 7.0), x)
    assert torch.equal(run_step(at(x, weight=1.0), Predictions(x, None), BetaCFG()), x)


def test_the_length_does_not_depend_on_the_size_of_the_latent():
    small, large = torch.ones(1, 4, 8, 8), torch.ones(1, 4, 32, 32)
    close(eps_length(small, torch.ones(1)), eps_length(large, torch.ones(1)))
    close(eps_length(torch.ones(1, 4, 64, 64), torch.full((1,), 2.0)), torch.tensor([64.0]))


@given(predictions(3))
def test_a_batch_is_so_many_single_runs(tensors):
    x, cond, uncond = tensors
    rows = [guided(BetaCFG(), x[i:i + 1], cond[i:i + 1], uncond[i:i + 1], 5.0) for i in range(len(x))]
    close(guided(BetaCFG(), x, cond, uncond, 5.0), torch.cat(rows))


def test_bad_input():
    for fields in ({"alpha": 0.5}, {"beta": math.nan}, {"gamma": -0.1}, {"gamma": 1.5}):
        with pytest.raises(GuidanceError, match=next(iter(fields))):
            BetaCFG(**fields)
    with pytest.raises(GuidanceError, match="2 steps would hold no guidance"):
        BetaCFG().check(setup(steps=2))
    at_cfg_1 = [beta_density(i / 9, 2, 2) for i in range(10)]
    with pytest.raises(GuidanceError, match=r"cfg is 1\)"):
        BetaCFG().check(setup(cfg=1.0, weights=at_cfg_1))
    BetaCFG().check(setup(cfg=1.0, weights=[5 * w for w in at_cfg_1]))  # Guidance Weight (CFG) on the same model


def test_the_trace_has_the_length_in_eps():
    x, cond, uncond = torch.randn(3, 2, 4, 3, 3)
    now = at(x, 4)
    run_step(now, Predictions(cond, uncond), BetaCFG())
    close(now.record["eps_norm"], eps_length(cond - uncond, now.sigma), rtol=1e-4, atol=1e-4)

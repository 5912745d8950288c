"""Guidance in a limited interval of noise levels."""

from __future__ import annotations

import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance.cfg import CFG
from rudder.guidance.contract import GuidanceError
from rudder.guidance.interval import LimitedInterval, interval_weight

from .tensors import setup, step, weights

levels = st.floats(1e-4, 200)


def evaluations(method: LimitedInterval, steps: int, weight: float = 7.0) -> int:
    """cond at every step, uncond where the weight is not 1."""
    return sum(1 + (method.scale(step(i, steps), weight) != 1.0) for i in range(steps))


@given(levels, weights)
def test_everything_is_cfg_and_nothing_is_the_conditional_prediction(sigma, weight):
    assert interval_weight(sigma, 0.0, math.inf, weight) == weight
    assert interval_weight(sigma, sigma, sigma, weight) == 1.0  # (s, s] holds nothing
    assert LimitedInterval().scale(step(level=sigma), weight) == weight or sigma > 1  # percents of this step end at 1


@given(levels, levels, weights)
def test_the_lower_end_is_open_and_the_upper_closed(low, width, weight):
    high = low + width
    assert interval_weight(high, low, high, weight) == weight
    assert interval_weight(low, low, high, weight) == 1.0
    assert interval_weight(math.nextafter(low, math.inf), low, high, weight) == weight
    assert interval_weight(math.nextafter(high, math.inf), low, high, weight) == 1.0


@given(levels, levels, levels, weights)
def test_the_weight_is_never_between(sigma, low, width, weight):
    inside = low < sigma <= low + width
    assert interval_weight(sigma, low, low + width, weight) == (weight if inside else 1.0)


@given(st.integers(1, 60), st.floats(0, 0.99), st.floats(0.01, 1))
def test_a_step_outside_costs_one_evaluation(steps, low, width):
    high = low + width
    inside = sum(low < step(i, steps).level <= high for i in range(steps))
    assert evaluations(LimitedInterval(sigma_low=low, sigma_high=high), steps) == steps + inside


def test_evaluations_at_the_ends():
    assert evaluations(LimitedInterval(), 20) == 40
    assert evaluations(LimitedInterval(sigma_low=5.0, sigma_high=9.0), 20) == 20  # above this run's noise: cond alone


def test_the_percent_window_gates_too():
    """Percents are 1 - sigma here."""
    method = LimitedInterval(first=0.15, last=0.55)
    assert [i for i in range(10) if method.scale(step(i, 10), 7.0) != 1.0] == [2, 3, 4, 5]
    both = LimitedInterval(first=0.15, last=0.55, sigma_low=0.55)
    assert [i for i in range(10) if both.scale(step(i, 10), 7.0) != 1.0] == [2, 3, 4]


def test_it_gates_whatever_weight_the_others_chose():
    gate, cfg = LimitedInterval(sigma_low=0.55), CFG(weight=3.0)
    assert gate.rank > cfg.rank
    weight = 7.0
    for method in sorted((gate, cfg), key=lambda method: method.rank):  # as the executor orders a plan
        weight = method.scale(step(9), weight)
    assert weight == 1.0


@pytest.mark.parametrize(
    "limits", [{"sigma_low": 2.0, "sigma_high": 1.0}, {"sigma_low": 1.0, "sigma_high": 1.0}, {"sigma_low": -0.5},
               {"sigma_low": math.nan}, {"sigma_high": math.nan}]
)
def test_limits_in_the_wrong_order_are_refused(limits):
    with pytest.raises(GuidanceError, match="sigma_low .* below sigma_high"):
        LimitedInterval(**limits)


@pytest.mark.parametrize("window", [{"first": 0.6, "last": 0.5}, {"first": -0.1}, {"last": 1.5}])
def test_a_window_in_the_wrong_order_is_refused(window):
    with pytest.raises(GuidanceError, match="start .* end"):
        LimitedInterval(**window)


def test_a_run_without_guidance_is_refused():
    with pytest.raises(GuidanceError, match="cfg is 1.*Raise cfg"):
        LimitedInterval().check(setup(cfg=1.0))
    LimitedInterval().check(setup(cfg=1.0, weights=[1.0, 5.0]))  # Guidance Weight (CFG) on the same model
    LimitedInterval(sigma_low=99, sigma_high=100).check(setup(cfg=7.0, weights=[1.0] * 4))  # said, not refused


# ---------------------------------------------------------------- limits that cut off nothing


WHOLE = "All are guided: the node changes nothing."
IDLE = {  # the levels of the run are 1.0, 0.9 ... 0.1
    "none given": ({}, ["every step is inside in this run", "from 1 to 0.1", WHOLE]),
    "of another model": ({"sigma_low": 0.28, "sigma_high": 5.42}, ["sigma_high 5.42 cut off no step", "0.22 to 0.84"]),
    "too low": ({"sigma_low": 0.05, "sigma_high": 0.84}, ["sigma_low 0.05 cut off no step"]),
    "no step": ({"sigma_low": 1.5, "sigma_high": 5.0}, ["no step of this run", "from 1 to 0.1", "nothing is guided"]),
    "both": ({"sigma_low": 0.05, "sigma_high": 5.0}, ["sigma_high 5 and sigma_low 0.05 cut off no step", WHOLE]),
}


@pytest.mark.parametrize("case", IDLE)
def test_limits_that_cut_off_no_step_are_announced(caplog, case):
    limits, words = IDLE[case]
    with caplog.at_level(logging.WARNING, "rudder"):
        LimitedInterval(**limits).check(setup())
    (said,) = caplog.messages
    assert all(word in said for word in (*words, "Guidance Interval", "start_percent")), said
    assert (WHOLE in said) == (WHOLE in words)


@pytest.mark.parametrize(
    "limits", [{"sigma_low": 0.28, "sigma_high": 0.84}, {"sigma_low": 0.28, "sigma_high": 5.42, "first": 0.2},
               {"last": 0.8}]
)
def test_limits_that_cut_are_not(caplog, limits):
    """Percents do what the idle sigma_high would."""
    with caplog.at_level(logging.WARNING, "rudder"):
        LimitedInterval(**limits).check(setup())
    assert not caplog.messages

"""The course of the weight: shapes, hand-drawn curves, the average that is kept."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance.cfg import CFG
from rudder.guidance.contract import GuidanceError
from rudder.guidance.curve import beta_density, interpolate, parse
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.schedule import SHAPES, Schedule

from .tensors import setup, step, weights

DRAWN = parse("0:0.5, 0.4:2, 1:0")
shapes = st.sampled_from(SHAPES)


def schedule(shape: str, **options) -> Schedule:
    return Schedule(shape=shape, points=DRAWN if shape == "curve" else (), **options)


def course(method: Schedule, weight: float, steps: int = 20) -> list[float]:
    return [method.scale(step(i, steps), weight) for i in range(steps)]


@given(st.floats(1e-6, 1.0))
def test_percents_invert_the_models_timesteps(sigma):
    now = step()
    for there in (lambda p: 1 - p, lambda p: (1 - p) ** 3, lambda p: 3 * (1 - p) / (1 + 2 * (1 - p))):
        now.percent_to_sigma = there
        assert there(now.percent_of(sigma)) == pytest.approx(sigma, abs=1e-5)
    assert now.percent_of(0.0) == 1.0 and now.percent_of(1e9) < 1e-6


@given(st.sampled_from(["triangle", "cosine", "beta", "interval"]), st.floats(0, 1), st.floats(1, 5), st.floats(1, 5))
def test_the_mean_of_a_shape_is_one(shape, low, a, b):
    method = schedule(shape, low=low, alpha=a, beta=b)
    middle = [(i + 0.5) / 4000 for i in range(4000)]
    assert sum(map(method.factor, middle)) / 4000 == pytest.approx(1, abs=2e-3)


@given(shapes, weights, st.integers(3, 40), st.floats(0, 0.4), st.floats(0.6, 1), st.floats(0.05, 1))
def test_the_average_over_time_is_kept(shape, weight, steps, first, last, low):
    method = schedule(shape, first=first, last=last, low=low)
    time = step(0, steps).sigmas  # percents are 1 - sigma
    spans = (time[:-1] - time[1:]).tolist()
    assert sum(w * span for w, span in zip(course(method, weight, steps), spans)) == pytest.approx(weight, rel=1e-4)


def test_the_average_is_over_time_not_over_steps():
    now = step(0, 4)
    now.sigmas = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.0])
    method, total = Schedule(), 0.0
    for i in range(4):
        here = replace(now, index=i, level=float(now.sigmas[i]))
        total += method.scale(here, 5.0) * float(now.sigmas[i] - now.sigmas[i + 1])
    assert total == pytest.approx(5.0, rel=1e-5)


@given(weights, st.integers(2, 40))
def test_flat_curves_are_cfg(weight, steps):
    for method in (Schedule(shape="interval"), Schedule(low=1.0), Schedule(shape="beta", alpha=1, beta=1),
                   Schedule(shape="curve", points=((0.5, 3.0),))):
        assert course(method, weight, steps) == pytest.approx([weight] * steps)


def test_the_triangle_goes_from_1_to_twice_and_back():
    rising = [1, 2.6, 4.2, 5.8, 7.4, 9]
    assert course(Schedule(keep_average=False), 5.0, 10) == pytest.approx([*rising, *rising[-2:0:-1]])
    assert course(Schedule(), 5.0, 10)[0] == 1.0, "and its start stays unguided when the average is restored"


def test_an_interval_is_the_guidance_interval_in_percent():
    gate = LimitedInterval(first=0.26, last=0.56)
    assert course(Schedule(shape="interval", first=0.26, last=0.56, keep_average=False), 7.0) == [
        gate.scale(step(i, 20), 7.0) for i in range(20)
    ]


def test_step_beta_and_curve():
    late = Schedule(shape="step", first=0.25, last=0.5, low=0.5, keep_average=False)
    assert course(late, 3.0, 8) == [2.0] * 2 + [3.0] * 6
    assert course(replace(late, last=0.1), 3.0, 8) == course(late, 3.0, 8), "a step has no end"
    Schedule(shape="curve", points=((0.0, 1.0),), first=0.5, last=0.5)  # nor has a curve either
    assert beta_density(0.5, 2, 2) == pytest.approx(1.5) and beta_density(0, 2, 3) == beta_density(1, 2, 3) == 0
    assert interpolate(((0.2, 1.0), (0.6, 3.0)), 0.3) == pytest.approx(1.5)
    assert [interpolate(((0.2, 1.0), (0.6, 3.0)), t) for t in (0, 0.2, 0.6, 1)] == [1, 1, 3, 3]


@given(shapes, st.floats(0.5, 3))
def test_it_acts_on_whatever_weight_was_set(shape, weight):
    assert schedule(shape).rank > CFG(weight=weight).rank
    assert set(course(schedule(shape), 1.0)) == {1.0}


def test_points_as_people_write_them():
    assert parse("0:0, 0.3:1.5,1:0") == parse("0 : 0\n0.3: 1.5 ;\n1:0\n") == ((0, 0), (0.3, 1.5), (1, 0))
    for text, says in {
        "": "no point", "0": "'0' is not a point", "0:1:2": "not a point", "a:1": "'a:1' is not a point",
        "0.5:1, 0.5:2": "rise", "0.6:1, 0.5:2": "'0.5:2' does not fit", "1.2:1": "0 .. 1",
        "0:-1": "0 or more", "nan:1": "fit", "0:inf": "fit", "0:nan": "fit",
    }.items():
        with pytest.raises(GuidanceError, match=says):
            parse(text)


@pytest.mark.parametrize(
    ("fields", "says"),
    [({"shape": "sine"}, "shape is 'sine'"), ({"shape": "curve"}, "a curve with points"),
     ({"first": 0.5, "last": 0.5}, "start"), ({"first": math.nan}, "start"), ({"low": 1.5}, "low"),
     ({"alpha": 0.5}, "alpha"), ({"beta": math.nan}, "beta")],
)
def test_values_out_of_range_are_refused(fields, says):
    with pytest.raises(GuidanceError, match=says):
        Schedule(**fields)


def test_runs_in_which_it_could_not_act():
    with pytest.raises(GuidanceError, match=r"cfg is 1\).*no weight to schedule"):
        Schedule().check(setup(cfg=1.0))
    with pytest.raises(GuidanceError, match="no step of this run has guidance"):
        Schedule().check(setup(weights=[1.0] * 4))
    with pytest.raises(GuidanceError, match="so narrow that keeping the average takes a weight of 900"):
        Schedule().check(setup(weights=[1.0, 900.0]))
    Schedule().check(setup(weights=[1.0, 9.0]))
    blank = Schedule(shape="curve", points=((0.0, 0.0),))
    assert course(blank, 7.0, 4) == [1.0] * 4  # which check refuses


def test_a_high_cfg_is_accepted():
    Schedule().check(setup(weights=[1.0, 199.0]))


@pytest.mark.parametrize("fields", [
    {"low": 1.0}, {"shape": "interval"}, {"shape": "beta", "alpha": 1.0, "beta": 1.0}, {"shape": "step"},
    {"shape": "curve", "points": ((0.0, 0.5), (1.0, 0.5))},
])
def test_a_curve_that_changes_nothing_is_announced(caplog, fields):
    with caplog.at_level(logging.WARNING, "rudder"):
        Schedule(**fields).check(setup())
        assert "so the node changes nothing" in caplog.text and len(caplog.records) == 1
        caplog.clear()
        Schedule().check(setup())
        Schedule(shape="interval", last=0.5).check(setup())
    assert not caplog.records

"""R2F: who plays the positive at which step, against the official code's tables."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance.contract import GuidanceError, Mix, overrides
from rudder.guidance.r2f import MODES, R2F, stop_fraction, stop_step, uses_frequent

from .tensors import prompt, setup, step

FREQUENT = prompt("frequent")
OFFICIAL = {"SD3": [0, 5, 10, 20, 30, 40], "SDXL": [0, 3, 5, 10, 20, 30]}  # of 50 steps, by level
BLENDED = [0, 1, 1, 1, 2, 2]  # of the 4 steps of Flux-schnell, by level


def schedule(method: R2F, steps: int) -> list:
    """Who plays "cond" at every step; None is the sampler's own positive, the rare prompt."""
    return [method.sources(step(index, steps)).get("cond") for index in range(steps)]


@given(st.integers(1, 100), st.floats(0, 1))
def test_the_frequent_prompt_has_every_second_step_before_the_stop(steps, stop):
    played = schedule(R2F(frequent=FREQUENT, stop=stop), steps)
    last = stop_step(stop, steps)
    assert sum(who is FREQUENT for who in played) == math.ceil(last / 2)
    assert all(who in (None, FREQUENT) for who in played)
    assert played[last:] == [None] * (steps - last)
    assert played[:last:2] == [FREQUENT] * math.ceil(last / 2)  # even steps, the first one included


@given(st.integers(0, 60), st.integers(0, 50))
def test_uses_frequent_counts_to_half_of_the_stop(stop, more):
    assert sum(uses_frequent(i, stop) for i in range(stop + more)) == math.ceil(stop / 2)


@pytest.mark.parametrize("mode", MODES)
def test_stop_0_is_the_rare_prompt_alone(mode):
    assert schedule(R2F(frequent=FREQUENT, stop=stop_fraction(0, mode), mode=mode), 20) == [None] * 20


@pytest.mark.parametrize("family", OFFICIAL)
@pytest.mark.parametrize("level", range(6))
def test_the_official_stop_steps(family, level):
    stop = stop_fraction(level, "alternate", family)
    assert stop_step(stop, 50) == OFFICIAL[family][level]
    official = [FREQUENT if i % 2 == 0 and i < OFFICIAL[family][level] else None for i in range(50)]
    assert schedule(R2F(frequent=FREQUENT, stop=stop), 50) == official
    assert stop_step(stop, 100) == 2 * OFFICIAL[family][level]  # absolute steps of 50 are shares of other runs


@pytest.mark.parametrize("level", range(6))
def test_the_official_blend_of_four_steps(level):
    played = schedule(R2F(frequent=FREQUENT, stop=stop_fraction(level, "blend"), mode="blend"), 4)
    amounts = [0.3, 0.15][: BLENDED[level]]
    assert [who.amount for who in played if who] == amounts
    assert played == [Mix(FREQUENT, amount) for amount in amounts] + [None] * (4 - len(amounts))


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_every_prompt_of_a_run_was_announced(steps, stop, amount):
    """The host converts conditionings once, before the run: a step may only ask for what ``prompts`` named."""
    for mode in MODES:
        method = R2F(frequent=FREQUENT, stop=stop, mode=mode, amount=amount)
        assert set(schedule(method, steps)) - {None} <= set(method.prompts())


@given(st.integers(4, 60))
def test_the_blend_halves_every_quarter_and_stops(steps):
    method = R2F(frequent=FREQUENT, stop=1.0, mode="blend", amount=0.8)
    amounts = [who.amount for who in schedule(method, steps)]
    assert amounts == sorted(amounts, reverse=True)
    assert sorted(set(amounts)) == pytest.approx([0.1, 0.2, 0.4, 0.8])


def test_an_amount_of_0_is_the_rare_prompt_alone():
    assert schedule(R2F(frequent=FREQUENT, stop=0.5, mode="blend", amount=0.0), 8) == [None] * 8


@given(st.integers(1, 50), st.floats(0.01, 1.0))
def test_a_wanted_stop_never_rounds_to_nothing(steps, stop):
    assert 1 <= stop_step(stop, steps) <= steps
    assert abs(stop_step(stop, steps) - stop * steps) <= max(0.5, 1 - stop * steps) + 1e-9


def test_it_costs_nothing():
    """It replaces the positive; it never adds a branch to the step."""
    assert not overrides(R2F(frequent=FREQUENT), "branches") and not overrides(R2F(frequent=FREQUENT), "scale")


@pytest.mark.parametrize(
    ("mode", "expected"), [("alternate", [1, 0, 1, 0, 0, 0]), ("blend", [0.3, 0.3, 0.15, 0, 0, 0])]
)
def test_the_share_of_the_frequent_prompt_is_recorded(mode, expected):
    shares = []
    for index in range(6):
        now = step(index, 6)
        R2F(frequent=FREQUENT, stop=0.5, mode=mode).sources(now)
        shares.append(now.record["frequent"])
    assert shares == pytest.approx(expected)


@pytest.mark.parametrize(("name", "value"), [("stop", 1.2), ("stop", -0.1), ("amount", 2.0), ("amount", math.nan)])
def test_shares_outside_0_and_1_are_refused(name, value):
    with pytest.raises(GuidanceError, match=rf"R2F\): {name} is .*\[0, 1\]"):
        R2F(frequent=FREQUENT, **{name: value})


def test_an_unknown_mode_is_refused():
    with pytest.raises(GuidanceError, match="mode is 'shuffle'; use one of alternate, blend"):
        R2F(frequent=FREQUENT, mode="shuffle")


@pytest.mark.parametrize("likeness", ["positive", "negative", "empty"])
def test_a_frequent_prompt_that_says_nothing_new_is_refused(likeness):
    with pytest.raises(GuidanceError, match="the frequent conditioning is"):
        R2F(frequent=FREQUENT).check(setup(likeness=likeness))
    R2F(frequent=FREQUENT).check(setup(cfg=1.0))  # distilled models run at cfg 1


def test_the_first_and_the_last_step_of_one():
    assert torch.equal(step(0, 1).sigmas, torch.tensor([1.0, 0.0]))
    assert schedule(R2F(frequent=FREQUENT, stop=1.0), 1) == [FREQUENT]


def test_a_stop_at_the_start_warns(caplog):
    with caplog.at_level(logging.WARNING, "rudder"):
        R2F(frequent=prompt()).check(setup())
        assert not caplog.records
        R2F(frequent=prompt(), stop=0.0).check(setup())
    assert "the node changes nothing" in caplog.text

"""What every method relies on: windows, state, identity of prompts, exclusive roles."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance.aapb import AAPB
from rudder.guidance.blend import FixedBlend
from rudder.guidance.cfg import CFG
from rudder.guidance.contract import Guidance, GuidanceError, Mix, Predictions, Prompt, extended, overrides
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.r2f import R2F
from rudder.guidance.trace import Recorder, Trace

from .tensors import prompt, step

SHARED = prompt()
METHODS = [
    AAPB(anchor=SHARED), FixedBlend(anchor=SHARED), CFG(weight=3.0), LimitedInterval(), R2F(frequent=SHARED),
    Trace(recorder=Recorder()),
]
named = pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)


# ---------------------------------------------------------------- windows and steps


def test_a_window_includes_both_ends():
    assert [i for i in range(10) if step(i).within(0.15, 0.55)] == [2, 3, 4, 5]
    assert all(step(i).within(0.0, 1.0) for i in range(10))
    assert [level for level in (0.81, 0.8, 0.6, 0.5, 0.49) if step(level=level).within(0.2, 0.5)] == [0.8, 0.6, 0.5]


@named
@pytest.mark.parametrize("window", [(0.6, 0.5), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_a_window_in_the_wrong_order_is_refused_by_its_name(method, window):
    fields = {**vars(method), "start": window[0], "end": window[1]}
    with pytest.raises(GuidanceError, match=r"start .* and end .* 0 <= start <= end <= 1") as error:
        type(method)(**fields)
    assert method.title in str(error.value)


@given(st.integers(1, 50))
def test_progress_and_the_next_level(steps):
    run = [step(i, steps) for i in range(steps)]
    assert run[0].progress == 0 and (steps == 1 or run[-1].progress == 1)
    assert [now.progress for now in run] == sorted(now.progress for now in run)
    assert [now.sigma_next for now in run] == run[0].sigmas[1:].tolist()
    assert run[-1].sigma_next == 0.0 and run[0].steps == steps


def test_an_evaluation_after_the_last_step_leads_nowhere():
    assert step(10, 10).sigma_next == 0.0


def test_state_belongs_to_one_method_and_one_run():
    first, twin = CFG(weight=3.0), CFG(weight=3.0)
    assert first == twin
    states = {}
    step(0, states=states).state(first)["count"] = 1
    assert step(1, states=states).state(first) == {"count": 1}
    assert step(1, states=states).state(twin) == {}  # equal methods wired twice do not share
    assert step(0).state(first) == {}  # another run


def test_log_is_free_without_a_record():
    now = step()
    now.log(gamma=0.5)
    now.log(gamma=0.6, weight=2.0)
    assert now.record == {"gamma": 0.6, "weight": 2.0}
    now.record = None
    now.log(gamma=torch.ones(3))


# ---------------------------------------------------------------- prompts and predictions


def test_a_prompt_is_its_conditioning_object():
    conditioning = [[torch.zeros(1, 2, 3), {}]]
    a, same = Prompt(conditioning, "anchor"), Prompt(conditioning, "frequent")
    equal = Prompt(copy.copy(conditioning), "anchor")
    assert a == same and hash(a) == hash(same) and a != equal
    assert len({a, same, equal}) == 2 and a != conditioning


def test_a_mix_is_its_prompt_and_amount():
    assert Mix(SHARED, 0.3) == Mix(Prompt(SHARED.conditioning, "other"), 0.3)
    assert hash(Mix(SHARED, 0.3)) == hash(Mix(Prompt(SHARED.conditioning, "other"), 0.3))
    assert Mix(SHARED, 0.3) != Mix(SHARED, 0.15) and Mix(SHARED, 0.3) != Mix(prompt(), 0.3)
    assert Mix(SHARED, 0.3).name == "0.3 anchor in positive" and Mix(SHARED, 1.0) != SHARED


def test_predictions_are_replaced_not_changed():
    cond, uncond, anchor = torch.randn(3, 1, 4, 2, 2)
    preds = Predictions(cond, uncond, {SHARED: anchor})
    changed = preds.replace(cond=anchor)
    assert changed.cond is anchor and preds.cond is cond and changed.uncond is uncond
    assert changed[SHARED] is anchor and changed[Prompt(SHARED.conditioning, "again")] is anchor
    with pytest.raises(FrozenInstanceError):
        preds.cond = anchor


# ---------------------------------------------------------------- methods


@named
def test_a_method_is_frozen_and_survives_the_hosts_copies(method):
    """ComfyUI deep-copies a MODEL's options in every clone: conditionings must neither be copied nor lose identity."""
    with pytest.raises(FrozenInstanceError):
        method.start = 0.5
    assert copy.deepcopy(method) is method
    options = copy.deepcopy({"rudder": (method,), "transformer_options": {}})
    assert options["rudder"][0] is method
    for branch in copy.deepcopy(method).prompts():
        wrapped = branch.prompt if isinstance(branch, Mix) else branch
        assert wrapped.conditioning is SHARED.conditioning


@named
def test_a_method_says_who_it_is(method):
    assert method.title != Guidance.title and type(method).__doc__
    assert not method.claims or all(isinstance(role, str) for role in method.claims)


def test_the_defaults_change_nothing():
    method, now = Guidance(), step()
    preds, x = Predictions(*torch.randn(2, 1, 4, 2, 2)), torch.randn(1, 4, 2, 2)
    assert method.refine(now, preds) is preds and method.direction(now, x) is x and method.finish(now, x) is x
    assert method.term(now, preds) is None and method.scale(now, 7.0) == 7.0
    assert not method.prompts() and not method.branches(now) and not method.sources(now) and now.record == {}
    hooks = ("scale", "sources", "branches", "refine", "direction", "term", "finish")
    assert not any(overrides(method, hook) for hook in hooks)
    assert overrides(CFG(weight=2.0), "scale") and not overrides(CFG(weight=2.0), "refine")


# ---------------------------------------------------------------- plans


def test_a_plan_grows_in_wiring_order_and_leaves_the_old_one():
    plan = extended((), METHODS[2])
    longer = extended(plan, METHODS[3])
    assert plan == (METHODS[2],) and longer == (METHODS[2], METHODS[3])


@dataclass(frozen=True, kw_only=True)
class Positive(Guidance):
    title = "Somebody Else"
    claims = frozenset({"positive prompt of a step", "another role"})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (AAPB(anchor=SHARED), FixedBlend(anchor=SHARED)),
        (CFG(weight=2.0), CFG(weight=3.0)),
        (R2F(frequent=SHARED), R2F(frequent=prompt())),
        (R2F(frequent=SHARED), Positive()),
    ],
)
def test_two_claims_of_one_role_name_both_nodes_and_the_way_out(first, second):
    for a, b in ((first, second), (second, first)):
        with pytest.raises(GuidanceError) as error:
            extended((LimitedInterval(), a), b)
        message = str(error.value)
        assert f"'{a.title}'" in message and f"'{b.title}'" in message
        assert next(iter(a.claims & b.claims)) in message and "Keep one of them" in message


def test_methods_of_different_roles_compose():
    plan = ()
    for method in METHODS[0], *METHODS[2:]:
        plan = extended(plan, method)
    assert len(plan) == 5
    assert len(extended(plan, LimitedInterval(sigma_low=1.0))) == 6  # a gate decides nothing alone


def test_guided_only_leaves_out_pictures_that_guidance_has_left():
    now, push = step(), torch.ones(2, 3)
    assert now.guided_only(push) is push
    now.left = torch.tensor([True, False])
    assert now.guided_only(push).tolist() == [[0] * 3, [1] * 3] and now.guided_only(push[:, 0]).tolist() == [0, 1]

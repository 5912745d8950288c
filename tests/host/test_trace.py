"""The trace: what it records is what the pure functions give, and each run of a sampler node replaces its last one."""

from __future__ import annotations

import pytest
import torch
from comfy_execution.utils import CurrentNodeContext

from rudder.guidance.aapb import AAPB, optimal_gamma
from rudder.guidance.blend import FixedBlend, blend
from rudder.guidance.contract import Prompt
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.r2f import R2F
from rudder.guidance.space import cosine, norm
from rudder.guidance.trace import Recorder, Trace
from rudder.host import add_guidance
from rudder.nodes.trace import RudderTrace, recorded

from .models import conditioning, evaluate, sample

POSITIVE, NEGATIVE, ANCHOR = conditioning(1), conditioning(2), conditioning(3)
ANCHORED = Prompt(ANCHOR, "anchor")
WEIGHT = 4.0


def traced(model, *methods):
    recorder = Recorder()
    for method in (*methods, Trace(recorder=recorder)):
        model = add_guidance(model, method)
    return model, recorder


def only(recorder: Recorder) -> dict:
    (run,) = recorder.runs.values()
    return run


@pytest.mark.parametrize("batch", [1, 3])
def test_values_are_those_of_the_pure_functions(model, kind, batch):
    patched, recorder = traced(model, AAPB(anchor=ANCHORED))
    evaluate(patched, kind, POSITIVE, NEGATIVE, cfg=WEIGHT, batch=batch)
    run = evaluate(model, kind, POSITIVE, NEGATIVE, ANCHOR, cfg=WEIGHT, batch=batch)
    x, target, uncond, anchor = run["input"], run["cond_denoised"], run["uncond_denoised"], run["third"]
    gamma = optimal_gamma(target, anchor, uncond, WEIGHT)
    record = only(recorder)
    (step,) = record["steps"]
    for name, value in {
        "gamma": gamma,
        "cosine": cosine(x - target, x - uncond),
        "guidance_norm": norm(target - uncond),
        "cond_norm": norm(target),
        "change_norm": norm(blend(target, anchor, gamma) - target),
    }.items():
        assert step[name] == pytest.approx(value.tolist(), rel=1e-3, abs=1e-4), name
    assert (step["index"], step["weight"], step["evaluations"]) == (0, WEIGHT, 3)
    assert step["sigma"] == pytest.approx(0.7)
    assert (record["methods"], record["cfg"], record["evaluations"]) == ([AAPB.title], WEIGHT, 3)
    assert record["parametrisation"] == {"unet": "eps", "flux": "flow"}[kind]


def test_what_a_run_records_step_by_step(model, kind):
    patched, recorder = traced(model, R2F(frequent=ANCHORED, stop=0.5), LimitedInterval(sigma_low=0.4, sigma_high=0.95))
    sample(patched, kind, POSITIVE, NEGATIVE, cfg=WEIGHT)
    steps = only(recorder)["steps"]
    guided = [0.4 < step["sigma"] <= 0.95 for step in steps]
    assert any(guided) and not all(guided)
    assert [step["weight"] for step in steps] == [WEIGHT if inside else 1.0 for inside in guided]
    assert [step["evaluations"] for step in steps] == [2 if inside else 1 for inside in guided]
    assert [step["frequent"] for step in steps] == [1.0, 0.0, 0.0, 0.0]
    assert ["cosine" in step for step in steps] == guided
    assert only(recorder)["evaluations"] == 4 + sum(guided)


def test_runs_by_sampler_node(model, kind):
    patched, recorder = traced(model, FixedBlend(anchor=ANCHORED))

    def at(node: str, steps: int) -> None:
        with CurrentNodeContext("prompt", node):
            sample(patched, kind, POSITIVE, NEGATIVE, steps=steps)

    at("3", 2)
    at("5", 3)
    at("3", 4)
    assert {node: len(run["steps"]) for node, run in recorder.runs.items()} == {"3": 4, "5": 3}


def test_every_run_of_a_list_is_kept(model, kind):
    """The host runs a node once for each input of a list; a shorter list later leaves nothing of the longer."""
    patched, recorder = traced(model, FixedBlend(anchor=ANCHORED))

    def queued(*steps: int) -> None:
        for place, count in enumerate(steps):
            with CurrentNodeContext("prompt", "3", place):
                sample(patched, kind, POSITIVE, NEGATIVE, steps=count)

    queued(2, 3, 4)
    assert {key: len(run["steps"]) for key, run in recorder.runs.items()} == {"3": 2, "3#1": 3, "3#2": 4}
    assert [len(run["steps"]) for run in recorded(recorder, {"3": {"inputs": {}}}).values()] == [2, 3, 4]
    queued(5, 2)
    with CurrentNodeContext("prompt", "3", 1):
        sample(patched, kind, POSITIVE, NEGATIVE, sigmas=torch.tensor([0.5]))  # no steps: nothing to show
    assert {key: len(run["steps"]) for key, run in recorder.runs.items()} == {"3": 5}


def test_a_failed_run_leaves_the_last_record(model, kind):
    patched, recorder = traced(model, AAPB(anchor=ANCHORED))
    sample(patched, kind, POSITIVE, NEGATIVE)
    record = only(recorder)
    with pytest.raises(ValueError):
        sample(patched, kind, POSITIVE, NEGATIVE, cfg=1.0)
    assert only(recorder) is record


def test_the_node_records_wherever_it_stands(model, kind):
    before, recorder = RudderTrace.execute(model).args
    before = add_guidance(before, AAPB(anchor=ANCHORED))
    after, other = traced(model, AAPB(anchor=ANCHORED))
    assert torch.equal(sample(before, kind, POSITIVE, NEGATIVE), sample(after, kind, POSITIVE, NEGATIVE))
    assert only(recorder) == only(other)
    assert other.runs is not recorder.runs

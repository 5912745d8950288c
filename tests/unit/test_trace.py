"""What is kept of a run, and how it is read."""

from __future__ import annotations

import json

import pytest
import torch

from rudder.guidance.contract import Guidance, overrides
from rudder.guidance.trace import QUANTITIES, Recorder, Trace, labelled, plain, series

HOOKS = ("prompts", "check", "scale", "sources", "branches", "refine", "direction", "term", "finish")


def run(*methods: str, cfg: float = 7.0, steps: list[dict] | None = None) -> dict:
    return {"methods": list(methods), "cfg": cfg, "steps": steps or []}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (0.5, 0.5),
        (3, 3),
        (torch.tensor([0.25, 0.5]), [0.25, 0.5]),
        (torch.tensor(2.0), 2.0),
        (torch.tensor([1, 2]), [1, 2]),
        (torch.tensor([0.5], dtype=torch.float16, requires_grad=True), [0.5]),
    ],
)
def test_plain_is_what_json_holds(given, kept):
    assert plain(given) == kept
    assert json.loads(json.dumps(plain(given))) == kept


def test_runs_are_labelled_by_what_they_did():
    runs = [run(), run("AAPB"), run("R2F", "Interval"), run(cfg=1.5)]
    assert list(labelled(runs)) == ["CFG 7", "AAPB", "R2F + Interval", "CFG 1.5"]
    assert list(labelled(runs).values()) == runs
    assert labelled([]) == {}


def test_twins_get_numbers():
    runs = [run("AAPB"), run("AAPB"), run(), run("AAPB"), run()]
    assert list(labelled(runs)) == ["AAPB", "AAPB #2", "CFG 7", "AAPB #3", "CFG 7 #2"]
    assert len(labelled([run("AAPB #2"), run("AAPB"), run("AAPB")])) == 3  # no run is ever lost to a label


def test_names_go_before_what_a_run_did():
    runs = [run("AAPB"), run(), run()]
    assert list(labelled(runs, ["", "mine"])) == ["AAPB", "mine", "CFG 7"]
    assert list(labelled(runs, ["mine", "mine"])) == ["mine", "mine #2", "CFG 7"]


def test_series_are_batch_means_of_the_steps_that_have_them():
    steps = [
        {"index": 0, "gamma": [0.25, 0.75], "weight": 7},
        {"index": 1, "weight": 1.0},
        {"index": 2, "gamma": 0.5, "weight": 7},
    ]
    assert series(run(steps=steps), "gamma") == [(0, 0.5), (2, 0.5)]
    assert series(run(steps=steps), "weight") == [(0, 7.0), (1, 1.0), (2, 7.0)]
    assert series(run(steps=steps), "frequent") == [] and series(run(), "gamma") == []


def test_a_trace_changes_nothing():
    trace = Trace(recorder=Recorder())
    assert not any(overrides(trace, hook) for hook in HOOKS)
    assert not trace.claims and trace.needs_uncond is Guidance.needs_uncond


def test_every_recorder_is_its_own():
    assert Recorder() != Recorder() and Recorder().runs is not Recorder().runs
    assert Trace(recorder=Recorder()) != Trace(recorder=Recorder())


def test_every_quantity_says_what_it_is():
    assert {"gamma", "cosine", "guidance_norm", "weight", "evaluations"} <= set(QUANTITIES)
    assert all(text and not text.endswith(".") for text in QUANTITIES.values())

"""All ordered pairs of methods on both models: one result whatever the wiring, or a refusal that names both."""

from __future__ import annotations

import importlib
import itertools
import pkgutil

import pytest
import torch

import rudder.guidance
from rudder.guidance.contract import Guidance, GuidanceError
from rudder.guidance.trace import Recorder, Trace
from rudder.host import add_guidance

from .models import sample
from .registry import EXCLUSIVE, METHODS, NEED_A_SOURCE, NEGATIVE, POSITIVE, evaluations, fitted

STEPS, WEIGHT = 3, 4.0
PAIRS = list(itertools.combinations(METHODS, 2))
TOGETHER = [pair for pair in PAIRS if set(pair) not in EXCLUSIVE]
ALONE = [pair for pair in itertools.product(METHODS, repeat=2) if set(pair) in EXCLUSIVE]
TWICE = [name for name in METHODS if METHODS[name].method.claims]


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_every_method_is_in_the_registry():
    for module in pkgutil.iter_modules(rudder.guidance.__path__):
        importlib.import_module(f"rudder.guidance.{module.name}")
    ours = {kind for kind in subclasses(Guidance) if kind.__module__.startswith("rudder.guidance.")}
    assert ours - {Guidance, Trace} - NEED_A_SOURCE == {type(entry.method) for entry in METHODS.values()}


def wired(model, *names: str):
    for method in [fitted(name, model) for name in names]:
        model = add_guidance(model, method)
    return model


@pytest.mark.parametrize("pair", TOGETHER, ids=" + ".join)
def test_a_pair_gives_one_result_whatever_the_wiring(model, kind, pair):
    recorder = Recorder()
    traced = add_guidance(wired(model, *pair), Trace(recorder=recorder))
    run = sample(traced, kind, POSITIVE, NEGATIVE, cfg=WEIGHT, steps=STEPS)
    assert run.isfinite().all()
    assert torch.equal(sample(wired(model, *reversed(pair)), kind, POSITIVE, NEGATIVE, cfg=WEIGHT, steps=STEPS), run)
    steps = recorder.runs[""]["steps"]
    assert [s["evaluations"] for s in steps] == evaluations(pair, kind, [s["sigma"] for s in steps])


@pytest.mark.parametrize("pair", ALONE, ids=" + ".join)
def test_a_pair_that_decides_the_same_thing_is_refused(model, pair):
    first, second = (METHODS[name].method for name in pair)
    with pytest.raises(GuidanceError) as error:
        add_guidance(add_guidance(model, first), second)
    assert f"'{first.title}'" in str(error.value) and f"'{second.title}'" in str(error.value)


@pytest.mark.parametrize("name", TWICE)
def test_a_method_twice_is_refused(model, name):
    with pytest.raises(GuidanceError, match="both decide"):
        wired(model, name, name)

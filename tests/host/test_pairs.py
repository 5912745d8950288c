"""All ordered pairs of methods on both models, in half of the ways that triples run in (test_matrix.py): every two of
batch 1 or 3, joint or split, KSampler or custom sampler. One result whatever the wiring, or a refusal that names both.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from dataclasses import replace

import pytest
import torch

import rudder.guidance
from rudder.guidance.contract import Guidance, GuidanceError
from rudder.guidance.trace import Trace
from rudder.host import add_guidance

from .models import latent
from .registry import EXCLUSIVE, METHODS, NEED_A_SOURCE
from .ways import HALF, by_ksampler, every_way, plain, wired  # noqa: F401 (fixture)

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


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_a_window_that_is_none(name):
    for start, end in ((0.6, 0.5), (-0.1, 0.5), (0.5, 1.1)):
        with pytest.raises(GuidanceError, match="start.*end.*must satisfy"):
            replace(METHODS[name].method, start=start, end=end)


@pytest.mark.parametrize("pair", TOGETHER, ids=" + ".join)
def test_a_pair_gives_one_result_whatever_the_wiring(model, kind, plain, pair, monkeypatch):  # noqa: F811
    run = every_way(model, kind, pair, plain, monkeypatch, HALF)
    assert torch.equal(by_ksampler(wired(model, reversed(pair)), latent(kind, 1)), run)


@pytest.mark.parametrize("pair", ALONE, ids=" + ".join)
def test_a_pair_that_decides_the_same_thing_is_refused(model, pair):
    first, second = (METHODS[name].method for name in pair)
    with pytest.raises(GuidanceError) as error:
        add_guidance(add_guidance(model, first), second)
    assert f"'{first.title}'" in str(error.value) and f"'{second.title}'" in str(error.value)


@pytest.mark.parametrize("name", TWICE)
def test_a_method_twice_is_refused(model, name):
    with pytest.raises(GuidanceError, match="both decide"):
        wired(model, (name, name))

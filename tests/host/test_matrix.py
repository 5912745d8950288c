"""A sample of triples of methods: both models x batch 1, 3 x joint, split evaluation x KSampler, custom sampler.

Finite, the same at every repetition and from both sampler nodes, evaluated as predicted, and the base model is as it
was. All pairs are in test_pairs.py; what users read of both is COMPOSITION.md.
"""

from __future__ import annotations

import itertools
import random

import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

import nodes as host_nodes
from rudder.guidance.trace import Recorder, Trace
from rudder.host import add_guidance, plan_of

from .models import calls, latent
from .registry import METHODS, NEGATIVE, POSITIVE, evaluations, fitted

STEPS, WEIGHT, SEED = 3, 4.0, 11
BATCHES = (1, 3)


def together(*names: str) -> bool:
    """Whether no role is claimed twice: what COMPOSITION.md says of every pair of them."""
    roles = [role for name in names for role in METHODS[name].method.claims]
    return len(set(roles)) == len(roles)


def sampled(seed: int = 0) -> list[tuple[str, ...]]:
    """Triples in random wiring, so that every method of the registry is in at least two of them."""
    dice = random.Random(seed)
    every = [triple for triple in itertools.combinations(METHODS, 3) if together(*triple)]
    dice.shuffle(every)
    found, seen = [], dict.fromkeys(METHODS, 0)
    while min(seen.values()) < 2:
        triple = max(every, key=lambda names: sum(seen[name] < 2 for name in names))  # the first of the best
        every.remove(triple)
        found.append(tuple(dice.sample(triple, 3)))
        seen.update({name: seen[name] + 1 for name in triple})
    return found


TRIPLES = sampled()


def by_ksampler(model, image: torch.Tensor) -> torch.Tensor:
    prompts = (POSITIVE, NEGATIVE, {"samples": image})
    return host_nodes.KSampler().sample(model, SEED, STEPS, WEIGHT, "euler", "normal", *prompts)[0]["samples"]


def by_custom_sampler(model, image: torch.Tensor) -> torch.Tensor:
    guider = custom.CFGGuider.execute(model, POSITIVE, NEGATIVE, WEIGHT).args[0]
    noise = custom.RandomNoise.execute(SEED).args[0]
    solver = custom.KSamplerSelect.execute("euler").args[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", STEPS, 1.0).args[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, solver, sigmas, {"samples": image}).args[0]["samples"]


@pytest.fixture(scope="module")
def plain(model, kind) -> dict[int, torch.Tensor]:
    """What the base model makes of each batch size before any method has met it."""
    return {batch: by_ksampler(model, latent(kind, batch)) for batch in BATCHES}


@pytest.mark.parametrize("names", TRIPLES, ids=" + ".join)
def test_a_triple(model, kind, plain, names, monkeypatch):
    methods = [fitted(name, model) for name in names]
    for batch, split, sampler in itertools.product(BATCHES, (False, True), (by_ksampler, by_custom_sampler)):
        recorder, (patched, seen) = Recorder(), calls(model)
        for method in (*methods, Trace(recorder=recorder)):
            patched = add_guidance(patched, method)
        with monkeypatch.context() as patch:
            if split:  # as the host does when memory is short: one forward for each cond
                patch.setattr(model.model, "memory_required", lambda *a, **k: 1e30)
            if split and "NAG" in names and kind == "flux":  # its rows must share a forward: said, not silent
                with pytest.raises(ValueError, match="different forward passes"):
                    sampler(patched, latent(kind, batch))
                continue
            run = sampler(patched, latent(kind, batch))
        assert run.isfinite().all() and not torch.equal(run, plain[batch])
        steps = recorder.runs[""]["steps"]
        assert [step["evaluations"] for step in steps] == evaluations(names, kind, [step["sigma"] for step in steps])
        assert set(seen["network"]) == {batch} if split else max(seen["network"]) >= batch
        if sampler is by_ksampler:
            first = run
        else:
            assert torch.equal(run, first), "a repetition, by the other sampler node"
    assert plan_of(model.model_options) == ()
    assert torch.equal(by_ksampler(model, latent(kind, batch)), plain[batch])


def test_every_method_is_in_the_sample():
    assert {name for triple in TRIPLES for name in triple} == set(METHODS)

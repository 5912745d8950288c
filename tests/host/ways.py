"""One combination of methods, run every way in which users run it: both batch sizes, joint and split, both samplers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

import nodes as host_nodes
from rudder.guidance.trace import Recorder, Trace
from rudder.host import add_guidance, plan_of

from .models import calls, latent
from .registry import NEGATIVE, POSITIVE, evaluations, fitted

STEPS, WEIGHT, SEED = 3, 4.0, 11
BATCHES = (1, 3)

def by_ksampler(model, image: torch.Tensor) -> torch.Tensor:
    prompts = (POSITIVE, NEGATIVE, {"samples": image})
    return host_nodes.KSampler().sample(model, SEED, STEPS, WEIGHT, "euler", "normal", *prompts)[0]["samples"]


def by_custom_sampler(model, image: torch.Tensor) -> torch.Tensor:
    guider = custom.CFGGuider.execute(model, POSITIVE, NEGATIVE, WEIGHT).args[0]
    noise = custom.RandomNoise.execute(SEED).args[0]
    solver = custom.KSamplerSelect.execute("euler").args[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", STEPS, 1.0).args[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, solver, sigmas, {"samples": image}).args[0]["samples"]


#: (batch, split, sampler): all, and the half in which every two of the three choices still meet.
ALL = list(itertools.product(BATCHES, (False, True), (by_ksampler, by_custom_sampler)))
HALF = [way for way in ALL if ((way[0] == 3) + way[1] + (way[2] is by_custom_sampler)) % 2 == 0]


def wired(model, names: Iterable[str]):
    for method in [fitted(name, model) for name in names]:
        model = add_guidance(model, method)
    return model


def every_way(
    model, kind: str, names: tuple[str, ...], plain: dict[int, torch.Tensor], monkeypatch, ways: list = ALL
) -> torch.Tensor:
    """Finite, evaluated as predicted, the same at every repetition and from both sampler nodes, and the base model is
    as it was. Returns what KSampler makes of a single picture. ``plain``: what it makes without a method, by batch."""
    results = {}
    for batch, split, sampler in ways:
        recorder, (patched, seen) = Recorder(), calls(model)
        patched = add_guidance(wired(patched, names), Trace(recorder=recorder))
        with monkeypatch.context() as patch:
            if split:  # as the host does when memory is short: one forward for each cond
                patch.setattr(model.model, "memory_required", lambda *a, **k: 1e30)
            run = sampler(patched, latent(kind, batch))
        assert run.isfinite().all() and not torch.equal(run, plain[batch])
        steps = recorder.runs[""]["steps"]
        assert [step["evaluations"] for step in steps] == evaluations(names, kind, [step["sigma"] for step in steps])
        assert set(seen["network"]) == {batch} if split else max(seen["network"]) >= batch
        first = results.setdefault((batch, split), run)
        assert torch.equal(run, first), "a repetition, by the other sampler node"
    assert plan_of(model.model_options) == ()
    assert torch.equal(by_ksampler(model, latent(kind, batch)), plain[batch])
    return results[1, False]


@pytest.fixture(scope="module")
def plain(model, kind) -> dict[int, torch.Tensor]:
    """What the base model makes of each batch size before any method has met it."""
    return {batch: by_ksampler(model, latent(kind, batch)) for batch in BATCHES}

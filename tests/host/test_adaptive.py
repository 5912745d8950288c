"""Adaptive Guidance in batches: a picture that guidance has left is what a run of its own gives, whatever else acts.

The registry's threshold of -1 lets all pictures switch at once; here they switch at different steps.
"""

from __future__ import annotations

from itertools import accumulate

import comfy.sample
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

from rudder.guidance import adaptive
from rudder.guidance.adaptive import AdaptiveGuidance
from rudder.guidance.contrast import PerturbedAttention
from rudder.guidance.space import norm
from rudder.guidance.trace import Recorder, Trace
from rudder.host import add_guidance
from rudder.host.samplers import cfg_pp
from rudder.inversion.cfg_pp import CFGPP

from .models import latent, sample
from .registry import EXCLUSIVE, METHODS, NEGATIVE, POSITIVE, fitted

STEPS, WEIGHT = 7, 4.0
OTHERS = [name for name in METHODS if name != "adaptive" and {name, "adaptive"} not in EXCLUSIVE]
TOGETHER = [(), *((name,) for name in OTHERS), ("APG", "PAG"), ("AAPB", "extra negative", "SAG"), ("LinearAG", "C-TAG")]


def by_name(model, kind: str, noise: torch.Tensor, sampler: str) -> torch.Tensor:
    return sample(model, kind, POSITIVE, NEGATIVE, cfg=WEIGHT, batch=len(noise), noise=noise, steps=STEPS,
                  sampler=sampler)


def by_our_cfg_pp(model, kind: str, noise: torch.Tensor, solver: str) -> torch.Tensor:
    sigmas = custom.BasicScheduler.execute(model, "normal", STEPS, 1.0).args[0]
    return comfy.sample.sample_custom(model, noise, WEIGHT, cfg_pp(CFGPP(solver=solver)), sigmas, POSITIVE, NEGATIVE,
                                      latent(kind, len(noise)), disable_pbar=True, seed=7)  # fmt: skip


def traced(model, kind: str, methods: list, gamma: float, noise: torch.Tensor, run, sampler: str):
    recorder = Recorder()
    for method in (*methods, AdaptiveGuidance(gamma=gamma), Trace(recorder=recorder)):
        model = add_guidance(model, method)
    return run(model, kind, noise, sampler), recorder.runs[""]["steps"]


@pytest.fixture
def seen(monkeypatch) -> list[list[float]]:
    """What is compared with the threshold, step by step. In place of the cosine, which for the UNet with its random
    weights is 1 but for rounding, it is minus the relative distance of the two predictions."""
    values: list[list[float]] = []

    def nearness(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        value = -norm(a - b) / norm(b)
        values.append(value.tolist())
        return value

    monkeypatch.setattr(adaptive, "cosine", nearness)
    return values


def between(course: list[list[float]]) -> float:
    """A threshold that one of two pictures reaches before the other, from a run in which none does."""
    highest = zip(*(accumulate(values, max) for values in zip(*course[:-1])))
    return sum(max(highest, key=lambda pair: abs(pair[0] / pair[1] - 1))) / 2


def check(seen: list, model, kind: str, methods: list, run=by_name, sampler: str = "euler") -> None:
    noise = comfy.sample.prepare_noise(latent(kind, 2), 7)
    never = traced(model, kind, methods, 1.0, noise, run, sampler)[1]
    gamma = between(seen)
    batch, steps = traced(model, kind, methods, gamma, noise, run, sampler)
    assert any(isinstance(rows := step.get("switched"), list) and sum(rows) == 1 for step in steps)
    before = [step["evaluations"] for step in steps if not sum(torch.tensor(step["switched"]).reshape(-1))]
    assert before == [step["evaluations"] for step in never[: len(before)]], "it costs nothing until one has switched"
    for i in range(2):
        single, _ = traced(model, kind, methods, gamma, noise[i : i + 1], run, sampler)
        torch.testing.assert_close(batch[i : i + 1], single, rtol=0, atol=1e-3 * float(single.abs().max()))


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: " + ".join(names) or "alone")
def test_a_picture_that_has_switched_is_what_its_own_run_gives(seen, model, kind, names):
    check(seen, model, kind, [fitted(name, model) for name in names])


@pytest.mark.parametrize(
    ("run", "sampler"),
    [(by_name, "euler_cfg_pp"), (by_name, "dpmpp_2m"), (by_our_cfg_pp, "euler"), (by_our_cfg_pp, "dpm++ 2m")],
)
def test_also_in_samplers_that_use_the_negative_or_remember(seen, model, kind, run, sampler):
    check(seen, model, kind, [PerturbedAttention(strength=1.0, blocks="middle, double")], run, sampler)

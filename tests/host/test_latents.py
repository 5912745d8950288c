"""Whole runs against guidance by hand: inpainting, image to image, v-prediction, video, several solvers."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from rudder.guidance.aapb import AAPB, optimal_gamma
from rudder.guidance.blend import FixedBlend, blend
from rudder.guidance.cfg import CFG, cfg
from rudder.guidance.contract import Guidance, Prompt, Step
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.r2f import R2F
from rudder.guidance.space import Parametrisation
from rudder.host import add_guidance

from .models import MODELS, conditioning, latent, sample, sample_by_hand, tiny_unet, tiny_wan

POSITIVE, NEGATIVE, ANCHOR = conditioning(1), conditioning(2), conditioning(3)
CONDITIONINGS = {"positive": POSITIVE, "negative": NEGATIVE, "anchor": ANCHOR}
ANCHORED = Prompt(ANCHOR, "anchor")
WEIGHT = 4.0


def by_cfg(predict, sigma, weight=WEIGHT, positive="positive"):
    uncond = predict("negative")
    return cfg(predict(positive), uncond, weight)


def by_aapb(predict, sigma):
    target, anchor, uncond = predict("positive"), predict("anchor"), predict("negative")
    return cfg(blend(target, anchor, optimal_gamma(target, anchor, uncond, WEIGHT)), uncond, WEIGHT)


def by_blend(predict, sigma):
    return cfg(blend(predict("positive"), predict("anchor"), 0.4), predict("negative"), WEIGHT)


def by_interval(predict, sigma):
    return by_cfg(predict, sigma) if 0.4 < sigma <= 0.95 else predict("positive")


def by_alternation():
    seen = []  # the sigmas of the run so far: R2F's first half of 4 steps is the frequent prompt, then the rare one

    def combine(predict, sigma):
        seen.append(sigma)
        return by_cfg(predict, sigma, positive="anchor" if len(seen) == 1 else "positive")

    return combine


def check(run: torch.Tensor, oracle: torch.Tensor, without: torch.Tensor) -> None:
    """The run is the oracle's, up to an error that is small against what the method does at all."""
    error, effect = (run - oracle).abs().max(), (run - without).abs().max()
    assert error < 0.03 * effect, (error, effect)


METHODS = {
    "AAPB": (AAPB(anchor=ANCHORED), lambda: by_aapb),
    "FixedBlend": (FixedBlend(anchor=ANCHORED, gamma=0.4), lambda: by_blend),
    "LimitedInterval": (LimitedInterval(sigma_low=0.4, sigma_high=0.95), lambda: by_interval),
    "R2F": (R2F(frequent=ANCHORED, stop=0.5), by_alternation),
    "CFG": (CFG(weight=2.0), lambda: lambda predict, sigma: by_cfg(predict, sigma, 2.0)),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_equals_guidance_by_hand(model, kind, method):
    ours, oracle = METHODS[method]
    run = sample(add_guidance(model, ours), kind, POSITIVE, NEGATIVE, cfg=WEIGHT)
    without = sample(model, kind, POSITIVE, NEGATIVE, cfg=WEIGHT)
    check(run, sample_by_hand(model, kind, CONDITIONINGS, oracle()), without)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_solvers(model, kind, sampler):
    guided = add_guidance(model, AAPB(anchor=ANCHORED))
    run, without = (sample(m, kind, POSITIVE, NEGATIVE, cfg=WEIGHT, sampler=sampler) for m in (guided, model))
    check(run, sample_by_hand(model, kind, CONDITIONINGS, by_aapb, sampler=sampler), without)


@pytest.mark.parametrize("denoise", [1.0, 0.5])
@pytest.mark.parametrize("masked", [False, True], ids=["", "inpaint"])
def test_image_to_image_and_inpainting(model, kind, denoise, masked):
    image = torch.randn(latent(kind, 2).shape, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1.0
    options = {"image": image, "denoise": denoise, "noise_mask": mask if masked else None}
    guided, neutral = add_guidance(model, AAPB(anchor=ANCHORED)), add_guidance(model, Guidance())
    run, without, idle = (sample(m, kind, POSITIVE, NEGATIVE, **options) for m in (guided, model, neutral))
    check(run, sample_by_hand(model, kind, CONDITIONINGS, by_aapb, **options), without)
    assert torch.equal(idle, without)
    if masked:
        torch.testing.assert_close(run[..., 4:], image[..., 4:])


@dataclass(frozen=True, kw_only=True)
class Watch(Guidance):
    steps: list = field(default_factory=list)

    def refine(self, step: Step, preds):
        self.steps.append(step)
        return preds


def v_prediction():
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    return ModelSamplingDiscrete().patch(tiny_unet(), "v_prediction", False)[0]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (tiny_unet, Parametrisation.EPS),
        (v_prediction, Parametrisation.V),
        (MODELS["flux"], Parametrisation.FLOW),
        (tiny_wan, Parametrisation.FLOW),
    ],
)
def test_parametrisations(make, expected):
    model, kind, watch = make(), "unet" if expected is not Parametrisation.FLOW else "flux", Watch()
    image = latent(kind) if make is not tiny_wan else torch.zeros(2, 16, 2, 8, 8)
    guided = add_guidance(add_guidance(model, AAPB(anchor=ANCHORED)), watch)
    run, without = (sample(m, kind, POSITIVE, NEGATIVE, image=image) for m in (guided, model))
    check(run, sample_by_hand(model, kind, CONDITIONINGS, by_aapb, image=image), without)
    assert {step.parametrisation for step in watch.steps} == {expected}
    assert run.shape == image.shape and run.isfinite().all()


def test_what_a_step_knows(model, kind):
    watch = Watch()
    sample(add_guidance(model, watch), kind, POSITIVE, NEGATIVE, steps=4)
    assert [step.index for step in watch.steps] == [0, 1, 2, 3]
    assert [step.progress for step in watch.steps] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    sigmas = [step.level for step in watch.steps]
    assert sigmas == sorted(sigmas, reverse=True)
    assert [step.sigma_next for step in watch.steps] == pytest.approx([*sigmas[1:], 0.0])
    assert torch.equal(watch.steps[0].sigmas, torch.tensor([*sigmas, 0.0]))
    assert all(step.sigma.tolist() == [step.level] and step.x.shape == latent(kind).shape for step in watch.steps)


def test_inner_evaluations_of_a_solver_belong_to_the_interval_they_fall_in(model, kind):
    watch = Watch()
    sample(add_guidance(model, watch), kind, POSITIVE, NEGATIVE, steps=3, sampler="heun")
    assert [step.index for step in watch.steps] == [0, 1, 1, 2, 2]

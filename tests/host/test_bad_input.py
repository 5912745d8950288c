"""Bad input: each gives a message that names the input and the way out, and the MODEL runs clean afterwards."""

from __future__ import annotations

import logging

import comfy.patcher_extension
import pytest
import torch
from comfy_extras.nodes_easycache import LazyCacheNode

from nodes import ConditioningZeroOut
from rudder.guidance.aapb import AAPB
from rudder.guidance.beta_cfg import BetaCFG
from rudder.guidance.blend import FixedBlend
from rudder.guidance.cfg import CFG
from rudder.guidance.cfg_zero import CFGZero
from rudder.guidance.contract import GuidanceError, Prompt
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.r2f import R2F
from rudder.host import add_guidance

from .models import CONTEXT, MODELS, POOLED, conditioning, having, latent, lora, sample

POSITIVE, NEGATIVE, ANCHOR = conditioning(1), conditioning(2), conditioning(3)


def anchored(conditioning, method=AAPB, **options):
    return method(anchor=Prompt(conditioning, "anchor"), **options)


def frequent(conditioning, **options):
    return R2F(frequent=Prompt(conditioning, "frequent"), **options)


def wide(extra_features: int = 0, extra_pooled: int = 0) -> list:
    return [[torch.randn(1, 7, CONTEXT + extra_features), {"pooled_output": torch.randn(1, POOLED + extra_pooled)}]]


def copied(prompt: list) -> list:
    return [[features.clone(), {"pooled_output": settings["pooled_output"].clone()}] for features, settings in prompt]


def without_pooled(prompt: list) -> list:
    return [[features, {}] for features, _ in prompt]


def with_hooks(prompt: list) -> list:
    import comfy.hooks

    return having(prompt, hooks=comfy.hooks.create_hook_lora(lora(MODELS["unet"](), 1), 1.0, 0.0))


HOOKED = with_hooks(POSITIVE)
WIRED = {
    "another encoder": (lambda: anchored(wide(8)), {}, ["anchor", "40", "32", "text encoders", "CLIP"]),
    "another pooled encoder": (lambda: anchored(wide(0, 8)), {}, ["anchor", "24 pooled", "16", "CLIP"]),
    "another encoder, R2F": (lambda: frequent(wide(8)), {}, ["frequent", "40", "32", "CLIP"]),
    "another encoder, R2F blend": (lambda: frequent(wide(8), mode="blend"), {}, ["frequent", "40", "32", "CLIP"]),
    "no pooled vector": (
        lambda: anchored(without_pooled(ANCHOR)),
        {},
        ["anchor", "no pooled features", "same text encode"],
    ),
    "lengths that cannot mix": (
        lambda: frequent(conditioning(3, 14), mode="blend"),
        {},
        ["frequent", "14", "7", "alternate"],
    ),
    "empty list": (lambda: anchored([]), {}, ["anchor", "empty list", "text encode"]),
    "empty list, R2F": (lambda: frequent([]), {}, ["frequent", "empty list", "text encode"]),
    "anchor is the positive": (
        lambda: anchored(copied(POSITIVE)),
        {},
        ["anchor", "identical to the positive", "different"],
    ),
    "blend with the positive": (lambda: anchored(POSITIVE, FixedBlend), {}, ["anchor", "identical to the positive"]),
    "frequent is the positive": (lambda: frequent(copied(POSITIVE)), {}, ["frequent", "identical to the positive"]),
    "hooked anchor is the positive": (
        lambda: anchored(HOOKED),
        {"positive": HOOKED},
        ["anchor", "identical to the positive"],
    ),
    "anchor is the negative": (
        lambda: anchored(copied(NEGATIVE)),
        {},
        ["anchor", "identical to the negative", "anchor prompt"],
    ),
    "anchor is zeroed out": (
        lambda: anchored(ConditioningZeroOut().zero_out(ANCHOR)[0]),
        {},
        ["anchor", "empty (all zeros)"],
    ),
    "AAPB at cfg 1": (lambda: anchored(ANCHOR), {"cfg": 1.0}, ["(AAPB)", "cfg is 1", "above 1", "R2F", "fixed"]),
    "AAPB where cfg is set to 1": (lambda: (anchored(ANCHOR), CFG(weight=1.0)), {}, ["(AAPB)", "cfg"]),
    "interval at cfg 1": (lambda: LimitedInterval(), {"cfg": 1.0}, ["Guidance Interval", "cfg is 1", "Raise cfg"]),
    "window without a step": (
        lambda: anchored(ANCHOR, start=0.9999, end=0.9999),
        {},
        ["(AAPB)", "none of the 4 steps", "Widen"],
    ),
}


@pytest.mark.parametrize("case", WIRED)
def test_refused_when_sampling_starts(model, kind, case):
    make, options, words = WIRED[case]
    options = {"positive": POSITIVE, "negative": NEGATIVE, **options}
    reference = sample(model, kind, POSITIVE, NEGATIVE)
    patched = model
    methods = make()
    for method in methods if isinstance(methods, tuple) else (methods,):
        patched = add_guidance(patched, method)
    with pytest.raises(GuidanceError) as error:
        sample(patched, kind, **options)
    assert all(word in str(error.value) for word in words), error.value
    assert torch.equal(sample(model, kind, POSITIVE, NEGATIVE), reference)


SHAPING = {"AAPB": lambda: anchored(ANCHOR), "interval": lambda: LimitedInterval(last=0.9), "beta-CFG": BetaCFG,
           "CFG-Zero*": CFGZero}


@pytest.mark.parametrize("method", SHAPING)
def test_guidance_that_another_node_may_set_is_not_refused(model, kind, method, caplog):
    """ComfyUI's CFG Override raises the weight when the step comes; where it does not, the run says so."""
    def overriding(weight: float):
        def wrapper(executor, *args):
            guider = executor.class_obj
            own, guider.cfg = guider.cfg, weight
            try:
                return executor(*args)
            finally:
                guider.cfg = own

        out = model.clone()
        out.add_wrapper(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, wrapper)
        return add_guidance(out, SHAPING[method]())

    with caplog.at_level(logging.WARNING, "rudder"):
        run = sample(overriding(4.0), kind, POSITIVE, NEGATIVE, cfg=1.0)
        assert "cfg was 1" not in caplog.text
        assert torch.equal(run, sample(overriding(4.0), kind, POSITIVE, NEGATIVE, cfg=4.0))
        sample(overriding(1.0), kind, POSITIVE, NEGATIVE, cfg=1.0)
    assert "cfg was 1 at every step of this run" in caplog.text


@pytest.mark.parametrize("method", SHAPING)
def test_a_step_cache_sets_no_guidance(model, kind, method):
    cached = LazyCacheNode.execute(model, 3.0, 0.0, 1.0, False).args[0]
    with pytest.raises(GuidanceError, match="cfg"):
        sample(add_guidance(cached, SHAPING[method]()), kind, POSITIVE, NEGATIVE, cfg=1.0)


NAN = torch.full((1, 1, 8, 8), float("nan"))
INPUTS = {
    "NaN in the latent": ({"image": NAN}, ["latent_image", "NaN", "VAE Encode", "--fp32-vae"]),
    "infinite latent": ({"image": NAN.nan_to_num(float("inf"))}, ["latent_image", "infinite"]),
    "NaN in the noise": ({"noise": NAN}, ["noise", "NaN"]),
}


@pytest.mark.parametrize("case", INPUTS)
def test_bad_tensors(model, kind, case):
    options, words = INPUTS[case]
    options = {name: t.expand(latent(kind).shape).clone() for name, t in options.items()}
    patched = add_guidance(model, anchored(ANCHOR))
    reference = sample(patched, kind, POSITIVE, NEGATIVE)
    with pytest.raises(GuidanceError) as error:
        sample(patched, kind, POSITIVE, NEGATIVE, **options)
    assert all(word in str(error.value) for word in words), error.value
    assert torch.equal(sample(patched, kind, POSITIVE, NEGATIVE), reference)


@pytest.mark.parametrize("sigmas", [[], [0.5]])
def test_a_sampler_without_steps_does_what_the_host_does(model, kind, sigmas):
    """What SplitSigmasDenoise leaves to one of two samplers when the other takes all."""
    options = {"sigmas": torch.tensor(sigmas), "image": torch.ones_like(latent(kind))}
    run = sample(add_guidance(model, anchored(ANCHOR)), kind, POSITIVE, NEGATIVE, **options)
    assert torch.equal(run, sample(model, kind, POSITIVE, NEGATIVE, **options))


VALUES = {
    "gamma above 1": (lambda: anchored(ANCHOR, FixedBlend, gamma=1.5), ["gamma is 1.5", "[0, 1]"]),
    "gamma below 0": (lambda: anchored(ANCHOR, FixedBlend, gamma=-0.1), ["gamma is -0.1", "[0, 1]"]),
    "gamma not a number": (lambda: anchored(ANCHOR, FixedBlend, gamma=float("nan")), ["gamma is nan", "[0, 1]"]),
    "window the wrong way": (
        lambda: anchored(ANCHOR, start=0.7, end=0.3),
        ["(AAPB)", "start 0.7", "end 0.3", "start <= end"],
    ),
    "stop above 1": (lambda: frequent(ANCHOR, stop=2.0), ["stop is 2", "[0, 1]"]),
    "no such mode": (lambda: frequent(ANCHOR, mode="mix"), ["mode is 'mix'", "alternate", "blend"]),
    "interval the wrong way": (lambda: LimitedInterval(sigma_low=2.0, sigma_high=1.0), ["sigma_low 2", "sigma_high 1"]),
    "infinite weight": (lambda: CFG(weight=float("inf")), ["weight is inf", "finite"]),
}


@pytest.mark.parametrize("case", VALUES)
def test_bad_values_are_refused_by_the_node(case):
    make, words = VALUES[case]
    with pytest.raises(GuidanceError) as error:
        make()
    assert all(word in str(error.value) for word in words), error.value


PAIRS = {
    "AAPB twice": (lambda: anchored(ANCHOR), lambda: anchored(conditioning(4))),
    "AAPB and the fixed blend": (lambda: anchored(ANCHOR), lambda: anchored(ANCHOR, FixedBlend)),
    "R2F twice": (lambda: frequent(ANCHOR), lambda: frequent(conditioning(4))),
    "CFG twice": (lambda: CFG(weight=2.0), lambda: CFG(weight=3.0)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_two_methods_of_one_role_are_refused_when_wired(model, kind, case):
    first, second = (make() for make in PAIRS[case])
    patched = add_guidance(model, first)
    reference = sample(patched, kind, POSITIVE, NEGATIVE)
    with pytest.raises(GuidanceError) as error:
        add_guidance(patched, second)
    assert all(word in str(error.value) for word in (first.title, second.title, "own sampler")), error.value
    assert torch.equal(sample(patched, kind, POSITIVE, NEGATIVE), reference)

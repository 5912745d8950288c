"""The samplers of the host: the same picture from each, guiders that Rudder can serve, guiders that it must refuse."""

from __future__ import annotations

import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_perpneg as perpneg
import pytest
import torch

import nodes as host_nodes
from rudder.guidance.contract import Guidance, GuidanceError, Prompt
from rudder.guidance.r2f import R2F
from rudder.host import add_guidance
from rudder.nodes.guidance import RudderAAPB, RudderCFG, RudderFixedBlend, RudderLimitedInterval, RudderR2F

from .models import conditioning, latent, sample

POSITIVE, NEGATIVE, ANCHOR = conditioning(1), conditioning(2), conditioning(3)
STEPS, SEED, WEIGHT = 4, 11, 4.0
METHODS = {
    "AAPB": lambda model: RudderAAPB.execute(model, ANCHOR, "adaptive", 0.4, 0.0, 1.0),
    "AAPB unclamped": lambda model: RudderAAPB.execute(model, ANCHOR, "adaptive unclamped", 0.4, 0.0, 1.0),
    "AAPB fixed": lambda model: RudderAAPB.execute(model, ANCHOR, "fixed", 0.4, 0.0, 1.0),
    "FixedBlend": lambda model: RudderFixedBlend.execute(model, ANCHOR, 0.4, 0.0, 0.6),
    "R2F alternate": lambda model: RudderR2F.execute(model, ANCHOR, "alternate", 4, "SD3", 0.0, 0.3),
    "R2F blend": lambda model: RudderR2F.execute(model, ANCHOR, "blend", 4, "SD3", 0.0, 0.3),
    "LimitedInterval": lambda model: RudderLimitedInterval.execute(model, 0.4, 0.95, 0.0, 1.0),
    "CFG": lambda model: RudderCFG.execute(model, 2.0, 0.0, 0.6),
}


def patched(model, method: str):
    return METHODS[method](model).args[0]


def by_ksampler(model, kind, cfg=WEIGHT):
    image = {"samples": latent(kind)}
    return host_nodes.KSampler().sample(model, SEED, STEPS, cfg, "euler", "normal", POSITIVE, NEGATIVE, image)[0][
        "samples"
    ]


def by_ksampler_advanced(model, kind, cfg=WEIGHT):
    image = {"samples": latent(kind)}
    return host_nodes.KSamplerAdvanced().sample(
        model, "enable", SEED, STEPS, cfg, "euler", "normal", POSITIVE, NEGATIVE, image, 0, 10000, "disable"
    )[0]["samples"]


def by_guider(model, kind, guider):
    noise = custom.RandomNoise.execute(SEED).args[0]
    sampler = custom.KSamplerSelect.execute("euler").args[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", STEPS, 1.0).args[0]
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, {"samples": latent(kind)}).args[0][
        "samples"
    ]


@pytest.mark.parametrize("method", METHODS)
def test_every_sampler_node_gives_the_same_latent(model, kind, method):
    guided = patched(model, method)
    reference = by_ksampler(guided, kind)
    assert torch.equal(by_ksampler_advanced(guided, kind), reference)
    guider = custom.CFGGuider.execute(guided, POSITIVE, NEGATIVE, WEIGHT).args[0]
    assert torch.equal(by_guider(guided, kind, guider), reference)
    assert torch.equal(by_guider(guided, kind, guider), reference), "the same guider again"
    assert not torch.equal(by_ksampler(model, kind), reference), "the method acts"


@pytest.mark.parametrize("method", ["AAPB fixed", "FixedBlend", "R2F alternate", "R2F blend"])
def test_basic_guider_is_cfg_1(model, kind, method):
    guided = patched(model, method)
    guider = custom.BasicGuider.execute(guided, POSITIVE).args[0]
    run = by_guider(guided, kind, guider)
    assert torch.equal(run, by_ksampler(guided, kind, cfg=1.0))
    assert not torch.equal(run, by_ksampler(model, kind, cfg=1.0)), "the method acts"


def test_methods_that_need_a_negative_say_so_on_a_basic_guider(model, kind):
    for method, words in {
        "AAPB": ["Rare Concept Blend (AAPB)", "no negative", "R2F"],
        "CFG": ["weight 2", "CFGGuider"],
    }.items():
        guided = patched(model, method)
        with pytest.raises(GuidanceError) as error:
            by_guider(guided, kind, custom.BasicGuider.execute(guided, POSITIVE).args[0])
        assert all(word in str(error.value) for word in words), error.value


OTHERS = {
    "Guider_DualCFG": lambda model: custom.DualCFGGuider.execute(
        model, POSITIVE, ANCHOR, NEGATIVE, 4.0, 2.0, "regular"
    ),
    "Guider_PerpNeg": lambda model: perpneg.PerpNegGuider.execute(model, POSITIVE, NEGATIVE, ANCHOR, 4.0, 1.0),
}
if hasattr(custom, "DualModelGuider"):  # ComfyUI 0.30.0
    OTHERS["Guider_DualModel"] = lambda model: custom.DualModelGuider.execute(model, POSITIVE, 4.0, model, NEGATIVE)


@pytest.mark.parametrize("name", OTHERS)
def test_guiders_that_combine_by_themselves_are_refused(model, kind, name):
    make = OTHERS[name]
    reference = by_guider(model, kind, make(model).args[0])
    for guided in (patched(model, "AAPB"), add_guidance(model, Guidance())):
        with pytest.raises(GuidanceError) as error:
            by_guider(guided, kind, make(guided).args[0])
        assert all(word in str(error.value) for word in (name, "CFGGuider", "remove")), error.value
    assert torch.equal(by_guider(model, kind, make(model).args[0]), reference), (
        "and the MODEL before it still serves them"
    )


@pytest.mark.parametrize("mode", ["alternate", "blend"])
def test_a_split_run_of_ksampler_advanced(model, kind, mode):
    """Two KSamplerAdvanced nodes share one run of the solver; R2F's share counts the steps of each sampler node."""
    guided = add_guidance(model, R2F(frequent=Prompt(ANCHOR, "frequent"), stop=1.0, mode=mode, amount=0.5))
    plain_tail = {}
    for name, tail in {"guided": guided, "plain": model}.items():
        first = host_nodes.KSamplerAdvanced().sample(
            guided,
            "enable",
            SEED,
            STEPS,
            WEIGHT,
            "euler",
            "normal",
            POSITIVE,
            NEGATIVE,
            {"samples": latent(kind)},
            0,
            2,
            "enable",
        )[0]
        plain_tail[name] = host_nodes.KSamplerAdvanced().sample(
            tail, "disable", SEED, STEPS, WEIGHT, "euler", "normal", POSITIVE, NEGATIVE, first, 2, 10000, "disable"
        )[0]["samples"]
    assert not torch.equal(plain_tail["guided"], plain_tail["plain"])
    assert not torch.equal(plain_tail["plain"], sample(model, kind, POSITIVE, NEGATIVE, seed=SEED))

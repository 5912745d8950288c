"""Every branch is an ordinary conditioning: areas, masks, ranges, ControlNets, LoRA and hooks act on it as ever.

The oracle takes the predictions from ordinary runs without Rudder, one step each, and combines them with the pure
functions. The anchor's is read from a run in which it is a third conditioning of the guider, so it gets what the host
gives to every conditioning (the areas of the others, a ControlNet that applies to all); the other two are read from a
run that knows nothing of the anchor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.controlnet
import comfy.hooks
import comfy.patcher_extension
import comfy.sd
import comfy_extras.nodes_model_advanced as sd3
import pytest
import torch

from rudder.guidance.aapb import AAPB, optimal_gamma
from rudder.guidance.blend import blend
from rudder.guidance.cfg import cfg
from rudder.guidance.cfg_zero import CFGZero
from rudder.guidance.contract import GuidanceError, Mix, Prompt
from rudder.guidance.contrast import PerturbedAttention
from rudder.guidance.instruct import InstructGuidance
from rudder.guidance.negative import ExtraNegative
from rudder.guidance.perpneg import PerpNeg
from rudder.guidance.r2f import R2F
from rudder.host import add_guidance, plan_of
from rudder.host.conds import SHOWN, converted, mixed
from rudder.nodes.guidance import RudderAAPB
from rudder.nodes.guidance_models import RudderInstruct
from rudder.nodes.guidance_more import RudderNegative, RudderPerpNeg
from rudder.nodes.nag import RudderNAG

from .models import calls, conditioning, evaluate, having, latent, lora, sample, tiny_flux, tiny_unet
from .test_branches import editor
from .test_nodes import call

WEIGHT = 4.0
POSITIVE, NEGATIVE, ANCHOR = conditioning(1), conditioning(2), conditioning(3)


def expected(model, kind, prompts: Callable[[], list], **options) -> torch.Tensor:
    """AAPB's x0 from runs without Rudder."""
    pair = evaluate(model, kind, *prompts()[:2], cfg=WEIGHT, **options)
    target, uncond = pair["cond_denoised"], pair["uncond_denoised"]
    anchor = evaluate(model, kind, *prompts(), cfg=WEIGHT, **options)["third"]
    anchor = torch.where((anchor != 0).any(1, keepdim=True), anchor, target)
    return cfg(blend(target, anchor, optimal_gamma(target, anchor, uncond, WEIGHT)), uncond, WEIGHT)


def actual(model, kind, positive, negative, anchor, **options) -> torch.Tensor:
    patched = add_guidance(model, AAPB(anchor=Prompt(anchor, "anchor")))
    return evaluate(patched, kind, positive, negative, cfg=WEIGHT, **options)["denoised"]


LEFT = {"area": (8, 4, 0, 0)}
RIGHT = {"area": (8, 4, 0, 4)}
MASK = torch.zeros(1, 8, 8)
MASK[:, :4] = 1.0
TOP = {"mask": MASK, "mask_strength": 1.0}
REGIONS = {
    "area on anchor": ({}, {}, LEFT),
    "area on positive": (LEFT, {}, {}),
    "area on negative": ({}, LEFT, {}),
    "areas on positive and anchor": (LEFT, {}, RIGHT),
    "same area on positive and anchor": (LEFT, {}, LEFT),
    "mask on anchor": ({}, {}, TOP),
    "mask on positive": (TOP, {}, {}),
    "mask on negative": ({}, TOP, {}),
    "mask on all": (TOP, TOP, TOP),
    "area and mask on anchor": ({}, {}, {**LEFT, **TOP}),
    "weak anchor": ({}, {}, {"strength": 0.3}),
    "anchor of strength 0": ({}, {}, {"strength": 0.0}),
}


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_areas_and_masks(model, kind, region, batch):
    prompts = [having(p, **options) for p, options in zip((POSITIVE, NEGATIVE, ANCHOR), REGIONS[region])]
    ours, oracle = actual(model, kind, *prompts, batch=batch), expected(model, kind, lambda: prompts, batch=batch)
    torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompts", ["area", "mask", "strength", "range"])
def test_an_anchor_that_covers_nothing_leaves_plain_guidance(model, kind, prompts):
    options = {"area": LEFT, "mask": TOP, "strength": {"strength": 0.0}, "range": {"start_percent": 0.9}}[prompts]
    ours = actual(model, kind, POSITIVE, NEGATIVE, having(ANCHOR, **options))
    plain = evaluate(model, kind, POSITIVE, NEGATIVE, cfg=WEIGHT)["denoised"]
    outside = {"area": (..., slice(4, 8)), "mask": (..., slice(4, 8), slice(None))}.get(prompts, ...)
    torch.testing.assert_close(ours[outside], plain[outside], rtol=1e-5, atol=1e-5)
    if outside is not ...:
        assert (ours - plain).abs().max() > 1e-3, "inside, the anchor acts"


EARLY, LATE = {"end_percent": 0.5}, {"start_percent": 0.5}
SIGMAS = {"unet": {"early": 8.0, "late": 0.5}, "flux": {"early": 0.9, "late": 0.2}}


@pytest.mark.parametrize("moment", ["early", "late"])
@pytest.mark.parametrize("role", [0, 1, 2], ids=["positive", "negative", "anchor"])
def test_timestep_ranges(model, kind, role, moment):
    prompts = [POSITIVE, NEGATIVE, ANCHOR]
    prompts[role] = (
        having(prompts[role], **EARLY) + having(conditioning(9), **LATE) if role < 2 else having(ANCHOR, **EARLY)
    )
    sigma = SIGMAS[kind][moment]
    ours = actual(model, kind, *prompts, sigma=sigma)
    torch.testing.assert_close(ours, expected(model, kind, lambda: prompts, sigma=sigma), rtol=1e-4, atol=1e-4)
    if role == 2:
        plain = evaluate(model, kind, POSITIVE, NEGATIVE, cfg=WEIGHT, sigma=sigma)["denoised"]
        assert (moment == "late") == torch.allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [LEFT, TOP, {"strength": 0.0}, {"start_percent": 0.9}], ids=str)
@pytest.mark.parametrize("method", ["alternate", "blend"])
def test_a_frequent_prompt_plays_the_positive_only_where_it_covers(model, kind, options, method):
    frequent = having(ANCHOR, **options)
    patched = add_guidance(model, R2F(frequent=Prompt(frequent, "frequent"), stop=1.0, mode=method))
    cond = evaluate(patched, kind, POSITIVE, NEGATIVE, cfg=WEIGHT)["cond_denoised"]
    run = evaluate(model, kind, POSITIVE, NEGATIVE, frequent, cfg=WEIGHT)
    if method == "blend":  # the embeddings are mixed, the coverage stays the positive's
        (a, settings), (b, other) = POSITIVE[0], ANCHOR[0]
        pooled = torch.lerp(settings["pooled_output"], other["pooled_output"], 0.3)
        oracle = evaluate(model, kind, [[torch.lerp(a, b, 0.3), {"pooled_output": pooled}]], NEGATIVE)["cond_denoised"]
    else:
        positive = evaluate(model, kind, POSITIVE, NEGATIVE, cfg=WEIGHT)["cond_denoised"]
        oracle = torch.where((run["third"] != 0).any(1, keepdim=True), run["third"], positive)
    torch.testing.assert_close(cond, oracle, rtol=1e-4, atol=1e-4)


class Control(comfy.controlnet.ControlBase):
    """A ControlNet in small: a fixed residual for the tiny models' blocks, the stronger the noisier."""

    def __init__(self, kind: str, seed: int):
        super().__init__()
        self.residual = torch.randn(64, generator=torch.Generator().manual_seed(seed))
        self.kind = kind
        self.cleaned = 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        residual = self.residual * x_noisy.std()
        if self.kind == "unet":
            return {"input": [], "middle": [residual.reshape(1, 64, 1, 1)], "output": []}
        return {"input": [residual.reshape(1, 1, 64)], "output": []}

    def cleanup(self):
        super().cleanup()
        self.cleaned += 1


WHO = {
    "anchor": "--1",
    "positive": "1--",
    "negative": "-1-",
    "all": "111",
    "all but the anchor": "11-",
    "each its own": "123",
}


@pytest.mark.parametrize("who", WHO)
def test_controlnet_on_any_branch(model, kind, who):
    controls = {n: Control(kind, int(n)) for n in "123"}
    prompts = [
        having(p, control=controls[n]) if n != "-" else p for p, n in zip((POSITIVE, NEGATIVE, ANCHOR), WHO[who])
    ]
    counted, seen = calls(model)
    ours = actual(counted, kind, *prompts)
    torch.testing.assert_close(ours, expected(model, kind, lambda: prompts), rtol=1e-4, atol=1e-4)
    without = actual(model, kind, POSITIVE, NEGATIVE, ANCHOR)
    assert (ours - without).abs().max() > 1e-3, "the ControlNet acts"
    assert seen["batching"] == [3]
    assert len(seen["network"]) == len(set(WHO[who])), "one batch for each ControlNet, and for none"


def test_a_controlnet_that_applies_to_uncond_applies_to_the_anchor(model, kind):
    positive = having(POSITIVE, control=Control(kind, 1), control_apply_to_uncond=True)
    counted, seen = calls(model)
    ours = actual(counted, kind, positive, NEGATIVE, ANCHOR)
    torch.testing.assert_close(ours, expected(model, kind, lambda: [positive, NEGATIVE, ANCHOR]), rtol=1e-4, atol=1e-4)
    assert seen["network"] == [3]


def test_a_controlnet_that_applies_to_an_anchor_of_areas_alone_is_explained(model, kind):
    """The host would divide by zero."""
    positive = having(POSITIVE, control=Control(kind, 1), control_apply_to_uncond=True)
    anchor = having(ANCHOR, area=(8, 4, 0, 0))
    with pytest.raises(GuidanceError, match=r"Every entry of the anchor conditioning has an area.*Apply ControlNet"):
        actual(model, kind, positive, NEGATIVE, anchor)
    assert actual(model, kind, positive, NEGATIVE, [*anchor, *ANCHOR]).isfinite().all()


def guided_flux():
    """A Flux with distilled guidance, as Flux-dev."""
    return tiny_flux(guidance_embed=True)


def shown(kind: str) -> torch.Tensor:
    return torch.ones_like(latent(kind))


#: What a conditioning shows beside its text, and a model that takes it.
GIVEN = {
    "control": ("unet", tiny_unet, lambda: Control("unet", 1)),
    "concat_latent_image": ("unet", editor, lambda: shown("unet")),
    "reference_latents": ("flux", tiny_flux, lambda: [shown("flux")]),
    "guidance": ("flux", guided_flux, lambda: 2.0),
}


def told(caplog, model, kind: str, method, *prompts) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rudder"):
        sample(add_guidance(model, method), kind, *prompts, steps=1)
    return caplog.text


@pytest.mark.parametrize("key", GIVEN)
def test_a_prompt_that_lacks_the_positives_image_or_controlnet_is_reported(key, caplog):
    """Its prediction differs by that, and the method would take the difference for one of words."""
    kind, make, value = GIVEN[key]
    model, given = make(), {key: value()}
    positive, pushed = having(POSITIVE, **given), by_node("extra negative", model)
    anchored, blended = AAPB(anchor=Prompt(ANCHOR, "anchor")), R2F(frequent=Prompt(ANCHOR, "frequent"), mode="blend")
    text = told(caplog, model, kind, anchored, positive, NEGATIVE)
    assert "the anchor conditioning lacks" in text and "sampler's positive" in text and SHOWN[key] in text
    alike = AAPB(anchor=Prompt(having(ANCHOR, **given), "anchor"))
    assert not told(caplog, model, kind, alike, positive, NEGATIVE)
    assert not told(caplog, model, kind, blended, positive, NEGATIVE), "it keeps the positive's"
    assert not told(caplog, model, kind, pushed, positive, NEGATIVE), "what the negative does not show is meant"
    assert "sampler's negative" in told(caplog, model, kind, pushed, positive, having(NEGATIVE, **given))
    if key == "control":
        assert not told(caplog, model, kind, anchored, having(positive, control_apply_to_uncond=True), NEGATIVE)
    if key == "guidance":
        usual = having(POSITIVE, guidance=3.5)
        assert not told(caplog, model, kind, anchored, usual, NEGATIVE), "what a Flux has anyway"


@pytest.mark.parametrize("key", ["concat_latent_image", "guidance", "reference_latents"])
def test_what_the_model_does_not_take_is_not_missed(key, caplog):
    positive, method = having(POSITIVE, **{key: GIVEN[key][2]()}), AAPB(anchor=Prompt(ANCHOR, "anchor"))
    assert not told(caplog, tiny_unet(), "unet", method, positive, NEGATIVE)
    if key == "guidance":
        assert not told(caplog, tiny_flux(), "flux", method, positive, NEGATIVE), "a Flux that is not distilled"


def test_the_base_of_an_image_strength_is_meant_to_lack_the_image(caplog):
    model, image = editor(), {"concat_latent_image": shown("unet")}
    [method] = plan_of(call(RudderInstruct, model=model, base=ANCHOR)[0].model_options)
    prompts = having(POSITIVE, **image), having(NEGATIVE, **image)
    assert not told(caplog, model, "unet", method, *prompts)
    both = add_guidance(model, method), AAPB(anchor=Prompt(ANCHOR, "anchor"))
    assert "the base conditioning lacks" in told(caplog, both[0], "unet", both[1], *prompts), "as an anchor it is not"


@pytest.mark.parametrize("name", ["NAG", "Perp-Neg", "extra negative", "AAPB"])
def test_negatives_are_told_to_the_model_as_such(model, kind, name, monkeypatch):
    """The SDXL refiner gives a negative another aesthetic score."""
    told, own = {}, model.model.extra_conds

    def spy(**given):
        told.setdefault(given["prompt_type"], []).append(given["cross_attn"])
        return own(**given)

    monkeypatch.setattr(model.model, "extra_conds", spy)
    sample(add_guidance(model, by_node(name, model)), kind, POSITIVE, NEGATIVE, steps=1)
    asked = [key for key, features in told.items() for one in features if torch.equal(one, ANCHOR[0][0])]
    assert (asked == ["negative"]) == (name != "AAPB") and len(asked) == 1


def by_node(name: str, model):
    """The method as its node wires it, with ANCHOR as its prompt."""
    node, prompt = {"NAG": (RudderNAG, "negative"), "Perp-Neg": (RudderPerpNeg, "negative_1"),
                    "extra negative": (RudderNegative, "negative"), "AAPB": (RudderAAPB, "anchor")}[name]
    [method] = plan_of(call(node, model=model, **{prompt: ANCHOR})[0].model_options)
    return method


def test_the_controlnet_of_an_anchor_is_cleaned_up(model, kind):
    control = Control(kind, 1)
    actual(model, kind, POSITIVE, NEGATIVE, having(ANCHOR, control=control))
    assert control.cleaned == 1


def test_lora_on_the_model(model, kind):
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora(model, 1), 1.0, 0.0)
    ours = actual(patched, kind, POSITIVE, NEGATIVE, ANCHOR)
    torch.testing.assert_close(
        ours, expected(patched, kind, lambda: [POSITIVE, NEGATIVE, ANCHOR]), rtol=1e-4, atol=1e-4
    )
    assert (ours - actual(model, kind, POSITIVE, NEGATIVE, ANCHOR)).abs().max() > 1e-3, "the LoRA acts"


def hooked(model, who: str, scheduled: bool) -> list[list]:
    """Positive, negative and anchor with the hooks that ``who`` names. Made anew for each run: the host's keyframes
    keep the last sigma of one run into the next."""
    schedule = comfy.hooks.HookKeyframeGroup()
    if scheduled:  # off in the first half of the timesteps, on in the second
        schedule.add(comfy.hooks.HookKeyframe(0.0, 0.0, 0))
        schedule.add(comfy.hooks.HookKeyframe(1.0, 0.5, 0))
    groups = {n: comfy.hooks.create_hook_lora(lora(model, int(n)), 1.0, 0.0) for n in "123"}
    for group in groups.values():
        group.set_keyframes_on_hooks(schedule)
    return [having(p, hooks=groups[n]) if n != "-" else p for p, n in zip((POSITIVE, NEGATIVE, ANCHOR), WHO[who])]


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("moment", ["early", "late"])
@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
def test_lora_hooks_on_any_branch(model, kind, who, moment, scheduled):
    sigma = SIGMAS[kind][moment]
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    counted, seen = calls(model)
    ours = actual(counted, kind, *hooked(model, who, scheduled), sigma=sigma)
    oracle = expected(model, kind, lambda: hooked(model, who, scheduled), sigma=sigma)
    torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-4)
    without = actual(model, kind, POSITIVE, NEGATIVE, ANCHOR, sigma=sigma)
    assert torch.allclose(ours, without, rtol=1e-5, atol=1e-5) == (scheduled and moment == "early"), "the hooks act"
    assert seen["batching"] == [3]
    assert len(seen["network"]) == len(set(WHO[who])), "one batch for each group of hooks, and for none"
    assert all(torch.equal(weight, before[key]) for key, weight in model.model.state_dict().items())


@pytest.mark.parametrize("scope", list(comfy.hooks.EnumHookScope), ids=str)
def test_transformer_options_hook_on_the_anchor(model, kind, scope):
    def louder(executor, *args, **kwargs):
        return executor(*args, **kwargs) * 1.1

    wrappers = {"wrappers": {comfy.patcher_extension.WrappersMP.APPLY_MODEL: {"louder": [louder]}}}
    group = comfy.hooks.HookGroup()
    group.add(comfy.hooks.TransformerOptionsHook(wrappers, scope))
    anchor = having(ANCHOR, hooks=group)
    everyone = scope is comfy.hooks.EnumHookScope.AllConditioning
    positive = evaluate(model, kind, POSITIVE, NEGATIVE, anchor if everyone else None, cfg=WEIGHT)
    there = evaluate(model, kind, POSITIVE, NEGATIVE, anchor, cfg=WEIGHT)["third"]
    target, uncond = positive["cond_denoised"], positive["uncond_denoised"]
    oracle = cfg(blend(target, there, optimal_gamma(target, there, uncond, WEIGHT)), uncond, WEIGHT)
    ours = actual(model, kind, POSITIVE, NEGATIVE, anchor)
    torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-4)
    assert (ours - actual(model, kind, POSITIVE, NEGATIVE, ANCHOR)).abs().max() > 1e-3, "the hook acts"


def test_hooked_weights_are_patched_once_a_run_as_the_host_does(model, kind, monkeypatch):
    patched = []
    original = type(model).patch_hook_weight_to_device
    monkeypatch.setattr(
        type(model), "patch_hook_weight_to_device", lambda self, **k: (patched.append(k["key"]), original(self, **k))
    )
    hooks = comfy.hooks.create_hook_lora(lora(model, 1), 1.0, 0.0)
    anchored = add_guidance(model, AAPB(anchor=Prompt(having(ANCHOR, hooks=hooks), "anchor")))
    sample(anchored, kind, POSITIVE, NEGATIVE, steps=3)
    ours = list(patched)
    patched.clear()
    sample(model, kind, POSITIVE, having(NEGATIVE, hooks=hooks), steps=3)
    assert ours == patched and len(set(ours)) == len(ours) > 0


@pytest.mark.parametrize("region", ["area", "mask", "range"])
@pytest.mark.parametrize("name", ["extra", "perp-neg", "instruct"])
def test_a_negative_has_no_say_where_it_covers_nothing(model, kind, name, region):
    """What is measured from the sampler's negative must not fall back on the positive there."""
    options = {"area": LEFT, "mask": TOP, "range": {"start_percent": 0.9}}[region]
    prompt = Prompt(having(ANCHOR, **options), "negative")
    method = {"extra": ExtraNegative(negative=prompt), "perp-neg": PerpNeg(negatives=(prompt,)),
              "instruct": InstructGuidance(base=prompt)}[name]
    ours = evaluate(add_guidance(model, method), kind, POSITIVE, NEGATIVE, cfg=WEIGHT)["denoised"]
    plain = evaluate(model, kind, POSITIVE, NEGATIVE, cfg=WEIGHT)["denoised"]
    outside = {"area": (..., slice(4, 8)), "mask": (..., slice(4, 8), slice(None))}.get(region, ...)
    torch.testing.assert_close(ours[outside], plain[outside], rtol=1e-5, atol=1e-5)
    if region != "range":
        assert (ours - plain).abs().max() > 1e-4, "inside, it acts"


BLOCK = {"unet": "middle", "flux": "double.0"}


def test_the_perturbed_prediction_of_a_frequent_prompt_is_as_partial_as_it(model, kind):
    """Where the frequent prompt has no say there is nothing to push away from, not the whole picture."""
    frequent = R2F(frequent=Prompt(having(ANCHOR, **TOP), "frequent"), stop=1.0)
    plain = evaluate(add_guidance(model, frequent), kind, POSITIVE, NEGATIVE, cfg=WEIGHT)["denoised"]
    both = add_guidance(add_guidance(model, frequent), PerturbedAttention(blocks=BLOCK[kind]))
    pushed = evaluate(both, kind, POSITIVE, NEGATIVE, cfg=WEIGHT)["denoised"]
    outside = (..., slice(4, 8), slice(None))
    torch.testing.assert_close(pushed[outside], plain[outside], rtol=1e-5, atol=1e-5)
    assert not torch.equal(pushed, plain)


@pytest.mark.parametrize("shift", [1.57, 3.0])
def test_the_first_step_of_a_flow_is_inside_every_window(shift):
    """ComfyUI's shift rounds the first noise level to a hair above 1 at some values."""
    model, counted = calls(sd3.ModelSamplingSD3().patch(tiny_flux(), shift)[0])
    run = add_guidance(model, CFGZero(zero_steps=1))
    sample(run, "flux", POSITIVE, NEGATIVE, steps=4, cfg=WEIGHT)
    assert sum(counted["network"]) == 2 * 4 - 1, "the step that zero-init leaves out is evaluated once"


def test_features_of_further_encoders_are_mixed_too():
    """HiDream and Hunyuan hand theirs on under names of their own; tokens and what is no tensor stay the positive's."""
    def prompt(value: float) -> list:
        more = {"conditioning_llama3": torch.full((1, 2, 3), value), "conditioning_lyrics": torch.tensor([int(value)]),
                "conditioning_note": str(value)}
        return having(conditioning(1), **more)

    [entry] = mixed(Mix(Prompt(prompt(3.0), "frequent"), 0.25), converted(Prompt(prompt(1.0), "positive")))
    assert torch.equal(entry["conditioning_llama3"], torch.full((1, 2, 3), 1.5))
    assert entry["conditioning_lyrics"].tolist() == [1] and entry["conditioning_note"] == "1.0"


def test_only_one_prompt_can_be_mixed_in(model, kind):
    frequent = Prompt(ANCHOR + conditioning(4), "frequent")
    patched = add_guidance(model, R2F(frequent=frequent, stop=1.0, mode="blend"))
    with pytest.raises(GuidanceError, match="2 entries .* only one can be mixed"):
        evaluate(patched, kind, POSITIVE, NEGATIVE, cfg=WEIGHT)

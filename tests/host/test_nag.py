"""NAG in the real host: cross- and joint attention, its cost, split batches, other methods, the node."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.hooks
import comfy_extras.nodes_pag as nodes_pag
import pytest
import torch

from rudder.attention.contract import AttentionEdit
from rudder.attention.nag import nag
from rudder.guidance.contract import Guidance, GuidanceError, Prompt
from rudder.guidance.contrast import PerturbedAttention
from rudder.guidance.nag import NAG
from rudder.guidance.perpneg import PerpNeg
from rudder.guidance.prompt_to_prompt import PromptToPrompt
from rudder.guidance.sag import SelfAttentionGuidance
from rudder.host import add_guidance, plan_of
from rudder.host.attention import NAMES, Attention
from rudder.nodes.nag import RudderNAG

from .models import MODELS, calls, conditioning, having, lora, sample, tiny_unet
from .registry import NEGATIVE, POSITIVE, prompt
from .test_attention import Editing, areas, controlled
from .test_branches import one_forward_a_cond
from .test_nodes import call
from .test_prompt_to_prompt import CAT, SOURCE, batch
from .test_prompt_to_prompt import run as edited

AWAY = conditioning(8)
PAG = PerturbedAttention(blocks="middle, double.0, joint.0")


def method(conditioning=AWAY, **options) -> NAG:
    return NAG(negative=Prompt(conditioning, "negative"), **options)


def run(network, family, *methods, split=False, **options):
    for each in methods:
        network = add_guidance(network, each)
    network = one_forward_a_cond(network) if split else network  # last: a clone forgets it
    return sample(network, family, POSITIVE, NEGATIVE, **options)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_run(network, family, cfg, batch):
    plain = run(network, family, cfg=cfg, batch=batch)
    counted, seen = calls(network)
    out = run(counted, family, method(), cfg=cfg, batch=batch)
    assert out.isfinite().all() and not torch.equal(out, plain)
    count = (1 if cfg == 1.0 else 2) + (family != "unet")
    assert seen["network"] == [batch * count] * 4, "no evaluation on a UNet, one on joint attention"
    assert torch.equal(run(network, family, method(), cfg=cfg, batch=batch), out)
    assert torch.equal(run(network, family, cfg=cfg, batch=batch), plain)


@pytest.mark.parametrize("neutral", [{"strength": 1.0}, {"alpha": 0.0}], ids=str)
def test_neutral_settings_are_bit_identical_and_free(network, family, neutral):
    counted, seen = calls(network)
    assert torch.equal(run(counted, family, method(**neutral)), run(network, family))
    assert seen["network"] == [2] * 4


def test_the_positive_as_negative_is_plain(network, family):
    copy = [[POSITIVE[0][0] * (1 + 1e-6), dict(POSITIVE[0][1])]]
    torch.testing.assert_close(run(network, family, method(copy)), run(network, family), rtol=1e-3, atol=1e-3)
    with pytest.raises(GuidanceError, match="identical to the positive"):
        run(network, family, method(conditioning(1)))


def test_on_a_unet_it_is_the_rule_by_another_packs_way():
    """The oracle replaces every cross-attention by ComfyUI's own patch point, at cfg 1."""
    unet = tiny_unet()
    text = AWAY[0][0]
    oracle = unet.clone()
    modules = dict(unet.model.diffusion_model.named_modules())

    def replaced(q, k, v, extra):
        from comfy.ldm.modules.attention import optimized_attention

        block = extra["block"]
        path = "middle_block.1" if block[0] == "middle" else f"{block[0]}_blocks.{block[1]}.1"
        attn = modules[f"{path}.transformer_blocks.0.attn2"]
        heads, rows = extra["n_heads"], text.expand(len(q), -1, -1)
        a = optimized_attention(q, k, v, heads)
        b = optimized_attention(q, attn.to_k(rows), attn.to_v(rows), heads)
        a, b = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (a, b))
        return nag(a, b, 5.0, 2.5, 0.25).transpose(1, 2).flatten(2)

    for block in [("input", i) for i in range(9)] + [("middle", 0)] + [("output", i) for i in range(9)]:
        oracle.set_model_attn2_replace(replaced, *block)
    ours = run(unet, "unet", method(), cfg=1.0, batch=2)
    torch.testing.assert_close(ours, run(oracle, "unet", cfg=1.0, batch=2), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, run(unet, "unet", cfg=1.0, batch=2), atol=1e-3)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("more", [(), (PAG,)], ids=["NAG", "NAG + PAG"])
def test_a_split_batch_is_the_same(network, family, cfg, more):
    """On joint attention the negative, and for PAG's prediction the positive too, is evaluated beside each part."""
    out = run(network, family, method(), *more, cfg=cfg, batch=2, split=True)
    torch.testing.assert_close(out, run(network, family, method(), *more, cfg=cfg, batch=2), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("apart", ["area", "ControlNet", "hooks"])
def test_what_the_host_keeps_apart_is_refused_on_joint_attention(apart):
    """It is told, and the model is as it was. (A negative has the positive's areas, so they only part where memory is
    short.)"""
    model = MODELS["flux"]()
    positive = {"area": areas(POSITIVE), "ControlNet": controlled(model, "flux"),
                "hooks": having(POSITIVE, hooks=comfy.hooks.create_hook_lora(lora(model, 1), 1.0, 0.0))}[apart]
    plain = sample(model, "flux", POSITIVE, NEGATIVE)
    with pytest.raises(ValueError, match=r"different forward passes.*token count"):
        patched = add_guidance(model, method())
        sample(one_forward_a_cond(patched) if apart == "area" else patched, "flux", positive, NEGATIVE)
    assert torch.equal(sample(model, "flux", POSITIVE, NEGATIVE), plain)


def test_a_negative_of_another_length():
    """A UNet takes any; the host cannot put other lengths into one forward of a Flux, and that is said."""
    longer = conditioning(8, tokens=11)
    assert run(tiny_unet(), "unet", method(longer)).isfinite().all()
    with pytest.raises(ValueError, match="different forward passes"):
        run(MODELS["flux"](), "flux", method(longer))


def test_a_combined_positive_is_refused_where_the_negative_can_ride_with_one_only(network, family):
    both = [*POSITIVE, *conditioning(8)]
    turns = having(POSITIVE, end_percent=0.5) + having(conditioning(8), start_percent=0.5)
    if family == "unet":
        assert sample(add_guidance(network, method()), family, both, NEGATIVE).isfinite().all()
    else:
        with pytest.raises(GuidanceError, match="has 2 parts at a time"):
            sample(add_guidance(network, method()), family, both, NEGATIVE)
    assert sample(add_guidance(network, method()), family, turns, NEGATIVE).isfinite().all()


def regions(name: str) -> list:
    top = torch.zeros(1, 8, 8)
    top[:, :4] = 1
    return {
        "one area": having(POSITIVE, area=(8, 4, 0, 0)),
        "a part of it": having(POSITIVE, area=("percentage", 0.5, 1.0, 0.0, 0.0)),
        "bounds of a mask": [*POSITIVE, *having(conditioning(8), mask=top, mask_strength=1.0, set_area_to_bounds=True)],
        "a picture and an area": [*POSITIVE, *having(conditioning(8), area=(8, 4, 0, 0))],
    }[name]


@pytest.mark.parametrize("region", ["one area", "a part of it", "bounds of a mask", "a picture and an area"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_positive_of_regions_takes_one_plain_negative(network, family, region, cfg):
    """The host gives the negative the positive's areas; it stays one prompt."""
    plain = sample(network, family, regions(region), NEGATIVE, cfg=cfg)
    out = sample(add_guidance(network, method()), family, regions(region), NEGATIVE, cfg=cfg)
    assert out.isfinite().all() and not torch.equal(out, plain)


@pytest.mark.parametrize("more", [(), (PAG,)], ids=["NAG", "NAG + PAG"])
def test_a_split_batch_with_reference_latents_is_the_same(more):
    """Flux Kontext: what a cond shows the model is a list."""
    shown = {"reference_latents": [torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))]}
    model, prompts = MODELS["flux"](), [having(each, **shown) for each in (POSITIVE, NEGATIVE, AWAY)]

    def out(split: bool) -> torch.Tensor:
        patched = model
        for each in (method(prompts[2]), *more):
            patched = add_guidance(patched, each)
        return sample(one_forward_a_cond(patched) if split else patched, "flux", *prompts[:2], batch=2)

    torch.testing.assert_close(out(True), out(False), rtol=1e-4, atol=1e-3)


def test_prompts_of_a_scheduled_clip_take_turns(network, family):
    """What a CLIP with keyframed hooks writes is a range like any other."""
    later = conditioning(8)
    turns = having(POSITIVE, end_percent=0.5) + having(later, start_percent=0.5)
    clip = having(POSITIVE, clip_start_percent=0.0, clip_end_percent=0.5) + having(
        later, clip_start_percent=0.5, clip_end_percent=1.0)
    patched = add_guidance(network, method())
    assert torch.equal(sample(patched, family, clip, NEGATIVE), sample(patched, family, turns, NEGATIVE))


def test_another_packs_pass_after_a_look_elsewhere_is_edited_too(monkeypatch):
    """ComfyUI's own PAG asks the model again after all predictions, and pushes away from what it gets."""
    seen, apply = [], Attention.apply_model

    def spy(self, executor, x, t, *args, **kwargs):
        options = (dict(zip(NAMES, args)) | kwargs)["transformer_options"]
        if options.get("patches_replace", {}).get("attn1"):
            seen.append([self.who.get(uuid) for uuid in options["uuids"]])
        return apply(self, executor, x, t, *args, **kwargs)

    monkeypatch.setattr(Attention, "apply_model", spy)
    [model] = nodes_pag.PerturbedAttentionGuidance.execute(tiny_unet(), 3.0).args
    run(model, "unet", method(), SelfAttentionGuidance(sigma=1.0), steps=1)
    assert seen == [[("cond",)]]


def test_only_plain_prompts():
    two = [*AWAY, *conditioning(9)]
    with pytest.raises(GuidanceError, match="negative conditioning has 2 texts"):
        run(tiny_unet(), "unet", method(two))
    wide = [[torch.cat([AWAY[0][0]] * 2, -1), AWAY[0][1]]]
    with pytest.raises(GuidanceError, match="different text encoders"):
        run(tiny_unet(), "unet", method(wide))


LIMITED = {
    "an area": {"area": (8, 4, 0, 0)}, "a mask": {"mask": torch.ones(1, 8, 8)}, "a strength": {"strength": 0.5},
    "a timestep range": {"start_percent": 0.5},
}


@pytest.mark.parametrize("limit", LIMITED)
def test_a_negative_for_a_part_is_refused(network, family, limit):
    """Its text would act everywhere, always and at full strength."""
    with pytest.raises(GuidanceError, match=f"the negative has {limit}, .*start_percent and end_percent here.*alpha"):
        run(network, family, method(having(AWAY, **LIMITED[limit])))
    ranges = {"start_percent": 0.0, "end_percent": 1.0, "clip_start_percent": 0.0, "clip_end_percent": 1.0}
    whole = method(having(AWAY, strength=1.0, **ranges))
    assert torch.equal(run(network, family, whole), run(network, family, method()))


def test_a_window(network, family):
    def latents(*methods):
        seen = []
        run(network, family, *methods, steps=6, callback=lambda step, x0, x, steps: seen.append(x.clone()))
        return seen

    same = [torch.equal(a, b) for a, b in zip(latents(), latents(method(start=0.5)))]
    assert 2 <= sum(same) < 6 and same == sorted(same, reverse=True)


def test_another_methods_prediction_of_the_same_prompt_stays_what_it_is(network, family):
    """Perp-Neg and NAG may be given one CONDITIONING; on joint attention NAG's branch must not be Perp-Neg's."""
    seen = []

    class Look(Guidance):
        title = "look"
        rank = -2

        def refine(self, step, preds):
            seen.append(next(p for branch, p in preds.extra.items() if isinstance(branch, Prompt)))
            return preds

    negative = Prompt(AWAY, "negative")
    for methods in ((), (NAG(negative=negative),)):
        run(network, family, PerpNeg(negatives=(negative,)), Look(), *methods, steps=1)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)


def test_the_node(network):
    (model,) = call(RudderNAG, model=network, negative=AWAY, end_percent=0.5)
    (made,) = plan_of(model.model_options)
    assert made == NAG(negative=made.negative, end=0.5) and made.negative.conditioning is AWAY
    with pytest.raises(GuidanceError, match="both decide the negative inside attention"):
        call(RudderNAG, model=model, negative=AWAY)


@dataclass(frozen=True, kw_only=True, eq=False)
class Last(Editing):
    rank = 99


@dataclass(frozen=True, kw_only=True, eq=False)
class Watched(AttentionEdit):
    met: list

    kinds = frozenset({"cross"})

    def output(self, call, attend):
        self.met.append((call, call.to_text(call.q, method().branch), attend()))
        return self.met[-1][-1]


@pytest.mark.parametrize("order", [1, -1], ids=["NAG last", "NAG first"])
def test_it_pushes_what_prompt_to_prompt_makes_of_the_edits(order):
    """One word exchanged: the edit reads its own values by the source's map, and NAG pushes that."""
    positive, prompts = batch(SOURCE, CAT)
    both, met = [PromptToPrompt(edit=prompts, self_end=0.0), method()][::order], []
    edited(tiny_unet(), "unet", positive, *both, Last(edit=Watched(met=met), on=("cond",)), steps=1)
    assert len(met) == 7
    for site, away, out in met:
        by_words = site.probabilities()[:1] @ site.v[1:]
        torch.testing.assert_close(out[1:], nag(by_words, away[1:], 5.0, 2.5, 0.25), rtol=1e-5, atol=1e-5)


def test_beside_other_methods(network, family):
    first = run(network, family, PerpNeg(negatives=(prompt(5, "negative"),)), method())
    assert torch.equal(run(network, family, method(), PerpNeg(negatives=(prompt(5, "negative"),))), first)


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_beside_a_method_that_looks_elsewhere_and_one_with_a_variant(network, family, cfg):
    """SAG asks for the positive at another latent at cfg 1, and on joint attention NAG's negative must ride along."""
    counted, seen = calls(network)
    sag = SelfAttentionGuidance(sigma=1.0)
    assert run(counted, family, method(), sag, cfg=cfg, steps=2).isfinite().all()
    joint, guided = family != "unet", cfg > 1
    assert seen["network"] == [1 + guided + joint, 1 + (joint and not guided)] * 2
    pag = PerturbedAttention(strength=1.0, blocks="middle, double, joint.1")
    first = run(network, family, pag, method(), cfg=cfg)
    assert first.isfinite().all() and torch.equal(run(network, family, method(), pag, cfg=cfg), first)

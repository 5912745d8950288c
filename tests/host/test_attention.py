"""Attention edits inside the real host: sites, rows, identity, other packs, removal.

The oracle for rows is a foreign override, which knows no rows: it changes the attention of every row in an ordinary run
without Rudder, and the run's predictions of cond and uncond are what an edit of only these rows must give.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field

import comfy.hooks
import comfy.model_management
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_tomesd import TomePatchModel

from rudder.attention.contract import AttentionEdit
from rudder.guidance.contract import Guidance, GuidanceError
from rudder.guidance.contrast import PerturbedAttention, SmoothedEnergy
from rudder.guidance.r2f import R2F
from rudder.host import add_guidance
from rudder.host.sites import sites_of

from .models import CHANNELS, MODELS, calls, conditioning, evaluate, having, lora, sample, tiny_flux
from .registry import METHODS, NEGATIVE, POSITIVE, prompt
from .test_branches import one_forward_a_cond
from .test_conditioning import Control
from .test_methods import by_guider, by_ksampler

SITES = {"unet": 14, "flux": 2, "sd3": 2, "chroma": 2, "wan": 4, "qwen": 2, "lumina": 4, "zimage": 4}


@dataclass(frozen=True, kw_only=True, eq=False)
class Same(AttentionEdit):
    """Changes nothing, and writes down what it met."""

    met: list = field(default_factory=list)

    title = "identity edit"

    def inputs(self, call):
        self.met.append(call)
        return call


class SameMap(Same):
    def map(self, call, probabilities):
        assert torch.allclose(probabilities.sum(-1), torch.ones(()))
        return probabilities


@dataclass(frozen=True, kw_only=True, eq=False)
class Editing(Guidance):
    edit: AttentionEdit
    on: tuple = ()

    title = "edits"

    def edits(self, step):
        return [(self.edit, self.on)]


def run(model, family, *methods, **options):
    for method in methods:
        model = add_guidance(model, method)
    return sample(model, family, POSITIVE, NEGATIVE, **options)


def test_a_compiled_network_is_named(family, network):
    """Core's node puts it in the place of the network after every check."""
    model = add_guidance(network, Editing(edit=Same()))
    set_torch_compile_wrapper(model, backend="eager")
    with pytest.raises(GuidanceError, match="Torch Compile Model"):
        sample(model, family, POSITIVE, NEGATIVE, steps=1)


def test_other_methods_run_in_a_compiled_network():
    plain = add_guidance(tiny_flux(), METHODS["AAPB"].method)
    compiled = plain.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    runs = [sample(model, "flux", POSITIVE, NEGATIVE, steps=2) for model in (plain, compiled)]
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on", [(), ("cond",), ("uncond",)], ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["joint", "split"])
def test_an_identity_edit_is_bit_identical_and_meets_every_site(family, network, on, split):
    edit = Same()
    bare, model = network.clone(), add_guidance(network, Editing(edit=edit, on=on))
    if split:
        bare, model = one_forward_a_cond(bare), one_forward_a_cond(model)
    out, plain = (sample(m, family, POSITIVE, NEGATIVE, steps=2, batch=2) for m in (model, bare))
    assert torch.equal(out, plain)
    sites = [site for site in sites_of(network.model.diffusion_model) if site.kind != "residual"]
    assert len(sites) == SITES[family]
    forwards = 2 * (2 if split and not on else 1)
    assert [call.site.name for call in edit.met] == [site.name for site in sites] * forwards
    for call in edit.met:
        assert call.samples == 2 and len(call.q) == 2 * len(call.roles)
        assert set(call.roles) <= set(on or ("cond", "uncond"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Copy(AttentionEdit):
    """Every sample gets what the residual block adds to the first."""

    title = "residuals of the first sample"
    kinds = frozenset({"residual"})

    def residual(self, block):
        h = block.by_sample(block.h)
        return h[:, :1].expand_as(h).flatten(0, 1)


def test_a_residual_edit_acts_on_what_a_block_adds():
    model = MODELS["unet"]()
    names = [site.name for site in sites_of(model.model.diffusion_model) if site.kind == "residual"]
    assert "output.1" in names and names.count("middle") == 2
    plain = run(model, "unet", batch=2)
    out = run(model, "unet", Editing(edit=Copy(blocks="output.1")), batch=2)
    assert torch.equal(out[0], plain[0]) and not torch.allclose(out[1], plain[1], atol=1e-3)
    with pytest.raises(GuidanceError, match="no residual attention of this model is called 'input.9'"):
        run(model, "unet", Editing(edit=Copy(blocks="input.9")))
    with pytest.raises(GuidanceError, match="has no residual"):
        run(MODELS["flux"](), "flux", Editing(edit=Copy()))
    assert torch.equal(run(model, "unet", batch=2), plain)


def test_pag_is_cores_on_the_middle_block():
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    model = MODELS["unet"]()
    ours = run(model, "unet", PerturbedAttention(strength=3.0), batch=2)
    core = PerturbedAttentionGuidance.execute(model, 3.0)[0]
    assert torch.allclose(ours, sample(core, "unet", POSITIVE, NEGATIVE, batch=2), atol=1e-5)


# ---------------------------------------------------------------- identity


@pytest.fixture
def in_bf16(network):
    """The family's network in bf16 for one test."""
    inner = network.model.diffusion_model
    weights = {name: parameter.data for name, parameter in inner.named_parameters()}
    inner.to(torch.bfloat16)
    inner.dtype = torch.bfloat16
    yield network
    inner.dtype = torch.float32
    for name, parameter in inner.named_parameters():
        parameter.data = weights[name]


def test_an_identity_edit_is_bit_identical_in_bf16(family, in_bf16):
    plain = run(in_bf16, family, steps=2, batch=2)
    edit = Same()
    assert torch.equal(run(in_bf16, family, Editing(edit=edit, on=("cond",)), steps=2, batch=2), plain)
    assert {call.q.dtype for call in edit.met} == {torch.bfloat16}
    mapped = evaluate(add_guidance(in_bf16, Editing(edit=SameMap())), family, POSITIVE, NEGATIVE)["denoised"]
    whole = evaluate(in_bf16, family, POSITIVE, NEGATIVE)["denoised"]
    assert (mapped - whole).abs().max() <= 2**-6 * whole.abs().max(), "a few steps of bf16's 8 bits"


def test_materialised_probabilities_change_only_the_rounding(family, network):
    mapped = evaluate(add_guidance(network, Editing(edit=SameMap())), family, POSITIVE, NEGATIVE, batch=2)["denoised"]
    whole = evaluate(network, family, POSITIVE, NEGATIVE, batch=2)["denoised"]
    assert (mapped - whole).abs().max() <= 1e-5 * whole.abs().max(), "fp32"


# ---------------------------------------------------------------- rows


@dataclass(frozen=True, kw_only=True)
class Louder(AttentionEdit):
    """Many times what attention gives: the tiny models' attention whispers."""

    title = "louder attention"

    def output(self, call, attend):
        return attend() * 30.0


@dataclass(frozen=True, kw_only=True)
class LouderSecond(AttentionEdit):
    """The same for the second sample alone."""

    title = "louder attention of the second sample"

    def output(self, call, attend):
        out = call.by_sample(attend()).clone()
        out[:, 1] *= 30.0
        return out.flatten(0, 1)


def overridden(model, function):
    """A clone with another pack's attention override."""
    patched = model.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = function
    return patched


def louder(func, *args, **kwargs):
    return func(*args, **kwargs) * 30.0


def top() -> torch.Tensor:
    mask = torch.zeros(1, 8, 8)
    mask[:, :4] = 1.0
    return mask


def areas(given: list) -> list:
    return having(given, area=(8, 4, 0, 0)) + having(given, area=(8, 8, 0, 0), strength=0.5)


def masks(given: list) -> list:
    return having(given, mask=top(), mask_strength=1.0) + having(given, mask=1 - top(), mask_strength=0.7)


class WideControl(Control):
    """For SD3, which is twice as wide."""

    def get_control(self, *args):
        return {"input": [], "output": [torch.cat([self.residual, self.residual]).reshape(1, 1, 128)]}


def controlled(model, family: str) -> list:
    control = WideControl(family, 1) if family == "sd3" else Control(family, 1)
    return having(POSITIVE, control=control)


PROMPTS = {
    "plain": lambda model, family: (POSITIVE, NEGATIVE),
    "two prompts": lambda model, family: (POSITIVE + conditioning(3), NEGATIVE),
    "areas": lambda model, family: (areas(POSITIVE), NEGATIVE),
    "areas of both": lambda model, family: (areas(POSITIVE), areas(NEGATIVE)),
    "masks": lambda model, family: (masks(POSITIVE), NEGATIVE),
    "another length": lambda model, family: (conditioning(1, 6), conditioning(2, 9)),
    "ControlNet": lambda model, family: (controlled(model, family), NEGATIVE),
    "LoRA hooks": lambda model, family: (  # Z-Image normalises what attention gives: what is loud does not get louder
        having(POSITIVE, hooks=comfy.hooks.create_hook_lora(lora(model, 1), 0.05 if family == "zimage" else 1.0, 0.0)),
        NEGATIVE,
    ),
    "range": lambda model, family: (
        having(POSITIVE, end_percent=0.1) + having(conditioning(3), start_percent=0.1), NEGATIVE
    ),
}  # fmt: skip


@pytest.mark.parametrize("split", [False, True], ids=["joint", "split"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_an_edit_changes_its_rows_and_no_other(family, network, prompts, split):
    base = one_forward_a_cond(network) if split else network

    def predictions(model, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        seen = evaluate(model, family, *PROMPTS[prompts](network, family), batch=batch)
        return seen["cond_denoised"], seen["uncond_denoised"]

    plain, everywhere = predictions(base), predictions(overridden(base, louder))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain, everywhere))
    for who, on in enumerate(("cond", "uncond")):
        found = predictions(add_guidance(base, Editing(edit=Louder(), on=(on,))))
        torch.testing.assert_close(found[who], everywhere[who], rtol=1e-5, atol=1e-5)
        assert torch.equal(found[1 - who], plain[1 - who])
    found = predictions(add_guidance(base, Editing(edit=LouderSecond())))
    for who in (0, 1):
        assert torch.equal(found[who][0], plain[who][0])
        torch.testing.assert_close(found[who][1], everywhere[who][1], rtol=1e-5, atol=1e-5)


def test_an_edit_sees_a_text_once_when_the_host_repeats_it(network, family):
    """Texts of 6 and 9 tokens share a batch on a UNet, with 18 keys; elsewhere they do not share one."""
    lengths = []

    class Lengths(Same):
        def map(self, call, probabilities):
            shown = len(range(*call.site.text.indices(probabilities.shape[-1])))
            lengths.append((call.roles, call.site.kind, shown, probabilities.shape[-1]))
            return probabilities

    edit = Lengths()
    model = add_guidance(network, Editing(edit=edit))
    found = evaluate(model, family, conditioning(1, 6), conditioning(2, 9))["denoised"]
    plain = evaluate(network, family, conditioning(1, 6), conditioning(2, 9))["denoised"]
    assert (found - plain).abs().max() <= 1e-5 * plain.abs().max()
    kind = "cross" if family == "unet" else "joint"
    seen = {(roles, shown) for roles, of, shown, _ in lengths if of == kind}
    assert seen == {(("cond",), 6), (("uncond",), 9)}
    assert all(of != "cross" or shown == keys for _, of, shown, keys in lengths)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading(AttentionEdit):
    """Writes down whose rows it was asked for, and with what keys; of kind "self" or "joint"."""

    met: list

    kinds = frozenset({"self", "joint"})

    def output(self, call, attend):
        self.met.append((call.first, call.samples, float(call.k.abs().max())))
        return attend()


@dataclass(frozen=True, kw_only=True)
class Apart(AttentionEdit):
    """Each sample by itself, the second with keys of zero."""

    kinds = frozenset({"self", "joint"})

    def output(self, call, attend):
        first, second = call.only(slice(0, 1)), call.only(slice(1, None))
        parts = attend(first), attend(second.replace(k=second.k * 0))
        return torch.stack([part.unflatten(0, (-1, 1)) for part in parts], 2).flatten(0, 2)


def test_what_an_edit_asks_for_another_call_reaches_the_edits_before_it(family, network):
    """Two of those before: the call must be handed down, and the rows are those that it has."""
    met = []
    before = [Editing(edit=Reading(met=met)) for _ in range(2)]
    out = run(network, family, *before, Editing(edit=Apart()), batch=2, steps=1)
    torch.testing.assert_close(out, run(network, family, Editing(edit=Apart()), batch=2, steps=1))
    assert {(first, samples, keys > 0) for first, samples, keys in met} == {(0, 1, True), (1, 1, False)}
    assert len(met) == 2 * 2 * sum(site.kind in Apart.kinds for site in sites_of(network.model.diffusion_model))
    assert not torch.equal(out[1], run(network, family, batch=2, steps=1)[1])


# ---------------------------------------------------------------- token layout


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (9, 7), (5, 12)], ids=str)
def test_the_token_grid_of_any_size(family, network, size):
    edit = Same()
    image = torch.zeros(1, CHANNELS[family], *size)
    out = run(network, family, Editing(edit=edit), image=image, steps=1)
    assert out.shape == image.shape
    half_size = tuple(-(-n // 2) for n in size)
    for call in edit.met:
        grid, (height, width) = call.site.grid, size if call.q.shape[2] == size[0] * size[1] else half_size
        assert grid == (1, height, width)
        if call.site.kind == "joint":
            assert call.site.text == slice(0, 7) and call.site.image == slice(7, 7 + height * width)
            assert call.q.shape[2] == 7 + height * width
        else:
            assert call.q.shape[2] == height * width and call.site.image == slice(0, height * width)
            assert call.k.shape[2] == (7 if call.site.kind == "cross" else height * width)
            assert call.site.text == (slice(0, 7) if call.site.kind == "cross" else slice(0))
    assert len({call.site.grid for call in edit.met}) == (2 if family == "unet" else 1)


@pytest.mark.parametrize("method", [None, "index", "offset"], ids=str)
def test_reference_pictures_are_not_the_picture(method):
    """Flux puts their tokens after the picture's; a prompt without one has a forward of its own."""
    model, edit = MODELS["flux"](), Same()
    references = {"reference_latents": [torch.randn(1, 16, 6, 4)]}
    given = having(POSITIVE, **references, **({"reference_latents_method": method} if method else {}))
    plain = sample(model, "flux", given, NEGATIVE, steps=2)
    assert torch.equal(sample(add_guidance(model, Editing(edit=edit)), "flux", given, NEGATIVE, steps=2), plain)
    for call in edit.met:
        assert call.site.text == slice(0, 7) and call.site.image == slice(7, 7 + 16) and call.site.grid == (1, 4, 4)
        assert call.q.shape[2] == 7 + 16 + (6 if call.roles == ("cond",) else 0)
    assert {call.roles for call in edit.met} == {("cond",), ("uncond",)}


# ---------------------------------------------------------------- other packs


def test_overrides_of_two_packs_act_both(family, network):
    """The other pack's is called with what the edit leaves of q, k and v; the edit acts on what it returns."""
    order = []

    def theirs(func, q, *args, **kwargs):
        order.append(float(q.abs().max()))
        return func(q, *args, **kwargs) + 0.1

    class Ours(AttentionEdit):
        def inputs(self, call):
            return call.replace(q=call.q * 0)

        def output(self, call, attend):
            return attend() * 0.5

    def both(func, q, *args, **kwargs):
        return 0.5 * (func(q * 0, *args, **kwargs) + 0.1)

    found = run(overridden(network, theirs), family, Editing(edit=Ours()), steps=2)
    assert order and not any(order)
    torch.testing.assert_close(found, run(overridden(network, both), family, steps=2), rtol=1e-5, atol=1e-5)


def replaced(model, *blocks: tuple):
    patched = model.clone()
    for name, number in blocks:
        patched.set_model_attn1_replace(lambda q, k, v, extra: v, name, number)
    return patched


def test_an_attention_replacement_of_another_node_is_an_error_where_nothing_is_left(caplog):
    model = replaced(MODELS["unet"](), ("middle", 0))
    with pytest.raises(GuidanceError, match=r"^edits: the attention of 'middle' did not run .*attention replacement"):
        run(model, "unet", Editing(edit=LouderSelf(blocks="middle")))
    with caplog.at_level(logging.WARNING, "rudder"):
        run(model, "unet", Editing(edit=LouderSelf()))
    told = [record.getMessage() for record in caplog.records if "replaces or skips" in record.getMessage()]
    assert len(told) == 1 and "skips middle.0," in told[0]


class LouderSelf(Louder):
    kinds = frozenset({"self"})


@pytest.mark.parametrize("method", [PerturbedAttention, SmoothedEnergy])
@pytest.mark.parametrize("node", ["Token Merging", "HyperTile"])
def test_merged_and_tiled_tokens_are_an_error_where_neighbours_count(method, node):
    patch = {"Token Merging": lambda m: TomePatchModel.execute(m, 0.5)[0],
             "HyperTile": lambda m: HyperTile.execute(m, 32, 1, 0, False)[0]}[node]  # fmt: skip
    model = patch(MODELS["unet"]())
    title = re.escape(method.title)
    with pytest.raises(GuidanceError, match=rf"^{title}: the image tokens of 'input.1.0' are not on a grid.*HyperTile"):
        run(model, "unet", method(blocks="input.1"))
    assert run(model, "unet", method(blocks="middle")).isfinite().all(), "they leave deeper blocks alone"


def test_a_wrapper_that_splits_the_batch_is_an_error(family, network):
    def one_by_one(apply_model, args):
        options = args["c"]
        rows = zip(args["input"].split(1), args["timestep"].split(1), options["c_crossattn"].split(1))
        first = {name: options[name][:1] for name in ("y", "guidance") if name in options}
        return torch.cat([apply_model(x, t, **{**options, **first, "c_crossattn": c}) for x, t, c in rows])

    model = network.clone()
    model.set_model_unet_function_wrapper(one_by_one)
    assert run(model, family, batch=2, steps=1).isfinite().all()
    with pytest.raises(GuidanceError, match="splits or extends the batch"):
        run(model, family, Editing(edit=Louder()), batch=2, steps=1)


# ---------------------------------------------------------------- nothing is left


def traces(model) -> list:
    """What a run could leave behind."""
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in model.model.modules()]
    options = {key: dict(value) if isinstance(value, dict) else value for key, value in model.model_options.items()}
    return [sum(len(after) + len(before) for after, before in hooks), options,
            [(key, weight.clone()) for key, weight in model.model.state_dict().items()]]


def untouched(before: list, after: list) -> bool:
    return before[:2] == after[:2] and all(torch.equal(a, b) for (_, a), (_, b) in zip(before[2], after[2]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Breaks(AttentionEdit):
    error: BaseException

    title = "breaks"

    def output(self, call, attend):
        raise self.error


@pytest.mark.parametrize("ending", ["well", "error", "interrupt"])
def test_nothing_survives_the_run(family, network, ending):
    plain, before = run(network, family, steps=2), traces(network)
    assert before[0] == 0
    error = {"well": None, "error": RuntimeError("out of ideas"),
             "interrupt": comfy.model_management.InterruptProcessingException()}[ending]  # fmt: skip
    edit = Louder() if error is None else Breaks(error=error)
    patched = add_guidance(network, Editing(edit=edit))
    wired = traces(patched)
    for _ in range(2):
        if error is None:
            assert not torch.equal(run(patched, family, steps=2), plain)
        else:
            with pytest.raises(type(error)):
                run(patched, family, steps=2)
        assert untouched(before, traces(network)) and untouched(wired, traces(patched))
    assert torch.equal(run(network, family, steps=2), plain)


# ---------------------------------------------------------------- with samplers and other methods


def test_both_sampler_nodes_give_the_same(family, network):
    method = PerturbedAttention(blocks="middle" if family == "unet" else "double.0, joint.0")
    model = add_guidance(network, method)
    found = by_ksampler(model, family, 2)
    assert torch.equal(by_guider(model, family, 2), found)
    assert not torch.equal(by_ksampler(network, family, 2), found)


def test_a_variant_is_of_the_prompt_that_plays_the_positive(kind, model):
    """While R2F's frequent prompt plays it, attention is perturbed for that prompt."""
    seen = []

    class Watch(Guidance):
        def finish(self, step, x0):
            seen.append(x0)
            return x0

    worse = PerturbedAttention(blocks="middle, double.0")
    both = add_guidance(add_guidance(model, worse), Watch())
    sample(add_guidance(both, R2F(frequent=prompt(4, "frequent"), stop=1.0)), kind, POSITIVE, NEGATIVE, steps=2)
    sample(both, kind, conditioning(4), NEGATIVE, steps=2)
    sample(add_guidance(model, Watch()), kind, conditioning(4), NEGATIVE, steps=2)
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-5, atol=1e-5)
    assert (seen[0] - seen[4]).abs().max() > 1e-4, "it acts"


def test_two_methods_with_the_same_variant_pay_for_it_once(kind, model):
    counted, seen = calls(model)
    blocks = "middle, double.0"
    strengths = PerturbedAttention(strength=1.0, blocks=blocks), PerturbedAttention(strength=2.0, blocks=blocks)
    found = run(counted, kind, *strengths, batch=2)
    assert seen["batching"] == [3] * 4 and seen["network"] == [6] * 4
    together = run(model, kind, PerturbedAttention(strength=3.0, blocks=blocks), batch=2)
    torch.testing.assert_close(found, together, rtol=1e-4, atol=1e-4)

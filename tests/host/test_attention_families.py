"""Attention edits on Wan, Qwen-Image, Lumina 2 and Z-Image: what ``test_attention`` says of the others, and what is
theirs: token layouts, rotary embeddings, and how each method acts."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import comfy.ops
import comfy.samplers
import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders import z_image

from rudder.attention.contract import AttentionEdit
from rudder.attention.foreground import Masks
from rudder.attention.mutual import Mutual
from rudder.guidance.contract import GuidanceError, Prompt
from rudder.guidance.contrast import PerturbedAttention, SmoothedEnergy
from rudder.guidance.entropy import AttentionEntropy
from rudder.guidance.features import PlugAndPlay
from rudder.guidance.local_blend import LocalBlend
from rudder.guidance.mutual import MasaCtrl
from rudder.guidance.nag import NAG
from rudder.guidance.rival import RIVAL
from rudder.guidance.sag import SelfAttentionGuidance
from rudder.host import add_guidance
from rudder.host.attention import OVERRIDE, Attention
from rudder.host.sites import sites_of
from rudder.host.words import check_lengths, encoded, layout
from rudder.nodes.inspect import RudderInspectAttention

from . import test_attention as attention
from .models import (
    MORE,
    WAN,
    _patcher,
    calls,
    conditioning,
    having,
    latent,
    sample,
    tiny_vace,
    tiny_wan,
    tiny_wan_i2v,
)
from .registry import NEGATIVE, POSITIVE
from .test_attention import (  # noqa: F401 (the same tests, on the families of this file)
    Editing,
    Same,
    SameMap,
    test_an_identity_edit_is_bit_identical_and_meets_every_site,
    test_an_identity_edit_is_bit_identical_in_bf16,
    test_materialised_probabilities_change_only_the_rounding,
    test_nothing_survives_the_run,
)
from .test_attention_full import Count
from .test_branches import one_forward_a_cond
from .test_nodes import call as node
from .test_prompt_to_prompt import CAT, SOURCE, WET, batch, p2p


@pytest.fixture(scope="module", params=list(MORE))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def network(family: str):
    return MORE[family]()


@pytest.fixture
def in_bf16(network):
    """The family's network in bf16 for one test; Wan cuts patches in fp32."""
    inner = network.model.diffusion_model
    weights = {name: parameter.data for name, parameter in inner.named_parameters()}
    inner.to(torch.bfloat16)
    if isinstance(inner, WanModel):
        inner.patch_embedding.float()
    inner.dtype = torch.bfloat16
    yield network
    inner.dtype = torch.float32
    for name, parameter in inner.named_parameters():
        parameter.data = weights[name]


def run(model, family, *methods, positive=POSITIVE, negative=NEGATIVE, **options):
    for method in methods:
        model = add_guidance(model, method)
    return sample(model, family, positive, negative, **options)


def met(model, family, kinds=Same.kinds, **options) -> list:
    """The attention calls of one step, with the sites as edits see them."""
    edit = type("Same", (Same,), {"kinds": kinds})()
    run(model, family, Editing(edit=edit), steps=1, **options)
    assert edit.met
    return edit.met


# ---------------------------------------------------------------- rows and names


@pytest.mark.parametrize("split", [False, True], ids=["joint", "split"])
@pytest.mark.parametrize("prompts", attention.PROMPTS)
def test_an_edit_changes_its_rows_and_no_other(family, network, prompts, split, monkeypatch):
    if prompts == "ControlNet" and family != "qwen":
        pytest.skip("ComfyUI has no ControlNet for it: Wan's VACE has tests of its own, Z-Image's is a model patch")
    if family in ("lumina", "zimage"):  # the oracle knows no sites, and attention among the text alone is none
        def louder(func, *args, **kwargs):
            return func(*args, **kwargs) * (30.0 if kwargs["transformer_options"].get("block_type") else 1.0)

        monkeypatch.setattr(attention, "louder", louder)
        for name in ("Louder", "LouderSecond"):
            monkeypatch.setattr(attention, name, partial(getattr(attention, name), blocks="joint"))
    attention.test_an_edit_changes_its_rows_and_no_other(family, network, prompts, split)


def test_overrides_of_two_packs_act_both(family, network):
    """The other pack's is called with what the edit leaves of q, k and v; the edit acts on what it returns."""
    class Ours(AttentionEdit):
        def inputs(self, call):
            return call.replace(q=call.q * 0)

        def output(self, call, attend):
            return attend() * 0.5

    def theirs(func, q, *args, **kwargs):
        return func(q, *args, **kwargs) + 0.1

    def both(func, q, *args, **kwargs):
        if not kwargs["transformer_options"].get("block_type"):  # before the blocks
            return theirs(func, q, *args, **kwargs)
        return 0.5 * theirs(func, q * 0, *args, **kwargs)

    found = run(attention.overridden(network, theirs), family, Editing(edit=Ours(blocks="block, joint")), steps=2)
    expected = run(attention.overridden(network, both), family, steps=2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


NAMES = {
    "wan": ["block.0 self", "block.0 cross", "block.1 self", "block.1 cross"],
    "qwen": ["joint.0 joint", "joint.1 joint"],
    "lumina": ["refiner.0 self", "refiner.1 self", "joint.0 joint", "joint.1 joint"],
}
NAMES["zimage"] = NAMES["lumina"]


def test_names(family, network):
    assert [f"{site.name} {site.kind}" for site in sites_of(network.model.diffusion_model)] == NAMES[family]


# ---------------------------------------------------------------- token layout


def padded(family: str, tokens: int) -> int:
    return tokens + (-tokens % 32 if family == "zimage" else 0)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (9, 7), (5, 12)], ids=str)
@pytest.mark.parametrize("frames", [1, 3])
def test_the_token_grid_of_any_size(family, network, size, frames):
    if frames > 1 and latent(family).ndim == 4:
        pytest.skip("a family of pictures")
    image = torch.zeros(2, 16, *([frames] if latent(family).ndim == 5 else []), *size)
    grid = (frames, *(-(-n // 2) for n in size))
    tokens = grid[0] * grid[1] * grid[2]
    for call in met(network, family, image=image):
        site, queries, keys = call.site, call.q.shape[2], call.k.shape[2]
        start = padded(family, 7) if site.kind == "joint" else 0
        assert site.grid == grid and site.image == slice(start, start + tokens)
        assert queries == start + padded(family, tokens) and keys == (7 if site.kind == "cross" else queries)
        assert site.text == (slice(0) if site.kind == "self" else slice(0, 7))
        if site.kind == "cross":
            assert call.rope is None
        else:
            assert call.rope.shape[1:] == (1, queries, call.q.shape[-1] // 2, 2, 2)


def test_image_tokens_are_the_grid_in_order(family, network):
    """A change of one cell of the latent changes, before the first attention, the q of its token alone."""
    edits, names = [], {"self", "joint"}
    noise = torch.randn(latent(family, 1, 12).shape, generator=torch.Generator().manual_seed(1))
    for value in (0.0, 9.0):
        changed = noise.clone()
        changed[..., 6, 3] += value
        edits.append(met(network, family, image=torch.zeros_like(noise), noise=changed)[0])
    before, after = edits
    moved = (before.q != after.q).any(-1).any(1)[0].nonzero().flatten() - before.site.image.start
    frames, height, width = before.site.grid
    assert before.site.kind in names and moved.tolist() == [f * height * width + 3 * width + 1 for f in range(frames)]


def test_image_to_video_looks_at_the_start_picture_first():
    """A site of its own, at which what is about text does not act; the text is the second."""
    model, family = tiny_wan_i2v(), "wan"
    names = [f"{site.name} {site.kind}" for site in sites_of(model.model.diffusion_model)]
    assert names == [f"block.{i} {kind}" for i in (0, 1) for kind in ("self", "image", "cross")]

    class Vision:
        penultimate_hidden_states = torch.randn(1, 5, 1280, generator=torch.Generator().manual_seed(3))

    positive, negative = (having(given, clip_vision_output=Vision()) for given in (POSITIVE, NEGATIVE))
    for given in ((positive, negative), (POSITIVE, NEGATIVE)):
        texts = dict(zip(("positive", "negative"), given))
        plain = run(model, family, **texts)
        edit = Same()
        assert torch.equal(run(model, family, Editing(edit=edit), **texts), plain)
        assert [call.site.kind for call in edit.met[:4]] == ["self", "cross"] * 2
        assert all(call.k.shape[2] == 7 for call in edit.met if call.site.kind == "cross")
        for method in (nag(), PerturbedAttention(blocks="block.1")):
            assert not torch.equal(run(model, family, method, **texts), plain)
    looks = met(model, family, kinds=frozenset({"image"}), positive=positive, negative=negative)
    assert {call.k.shape[2] for call in looks} == {5}
    copy = [[positive[0][0] * (1 + 1e-6), dict(positive[0][1])]]
    torch.testing.assert_close(run(model, family, nag(copy), positive=positive, negative=negative),
                               run(model, family, positive=positive, negative=negative), rtol=1e-3, atol=1e-3)


def test_a_wan_with_blocks_of_its_own_beside():
    """VACE's control blocks attend too, and are no sites."""
    model, family, edit = tiny_vace(), "wan", Same()
    plain = run(model, family, steps=2)
    assert torch.equal(run(model, family, Editing(edit=edit), steps=2), plain)
    assert [f"{call.site.name} {call.site.kind}" for call in edit.met] == NAMES["wan"] * 2
    for method in (PerturbedAttention(blocks="block.1"), nag()):
        assert not torch.equal(run(model, family, method, steps=2), plain)


def test_autoregressive_video_is_refused():
    """It attends without the host's options, so that no edit could act."""
    configuration = getattr(comfy.supported_models, "WAN21_CausalAR_T2V", None)
    if configuration is None:
        pytest.skip("this ComfyUI has no such model")
    model = _patcher(type("Tiny", (configuration,), {})({**WAN, "causal_ar": True}), None)

    def frame_by_frame(model) -> torch.Tensor:
        guider, image = comfy.samplers.CFGGuider(model), latent("wan")
        guider.set_conds(POSITIVE, NEGATIVE)
        guider.set_cfg(1.0)
        sigmas, sampler = torch.tensor([1.0, 0.5, 0.0]), comfy.samplers.ksampler("ar_video")
        return guider.sample(torch.randn_like(image), image, sampler, sigmas, disable_pbar=True, seed=7)

    assert frame_by_frame(model).isfinite().all()
    with pytest.raises(GuidanceError, match="autoregressive video"):
        frame_by_frame(add_guidance(model, AttentionEntropy(trained=(2, 2))))


def references(family: str) -> tuple:
    """A model of the family, a positive with references, the tokens before and after the picture's of 2 x 16."""
    picture = torch.randn(1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(4))
    if family == "wan, first":
        model = tiny_wan(in_dim_ref_conv=16)
        return model, having(POSITIVE, reference_latents=[torch.randn(1, 16, 1, 8, 8)]), 16, 0
    if family == "wan, after":
        return tiny_wan(), having(POSITIVE, time_dim_concat=torch.randn(1, 16, 3, 8, 8)), 0, 48
    if family == "qwen":
        return MORE[family](), having(POSITIVE, reference_latents=[picture]), 7, 6
    more = {"reference_latents": [picture[:, :, 0]], "reference_latents_text_embeds": [conditioning(9, 40)[0][0]]}
    return MORE[family](), having(POSITIVE, **more), 64 + 32 + 32, 16


@pytest.mark.parametrize("name", ["wan, first", "wan, after", "qwen", "zimage"])
def test_references_are_not_the_picture(name):
    (model, positive, before, after), family = references(name), name.split(",")[0]
    plain, edit = run(model, family, positive=positive, steps=2), Same()
    assert torch.equal(run(model, family, Editing(edit=edit, on=("cond",)), positive=positive, steps=2), plain)
    tokens = 32 if family == "wan" else 16
    assert {call.roles for call in edit.met} == {("cond",)}
    for call in edit.met:
        start = before if call.site.kind != "self" or family == "wan" else 32  # a reference's 32 in the refiner
        assert call.site.image == slice(start, start + tokens)
        assert call.q.shape[2] == start + tokens + after
        if call.rope is not None:
            assert call.rope.shape[2] == call.q.shape[2]
    changed = run(model, family, PerturbedAttention(blocks=BLOCKS), positive=positive, steps=2)
    assert changed.isfinite().all() and not torch.equal(changed, plain)


# ---------------------------------------------------------------- rotary embedding


def by_hand(family: str, module, args: tuple, kwargs: dict) -> torch.Tensor:
    """The queries of an attention module before its rotary embedding, ``[B, heads, tokens, D]``."""
    if family == "wan":
        return module.norm_q(module.q(args[0])).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
    if family == "qwen":
        text = module.add_q_proj(kwargs["encoder_hidden_states"]).unflatten(-1, (module.heads, -1))
        image = module.to_q(kwargs["hidden_states"]).unflatten(-1, (module.heads, -1))
        return torch.cat([module.norm_added_q(text), module.norm_q(image)], 1).transpose(1, 2)
    q = module.qkv(args[0])[..., : module.n_local_heads * module.head_dim]
    return module.q_norm(q.unflatten(-1, (module.n_local_heads, -1))).transpose(1, 2)


def test_queries_before_their_rotary_embedding_are_the_projections(family, network):
    inner = network.model.diffusion_model
    blocks = inner.blocks if family == "wan" else inner.transformer_blocks if family == "qwen" else [
        *inner.noise_refiner, *inner.layers]
    seen, hooks = [], []
    for block in blocks:
        module = block.self_attn if family == "wan" else block.attn if family == "qwen" else block.attention
        hooks.append(module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(by_hand(family, m, args, kwargs)), with_kwargs=True))
    try:
        calls = [call for call in met(network, family) if call.site.kind != "cross"]
    finally:
        for hook in hooks:
            hook.remove()
    assert len(calls) == len(seen) == len(blocks)
    for call, plain in zip(calls, seen):
        torch.testing.assert_close(call.unrotated(call.q), plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(call.rotated(plain), call.q, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(call.q, plain, atol=1e-3)
        image = call.site.image
        torch.testing.assert_close(call.unrotated(call.q[:, :, image], image), plain[:, :, image], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- maps


def test_inspect_attention_lists_and_draws(family, network):
    def inspected(**inputs):
        image = {"samples": torch.zeros(*latent(family, 2).shape[:-2], 6, 10)}
        return node(RudderInspectAttention, model=network, positive=POSITIVE, latent_image=image, **inputs)

    _, text = inspected()
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines()[1:]]
    assert [f"{row[0]} {row[1]}" for row in rows] == NAMES[family]
    assert {row[-1] for row in rows} == {"2 x 3 x 5" if family == "wan" else "3 x 5"}
    for draw in ("text to image", "self"):
        image, _ = inspected(blocks="all", draw=draw, tokens="1, 3-4")
        assert image.shape[0] == 2 and image.isfinite().all() and image.min() < image.max()


# ---------------------------------------------------------------- methods on plain runs

AWAY = conditioning(8)


def nag(conditioning=AWAY, **options) -> NAG:
    return NAG(negative=Prompt(conditioning, "negative"), **options)


BLOCKS = "block.1, joint.1"
METHODS = {  # with what it evaluates a step at cfg 1
    "PAG": (PerturbedAttention(blocks=BLOCKS), [2]),
    "SEG": (SmoothedEnergy(blocks=BLOCKS, sigma=1.0), [2]),
    "SEG, mean": (SmoothedEnergy(blocks=BLOCKS, sigma=1e5), [2]),
    "SAG": (SelfAttentionGuidance(sigma=1.0), [1, 1]),
    "entropy": (AttentionEntropy(trained=(2, 2)), [1]),
    "NAG": (nag(), [2]),
}


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_acts_at_any_cfg_and_leaves_nothing(family, network, name, cfg):
    method, cost = METHODS[name]
    if name == "NAG" and family == "wan":
        cost = [1]
    plain = run(network, family, cfg=cfg, batch=2, steps=2)
    counted, seen = calls(network)
    out = run(counted, family, method, cfg=cfg, batch=2, steps=2)
    assert out.isfinite().all() and not torch.equal(out, plain)
    assert seen["network"] == [2 * (n + (cfg > 1 and i == 0)) for _ in range(2) for i, n in enumerate(cost)]
    assert torch.equal(run(network, family, method, cfg=cfg, batch=2, steps=2), out)
    assert torch.equal(run(network, family, cfg=cfg, batch=2, steps=2), plain)


@pytest.mark.parametrize("name", METHODS)
def test_a_split_batch_gives_the_same(family, network, name):
    method, _ = METHODS[name]
    together = run(network, family, method, batch=2, steps=2)
    split = one_forward_a_cond(add_guidance(network, method))
    torch.testing.assert_close(run(split, family, batch=2, steps=2), together, rtol=1e-4, atol=1e-3)


OFF = [PerturbedAttention(strength=0.0), SmoothedEnergy(sigma=0.0), SelfAttentionGuidance(strength=0.0),
       nag(strength=1.0), nag(alpha=0.0)]


@pytest.mark.parametrize("method", OFF, ids=lambda method: method.title)
def test_off_is_bit_identical_and_free(family, network, method):
    counted, seen = calls(network)
    assert torch.equal(run(counted, family, method, steps=2), run(network, family, steps=2))
    assert seen["network"] == [2] * 2


def test_entropy_at_the_trained_size_is_bit_identical(family, network):
    assert torch.equal(run(network, family, AttentionEntropy(trained=(8, 8))), run(network, family))


def test_blocks_that_are_not_there_are_told(family, network):
    """The preset names a block that a model this small lacks, or has."""
    if family == "wan":
        with pytest.raises(GuidanceError, match=r"no joint and self attention .* It has: block.0, block.1\."):
            run(network, family, PerturbedAttention())
    else:
        assert run(network, family, PerturbedAttention(), steps=1).isfinite().all()


# ---------------------------------------------------------------- NAG


def test_the_positive_as_negative_is_plain(family, network):
    copy = [[POSITIVE[0][0] * (1 + 1e-6), dict(POSITIVE[0][1])]]
    torch.testing.assert_close(run(network, family, nag(copy)), run(network, family), rtol=1e-3, atol=1e-3)


def test_what_queries_get_from_another_text_is_what_that_prompt_gives(network, family):
    """The first cross-attention has queries that no text has touched yet."""
    if family != "wan":
        pytest.skip("joint attention has no text of its own")
    seen, method = [], nag(blocks="block.1")

    class Reads(AttentionEdit):
        kinds = frozenset({"cross"})

        def output(self, call, attend):
            seen.append(attend())
            if method.branch in reads:
                seen.append(call.to_text(call.q, method.branch))
            return attend()

    reads = {method.branch}
    run(network, family, method, Editing(edit=Reads(blocks="block.0")), cfg=1.0, steps=1, batch=2)
    reads.clear()
    run(network, family, Editing(edit=Reads(blocks="block.0")), positive=AWAY, cfg=1.0, steps=1, batch=2)
    own, other, expected = seen
    torch.testing.assert_close(other, expected)
    assert not torch.allclose(own, other, rtol=0.01, atol=0)


def test_a_negative_of_another_length(network, family):
    """Encoders of these families do not pad: joint attention cannot take it, and that is said."""
    longer = conditioning(8, tokens=11)
    if family == "wan":
        assert run(network, family, nag(longer), steps=1).isfinite().all()
        return
    with pytest.raises(ValueError, match=r"different forward passes.*token count"):
        run(network, family, nag(longer), steps=1)


# ---------------------------------------------------------------- edits of a source picture

MASK = torch.cat([torch.ones(1, 8, 4), torch.zeros(1, 8, 4)], 2)
POSITIVES, PROMPTS = batch(SOURCE, CAT, WET)
EDITS = {
    "MasaCtrl": MasaCtrl(start=0.0),
    "MasaCtrl, union": MasaCtrl(start=0.0, depth=0.0, union=True),
    "MasaCtrl, masks": MasaCtrl(start=0.0, depth=0.0, masks=Masks(MASK, MASK)),
    "PnP": PlugAndPlay(),
    "RIVAL": RIVAL(),
    "P2P": p2p(PROMPTS, self_tokens=64),
    "P2P, weights": p2p(PROMPTS, self_end=0.0, words=(("wet", 2.0), ("cat", 0.0))),
}


def edited(model, family, *methods, positive=POSITIVES, size=(8, 12), split=False, **options):
    for method in methods:
        model = add_guidance(model, method)
    model = one_forward_a_cond(model) if split else model  # last: a clone forgets it
    image = torch.zeros(*latent(family, 3).shape[:-2], *size)
    noise = torch.randn(image[:1].shape, generator=torch.Generator().manual_seed(5)).expand_as(image).clone()
    return sample(model, family, positive, NEGATIVE, image=image, noise=noise, **options)


@pytest.mark.parametrize("name", EDITS)
def test_the_source_is_what_it_is_without_the_node_and_edits_are_not(family, network, name):
    plain = edited(network, family)
    counted, seen = calls(network)
    out = edited(counted, family, EDITS[name])
    assert out.isfinite().all() and torch.equal(out[0], plain[0])
    assert not torch.equal(out[1], plain[1]) and not torch.equal(out[2], plain[2])
    assert seen["network"] == [6] * 4, "no further evaluation"
    torch.testing.assert_close(edited(network, family, EDITS[name], split=True), out, rtol=1e-4, atol=1e-3)
    assert torch.equal(edited(network, family), plain)


def test_masks_from_words(family, network):
    method = MasaCtrl(start=0.0, depth=0.0, edit=PROMPTS, words=("dog", "cat"))
    out, plain = edited(network, family, method), edited(network, family)
    assert torch.equal(out[0], plain[0]) and out.isfinite().all() and not torch.equal(out[1:], plain[1:])
    torch.testing.assert_close(edited(network, family, method, split=True), out, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_local_blend_reads_the_words(family, network, threshold):
    """Above all of a map nothing may change, above none of it everything."""
    out = edited(network, family, LocalBlend(edit=PROMPTS, blocks=BLOCKS, threshold=threshold))
    plain = edited(network, family)
    expected = plain[:1].expand_as(plain) if threshold else plain
    torch.testing.assert_close(out, expected, rtol=0 if threshold == 0 else 1e-5, atol=0 if threshold == 0 else 1e-5)


def test_masactrl_leaves_the_first_blocks_alone(family, network):
    edit = Mutual(depth=0.625)
    acting = [site.name for site in sites_of(network.model.diffusion_model) if edit.acts_at(site)]
    assert acting == ["block.1" if family == "wan" else "joint.1"]


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("method", [PerturbedAttention(blocks=BLOCKS), MasaCtrl(start=0.0, depth=0.0, union=True)],
                         ids=lambda method: method.title)
def test_a_text_with_a_mask(method):
    """Qwen-Image hides padding from all; a text whose padding is hidden is as the text without it."""
    model, mask = MORE["qwen"](), torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    hidden = having(POSITIVE, attention_mask=mask)
    short = [[POSITIVE[0][0][:, :5], POSITIVE[0][1]]]
    run_on = edited if isinstance(method, MasaCtrl) else run
    given = [{"positive": positive, "steps": 2} for positive in (hidden, short)]
    same = Editing(edit=Same())
    assert torch.equal(run_on(model, "qwen", same, **given[0]), run_on(model, "qwen", **given[0]))
    for methods in ([], [Editing(edit=SameMap())], [method]):
        found, expected = (run_on(model, "qwen", *methods, **options) for options in given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_language_models_take_prompts_of_one_length():
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    options = {"qwen3_4b_model_config": small, "dtype": torch.float32}
    with torch.inference_mode(False):
        target = ClipTarget(z_image.ZImageTokenizer, z_image.te())
        clip = comfy.sd.CLIP(target, model_options=options, disable_dynamic=True)
        for parameter in clip.cond_stage_model.parameters():
            parameter.data = torch.full_like(parameter, 0.02)
    [[features, _]], prompts = encoded(clip, ("dog runs", "cat runs"))
    assert len(features) == 2 and prompts.changed(1) == (prompts.positions(0, "dog"), prompts.positions(1, "cat"))
    assert prompts.positions(0, "dog") and prompts.positions(0, "runs") == prompts.positions(1, "runs")
    chinese = layout(clip, clip.tokenize("一只猫在草地上，", return_word_ids=True), "qwen3_4b")
    assert {"猫", "在", "，", "<|im_end|>"} <= set(chinese.words) and chinese.find("一只猫")
    with pytest.raises(ValueError, match=r"have \d+, \d+ tokens, and this text encoder does not pad"):
        encoded(clip, ("a dog runs", "a small dog runs"))
    with pytest.raises(ValueError, match="does not pad"):
        check_lengths([12, 17], ())  # Qwen-Image's, whose template is cut off: its words are not known
    for names in (("l",), ("t5xxl",), ("l", "t5xxl"), ("umt5xxl",)):
        check_lengths([77, 154], names)


# ---------------------------------------------------------------- full size


META = {"dtype": torch.float32, "device": "meta", "operations": comfy.ops.disable_weight_init}
WAN_14B = {"model_type": "t2v", "dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
LUMINA_2 = {"in_channels": 16, "dim": 2304, "n_layers": 26, "n_heads": 24, "n_kv_heads": 8, "qk_norm": True,
            "cap_feat_dim": 2304, "axes_dims": [32, 32, 32]}  # fmt: skip
Z_IMAGE = {"in_channels": 16, "dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30, "qk_norm": True,
           "cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "ffn_dim_multiplier": 8 / 3, "z_image_modulation": True,
           "pad_tokens_multiple": 32}  # fmt: skip
NETWORKS = {  # network, shape of the latents, width of the text, hits of one forward
    "Wan 14B": (lambda: WanModel(**WAN_14B, **META), (3, 32, 32), 4096, {"self": 40, "cross": 40}),
    "Wan 14B i2v": (lambda: WanModel(**WAN_14B | {"model_type": "i2v"}, **META), (3, 32, 32), 4096,
                    {"self": 40, "cross": 40, "image": 40}),
    "Qwen-Image": (lambda: QwenImageTransformer2DModel(**META), (1, 32, 32), 3584, {"joint": 60}),
    "Lumina 2": (lambda: NextDiT(**LUMINA_2, **META), (32, 32), 2304, {"self": 2, "joint": 26}),
    "Z-Image": (lambda: NextDiT(**Z_IMAGE, **META), (32, 32), 2560, {"self": 2, "joint": 30}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_hits_of_one_forward(name):
    build, size, width, hits = NETWORKS[name]
    network, x = build(), torch.zeros(2, 16, *size, device="meta")
    inputs = {"context": torch.zeros(2, 9, width, device="meta")}
    if width in (2304, 2560):
        inputs["num_tokens"] = 9
    edit = Count(seen=Counter())
    object.__setattr__(edit, "kinds", frozenset({"self", "cross", "joint", "image"}))
    access = Attention()
    access.who, access.step = {0: ("uncond",), 1: ("cond",)}, SimpleNamespace(x=x[:1])
    access.acting = [(edit, ())]

    def forward(x, t, transformer_options):
        return network(x, t, transformer_options=transformer_options, **inputs)

    forward.class_obj = SimpleNamespace(diffusion_model=network)
    options = {"uuids": [0, 1], OVERRIDE: lambda func, q, *args, **kwargs: q.transpose(1, 2).flatten(2)}  # of the text
    out = access.apply_model(forward, x, torch.zeros(2, device="meta"), transformer_options=options)
    assert out.shape == x.shape
    assert {kind: sum(n for (k, _), n in edit.seen.items() if k == kind) for kind, _ in edit.seen} == hits

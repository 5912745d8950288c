"""Prompt-to-Prompt in the real host: what stays bit-identical, what must differ, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.sample
import pytest
import torch

from rudder.attention.contract import AttentionEdit
from rudder.attention.edit_prompts import EditPrompts
from rudder.attention.operations import operation
from rudder.attention.prompt_to_prompt import TextMaps
from rudder.attention.words import Tokens
from rudder.guidance.contract import GuidanceError
from rudder.guidance.contrast import PerturbedAttention
from rudder.guidance.local_blend import LocalBlend
from rudder.guidance.prompt_to_prompt import PromptToPrompt
from rudder.guidance.r2f import R2F
from rudder.host import add_guidance
from rudder.nodes.prompt_to_prompt import RudderLocalBlend, RudderPromptToPrompt

from .models import MODELS, conditioning, latent, sample
from .registry import NEGATIVE, POSITIVE, prompt
from .test_attention import Editing
from .test_branches import one_forward_a_cond
from .test_nodes import call

SOURCE, CAT, WET, SAME = "a dog runs", "a cat runs", "a wet dog runs", "a dog runs"
SEEDS = {SOURCE: 1, CAT: 5, WET: 6}
TOKENS = 7


def batch(*texts: str) -> tuple[list, EditPrompts]:
    """What Source and Edits makes of texts, with random features."""
    parts = [conditioning(SEEDS[text], TOKENS)[0] for text in texts]
    features = torch.cat([part[0] for part in parts])
    positive = [[features, {"pooled_output": torch.cat([part[1]["pooled_output"] for part in parts])}]]
    layouts = []
    for text in texts:
        words = tuple(text.split())
        keys = [(0, "start", 0), *range(len(words))]
        keys += [(0, "end", i) for i in range(TOKENS - len(keys))]
        layouts.append((Tokens("CLIP", words, tuple(keys)),))
    return positive, EditPrompts(texts, tuple(layouts), (features,))


def run(model, family, positive, *methods, size=(8, 8), noise=None, **options):
    for method in methods:
        model = add_guidance(model, method)
    rows = len(positive[0][0])
    image = torch.zeros(rows, latent(family).shape[1], *size)
    noise = comfy.sample.prepare_noise(image, 7, [0] * rows) if noise is None else noise
    return sample(model, family, positive, NEGATIVE, image=image, noise=noise, **options)


def p2p(prompts: EditPrompts, **options) -> PromptToPrompt:
    return PromptToPrompt(edit=prompts, **options)


@pytest.mark.parametrize("split", [False, True], ids=["joint", "split"])
def test_equal_prompts_give_equal_rows(family, network, split):
    positive, prompts = batch(SOURCE, SAME, SAME)
    model = one_forward_a_cond(network.clone()) if split else network
    out = run(model, family, positive, p2p(prompts, cross_end=1.0, self_end=1.0), size=(8, 12))
    assert torch.equal(out[1], out[0]) and torch.equal(out[2], out[0])


def test_nothing_kept_is_plain_sampling(family, network):
    positive, prompts = batch(SOURCE, CAT, WET)
    assert torch.equal(run(network, family, positive, p2p(prompts, cross_end=0.0, self_end=0.0)),
                       run(network, family, positive))


@pytest.mark.parametrize("options", [{}, {"words": (("cat", 2.0),)}, {"mode": "style", "renorm": "row"}], ids=str)
def test_the_source_is_as_without_the_node_and_the_edits_are_not(family, network, options):
    positive, prompts = batch(SOURCE, CAT, WET)
    plain = run(network, family, positive)
    blend = LocalBlend(edit=prompts, words=("dog", "cat"), blocks="" if family == "unet" else "double, joint")
    for methods in ([p2p(prompts, **options)], [p2p(prompts, **options), blend]):
        out = run(network, family, positive, *methods)
        assert torch.equal(out[0], plain[0])
        assert not any(torch.equal(out[i], other[i]) for i in (1, 2) for other in (plain, out[:1].expand_as(out)))


@pytest.mark.parametrize("options", [{}, {"words": (("wet", -1.0),), "self_end": 0.0}], ids=str)
def test_rows_do_not_mind_how_they_are_batched(family, network, options):
    positive, prompts = batch(SOURCE, CAT, WET)
    together = run(network, family, positive, p2p(prompts, **options))
    split = run(one_forward_a_cond(network.clone()), family, positive, p2p(prompts, **options))
    assert torch.allclose(split, together, atol=1e-5)
    positive, prompts = batch(SOURCE, WET)
    alone = run(network, family, positive, p2p(prompts, **options))
    assert torch.allclose(alone, together[[0, 2]], atol=1e-5)


def test_an_exchanged_word_takes_the_old_words_map():
    """One token for one token: in every cross-attention the edit's probabilities are the source's."""
    positive, prompts = batch(SOURCE, CAT)
    network, seen = MODELS["unet"](), []

    @dataclass(frozen=True, kw_only=True, eq=False)
    class Watched(AttentionEdit):
        kinds = frozenset({"cross"})

        def output(self, call, attend):
            seen.append((call, attend()))
            return seen[-1][1]

    run(network, "unet", positive, p2p(prompts, self_end=0.0), Editing(edit=Watched(), on=("cond",)), steps=1)
    assert len(seen) == 7
    for met, out in seen:
        assert torch.allclose(out[1], met.probabilities()[0] @ met.v[1], atol=1e-5)


def test_a_text_of_several_blocks_in_the_negative_changes_nothing(network, family):
    """The host repeats the prompts' tokens to the length of the negative's; the words are still the same."""
    if family != "unet":
        pytest.skip("only cross-attention repeats text")
    positive, prompts = batch(SOURCE, CAT)
    long = [[NEGATIVE[0][0].repeat(1, 3, 1), NEGATIVE[0][1]]]
    ours = [sample(add_guidance(network, p2p(prompts)), family, positive, negative, image=latent(family, 2),
                   noise=comfy.sample.prepare_noise(latent(family, 2), 7, [0, 0])) for negative in (NEGATIVE, long)]
    assert torch.allclose(*ours, atol=1e-4)


def test_prompts_that_were_repeated_to_one_length_are_edited_as_before():
    """As for prompts of one and of two blocks of 77 tokens in a batch: token i is i modulo the prompt's own length."""
    network = MODELS["unet"]()
    positive, prompts = batch(SOURCE, WET)
    features, settings = positive[0]
    twice = features.repeat(1, 2, 1)
    longer = EditPrompts(prompts.texts, prompts.layouts, (twice,))
    options = {"words": (("wet", 1.5),), "mode": "refine"}
    ours = run(network, "unet", [[twice, settings]], p2p(longer, **options), LocalBlend(edit=longer))
    plain = run(network, "unet", positive, p2p(prompts, **options), LocalBlend(edit=prompts))
    assert torch.allclose(ours, plain, atol=1e-4)


def test_the_maps_are_those_of_the_papers_rule():
    """Cross-attention in the whole run by hand: the source's map for the words, the edit's for the new one."""
    positive, prompts = batch(SOURCE, WET)
    network, seen = MODELS["unet"](), []

    class Watched(TextMaps):
        def output(self, call, attend):
            out = super().output(call, attend)
            seen.append((call, out))
            return out

    how = operation(prompts.layouts[0], prompts.layouts[1], "refine")
    edit = Watched(operations=[None, how], inside=[None, torch.ones(TOKENS, dtype=torch.bool)])
    run(network, "unet", positive, Editing(edit=edit, on=("cond",)), steps=1)
    assert len(seen) == 7
    for met, out in seen:
        source, target = met.by_sample(met.probabilities())[0]
        expected = target.clone()
        expected[..., [0, 1]] = source[..., [0, 1]]  # start, a
        expected[..., [3, 4, 5, 6]] = source[..., [2, 3, 4, 5]]  # dog, runs, end, one of two paddings
        assert torch.allclose(out[1], expected @ met.v[1], atol=1e-5)


def test_a_local_blend_keeps_the_rest_to_the_last_bit(family, network):
    positive, prompts = batch(SOURCE, CAT, WET)
    blocks = "" if family == "unet" else "double, joint.1"
    for threshold in (0.3, 1.0):
        out = run(network, family, positive, LocalBlend(edit=prompts, blocks=blocks, threshold=threshold), size=(8, 12))
        kept = (out == out[:1]).all(1).flatten(1).float().mean(1)
        assert kept[0] == 1 and (threshold < 1 or bool((kept == 1).all()))
    wide = run(network, family, positive, LocalBlend(edit=prompts, blocks=blocks, threshold=0.0))
    assert torch.equal(wide, run(network, family, positive))


def test_a_blend_reads_a_transformer_where_it_is_not_told(family, network):
    positive, prompts = batch(SOURCE, CAT, WET)
    found, told = (run(network, family, positive, LocalBlend(edit=prompts, blocks=blocks, threshold=0.9999))
                   for blocks in ("", "all"))  # so few blocks are all read
    assert torch.equal(found, told) and not torch.equal(found, run(network, family, positive))


def test_windows_begin_and_end(family, network):
    positive, prompts = batch(SOURCE, CAT, WET)
    plain = run(network, family, positive)
    half = run(network, family, positive, LocalBlend(edit=prompts, threshold=1.0, end=0.5))
    assert not torch.equal(half, plain) and not torch.equal(half[1:], half[:1].expand_as(half[1:]))
    late = run(network, family, positive, p2p(prompts, self_end=0.8, start=0.3))
    assert not torch.equal(late, run(network, family, positive, p2p(prompts, self_end=0.8))) and torch.equal(
        late[0], plain[0])


def test_it_goes_with_other_methods(family, network):
    positive, prompts = batch(SOURCE, CAT)
    worse = PerturbedAttention(strength=2.0, blocks="middle" if family == "unet" else "")
    one = run(network, family, positive, p2p(prompts), worse)
    assert torch.equal(one, run(network, family, positive, worse, p2p(prompts)))
    assert torch.equal(one[0], run(network, family, positive, worse)[0])
    assert not torch.equal(one, run(network, family, positive, p2p(prompts)))
    with pytest.raises(GuidanceError, match="both decide the positive prompt of a step"):
        run(network, family, positive, p2p(prompts), R2F(frequent=prompt(4, "frequent")))


def test_other_batches_and_positives_are_refused(family, network):
    positive, prompts = batch(SOURCE, CAT)
    for methods in ([p2p(prompts)], [LocalBlend(edit=prompts, blocks="" if family == "unet" else "double, joint")]):
        with pytest.raises(GuidanceError, match="holds 3 pictures, and the prompts are a source and 1 edits"):
            three = torch.zeros(3, *latent(family).shape[1:])
            sample(add_guidance(network, methods[0]), family, positive, NEGATIVE, image=three,
                   noise=comfy.sample.prepare_noise(three, 7, [0, 0, 0]))
        with pytest.raises(GuidanceError, match="positive is not that of the prompts"):
            run(network, family, batch(SOURCE, WET)[0], *methods)
        with pytest.raises(GuidanceError, match="positive is not that of the prompts"):
            sample(add_guidance(network, methods[0]), family, POSITIVE, NEGATIVE, batch=2)
        with pytest.raises(GuidanceError, match="start from different noise"):
            run(network, family, positive, *methods, noise=comfy.sample.prepare_noise(latent(family, 2), 7))


@pytest.mark.parametrize("sampler, scheduler", [("dpm_2", "beta"), ("dpm_adaptive", "normal")])
def test_a_second_look_in_the_first_step_is_no_other_noise(family, network, sampler, scheduler):
    positive, prompts = batch(SOURCE, CAT)
    steps = 20 if sampler == "dpm_2" else 4
    model, image = add_guidance(network, p2p(prompts)), torch.zeros(2, latent(family).shape[1], 8, 8)
    noise = comfy.sample.prepare_noise(image, 7, [0, 0])
    out = comfy.sample.sample(model, noise, steps, 4.0, sampler, scheduler, positive, NEGATIVE, image,
                              disable_pbar=True, seed=7)
    assert out.isfinite().all()


def test_rows_with_masks_of_their_own_start_from_one_noise(family, network):
    positive, prompts = batch(SOURCE, CAT)
    mask = torch.stack((torch.zeros(1, 8, 8), torch.ones(1, 8, 8)))
    assert run(network, family, positive, p2p(prompts), noise_mask=mask).isfinite().all()


def test_what_cannot_act_says_so(family, network):
    positive, prompts = batch(SOURCE, CAT)
    unknown = EditPrompts(prompts.texts, ((), ()), prompts.features)
    if family == "unet":
        with pytest.raises(GuidanceError, match="self_tokens is too low for this picture, whose smallest .* 16 tokens"):
            run(network, family, positive, p2p(prompts, self_tokens=4))
        with pytest.raises(GuidanceError, match="tokens is too low"):
            run(network, family, positive, LocalBlend(edit=prompts, tokens=4))
        with pytest.raises(GuidanceError, match="text encoder are is not known"):
            run(network, family, positive, p2p(unknown))
    else:
        assert run(network, family, positive, p2p(unknown)).isfinite().all()
        with pytest.raises(GuidanceError, match="no attention to words to take over"):
            run(network, family, positive, p2p(prompts, self_end=0.0))


def test_the_nodes_read_words_and_numbers():
    model, (_, prompts) = MODELS["unet"](), batch(SOURCE, CAT, WET)
    (out,) = call(RudderPromptToPrompt, model=model, prompts=prompts, words="cat: 1.5,\n wet : -1", word_ends="cat:0.2")
    method = out.model_options["rudder"][0]
    assert method.words == (("cat", 1.5), ("wet", -1.0)) and method.ends == (("cat", 0.2),)
    (out,) = call(RudderLocalBlend, model=model, prompts=prompts, words="dog, cat,")
    assert out.model_options["rudder"][0].words == ("dog", "cat")
    for words in ("cat", "cat: much", ": 2"):
        with pytest.raises(ValueError, match="no word with a number"):
            call(RudderPromptToPrompt, model=model, prompts=prompts, words=words)

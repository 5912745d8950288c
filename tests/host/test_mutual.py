"""MasaCtrl in the real host: what the source row stays, what the edits become, masks, bad input, the node."""

from __future__ import annotations

import pytest
import torch

from rudder.attention.foreground import Masks
from rudder.guidance.contract import Guidance, GuidanceError
from rudder.guidance.features import PlugAndPlay
from rudder.guidance.mutual import MasaCtrl
from rudder.guidance.rival import RIVAL
from rudder.host import add_guidance, plan_of
from rudder.nodes.reference import RudderMasaCtrl

from .models import CHANNELS, MODELS, calls, conditioning, having, sample
from .registry import NEGATIVE
from .test_branches import one_forward_a_cond
from .test_nodes import call
from .test_prompt_to_prompt import CAT, SOURCE, WET, batch, run

ONES = torch.ones(1, 8, 8)
HALF = torch.cat([ONES[:, :, :4], 0 * ONES[:, :, :4]], 2)


def rows(*seeds: int) -> list:
    """A CONDITIONING with one prompt for each row of the batch."""
    given = [conditioning(seed)[0] for seed in seeds]
    pooled = torch.cat([settings["pooled_output"] for _, settings in given])
    return [[torch.cat([features for features, _ in given]), {"pooled_output": pooled}]]


def edit(model, family, *methods, seeds=(1, 3), size=(8, 8), split=False, **options):
    """The latents of source and edits, all from one noise."""
    for method in methods:
        model = add_guidance(model, method)
    model = one_forward_a_cond(model) if split else model  # last: a clone forgets it
    image = torch.zeros(len(seeds), CHANNELS[family], *size)
    noise = torch.randn(image[:1].shape, generator=torch.Generator().manual_seed(5)).repeat(len(seeds), 1, 1, 1)
    return sample(model, family, rows(*seeds), NEGATIVE, image=image, noise=noise, **options)


METHODS = {
    "MasaCtrl": MasaCtrl(start=0.0),
    "MasaCtrl, union": MasaCtrl(start=0.0, depth=0.0, union=True),
    "MasaCtrl, masks": MasaCtrl(start=0.0, depth=0.0, masks=Masks(HALF, HALF)),
    "PnP": PlugAndPlay(),
    "RIVAL": RIVAL(),
}
every_method = pytest.mark.parametrize("name", METHODS)


@every_method
@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
def test_the_source_is_what_it_is_without_the_node_and_edits_are_not(network, family, name, size):
    method = METHODS[name]
    plain = edit(network, family, seeds=(1, 3, 4), size=size)
    counted, seen = calls(network)
    out = edit(counted, family, method, seeds=(1, 3, 4), size=size)
    assert out.isfinite().all() and torch.equal(out[0], plain[0])
    assert all(not torch.equal(out[i], plain[i]) for i in (1, 2))
    assert seen["network"] == [6] * 4, "no further evaluation"
    assert torch.equal(edit(network, family, method, seeds=(1, 3, 4), size=size), out)
    assert torch.equal(edit(network, family, seeds=(1, 3, 4), size=size), plain)


@every_method
def test_every_edit_is_as_it_would_be_alone(network, family, name):
    out = edit(network, family, METHODS[name], seeds=(1, 3, 4))
    for i, seed in ((1, 3), (2, 4)):
        single = edit(network, family, METHODS[name], seeds=(1, seed))[1]
        torch.testing.assert_close(out[i], single, rtol=1e-4, atol=1e-3)


@every_method
def test_a_split_batch_changes_nothing(network, family, name):
    counted, seen = calls(network)
    edit(counted, family, METHODS[name], split=True)
    assert set(seen["network"]) == {2}
    out = edit(network, family, METHODS[name])
    split = edit(network, family, METHODS[name], split=True)
    torch.testing.assert_close(split, out, rtol=1e-4, atol=1e-3)


@every_method
def test_the_same_prompt_gives_the_source(network, family, name):
    method = METHODS[name]
    if name == "RIVAL":
        method = RIVAL(early_until=0.0)
    out = edit(network, family, method, seeds=(1, 1))
    if name in ("MasaCtrl, masks",):
        return  # each half attends to half of the source
    torch.testing.assert_close(out[1], out[0], rtol=1e-4, atol=1e-4)


@every_method
def test_at_cfg_1(network, family, name):
    out, plain = (edit(network, family, *m, cfg=1.0) for m in ((METHODS[name],), ()))
    assert torch.equal(out[0], plain[0]) and not torch.equal(out[1], plain[1])


@every_method
def test_a_batch_of_one_is_refused(network, family, name):
    with pytest.raises(GuidanceError, match=r"at least 2 rows.*RudderEditBatch"):
        edit(network, family, METHODS[name], seeds=(1,))


@pytest.mark.parametrize("method", [PlugAndPlay(attention_until=0, feature_until=0),
                                    RIVAL(align_until=0, early_until=0, blocks="none")], ids=["PnP", "RIVAL"])
def test_windows_of_nothing_are_plain(network, family, method):
    if isinstance(method, RIVAL):
        with pytest.raises(GuidanceError, match="is called 'none'"):
            edit(network, family, method)
        return
    assert torch.equal(edit(network, family, method), edit(network, family))


def latents_of(network, family, *methods) -> list[torch.Tensor]:
    seen = []
    edit(network, family, *methods, steps=6, callback=lambda step, x0, x, steps: seen.append(x.clone()))
    return seen


def test_nothing_changes_before_the_start_step(network, family):
    plain, out = latents_of(network, family), latents_of(network, family, MasaCtrl(start=0.5, depth=0.0))
    same = [torch.equal(a, b) for a, b in zip(plain, out)]
    assert 2 <= sum(same) < 6 and same == sorted(same, reverse=True)


def test_masks_of_ones_are_no_masks(network, family):
    whole = edit(network, family, MasaCtrl(start=0.0, depth=0.0))
    masked = edit(network, family, MasaCtrl(start=0.0, depth=0.0, masks=Masks(ONES, ONES)))
    torch.testing.assert_close(masked, whole, rtol=1e-4, atol=1e-4)
    union = edit(network, family, MasaCtrl(start=0.0, depth=0.0, union=True))
    both = edit(network, family, MasaCtrl(start=0.0, depth=0.0, union=True, masks=Masks(ONES, ONES)))
    torch.testing.assert_close(both, union, rtol=1e-4, atol=1e-4)


def test_the_mask_of_an_edit_asks_for_a_kernel_that_heeds_masks(network, family):
    """The host's SageAttention drops masks in older versions, unless it is told to keep to full precision."""
    asked = []

    def kernel(func, q, k, v, heads, *args, **kwargs):
        asked.append((args[0] if args else kwargs.get("mask"), kwargs.get("low_precision_attention", True)))
        return func(q, k, v, heads, *args, **kwargs)

    network = network.clone()
    network.model_options["transformer_options"]["optimized_attention_override"] = kernel
    edit(network, family)
    plain = list(asked)
    asked.clear()
    edit(network, family, MasaCtrl(start=0.0, depth=0.0, masks=Masks(HALF, HALF)))
    assert any(mask is not None and not low for mask, low in asked) and all(low for _, low in plain)
    assert all(low for mask, low in asked if mask is None)


def test_a_mask_for_each_edit(network, family):
    masks = Masks(HALF, torch.cat([HALF, 1 - HALF]))
    out = edit(network, family, MasaCtrl(start=0.0, depth=0.0, masks=masks), seeds=(1, 3, 4))
    for i, seed in ((1, 3), (2, 4)):
        method = MasaCtrl(start=0.0, depth=0.0, masks=Masks(HALF, masks.edits[i - 1 : i]))
        torch.testing.assert_close(out[i], edit(network, family, method, seeds=(1, seed))[1], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="edit_mask: it holds 2 masks, and 1 pictures"):
        edit(network, family, MasaCtrl(start=0.0, masks=masks))


class LookAhead(Guidance):
    """Evaluates the positive at another latent and level, as ANSWER and SAG do, and changes nothing."""

    title = "look ahead"

    def finish(self, step, x0):
        step.evaluate(-step.x, step.level / 2, "cond")
        return x0


def test_masks_from_words(network, family):
    """The maps of the steps before decide, so the first step has none."""
    positive, prompts = batch(SOURCE, CAT, WET)
    method = MasaCtrl(start=0.0, depth=0.0, edit=prompts, words=("dog", "cat"))
    out, whole = (run(network, family, positive, m) for m in (method, MasaCtrl(start=0.0, depth=0.0)))
    assert torch.equal(out[0], whole[0]) and out.isfinite().all() and not torch.equal(out[1:], whole[1:])
    assert torch.equal(run(network, family, positive, method), out), "nothing is left from the first run"
    split = run(one_forward_a_cond(network.clone()), family, positive, method)
    torch.testing.assert_close(split, out, rtol=1e-4, atol=1e-3)
    assert torch.equal(run(network, family, positive, method, LookAhead()), out), "nothing else is read"
    with pytest.raises(ValueError, match="a prompt has an area"):
        run(network, family, [*positive, *having(positive, area=(8, 4, 0, 0))], method)
    with pytest.raises(GuidanceError, match="positive is not that of the prompts"):
        edit(network, family, method, seeds=(1, 2, 3))


def test_two_methods_for_the_same_keys_are_refused(network, family):
    with pytest.raises(GuidanceError, match="both decide the keys and values"):
        edit(network, family, MasaCtrl(), RIVAL())


def test_plug_and_play_and_masactrl_go_together(network, family):
    first = edit(network, family, PlugAndPlay(), MasaCtrl(start=0.0))
    assert torch.equal(edit(network, family, MasaCtrl(start=0.0), PlugAndPlay()), first)


_, PROMPTS = batch(SOURCE, CAT)
BAD = {
    "depth": ({"depth": 1.0}, "start_depth is 1"), "no prompts": ({"words": ("dog",)}, "Connect the EDIT_PROMPTS"),
    "both": ({"edit": PROMPTS, "words": ("dog", "cat"), "masks": Masks(ONES, ONES)}, "not both"),
    "an edit says none": ({"edit": PROMPTS, "words": ("dog",)}, "'a cat runs' says none of the words dog"),
    "nobody says it": ({"edit": PROMPTS, "words": ("dog", "cat", "cow")}, "no prompt says 'cow'"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "says"), BAD.values(), ids=BAD)
def test_bad_input(given, says):
    with pytest.raises(GuidanceError, match=says):
        MasaCtrl(**given)


def test_the_node():
    unet = MODELS["unet"]()
    (model,) = call(RudderMasaCtrl, model=unet, source_mask=ONES)
    (method,) = plan_of(model.model_options)
    assert (method.start, method.depth, method.union) == (0.08, 0.625, False)
    assert torch.equal(method.masks.edits, ONES) and plan_of(unet.model_options) == ()
    (model,) = call(RudderMasaCtrl, model=unet, prompts=PROMPTS, words="dog, cat", blocks=" ")
    assert plan_of(model.model_options)[0].seen.tokens == [[2], [2]] and plan_of(model.model_options)[0].blocks == ""
    (model,) = call(RudderMasaCtrl, model=unet, source_mask=ONES[0], edit_mask=ONES[0])  # as some nodes give them
    assert plan_of(model.model_options)[0].masks.source.shape == plan_of(model.model_options)[0].masks.edits.shape == (
        1, *ONES.shape[1:])
    with pytest.raises(ValueError, match="edit_mask needs a source_mask"):
        call(RudderMasaCtrl, model=unet, edit_mask=ONES)
    with pytest.raises(ValueError, match="source_mask holds 2 masks and the source is one picture"):
        call(RudderMasaCtrl, model=unet, source_mask=ONES[[0, 0]])

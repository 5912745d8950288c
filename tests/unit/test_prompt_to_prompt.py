"""Prompt-to-Prompt: the eight operations, the mappers, the local blend's mask, and what the method refuses."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.attention.edit_prompts import EditPrompts
from rudder.attention.local_blend import WordMaps, blended, masks
from rudder.attention.operations import MODES, Operation, edited_map, operation
from rudder.attention.prompt_to_prompt import SameLayout, TextMaps, folded
from rudder.attention.sites import Site
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.editing import check_positive, check_sizes
from rudder.guidance.local_blend import LocalBlend
from rudder.guidance.prompt_to_prompt import PromptToPrompt

from .tensors import at, setup, step
from .test_mutual import GRID, N, attend, made
from .test_words import edit, prompts, tokens

close = torch.testing.assert_close
LENGTH = 12


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).softmax(-1)


SOURCE, TARGET = maps(5, LENGTH), maps(5, LENGTH, seed=1)


def how(source: str, target: str, mode: str = "refine", alpha: float = 0.2, **options) -> Operation:
    made = operation([tokens(source, **options)], [tokens(target, **options)], mode, alpha)
    return Operation(made.mapper.double(), made.own.double(), made.weight.double(), made.edited)


def new(source: str, target: str, mode: str = "refine", renorm: str = "none", weights=(), **options) -> torch.Tensor:
    """The edited map for toy prompts of one token a word."""
    made = how(source, target, mode, **options)
    for token, weight in weights:
        made = made.weighted([token], weight)
    return edited_map(SOURCE, TARGET, made, renorm)


def total(map: torch.Tensor) -> torch.Tensor:
    return map.sum(-1)


# ---------------------------------------------------------------- the eight operations, columns and row sums


def test_replacement_as_in_the_paper_keeps_the_old_words_map():
    close(new("a dog ran", "a cat ran", "replace"), SOURCE)


def test_replacement_as_refine_takes_the_new_words_own():
    out = new("a dog ran", "a cat ran")
    close(out[:, 2], TARGET[:, 2])
    close(total(out), 1 - SOURCE[:, 2] + TARGET[:, 2])
    others = [i for i in range(LENGTH) if i != 2]
    close(out[:, others], SOURCE[:, others])


def test_insertion_drops_a_padding_column():
    out = new("a dog ran", "a wet dog ran")
    close(out[:, 2], TARGET[:, 2])
    close(out[:, 3:], SOURCE[:, 2:-1])
    close(total(out), 1 + TARGET[:, 2] - SOURCE[:, -1])


def test_a_degree_word_leans_on_its_word():
    eta, lam = 0.3, 0.5
    out = new("a wet dog", "a very wet dog", "degree", weights=[(2, eta), (3, 1 + lam)])
    close(out[:, 2], eta * SOURCE[:, 2])
    close(out[:, 3], (1 + lam) * SOURCE[:, 2])
    close(total(out), 1 + (lam + eta) * SOURCE[:, 2] - SOURCE[:, -1])


def test_deletion_shifts_the_rest():
    out = new("a wet dog ran", "a dog ran")
    close(out[:, 2:-1], SOURCE[:, 3:])
    close(total(out), 1 - SOURCE[:, 2])


@pytest.mark.parametrize("weight", [2.0, 1.5, 0.5, 0.0, -1.0, -2.0])
def test_strengthening_and_weakening(weight):
    out = new("a wet dog", "a wet dog", weights=[(2, weight)])
    close(out[:, 2], weight * SOURCE[:, 2])
    close(total(out), 1 + (weight - 1) * SOURCE[:, 2])


@given(st.permutations(list("abcdefg")))
def test_reordering_undone_is_nothing(order):
    words, other = "a b c d e f g", " ".join(order)
    there, back = how(words, other, "reorder"), how(other, words, "reorder")
    moved = edited_map(SOURCE, TARGET, there)
    close(total(moved), torch.ones(5, dtype=torch.float64))
    close(edited_map(moved, TARGET, back), SOURCE)
    assert torch.equal(there.mapper @ back.mapper, torch.eye(LENGTH, dtype=torch.float64))


def test_style_mixes_aligned_words_and_admits_new_ones_by_alpha():
    out = new("a wet dog", "a wet dog now", "style", alpha=0.3)
    close(out[:, :4], 0.7 * SOURCE[:, :4] + 0.3 * TARGET[:, :4])
    close(out[:, 4], 0.3 * TARGET[:, 4])
    close(total(new("a wet dog", "a wet dog", "style")), torch.ones(5, dtype=torch.float64))


# ---------------------------------------------------------------- mappers and renormalisation


@pytest.mark.parametrize("mode", MODES)
@given(words=prompts)
def test_equal_prompts_change_nothing(mode, words):
    made = how(" ".join(words), " ".join(words), mode)
    assert torch.equal(made.mapper, torch.eye(LENGTH, dtype=torch.float64))
    assert mode == "style" or torch.equal(edited_map(SOURCE, TARGET, made), SOURCE)
    assert operation([tokens(" ".join(words))], [tokens(" ".join(words))], mode).trivial


@pytest.mark.parametrize("mode", MODES)
@given(words=prompts)
def test_an_exchanged_word_is_an_edit(mode, words):
    """One token for one token leaves the mapper as for equal prompts, but the source's map is not the edit's own."""
    source = [tokens(" ".join(words))]
    assert not operation(source, [tokens(" ".join([*words[:-1], "new"]))], mode).trivial


@given(prompts, prompts)
def test_a_carried_word_gives_all_it_has(source, target):
    """Rows of the mapper sum to 1, or to 0 where a word or padding was dropped; the official mapper has rows of 2."""
    source, target = " ".join(source), " ".join(target)
    for mode in ("replace", "refine", "reorder"):
        made = how(source, target, mode)
        sums = made.mapper.sum(1)
        assert bool(((sums - 1).abs() < 1e-6).logical_or(sums == 0).all())
        assert torch.equal(made.own > 0, made.edited & (made.mapper.sum(0) == 0))


def test_replaced_words_of_other_lengths_keep_the_sum():
    """n tokens to m, spread as 1/m; what follows moves along, which the official mapper gets wrong."""
    made = how("a dog ran", "a hippopotamus ran", "replace", pieces=3)
    out = edited_map(SOURCE, TARGET, made)
    close(out[:, 2:5], SOURCE[:, 2:3].expand(-1, 3) / 3, rtol=1e-6, atol=1e-7)
    close(out[:, 5], SOURCE[:, 3])
    close(total(out), 1 - SOURCE[:, -2:].sum(-1), rtol=1e-6, atol=1e-7)
    back = edited_map(SOURCE, TARGET, how("a hippopotamus ran", "a dog ran", "replace", pieces=3))
    close(back[:, 2], SOURCE[:, 2:5].sum(-1))


@given(prompts, prompts, st.sampled_from(MODES), st.floats(-2, 2))
def test_rows_are_renormalised(source, target, mode, weight):
    out = new(" ".join(source), " ".join(target), mode, "row", weights=[(1, weight)])
    plain = total(new(" ".join(source), " ".join(target), mode, weights=[(1, weight)]))
    close(total(out), torch.where(plain > 0.1, 1.0, plain / 0.1))


@given(prompts, prompts, st.sampled_from(MODES))
def test_preserve_scales_nothing_but_what_was_edited(source, target, mode):
    source, target = " ".join(source), " ".join(target)
    made, plain = how(source, target, mode), new(source, target, mode)
    out = edited_map(SOURCE, TARGET, made, "preserve")
    close(out[:, ~made.edited], plain[:, ~made.edited])
    if made.edited.any() and bool((plain[:, made.edited].sum(-1) > 0).all()):
        close(total(out), torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    else:
        close(out, plain)


def test_encoders_are_edited_apart():
    source, target = tokens("a dog"), tokens("a cat")
    both = operation([source, source], [target, target])
    assert both.mapper.shape == (24, 24) and not both.mapper[:12, 12:].any() and not both.mapper[12:, :12].any()


def test_repeated_tokens_are_one_token():
    close(folded(torch.cat([SOURCE, SOURCE, SOURCE], -1) / 3, LENGTH), SOURCE)
    with pytest.raises(ValueError, match="13 text tokens and the prompt has 12"):
        folded(maps(2, 13), LENGTH)


# ---------------------------------------------------------------- local blend


def test_the_mask_is_where_either_picture_has_the_word():
    grid = (1, 6, 8)
    seen = torch.zeros(2, 2, *grid)
    seen[0, :, :, 1, 1] = 5.0  # the source, both edits
    seen[1, 1, :, 4, 6] = 0.01  # the second edit alone; each is measured by its own maximum
    mask = masks({(1, 2, 2): torch.ones(2, 2, 4), grid: seen.flatten(2)}, 0.3, (6, 8))
    assert mask.shape == (2, 1, 6, 8)
    assert mask[0].sum() == 9 and mask[1].sum() == 18 and mask[1, 0, 4, 6] == 1 and mask[0, 0, 4, 6] == 0
    x0 = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    out = blended(x0, mask)
    assert torch.equal(out[0], x0[0])
    assert torch.equal(out[1:], x0[:1] + mask * (x0[1:] - x0[:1])) or torch.allclose(
        out[1:], x0[:1] + mask * (x0[1:] - x0[:1]))
    video = masks({grid: seen.flatten(2)}, 0.3, (2, 12, 16))
    assert video.shape == (2, 1, 2, 12, 16)


# ---------------------------------------------------------------- what is refused

DOG = edit("a dog ran", "a cat ran", "a wet dog ran")


@pytest.mark.parametrize("options, message", [
    ({"cross_end": 1.5}, "cross_end is 1.5"), ({"self_end": -0.1}, "self_end"), ({"mode": "swap"}, "mode is 'swap'"),
    ({"renorm": "l2"}, "renorm"), ({"words": (("cat", 3.0),)}, "weight of 'cat' is 3"),
    ({"words": (("bird", 1.5),)}, "no prompt says 'bird'"), ({"ends": (("bird", 0.5),)}, "no prompt says 'bird'"),
    ({"ends": (("cat", 2.0),)}, "word_ends, 'cat' is 2"),
    ({"start": 0.9}, "start_percent is 0.9 and everything ends before"),
    ({"words": (("cat", 1.5),), "cross_end": 0.0}, "words have weights and cross_end is 0"),
])
def test_bad_settings_are_refused(options, message):
    with pytest.raises(GuidanceError, match=message):
        PromptToPrompt(edit=DOG, **options)


@pytest.mark.parametrize("kind, options, first, message", [
    ("cross", {}, 9, "lies at 0.9 of the timesteps, and cross_end is 0.8 and self_end is 0.4"),
    ("cross", {"cross_end": 0.0}, 5, "lies at 0.5 of the timesteps, and self_end is 0.4"),
    ("joint", {"self_end": 0.2}, 3, "lies at 0.3 of the timesteps, and self_end is 0.2"),
    ("joint", {"self_end": 0.2, "words": (("cat", 2.0),)}, 3, None),
    ("cross", {"cross_end": 0.0, "self_end": 0.0}, 9, None),
    ("cross", {}, 3, None),
])
def test_a_run_that_begins_after_every_end_is_refused(kind, options, first, message):
    """Image to image begins late; on joint attention words act by their weights alone."""
    prompts = replace(DOG, features=(torch.zeros(3, 4, 8),))
    run = replace(setup(), sites=[Site("0", kind)], steps=setup().steps[first:], features=prompts.features)
    with pytest.raises(GuidanceError, match=message) if message else nullcontext():
        PromptToPrompt(edit=prompts, **options).check(run)


def test_a_prompt_that_differs_in_weights_alone_is_edited():
    """The text "(dog:1.5)" has the source's words; what differs is in the features."""
    plain, heavy = torch.randn(2, 1, 12, 8, generator=torch.Generator().manual_seed(0))
    prompts = edit("a dog", "a dog", "a dog")
    prompts = replace(prompts, features=(torch.cat([plain, plain, heavy]),))
    same, weighted = PromptToPrompt(edit=prompts).operations[1:]
    assert same is None and weighted is not None and weighted.trivial


def test_a_limit_that_leaves_the_layout_out_is_told_once(caplog):
    """512x768 on SD1.5: the quarter of the resolution has 384 tokens."""
    now = at(torch.zeros(2, 4, 64, 96))
    for seen, told in (({"acted": {96}, "skipped": {384, 1536}}, 1), ({"acted": {256, 64}, "skipped": {1024}}, 0)):
        caplog.clear()
        now = now if told else at(torch.zeros(2, 4, 64, 64))
        for _ in range(2):
            check_sizes("P2P", "self_tokens", 256, now, seen)
        assert caplog.text.count("has 384 tokens, and self_tokens is 256") == told
    with pytest.raises(GuidanceError, match="smallest attention has 384 tokens"):
        check_sizes("P2P", "self_tokens", 256, now, {"skipped": {384, 1536}})


def test_a_blend_needs_a_word():
    assert LocalBlend(edit=DOG).columns == [([2], [2]), ([], [2])]
    assert LocalBlend(edit=DOG, words=("dog",)).columns == [([2], []), ([2], [3])]
    with pytest.raises(GuidanceError, match="no word to look for in edit 1, 'a dog'"):
        LocalBlend(edit=edit("a dog", "a dog"))
    with pytest.raises(GuidanceError, match="no prompt says 'bird'"):
        LocalBlend(edit=DOG, words=("bird",))
    with pytest.raises(GuidanceError, match="end_percent is 0.5 and start_percent 0.8"):
        LocalBlend(edit=DOG, blend_start=0.8, end=0.5)
    with pytest.raises(GuidanceError, match="not known"):
        LocalBlend(edit=EditPrompts(("a", "b"), ((), ())))


def test_words_may_stop_at_times_of_their_own():
    method = PromptToPrompt(edit=DOG, cross_end=0.8, ends=(("ran", 0.2),))
    assert method.inside(step(0), 1).all()
    late = method.inside(step(5), 1)
    assert not late[3] and late.sum() == LENGTH - 1
    assert not method.inside(step(9), 1).any()


def weighing(*weights: float | None, text: int) -> TextMaps:
    """What scales the last word of each row; None leaves a row alone."""
    plain = Operation(torch.eye(text), torch.zeros(text), torch.ones(text), torch.zeros(text, dtype=torch.bool))
    rows = [None if weight is None else plain.weighted([text - 1], weight) for weight in weights]
    return TextMaps(operations=rows, inside=[None] * len(rows))


def test_a_word_is_weighted_in_its_row_whichever_samples_are_asked_for():
    """Another edit may ask for the source and for the edits apart (a union with the source, masks)."""
    call, edit = made(text=4), weighing(None, None, 3.0, text=4)

    def through(call):
        return call.by_sample(edit.output(call, lambda other=None: attend(call if other is None else other)))

    whole = through(call)
    assert torch.equal(whole[:, :2], call.by_sample(attend(call))[:, :2]) and not torch.equal(
        whole[:, 2], call.by_sample(attend(call))[:, 2])
    for part in (slice(0, 1), slice(1, None), slice(2, 3), slice(0, 2)):
        close(through(call.only(part)), whole[:, part])
    close(through(call.only(slice(1, None)).only(slice(1, 2))), whole[:, 2:])


def test_maps_are_not_compared_across_parts():
    call, edit = made(), weighing(None, 2.0, None, text=N)
    cross = replace(call, site=replace(call.site, kind="cross"))
    assert edit.output(cross, lambda: attend(cross)).isfinite().all()
    assert torch.equal(edit.output(cross.only(slice(0, 1)), lambda: call.v), call.v), "the source alone is plain"
    with pytest.raises(ValueError, match=r"another edit of 'output.3.0' sets the source apart"):
        edit.output(cross.only(slice(1, None)), lambda: call.v)


@pytest.mark.parametrize(("limit", "acts"), [(N, True), (N - 1, False)])
def test_a_limit_on_tokens_includes_itself(limit, acts):
    call, layout = made(samples=2), SameLayout(tokens=limit)
    assert (layout.inputs(call) is not call) == acts == ("acted" in layout.seen)
    words = WordMaps(columns=[([1], [1])], lengths=[N, N], tokens=limit)
    words.output(replace(call, site=replace(call.site, kind="cross", text=slice(0, N))), lambda: call.q)
    assert bool(words.maps) == acts


def test_word_maps_are_summed_and_each_edit_reads_its_own_words():
    call = made(samples=3)
    call = replace(call, site=replace(call.site, kind="cross", text=slice(0, N)))
    words = WordMaps(columns=[([1], [2]), ([3], [4])], lengths=[N] * 3)
    ahead = step(0)
    ahead.plain = Predictions(ahead.x, None)
    for met in (call, call, replace(call, step=ahead), replace(call, latent=(1, 2))):  # a look ahead, an area: not read
        words.output(met, lambda: call.q)
    seen = call.by_sample(call.probabilities())[1].mean(1)
    expected = torch.stack([seen[0, :, [1, 3]].T, torch.stack([seen[1, :, 2], seen[2, :, 4]])])
    close(words.maps[GRID], 2 * expected)


def test_every_part_acts_in_its_own_window():
    method = PromptToPrompt(edit=DOG, cross_end=0.3, self_end=0.6, ends=(("ran", 0.1),))
    x = torch.zeros(3, 4, 2, 2)
    kinds = [[type(edit).__name__ for edit, _ in method.edits(at(x, i))] for i in range(10)]
    assert kinds == [["TextMaps", "SameLayout"]] * 3 + [["SameLayout"]] * 3 + [[]] * 4
    (maps, on), _ = method.edits(at(x, 2))
    assert on == ("cond",) and maps.inside[1][2] and not maps.inside[1][3], "'ran' has ended, 'cat' has not"


def test_word_weights_leave_text_rows_alone_and_end_with_their_window():
    call, edit = made(text=4), weighing(None, None, 3.0, text=4)

    def on(edit):
        return edit.output(call, lambda other=None: attend(other or call))

    assert torch.equal(on(edit)[:, :, :4], attend(call)[:, :, :4]), "text rows stay"
    close(on(replace(edit, inside=[None, None, torch.zeros(4, dtype=torch.bool)])), attend(call))


def test_weights_that_sum_to_nothing_do_not_blow_up():
    out = new("a dog", "a dog", renorm="row", weights=[(i, -1.0) for i in range(LENGTH)])
    close(out, -SOURCE / 0.1)  # not turned round, and not blown up


def test_words_are_exchanged_one_by_one():
    out = edited_map(SOURCE, TARGET, how("a red hippopotamus ran", "a enormous cat ran", "replace"))
    close(out[:, 2:4], SOURCE[:, 2:3].expand(-1, 2) / 2)
    close(out[:, 4], SOURCE[:, 3:5].sum(-1))


def test_every_edits_map_is_judged_by_its_own_maximum():
    seen = torch.zeros(2, 2, 1, 6, 8)
    seen[:, 0, :, 1, 1], seen[:, 1, :, 4, 6] = 5.0, 0.01
    assert masks({(1, 6, 8): seen.flatten(2)}, 0.3, (6, 8)).flatten(1).sum(1).tolist() == [9, 9]


def test_the_trace_has_the_changed_area():
    method, now = LocalBlend(edit=DOG, blend_start=0.0), at(torch.zeros(3, 4, 8, 8))
    seen = torch.zeros(2, 2, 1, 8, 8)
    seen[:, :, :, 3, 3] = 1.0
    now.state(method)["maps"] = {(1, 8, 8): seen.flatten(2)}
    method.finish(now, now.x)
    close(now.record["changed_area"], torch.full((2,), 9 / 64))


def test_a_combined_positive_with_another_entry_is_refused():
    own, other = torch.randn(2, 3, 12, 8)
    with pytest.raises(GuidanceError, match="positive is not that of the prompts"):
        check_positive("P2P", replace(DOG, features=(own,)), replace(setup(), features=[own, other]))

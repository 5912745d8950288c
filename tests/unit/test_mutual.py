"""Mutual self-attention on plain tensors: the paper's formulas by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.attention.contract import Call
from rudder.attention.foreground import Masked, Masks, tokens_of
from rudder.attention.local_blend import WordMaps
from rudder.attention.mutual import FLUX_CONTENT, Mutual
from rudder.attention.sites import Site, numbered
from rudder.attention.word_masks import WordMasks
from rudder.guidance.contract import Predictions

from .tensors import seeds, step

close = torch.testing.assert_close
GRID = (1, 4, 4)
N = 16


def attention(q, k, v, bias=0.0):
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias).softmax(-1)) @ v


def attend(call: Call):
    mask = 0.0 if call.mask is None else call.mask
    return attention(call.q, call.k, call.v, torch.where(mask, 0.0, -math.inf) if call.mask is not None
                     and mask.dtype == torch.bool else mask)


def made(seed: int = 0, samples: int = 3, roles=("uncond", "cond"), text: int = 0, mask=None) -> Call:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(len(roles) * samples, 2, text + N, 8, generator=generator, dtype=torch.float64)
               for _ in range(3))
    site = Site("double.0" if text else "output.3.0", "joint" if text else "self", 0, 1, GRID, slice(0, text),
                slice(text, text + N))
    now = step()
    return Call(q, k, v, site, roles, samples, now, mask, latent=tuple(now.x.shape[2:]))


def through(edit, call: Call) -> torch.Tensor:
    call = edit.inputs(call)
    return edit.output(call, lambda other=None: attend(call if other is None else other))


@given(seeds, st.integers(2, 4))
def test_edits_attend_to_the_source_of_their_own_half(seed, samples):
    call = made(seed, samples)
    out = call.by_sample(through(Mutual(), call))
    q, k, v = (call.by_sample(t) for t in (call.q, call.k, call.v))
    for chunk in range(2):
        for i in range(samples):
            close(out[chunk, i], attention(q[chunk, i], k[chunk, 0], v[chunk, 0]))


@given(seeds)
def test_a_union_sees_both(seed):
    call = made(seed)
    out, plain = call.by_sample(through(Mutual(union=True), call)), call.by_sample(attend(call))
    close(out[:, 0], plain[:, 0])
    q, k, v = (call.by_sample(t) for t in (call.q, call.k, call.v))
    close(out[1, 2], attention(q[1, 2], torch.cat([k[1, 0], k[1, 2]], 1), torch.cat([v[1, 0], v[1, 2]], 1)))


@given(seeds)
def test_beside_text_a_union_of_equals_changes_nothing(seed):
    call = made(seed, samples=2, text=5)
    same = call.replace(**{n: call.by_sample(getattr(call, n))[:, [0, 0]].flatten(0, 1) for n in "qkv"})
    close(through(Mutual(union=True), same), attend(same))
    out = call.by_sample(through(Mutual(), call))
    q, k, v = (call.by_sample(t)[1] for t in (call.q, call.k, call.v))
    k, v = (torch.cat([t[1, :, :5], t[0, :, 5:]], 1) for t in (k, v))
    close(out[1, 1], attention(q[1], k, v)), "text keys stay the edit's own"


@given(seeds, st.booleans())
def test_masks_are_the_papers_two_terms(seed, union):
    generator = torch.Generator().manual_seed(seed)
    source, edits = (torch.rand(n, *GRID[1:], generator=generator).round() for n in (1, 2))
    call = made(seed)
    out = call.by_sample(through(Masked(masks=Masks(source, edits), union=union), call))
    plain = call.by_sample(attend(call))
    close(out[:, 0], plain[:, 0])
    assert out.isfinite().all()
    q, k, v = (call.by_sample(t) for t in (call.q, call.k, call.v))
    seen, own = source.flatten().bool(), torch.zeros(N if union else 0)

    def part(i, keys):
        bias = torch.where(keys if keys.any() else ~keys, 0.0, -math.inf)  # a part that the source lacks sees all
        ks, vs = (torch.cat([t[1, 0], t[1, i][:, : len(own)]], 1) for t in (k, v))
        return attention(q[1, i], ks, vs, torch.cat([bias, own]))

    for i in (1, 2):
        m = edits[i - 1].flatten()[:, None]
        close(out[1, i], m * part(i, seen) + (1 - m) * part(i, ~seen))


def test_masks_are_scaled_to_the_grid():
    call = made(text=3)
    big = torch.zeros(1, 32, 64)
    big[:, :, 32:] = 1
    out, small = through(Masked(masks=Masks(big, big)), call), torch.zeros(1, 4, 4)
    small[:, :, 2:] = 1
    assert torch.equal(through(Masked(masks=Masks(small, small)), call), out)
    with pytest.raises(ValueError, match="holds 3 masks, and 2 pictures"):
        through(Masked(masks=Masks(big, big.repeat(3, 1, 1))), call)


def test_a_host_mask_stays():
    hidden = torch.zeros(1, 1, 1, 5 + N, dtype=torch.float64)
    hidden[..., 0] = -1e9
    call = made(samples=2, text=5, mask=hidden)
    ones = torch.ones(1, 4, 4)
    for edit in (Mutual(union=True), Masked(masks=Masks(ones, ones))):
        changed = call.replace(v=call.v.clone())
        changed.v[:, :, 0] = 100.0
        close(through(edit, changed), through(edit, call))
        boolean = call.replace(mask=hidden == 0)
        close(through(edit, boolean), through(edit, call))


def sd15() -> list[Site]:
    names = [f"input.{i}.0" for i in (1, 2, 4, 5, 7, 8)] + ["middle.0"] + [f"output.{i}.0" for i in range(3, 12)]
    return numbered(Site(name, kind) for name in names for kind in ("self", "cross"))


def acting(edit, sites) -> list[str]:
    return [site.name for site in sites if edit.acts_at(site)]


def test_it_begins_at_the_papers_layer():
    assert acting(Mutual(depth=0.625), sd15()) == [f"output.{i}.0" for i in range(6, 12)]
    assert len(acting(Mutual(), sd15())) == 16 and acting(Mutual(blocks="middle", depth=0.9), sd15()) == ["middle.0"]
    one = numbered([Site("double.0", "joint"), Site("single.0", "joint")])
    assert acting(Mutual(depth=0.99), one) == ["single.0"], "never nothing"


def test_flux_has_a_list_of_its_own():
    names = [f"double.{i}" for i in range(19)] + [f"single.{i}" for i in range(38)]
    flux = numbered(Site(name, "joint") for name in names)
    assert [i for i, site in enumerate(flux) if Mutual(depth=0.625).acts_at(site)] == sorted(FLUX_CONTENT)
    assert len(acting(Mutual(), flux)) == 57



def test_word_masks_come_from_the_steps_before():
    edit = WordMasks(tokens=[[1], [2]])
    first, second = step(0), step(1)
    second.states = first.states
    call = made(samples=2)
    keys = torch.zeros(4, 2, 5, 8, dtype=torch.float64)
    keys[:, :, 1, 0], keys[:, :, 2, 1] = 40.0, 40.0
    q = torch.zeros_like(call.q)
    q[2, :, :4, 0] = 1.0  # the source looks at token 1 in the first row of the grid
    q[3, :, 12:, 1] = 1.0  # the edit at token 2 in the last
    site = Site("input.5.0", "cross", 1, 2, GRID, slice(0, 5))
    seen = replace(call, q=q, k=keys, v=keys, site=site, step=first)
    assert edit.masks(first) is None and torch.equal(edit.output(seen, lambda: q), q) and edit.masks(first) is None
    masks = edit.masks(second)
    expected = torch.zeros(2, 4, 4)
    expected[0, 0], expected[1, 3] = 1.0, 1.0
    assert torch.equal(torch.cat([masks.source, masks.edits]), expected)


def test_word_masks_read_the_steps_own_call_of_whole_pictures():
    edit, site = WordMasks(tokens=[[1], [1]]), Site("input.5.0", "cross", 1, 2, GRID, slice(0, N))
    now, ahead = step(0), step(0)
    call = replace(made(samples=2), site=site, step=now)
    ahead.plain = Predictions(ahead.x, None)  # the step has its predictions: a method evaluates elsewhere
    for other in (replace(call, step=ahead), replace(call, latent=(call.latent[0], call.latent[1] // 2))):
        edit.output(other, lambda: call.q)
        assert "now" not in other.step.state(edit)
    edit.output(call, lambda: call.q)
    assert "now" in now.state(edit)


def test_masks_of_whole_pictures_are_not_squeezed_into_an_area():
    ones, call = torch.ones(1, 4, 4), made()
    edit = Masked(masks=Masks(ones, ones))
    assert torch.equal(through(edit, replace(call, latent=(5, *call.latent))), through(edit, call)), "frames"
    with pytest.raises(ValueError, match="a prompt has an area"):
        through(edit, replace(call, latent=(call.latent[0] // 2, call.latent[1])))


def test_the_blocks_that_word_masks_read_are_the_papers():
    read = [name.removesuffix(".0") for name in acting(WordMasks(tokens=[[1], [1]]), sd15())]
    assert read == ["input.7", "input.8", "output.3", "output.4", "output.5"], "16 x 16 of SD1.5"


@pytest.mark.parametrize("edit", [WordMasks(tokens=[[1], [1]]), WordMaps()], ids=["masks", "maps"])
def test_a_few_blocks_of_a_transformer_are_read(edit):
    flux = numbered(Site(f"double.{i}" if i < 19 else f"single.{i - 19}", "joint") for i in range(57))
    read = [i for i, site in enumerate(flux) if edit.acts_at(site)]
    assert read == [0, 8, 16, 24, 32, 40, 48, 56]
    small = numbered(Site(f"joint.{i}", "joint") for i in range(5))
    assert acting(edit, small) == [site.name for site in small] and edit.acts_at(Site("joint.0", "joint"))
    assert acting(replace(edit, blocks="double.3-4"), flux) == ["double.3", "double.4"], "named ones count alone"


def test_word_masks_read_the_text_of_a_joint_call():
    """The same pictures and words, with the text's tokens before the picture's, tell the same places."""
    q = torch.zeros(2, 2, N + 3, 8, dtype=torch.float64)
    k = torch.zeros_like(q)
    k[:, :, 1, 0] = 40.0  # the second of three text tokens
    q[0, :, 3 : 3 + 4, 0], q[1, :, 3 + 12 :, 0] = 1.0, 1.0  # the first row of the grid; the last
    site = Site("joint.0", "joint", 0, 1, GRID, slice(0, 3), slice(3, None))
    now, later = step(0), step(1)
    later.states = now.states
    edit = WordMasks(tokens=[[1], [1]])
    edit.output(replace(made(samples=2), q=q, k=k, v=k, site=site, step=now, roles=("cond",)), lambda: q)
    masks = edit.masks(later)
    expected = torch.zeros(2, 4, 4)
    expected[0, 0], expected[1, 3] = 1.0, 1.0
    assert torch.equal(torch.cat([masks.source, masks.edits]), expected)


def test_a_mask_is_repeated_frame_after_frame():
    call = replace(made(samples=2), site=Site("block.0", "self", grid=(4, 2, 2)))
    assert tokens_of(torch.tensor([[[1.0, 0], [0, 1]]]), call)[0].tolist() == [True, False, False, True] * 4


def test_a_token_is_foreground_from_half_of_it_on():
    fine = torch.zeros(1, 8, 8)
    fine[0, 0, 0], fine[0, 0, 2:4] = 1, 1  # a quarter of token 0, half of token 1
    assert tokens_of(fine, made())[0].nonzero().flatten().tolist() == [1]


def test_a_part_that_the_source_lacks_sees_all_of_it():
    call, ones = made(samples=2), torch.ones(1, 4, 4)
    close(through(Masked(masks=Masks(ones, 0 * ones)), call), through(Mutual(), call))


def test_word_masks_sum_sites_and_steps_and_scale_each_picture_alone():
    edit, states, past = WordMasks(tokens=[[1], [1]]), {}, 0.0
    site = Site("input.5.0", "cross", 1, 2, GRID, slice(0, N))
    for i in range(4):  # two sites in each of two steps
        call = replace(made(i, samples=2, roles=("cond",)), site=site, step=step(i // 2, states=states))
        call = call.replace(q=call.q * torch.tensor([1.0, 0.1])[:, None, None, None])  # the edit's map is much flatter
        edit.output(call, lambda q=call.q: q)
        past = past + call.probabilities().mean(1)[..., 1]
    low, high = past.amin(1, keepdim=True), past.amax(1, keepdim=True)
    found = edit.masks(step(2, states=states))
    assert torch.equal(torch.cat([found.source, found.edits]).flatten(1), ((past - low) / (high - low) >= 0.1).float())

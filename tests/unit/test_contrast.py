"""PAG and SEG: their edits of the attention, and the push away from what comes of it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.attention.contract import Call
from rudder.attention.perturb import Blur, Identity, blur, gaussian
from rudder.attention.sites import Site
from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.contrast import BLOCKS, PerturbedAttention, SmoothedEnergy
from rudder.guidance.space import cosine, norm

from .tensors import at, predictions, run_step, weights

close = torch.testing.assert_close
grids = st.tuples(st.integers(1, 2), st.integers(1, 5), st.integers(1, 5))  # (t, h, w): images and videos, any shape
texts = st.integers(0, 3)  # 0 is self-attention, more is joint
METHODS = [PerturbedAttention(strength=2.0), SmoothedEnergy(strength=2.0)]


def rope(tokens: int, size: int) -> torch.Tensor:
    """[1, 1, tokens, size / 2, 2, 2], rotations by an angle of each token and pair."""
    angle = torch.arange(tokens)[:, None] * torch.linspace(1.0, 0.1, size // 2)
    rows = [torch.stack(row, -1) for row in ((angle.cos(), -angle.sin()), (angle.sin(), angle.cos()))]
    return torch.stack(rows, -2)[None, None]


def a_call(grid: tuple[int, int, int], text: int = 0, seed: int = 0, rotary: bool = False, **tensors) -> Call:
    """Two rows, three heads of four features."""
    image = grid[0] * grid[1] * grid[2]
    tokens, generator = text + image, torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, tokens, 4, generator=generator) for _ in range(3))
    site = Site("joint.0" if text else "middle.0", "joint" if text else "self", grid=grid, text=slice(0, text),
                image=slice(text, tokens))
    return Call(q, k, v, site, ("cond",), 2, None, rope=rope(tokens, 4) if rotary else None).replace(**tensors)


def attend(call: Call) -> torch.Tensor:
    return call.probabilities() @ call.v


def worse(edit, call: Call) -> torch.Tensor:
    call = edit.inputs(call)
    return edit.output(call, lambda other=None: attend(call if other is None else other))


@given(grids, texts)
def test_pag_is_the_identity_map_on_image_tokens(grid, text):
    call = a_call(grid, text)
    out, plain, image = worse(Identity(), call), attend(call), call.site.image
    assert torch.equal(out[:, :, image], call.v[:, :, image])
    assert torch.equal(out[:, :, :text], plain[:, :, :text])
    identity = call.probabilities()
    identity[:, :, image] = torch.eye(identity.shape[-1])[image]
    close(out, identity @ call.v)


def test_pag_of_self_attention_asks_for_no_attention():
    call = a_call((1, 3, 2))

    def refuse(other=None):
        raise AssertionError("it was computed")

    assert Identity().output(call, refuse) is call.v


@given(grids, texts, st.booleans())
def test_seg_at_zero_is_the_base_and_near_it_close(grid, text, rotary):
    call = a_call(grid, text, rotary=rotary)
    assert Blur(sigma=0.0).inputs(call) is call
    close(worse(Blur(sigma=1e-3), call), attend(call))


@given(grids, texts, st.sampled_from([1.0, 100.0, 1e4]))
def test_seg_keeps_a_constant_query_and_every_text_row(grid, text, sigma):
    call = a_call(grid, text)
    same = call.q[:, :, -1:].expand_as(call.q)
    close(Blur(sigma=sigma).inputs(call.replace(q=same)).q, same)
    edited = Blur(sigma=sigma).inputs(call)
    assert torch.equal(edited.q[:, :, :text], call.q[:, :, :text])
    assert torch.equal(edited.k, call.k) and torch.equal(edited.v, call.v)


@given(grids, texts)
def test_seg_beyond_9999_gives_every_token_of_a_frame_the_same(grid, text):
    frames = worse(Blur(sigma=1e4), a_call(grid, text))[:, :, text:].unflatten(2, (grid[0], -1))
    close(frames, frames[:, :, :, :1].expand_as(frames))
    if grid[0] > 1:
        assert not torch.equal(frames[:, :, 0], frames[:, :, 1])  # frames do not mix here either


@given(grids, st.integers(1, 3), st.sampled_from([0.8, 1e4]))
def test_seg_blurs_queries_before_their_rotary_embedding(grid, text, sigma):
    bare = a_call(grid, text)
    turned = a_call(grid, text, rotary=True)
    turned = turned.replace(q=turned.rotated(bare.q))
    close(Blur(sigma=sigma).inputs(turned).q, turned.rotated(Blur(sigma=sigma).inputs(bare).q), rtol=1e-4, atol=1e-5)


@given(grids, st.floats(0.3, 4.0))
def test_seg_blurs_the_logits_of_each_frame(grid, sigma):
    """Of queries or of logits: the same. Frames do not mix, and height and width are not exchanged."""
    call = a_call(grid)
    logits = call.q @ call.k.transpose(-1, -2)
    close(Blur(sigma=sigma).inputs(call).q @ call.k.transpose(-1, -2), blur(logits, grid, sigma), rtol=1e-4, atol=1e-5)
    t, h, w = grid
    spread = blur(torch.eye(t * h * w)[None, None], grid, sigma)[0, 0].reshape(t, h, w, t, h, w)
    one, reach = torch.zeros(t, h, w), 3 * sigma + 1
    one[0, 0, 0] = 1
    assert spread[0, :, :, 1:].count_nonzero() == 0
    close(spread[..., 0, 0, 0], gaussian(one, sigma))
    assert all(one.new_tensor([y, x]).abs().max() <= reach for _, y, x in spread[..., 0, 0, 0].nonzero().tolist())


def test_the_gaussian_is_one():
    """Far from edges: the weights themselves, and a variance of sigma squared."""
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    out = gaussian(point, 2.0)[0]
    place = torch.arange(41) - 20.0
    line = torch.exp(-0.5 * (place / 2) ** 2) * (place.abs() <= 6)
    close(out, torch.outer(line, line) / line.sum() ** 2)
    close((out.sum(0) * place**2).sum(), torch.tensor(4.0), rtol=0.05, atol=0)
    assert gaussian(point, 2.0, span=2)[0, 20].count_nonzero() == 9  # the kernel of ComfyUI's own SAG


@pytest.mark.parametrize("side", [4, 8, 9, 16, 64])
@pytest.mark.parametrize("sigma", [0.4, 1.5, 2.0, 5.0, 10.0, 100.0])
def test_the_kernel_is_that_of_the_official_code(side, sigma):
    """Odd, ceil(6 sigma) wide, and no wider than the first odd number from the grid's height on."""
    width = math.ceil(6 * sigma)
    width = min(width + 1 - width % 2, side + 1 - side % 2)
    place = torch.linspace(-(width - 1) / 2, (width - 1) / 2, width)
    line = torch.exp(-0.5 * (place / sigma) ** 2)
    line = line / line.sum()
    planes = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(side))
    padded = torch.nn.functional.pad(planes, [width // 2] * 4, mode="reflect")
    kernel = torch.outer(line, line).expand(2, 1, -1, -1)
    close(gaussian(planes, sigma), torch.nn.functional.conv2d(padded, kernel, groups=2))


@given(predictions(4))
def test_each_method_has_quantities_of_its_own(tensors):
    x, cond, first, second = tensors
    pag, seg = PerturbedAttention(), SmoothedEnergy()
    now = at(x)
    run_step(now, Predictions(cond, x, {pag.worse: first, seg.worse: second}), pag, seg)
    close(now.record["pag_norm"], norm(cond - first))
    close(now.record["seg_norm"], norm(cond - second))
    close(now.record["pag_cosine"], cosine(cond - first, cond - x))
    close(now.record["seg_cosine"], cosine(cond - second, cond - x))


@given(predictions(4), weights, st.sampled_from(METHODS))
def test_the_push(tensors, weight, method):
    x, cond, uncond, bad = tensors
    preds = Predictions(cond, uncond, {method.worse: bad})
    now = at(x, weight=weight)
    close(run_step(now, preds, method), cfg(cond, uncond, weight) + 2 * (cond - bad))
    close(now.record[f"{method.short}_norm"], norm(cond - bad))
    close(run_step(at(x, weight=1.0), Predictions(cond, None, {method.worse: bad}), method), cond + 2 * (cond - bad))
    close(run_step(at(x), Predictions(cond, uncond, {method.worse: cond}), method), cfg(cond, uncond, 7.0))


@given(predictions(2))
def test_the_contrast_is_with_what_the_model_said(tensors):
    """Not with what other methods made of the positive."""
    cond, bad = tensors
    method, now = METHODS[0], at(cond)
    now.plain = Predictions(cond, None, {method.worse: bad})
    close(method.term(now, now.plain.replace(cond=cond + 1)), 2 * (cond - bad))


OFF = [PerturbedAttention(strength=0.0), SmoothedEnergy(strength=0.0), SmoothedEnergy(sigma=0.0)]


@pytest.mark.parametrize("method", OFF, ids=str)
def test_off_is_no_change_and_no_evaluation(method):
    x, cond, uncond = torch.randn(3, 2, 4, 3, 5)
    assert method.prompts() == method.branches(at(x)) == ()
    assert torch.equal(run_step(at(x), Predictions(cond, uncond), method), uncond + (cond - uncond) * 7.0)


def test_equal_contrasts_share_their_evaluation():
    first, second = PerturbedAttention(strength=1.0), PerturbedAttention(strength=3.0, end=0.5)
    assert first.worse == second.worse != PerturbedAttention(blocks="output").worse != SmoothedEnergy().worse
    assert SmoothedEnergy(sigma=1.0).worse != SmoothedEnergy(sigma=2.0).worse


@pytest.mark.parametrize("name", ["middle.0", "joint.1", "double.1"])
def test_the_blocks_of_every_family(name):
    kind = "self" if name.startswith("middle") else "joint"
    assert Identity(blocks=BLOCKS).acts_at(Site(name, kind))
    assert not Identity(blocks=BLOCKS).acts_at(Site(name, "cross"))
    assert not any(Identity(blocks=BLOCKS).acts_at(Site(n, k)) for n, k in (("input.1.0", "self"), ("joint.11", kind)))


def test_bad_input():
    with pytest.raises(GuidanceError, match="strength is nan; give a finite number"):
        PerturbedAttention(strength=float("nan"))
    for sigma in (-1.0, float("nan")):
        with pytest.raises(GuidanceError, match=r"\(SEG\): sigma is .*; it must be 0"):
            SmoothedEnergy(sigma=sigma)


@pytest.mark.parametrize("name", ["middle.0", "joint.1", "double.1", "block.9"])
def test_the_default_block_of_every_family(name):
    assert Identity(blocks=BLOCKS).acts_at(Site(name, "self" if name[0] in "mb" else "joint"))

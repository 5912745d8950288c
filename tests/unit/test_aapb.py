"""AAPB against its definition (Eq. 8, 12, 13), its closed meaning, and its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance import space
from rudder.guidance.aapb import AAPB, CLAMP, optimal_gamma
from rudder.guidance.blend import blend
from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError
from rudder.guidance.space import dot, expand, norm

from .tensors import guided, kinds, levels, predictions, prompt, setup, shapes, step, weights

close = torch.testing.assert_close
LOOSE = {"rtol": 1e-8, "atol": 1e-8}


def aapb(target, anchor, uncond, weight, clamp=False):
    """D~ as the sampler gets it."""
    return guided(AAPB(anchor=prompt(), clamp=clamp), step(weight=weight), target, uncond, anchor=anchor)


@given(predictions(3), weights)
def test_the_result_is_the_target_plus_the_push_across_the_anchor_axis(tensors, weight):
    """Unclamped: D~ = D_T + (w - 1) (d - proj_a d), so <D~ - D_T, a> = 0 and |D~ - D_T| <= (w - 1) |d|."""
    target, anchor, uncond = tensors
    d, a = target - uncond, anchor - target
    moved = aapb(target, anchor, uncond, weight) - target
    across = d - expand(dot(d, a) / dot(a, a), a) * a
    close(moved, (weight - 1) * across, **LOOSE)
    assert (dot(moved, a).abs() <= 1e-9 * (1 + weight * norm(d) * norm(a))).all()
    assert (norm(moved) <= (weight - 1) * norm(d) + 1e-9).all()


@given(predictions(3), weights.filter(lambda weight: weight > 1))
def test_the_clamp_leaves_a_push_towards_the_side_it_cut(tensors, weight):
    """<D~ - D_T, a> = w (gamma - gamma*) |a|^2: >= 0 where the clamp raised gamma, <= 0 where it lowered it."""
    target, anchor, uncond = tensors
    a = anchor - target
    free = optimal_gamma(target, anchor, uncond, weight, clamp=False)
    clamped = optimal_gamma(target, anchor, uncond, weight)
    along = dot(aapb(target, anchor, uncond, weight, clamp=True) - target, a)
    close(along, weight * (clamped - free) * dot(a, a), **LOOSE)


@given(predictions(3), weights)
def test_gamma_minimises_the_distance_to_the_target(tensors, weight):
    """Eq. 12, by a search that knows nothing of Eq. 13: three losses determine the parabola in gamma."""
    target, anchor, uncond = tensors

    def loss(gamma):
        moved = cfg(blend(target, anchor, gamma), uncond, weight) - target
        return dot(moved, moved)

    low, middle, high = loss(-1.0), loss(0.0), loss(1.0)
    vertex = (low - high) / (2 * (low - 2 * middle + high))
    gamma = optimal_gamma(target, anchor, uncond, weight, clamp=False)
    close(gamma, vertex, rtol=1e-6, atol=1e-6)
    best = loss(gamma)
    for offset in torch.linspace(-3, 3, 31, dtype=torch.float64):
        assert (best <= loss(gamma + offset) + 1e-9).all()
    inside = gamma.clamp(*CLAMP)
    grid = torch.linspace(*CLAMP, 99, dtype=torch.float64)
    assert (loss(inside) <= torch.stack([loss(float(g)) for g in grid]).min(0).values + 1e-9).all()


@given(predictions(2), weights)
def test_an_anchor_that_is_the_negative_cancels_the_guidance(tensors, weight):
    target, uncond = tensors
    gamma = optimal_gamma(target, uncond, uncond, weight, clamp=False)
    close(gamma, torch.full_like(gamma, (weight - 1) / weight))
    close(aapb(target, uncond, uncond, weight), target, **LOOSE)


@pytest.mark.parametrize("clamp", [True, False])
@given(tensors=predictions(2), weight=weights)
def test_an_anchor_that_is_the_target_is_cfg(clamp, tensors, weight):
    target, uncond = tensors
    assert not optimal_gamma(target, target, uncond, weight, clamp).any()
    assert torch.equal(aapb(target, target.clone(), uncond, weight, clamp), cfg(target, uncond, weight))


@given(shapes.filter(lambda shape: shape[1] > 1), weights)
def test_an_anchor_across_the_push_is_cfg(shape, weight):
    target, d, a = torch.randn(3, *shape, dtype=torch.float64)
    d[:, 0], a[:, 1:] = 0, 0  # channel 0 belongs to the anchor alone, so <d, a> is exactly 0
    assert not optimal_gamma(target, target + a, target - d, weight, clamp=False).abs().gt(1e-12).any()
    close(aapb(target, target + a, target - d, weight), cfg(target, target - d, weight), **LOOSE)


@given(predictions(3))
def test_without_guidance_there_is_nothing_to_repair(tensors):
    target, anchor, uncond = tensors
    assert not optimal_gamma(target, anchor, uncond, 1.0, clamp=False).any()
    method, now = AAPB(anchor=prompt()), step(weight=1.0)
    assert method.branches(now) == ()
    assert torch.equal(guided(method, now, target, None, anchor=anchor), target) and now.record == {}


@given(predictions(3))
def test_the_negative_alone_is_not_disturbed(tensors):
    """cfg 0 asks for the unconditional picture: Eq. 13 has no value there and the blend has no say."""
    target, anchor, uncond = tensors
    close(aapb(target, anchor, uncond, 0.0), uncond)
    assert torch.isfinite(optimal_gamma(target, anchor, uncond, 0.0, clamp=False)).all()


@given(predictions(4), weights, kinds)
def test_gamma_is_the_same_in_every_space(tensors, weight, kind):
    x, *preds = tensors
    sigma = levels(len(x), kind)
    expected = optimal_gamma(*preds, weight, clamp=False)
    close(optimal_gamma(*(space.residual(x, p) for p in preds), weight, clamp=False), expected, **LOOSE)
    for there in (space.noise_from_x0, space.v_from_x0, space.score_from_x0):
        found = optimal_gamma(*(there(x, p, sigma, kind) for p in preds), weight, clamp=False)
        close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clamp", [True, False])
@given(data=st.data(), weight=weights)
def test_a_batch_is_its_samples_one_by_one(dtype, clamp, data, weight):
    target, anchor, uncond = data.draw(predictions(3, dtype))
    whole = aapb(target, anchor, uncond, weight, clamp)
    for i in range(len(target)):
        one = slice(i, i + 1)
        alone = aapb(target[one], anchor[one], uncond[one], weight, clamp)
        close(whole[one], alone, rtol=1e-6, atol=1e-5 if dtype is torch.float32 else 1e-12)


def test_a_neighbour_never_changes_gamma():
    target, anchor, uncond = torch.randn(3, 4, 4, 8, 8)
    before = optimal_gamma(target, anchor, uncond, 7.0, clamp=False)
    anchor[1] *= 1000
    uncond[1] = target[1]
    after = optimal_gamma(target, anchor, uncond, 7.0, clamp=False)
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and after[1] == 0


@given(predictions(3), weights)
def test_the_clamp_is_the_official_range(tensors, weight):
    gamma = optimal_gamma(*tensors, weight, clamp=True)
    assert CLAMP == (0.01, 0.99) and (gamma >= 0.01).all() and (gamma <= 0.99).all()
    close(gamma, optimal_gamma(*tensors, weight, clamp=False).clamp(0.01, 0.99))


def test_a_hand_worked_case():
    """w 2, u at the origin, T at 4, A at 1 on one axis: a = -3, d = 4, gamma* = -1/2 * (4 * -3) / 9 = 2/3."""
    u, t, a = (torch.full((1, 1, 1, 1), value) for value in (0.0, 4.0, 1.0))
    assert float(optimal_gamma(t, a, u, 2.0)) == pytest.approx(2 / 3)
    assert float(aapb(t, a, u, 2.0)) == pytest.approx(4.0)  # on one axis nothing of the push is left: D~ is the target
    assert float(optimal_gamma(t, t + 1, u, 2.0)) == pytest.approx(0.01)  # anchor beyond the target: clamped from below


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e-7])
def test_an_anchor_that_is_almost_the_target_is_cfg(scale):
    target, uncond, noise = torch.randn(3, 2, 4, 4, 4)
    anchor = target.double() + scale * noise.double()
    gamma = optimal_gamma(target.double(), anchor, uncond.double(), 7.0, clamp=False)
    assert torch.isfinite(gamma).all()
    if scale < 1e-8:  # official: w^2 |a|^2 <= 1e-12 says nothing
        assert not gamma.any()


def test_the_node_asks_and_reports():
    anchor = prompt()
    method, now = AAPB(anchor=anchor), step(weight=7.0)
    assert method.prompts() == (anchor,) and method.branches(now) == (anchor,)
    target, other, uncond = torch.randn(3, 2, 4, 3, 3)
    guided(method, now, target, uncond, anchor=other)
    close(now.record["gamma"], optimal_gamma(target, other, uncond, 7.0))


def test_a_run_without_guidance_is_refused():
    with pytest.raises(GuidanceError, match=r"cfg is 1\).*Set cfg above 1.*R2F"):
        AAPB(anchor=prompt()).check(setup(cfg=1.0))
    with pytest.raises(GuidanceError, match="there is no negative"):
        AAPB(anchor=prompt()).check(setup(cfg=1.0, has_negative=False))
    AAPB(anchor=prompt()).check(setup(cfg=1.0, weights=[1.0, 4.0]))  # another node guides some of the steps


@pytest.mark.parametrize("likeness", ["positive", "negative", "empty"])
def test_an_anchor_that_says_nothing_new_is_refused(likeness):
    with pytest.raises(GuidanceError, match="the anchor conditioning is"):
        AAPB(anchor=prompt()).check(setup(likeness=likeness))
    AAPB(anchor=prompt()).check(setup())

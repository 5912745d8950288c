"""SAG: what is salient, the blurred picture with its noise, and the push."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.attention.perturb import gaussian
from rudder.attention.salience import Salience, received
from rudder.attention.sites import Site
from rudder.guidance.contract import GuidanceError, Predictions, Setup
from rudder.guidance.contrast import PerturbedAttention
from rudder.guidance.sag import SelfAttentionGuidance, salient
from rudder.guidance.space import Parametrisation, noise_from_x0

from .tensors import at, kinds, run_step, seeds
from .test_contrast import a_call, attend, grids, texts
from .test_contrast import attend as plain_attend

close = torch.testing.assert_close
SAG = SelfAttentionGuidance(strength=0.7, sigma=1.0)
FLOW = Parametrisation.FLOW


def seen(step, maps: torch.Tensor, method=SAG):
    """``step`` as it is after its call: the map of each row was read."""
    step.state(method).update(cond=[maps], uncond=[maps])
    return step


@given(seeds, st.integers(1, 4), st.integers(2, 20))
def test_what_tokens_receive_is_the_mean_over_heads_summed_over_queries(seed, heads, tokens):
    q, k = torch.randn(2, 3, heads, tokens, 4, generator=torch.Generator().manual_seed(seed))
    close(received(q, k), (q @ k.transpose(-1, -2) / 2).softmax(-1).mean(1).sum(1))
    close(received(q, k).mean(-1), torch.ones(3))


@given(grids, texts, st.booleans())
def test_a_joint_map_is_renormalised_over_image_tokens(grid, text, rotary):
    """And what is read changes nothing."""
    call = a_call(grid, text, rotary=rotary)
    image = call.site.image
    now = at(torch.zeros(2, 4, grid[0], grid[1] * 2, grid[2] * 2))
    call = call.replace(step=now, latent=tuple(now.x.shape[2:]))
    out = Salience(owner=SAG).output(call, lambda: attend(call))
    assert torch.equal(out, attend(call))
    part = call.probabilities()[:, :, image, image]
    (maps,) = now.state(SAG)["cond"]
    close(maps.flatten(1), (part / part.sum(-1, keepdim=True)).mean(1).sum(1))
    assert maps.shape == (2, *grid)


def test_only_the_two_roles_and_only_the_step_itself_are_read():
    call = a_call((1, 2, 3))
    now = at(torch.zeros(1, 4, 4, 6))
    call = call.replace(step=now, latent=(4, 6), roles=("uncond", "cond"), samples=1)
    reader = Salience(owner=SAG)
    reader.output(call, lambda: attend(call))
    for row, role in enumerate(call.roles):
        (maps,) = now.state(SAG)[role]
        close(maps.flatten(), received(call.q, call.k)[row])
    reader.output(call.replace(roles=(None, PerturbedAttention().worse)), lambda: attend(call))
    now.plain = Predictions(now.x, None)
    reader.output(call, lambda: attend(call))
    assert {role: len(maps) for role, maps in now.state(SAG).items()} == {"uncond": 1, "cond": 1}


def test_what_is_salient_by_hand():
    salience = torch.tensor([[[[0.5, 1.5], [1.2, 0.8]]], [[[1.0, 1.0], [1.0, 1.0 + 1e-7]]]])  # [B, t, h, w]
    mask = salient(salience, torch.zeros(2, 4, 4, 6))
    assert mask.shape == (2, 1, 4, 6)
    assert mask[0, 0].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[1, 1, 1, 0, 0, 0]] * 2
    assert not mask[1].any(), "an even map finds nothing"
    assert salient(salience, torch.zeros(2, 4, 3, 5, 7)).shape == (2, 1, 3, 5, 7)


@given(seeds, kinds, st.sampled_from([(4, 6), (3, 4, 6)]))
def test_the_push(seed, kind, size):
    """With the blurred picture under the very noise that x holds, in every parametrisation."""
    generator = torch.Generator().manual_seed(seed)
    x, cond, uncond, again = torch.randn(4, 2, 3, *size, generator=generator)
    maps = torch.rand(2, 1, 2, 3, generator=generator) * 2
    asked = []

    def evaluate(y, sigma, *roles):
        asked.append((y, sigma, roles))
        return [again]

    now = seen(at(x, parametrisation=kind, evaluate=evaluate), maps)
    out = run_step(now, Predictions(cond, uncond), SAG)
    plain = uncond + (cond - uncond) * 7.0
    mask = salient(maps, x)
    some = mask.flatten(1).any(1).reshape(-1, *[1] * (x.ndim - 1)).float()
    blurred = mask * gaussian(uncond, 1.0, span=2) + (1 - mask) * uncond
    if not asked:
        assert not mask.any() and torch.equal(out, plain)
        return
    close(out, plain + 0.7 * some * (blurred - again))
    ((y, sigma, roles),) = asked
    assert sigma == now.level and roles == ("uncond",)
    noise = noise_from_x0(x, uncond, now.level, kind)
    share = 1 - now.level if kind is FLOW else 1.0
    close(y, share * blurred + now.level * noise, rtol=1e-4, atol=1e-5)


@given(seeds)
def test_without_guidance_it_is_the_positive(seed):
    x, cond, again = torch.randn(3, 1, 3, 4, 6, generator=torch.Generator().manual_seed(seed))
    maps = torch.tensor([[[[0.5, 1.5, 1.0]]]])
    roles = []
    now = seen(at(x, weight=1.0, evaluate=lambda y, s, *r: roles.extend(r) or [again]), maps)
    mask = salient(maps, x)
    blurred = mask * gaussian(cond, 1.0, span=2) + (1 - mask) * cond
    close(run_step(now, Predictions(cond, None), SAG), cond + 0.7 * (blurred - again))
    assert roles == ["cond"] and not now.state(SAG)


@given(seeds, st.floats(0.01, 0.9))
def test_for_flow_it_is_the_rule_for_the_noise_too(seed, sigma):
    """n + s (n - n(x~)) with the n of each prediction gives the same x0."""
    x, base, again = torch.randn(3, 1, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    maps = torch.tensor([[[[0.5, 1.5]]]], dtype=torch.float64)
    now = seen(at(x, level=sigma, weight=1.0, parametrisation=FLOW, evaluate=lambda *a: [again]), maps)
    ours = run_step(now, Predictions(base, None), SAG)
    mask = salient(maps, x)
    blurred = mask * gaussian(base, 1.0, span=2) + (1 - mask) * base
    noise = noise_from_x0(x, base, sigma, FLOW)
    y = (1 - sigma) * blurred + sigma * noise
    steered = noise + 0.7 * (noise - noise_from_x0(y, again, sigma, FLOW))
    close(ours, (x - sigma * steered) / (1 - sigma), rtol=1e-4, atol=1e-4)


def test_rows_by_themselves():
    """A picture without salient areas stays as it is beside one that has some."""
    x, cond, again = torch.randn(3, 2, 3, 4, 4)
    maps = torch.ones(2, 1, 2, 2)
    maps[1, 0, 0] += torch.tensor([0.5, -0.5])
    now = seen(at(x, weight=1.0, evaluate=lambda *a: [again]), maps)
    out = run_step(now, Predictions(cond, None), SAG)
    assert torch.equal(out[0], cond[0]) and not torch.equal(out[1], cond[1])
    single = seen(at(x[1:], weight=1.0, evaluate=lambda *a: [again[1:]]), maps[1:])
    close(out[1:], run_step(single, Predictions(cond[1:], None), SAG))


def test_off_and_nothing_salient_evaluate_nothing():
    x, cond = torch.randn(2, 2, 3, 4, 4)
    off = SelfAttentionGuidance(strength=0.0)
    assert off.edits(at(x)) == [] and off.term(at(x), Predictions(cond, None)) is None
    now = seen(at(x, weight=1.0), torch.ones(2, 1, 2, 2))  # no ``evaluate`` to call
    assert torch.equal(run_step(now, Predictions(cond, None), SAG), cond)


def test_which_block_is_read():
    def names(method, sites):
        return [site.name for site in sites if method.reader.acts_at(site)]

    joint = [Site(f"joint.{i}", "joint", i, 24) for i in range(24)]
    unet = [Site(name, kind) for name in ("input.4.0", "middle.0", "middle.1") for kind in ("self", "cross")]
    assert names(SAG, joint) == ["joint.12"] and names(SAG, unet) == ["middle.0"]
    one = SelfAttentionGuidance(blocks="input.4")
    assert names(one, unet) == ["input.4.0"]
    one.check(Setup(7.0, [7.0], True, FLOW, sites=unet))
    with pytest.raises(GuidanceError, match="'middle' names 2: middle.0, middle.1. Write one of them"):
        SelfAttentionGuidance(blocks="middle").check(Setup(7.0, [7.0], True, FLOW, sites=unet))


def test_bad_input():
    for sigma in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(GuidanceError, match="blur_sigma is .*; it must be above 0"):
            SelfAttentionGuidance(sigma=sigma)
    with pytest.raises(GuidanceError, match="strength is inf; give a finite number"):
        SelfAttentionGuidance(strength=float("inf"))
    now = at(torch.zeros(1, 4, 4, 6))
    with pytest.raises(GuidanceError, match="the negative is evaluated in parts or not at all. Combine it"):
        run_step(now, Predictions(now.x, now.x), SAG)


def test_a_prompt_that_sees_less_than_the_picture_is_told():
    now = at(torch.zeros(2, 4, 8, 8))
    call = a_call((1, 2, 2)).replace(step=now, latent=(4, 4))
    Salience(owner=SAG).output(call, lambda: attend(call))
    now.weight, now.plain = 1.0, Predictions(now.x, None)
    with pytest.raises(GuidanceError, match="the positive is evaluated in parts"):
        SAG.term(now, now.plain)


def test_salience_is_the_mean_of_the_maps():
    now, (a, b) = at(torch.zeros(1, 3, 4, 4)), torch.rand(2, 1, 1, 2, 2)
    now.state(SAG)["cond"] = [a, b]
    close(SAG.salience(now, "cond"), (a + b) / 2)


def test_a_negative_is_not_asked_where_nothing_guides():
    x, asked, maps = torch.randn(1, 3, 4, 4), [], torch.tensor([[[[0.5, 1.5]]]])
    now = at(x, weight=1.0, evaluate=lambda y, s, *roles: asked.append(roles) or [x])
    now.state(SAG).update(cond=[maps], uncond=[maps])
    run_step(now, Predictions(x, x + 1), SAG)  # a negative for another method, not for guidance
    assert asked == [("cond",)]


def test_the_trace_has_the_salient_share():
    x, maps = torch.randn(1, 3, 4, 4), torch.tensor([[[[1.5, 0.9, 0.8, 0.8]]]])
    now = at(x, weight=1.0, evaluate=lambda *a: [x])
    now.state(SAG)["cond"] = [maps]
    run_step(now, Predictions(x, None), SAG)
    assert now.record["salient"].tolist() == [0.25]


def test_a_part_of_a_videos_frames_is_not_read():
    now = at(torch.zeros(2, 4, 3, 2, 2))
    call = a_call((1, 2, 2)).replace(step=now, latent=(1, 2, 2))  # one of three frames
    Salience(owner=SAG).output(call, lambda: plain_attend(call))
    assert not now.state(SAG)

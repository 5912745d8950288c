"""The exact worlds are exact: closed forms against autograd, dense algebra and plain counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from rudder.bench.exact.distances import Ruler, assigned, sliced_w2, spread, total_variation, w2
from rudder.bench.exact.mixture import Modes, scale_of
from rudder.bench.exact.worlds import DRIFT, POSES, WORLDS, World
from rudder.guidance.space import Parametrisation, noise_from_x0, score_from_x0, v_from_x0

EPS, FLOW = Parametrisation.EPS, Parametrisation.FLOW
MADE = {name: make() for name, make in WORLDS.items()}

seeds = st.integers(0, 2**31)
kinds = st.sampled_from([EPS, FLOW])
worlds = st.sampled_from(list(MADE.values()))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def mixtures(draw) -> tuple[Modes, torch.Tensor]:
    """Any modes with any weights, some of them zero."""
    k, d = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    r, g = draw(st.integers(1, d)), generator(draw(seeds))
    axes = torch.linalg.qr(torch.randn(k, d, r, generator=g).double()).Q.mT
    weights = torch.rand(k, generator=g).double() * (torch.rand(k, generator=g) < 0.8)
    weights[0] += 0.1
    variances, floor = torch.rand(k, r, generator=g).double(), 0.05 + torch.rand(k, generator=g).double()
    return Modes(2 * torch.randn(k, d, generator=g).double(), axes, variances, floor), weights / weights.sum()


@st.composite
def noised(draw, dimensions: int, kind: Parametrisation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x ``[3, D]``, scale and sigma ``[3]``, over the levels that a sampler visits."""
    g = generator(draw(seeds))
    levels = torch.rand(3, generator=g).double()
    sigma = 0.02 + 0.97 * levels if kind is FLOW else torch.exp(6.5 * levels - 3.7)
    return 3 * torch.randn(3, dimensions, generator=g).double(), scale_of(sigma, kind), sigma


def dense(modes: Modes, x: torch.Tensor, scale: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """log p(x | mode) ``[B, K]`` with whole covariance matrices."""
    rows = []
    for point, a, s in zip(x, scale.tolist(), sigma.tolist()):
        rows.append(MultivariateNormal(a * modes.means, modes.covariances(a, s)).log_prob(point))
    return torch.stack(rows)


@given(st.data(), mixtures(), kinds)
def test_densities_are_those_of_dense_gaussians(data, mixture, kind):
    modes, weights = mixture
    x, scale, sigma = data.draw(noised(modes.means.shape[1], kind))
    logs = dense(modes, x, scale, sigma)
    torch.testing.assert_close(modes.log_likelihoods(x, scale, sigma), logs, rtol=1e-8, atol=1e-8)
    by_hand = (logs.exp() * weights).sum(1).log()
    usual = by_hand > -500  # below, the plain sum underflows; the closed form does not
    density = modes.log_density(x, scale, sigma, weights)
    torch.testing.assert_close(density[usual], by_hand[usual], rtol=1e-8, atol=1e-8)


@given(st.data(), mixtures(), kinds)
def test_the_score_is_the_gradient_of_the_log_density(data, mixture, kind):
    modes, weights = mixture
    x, scale, sigma = data.draw(noised(modes.means.shape[1], kind))
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(modes.log_density(x, scale, sigma, weights).sum(), x)
    with torch.no_grad():
        score = score_from_x0(x, modes.denoise(x, scale, sigma, weights), sigma, kind)
    torch.testing.assert_close(score, gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max() + 1))


@given(st.data(), worlds, kinds)
def test_the_score_of_every_prompt_of_every_world(data, world, kind):
    prompt = world.prompts[data.draw(st.sampled_from(list(world.prompts)))]
    x, scale, sigma = data.draw(noised(world.modes.means.shape[1], kind))
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(world.modes.log_density(x, scale, sigma, prompt).sum(), x)
    with torch.no_grad():
        latent = x.reshape(-1, *world.shape)
        score = score_from_x0(latent, world.denoise(latent, sigma, prompt, kind), sigma, kind)
    torch.testing.assert_close(score.flatten(1), gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max() + 1))


@given(st.data(), mixtures(), kinds)
def test_the_denoised_estimate_is_the_posterior_mean(data, mixture, kind):
    """Against the textbook formula with whole matrices, mode by mode."""
    modes, weights = mixture
    x, scale, sigma = data.draw(noised(modes.means.shape[1], kind))
    posterior = torch.softmax(dense(modes, x, scale, sigma) + weights.log(), 1)
    expected = []
    for point, r, a, s in zip(x, posterior, scale.tolist(), sigma.tolist()):
        gain = a * modes.covariances() @ torch.linalg.inv(modes.covariances(a, s))
        means = modes.means + torch.einsum("kde,ke->kd", gain, point - a * modes.means)
        expected.append(r @ means)
    x0 = modes.denoise(x, scale, sigma, weights)
    torch.testing.assert_close(x0, torch.stack(expected), rtol=1e-7, atol=1e-7)


@given(st.data(), worlds, kinds)
def test_class_probabilities_sum_to_one_and_follow_bayes(data, world, kind):
    x, scale, sigma = data.draw(noised(world.modes.means.shape[1], kind))
    found = world.class_probabilities(x.reshape(-1, *world.shape), sigma, kind)
    torch.testing.assert_close(sum(found.values()), torch.ones(3).double())
    joint = dense(world.modes, x, scale, sigma) + world.prompts[""].log()
    for concept, probability in found.items():
        mine = torch.tensor([c == concept for c in world.concepts])
        torch.testing.assert_close(probability, (joint[:, mine].logsumexp(1) - joint.logsumexp(1)).exp())


@given(worlds, seeds)
def test_the_two_parametrisations_are_one_law(world, seed):
    """x = x0 + s n seen by eps is x / (1 + s) at sigma s / (1 + s) seen by flow; the same x0, and v = n - x0."""
    g = generator(seed)
    clean = world.true_samples(4, g)
    s = torch.exp(5 * torch.rand(4, generator=g).double() - 3)
    wide = s.reshape(-1, 1, 1, 1)
    x, weights = clean + wide * torch.randn(clean.shape, generator=g).double(), world.prompts[world.target]
    eps = world.denoise(x, s, weights, EPS)
    y, t = x / (1 + wide), s / (1 + s)
    flow = world.denoise(y, t, weights, FLOW)
    torch.testing.assert_close(flow, eps, rtol=1e-7, atol=1e-9)
    velocity = noise_from_x0(x, eps, s, EPS) - eps
    torch.testing.assert_close(v_from_x0(y, flow, t, FLOW), velocity, rtol=1e-6, atol=1e-6)


@given(mixtures(), seeds)
def test_draws_have_the_moments_of_the_mixture(mixture, seed):
    modes, weights = mixture
    draws = modes.sample(weights, 4000, generator(seed))
    mean, variance = modes.moments(weights)
    error = 6 * (variance / len(draws)) ** 0.5
    assert float((draws.mean(0) - mean).norm()) < error
    assert float((draws - mean).square().sum(1).mean()) == pytest.approx(float(variance), rel=0.35)


# ---------------------------------------------------------------- the worlds


@pytest.mark.parametrize("world", MADE.values(), ids=MADE)
def test_a_world_is_standardised_and_its_laws_are_laws(world: World):
    mean, variance = world.modes.moments(world.prompts[""])
    assert float(mean.norm()) < 1e-12 and float(variance) == pytest.approx(len(mean))
    for weights in (world.truth, *world.prompts.values()):
        assert weights.shape == (len(world.modes),) and float(weights.sum()) == pytest.approx(1)
    assert len(world.concepts) == len(world.modes) and {world.target, world.anchor, ""} <= set(world.prompts)
    assert [c for c, right in zip(world.concepts, world.right) if right] == [world.target] * len(POSES)
    products = world.modes.axes @ world.modes.axes.mT
    torch.testing.assert_close(products, torch.eye(products.shape[1]).double().expand_as(products))


@pytest.mark.parametrize("name", DRIFT)
def test_captions_slip_for_the_rare_concept_alone(name):
    world = MADE[name]
    attribute, noun = world.target.split()
    model = {c: float(world.prompts[world.target][[k == c for k in world.concepts]].sum()) for c in world.concepts}
    frequent = next(c for c in model if c.endswith(noun) and c != world.target)
    assert model == pytest.approx({c: 0.0 for c in model} | {world.target: 1 - DRIFT[name], frequent: DRIFT[name]})
    overall, anchor = world.prompts[""], world.prompts[world.anchor]
    assert float(overall[world.right].sum()) == pytest.approx(0.002)
    kept = torch.tensor([c.startswith(attribute) for c in world.concepts])
    torch.testing.assert_close(anchor, torch.where(kept, overall, 0) / overall[kept].sum())  # clean


def test_where_nothing_slips_the_model_is_the_truth():
    world = MADE["overlap"]
    assert torch.equal(world.prompts[world.target], world.truth)
    nearest, _ = assigned(world, world.true_samples(4000, generator()))
    assert 0.8 < float(world.right[nearest].double().mean()) < 0.97  # the modes do overlap


# ---------------------------------------------------------------- the distances


@given(seeds, st.integers(1, 4), st.integers(2, 12))
def test_w2_of_a_shift_is_its_length(seed, dimensions, count):
    g = generator(seed)
    a, shift = torch.randn(count, dimensions, generator=g).double(), torch.randn(dimensions, generator=g).double()
    shuffled = (a + shift)[torch.randperm(count, generator=g)]
    bases = torch.linalg.qr(torch.randn(8, dimensions, dimensions, generator=g).double()).Q.flatten(0, 1)
    assert w2(a, shuffled) == pytest.approx(float(shift.norm()), rel=1e-6)
    assert sliced_w2(a, shuffled, bases) == pytest.approx(float(shift.norm()), rel=1e-6)
    assert w2(a, a) == pytest.approx(0, abs=1e-6)


@given(seeds, st.integers(1, 5), st.integers(2, 12))
def test_slices_see_no_more_than_the_whole(seed, dimensions, count):
    g = generator(seed)
    a, b = (torch.randn(count, dimensions, generator=g).double() for _ in range(2))
    bases = torch.linalg.qr(torch.randn(3, dimensions, dimensions, generator=g).double()).Q.flatten(0, 1)
    assert sliced_w2(a, b, bases) <= w2(a, b) * (1 + 1e-9)
    assert w2(a, b) == pytest.approx(w2(b, a))


def test_w2_finds_the_best_assignment():
    a, b = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[1.2], [0.1]]).double()
    assert w2(a, b) == pytest.approx(((0.1**2 + 0.2**2) / 2) ** 0.5)


@pytest.mark.parametrize("world", MADE.values(), ids=MADE)
def test_the_truth_measures_as_the_truth_and_what_was_done_to_it_is_seen(world: World):
    g = generator(1)
    ruler = Ruler.of(world, g, 20_000)
    truth, second = world.true_samples(400, g), world.true_samples(400, g)
    fair = ruler.measure(second, truth)
    assert fair["coverage"] < 0.12 and fair["inside"] > 0.8
    assert fair["right"] == (pytest.approx(0.9, abs=0.07) if world.name == "overlap" else 1)
    assert fair["spread"] == pytest.approx(1, abs=0.15)

    elsewhere = world.modes.sample(1.0 * ~world.right, 400, g).reshape(truth.shape)
    wrong = ruler.measure(elsewhere, truth)
    assert wrong["right"] < 0.2 and wrong["inside"] <= wrong["right"] and wrong["coverage"] > 0.8
    assert wrong["w2"] > 3 * fair["w2"] or world.name == "image"  # 64 dimensions have a high floor
    assert wrong["sliced"] > 3 * fair["sliced"] and wrong["w2"] > fair["w2"]

    heaviest = world.modes.means[world.truth.argmax()].reshape(world.shape)
    collapsed = ruler.measure(heaviest.expand_as(truth), truth)
    assert collapsed["right"] == collapsed["inside"] == 1 and collapsed["spread"] < 1e-6
    assert collapsed["coverage"] == pytest.approx(1 - max(POSES), abs=0.1)


def test_spread_is_a_ratio_within_modes():
    world = MADE["rare"]
    right = torch.nonzero(world.right).flatten()
    draws = world.modes.sample(world.truth, 2000, generator())
    nearest, _ = assigned(world, draws.reshape(-1, *world.shape))
    squeezed = world.modes.means[nearest] + 0.5 * (draws - world.modes.means[nearest])
    assert spread(world, squeezed, nearest) == pytest.approx(0.5 * spread(world, draws, nearest))
    one_each = world.modes.means[right]
    assert spread(world, one_each, right) != spread(world, one_each, right)  # nan: one sample has no spread


def test_total_variation():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert total_variation(p, p) == 0 and total_variation(p, q) == 0.5
    assert total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 1

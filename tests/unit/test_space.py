"""Conversions between x0, noise, v and score: against closed forms, against each other, and per sample."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from rudder.guidance import space
from rudder.guidance.space import Parametrisation

from .tensors import KINDS, kinds, levels, predictions, seeds

close = torch.testing.assert_close


def noised(x0, noise, sigma, kind):
    """The forward process, written out: what every conversion must agree with. Also the network's v and the score."""
    s = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    if kind is Parametrisation.FLOW:
        return (1 - s) * x0 + s * noise, noise - x0, -noise / s
    alpha, scale = 1 / torch.sqrt(1 + s**2), s / torch.sqrt(1 + s**2)  # variance preserving: alpha^2 + scale^2 = 1
    return x0 + s * noise, alpha * noise - scale * x0, -noise / s


@given(predictions(2), kinds, seeds)
def test_conversions_agree_with_the_forward_process(tensors, kind, seed):
    x0, noise = tensors
    sigma = levels(len(x0), kind, seed)
    x, v, score = noised(x0, noise, sigma, kind)
    close(space.noise_from_x0(x, x0, sigma, kind), noise)
    close(space.x0_from_noise(x, noise, sigma, kind), x0)
    close(space.v_from_x0(x, x0, sigma, kind), v)
    close(space.x0_from_v(x, v, sigma, kind), x0)
    close(space.score_from_x0(x, x0, sigma, kind), score)
    s = space.expand(sigma, x0)
    close(space.residual(x, x0), s * (v if kind is Parametrisation.FLOW else noise))


@given(predictions(2), kinds, seeds)
def test_round_trips_hold_for_any_prediction(tensors, kind, seed):
    """Also for an x0 that has nothing to do with x, as a prediction of a network."""
    x, x0 = tensors
    sigma = levels(len(x), kind, seed)
    close(space.x0_from_noise(x, space.noise_from_x0(x, x0, sigma, kind), sigma, kind), x0, rtol=1e-9, atol=1e-9)
    close(space.x0_from_v(x, space.v_from_x0(x, x0, sigma, kind), sigma, kind), x0, rtol=1e-9, atol=1e-9)
    noise = space.noise_from_x0(x, x0, sigma, kind)
    close(space.score_from_x0(x, x0, sigma, kind), -noise / space.expand(sigma, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 2, 5, 6)])
def test_a_level_for_each_sample_is_a_batch_of_single_levels(kind, shape):
    x, x0 = torch.randn(2, *shape, dtype=torch.float64)
    sigma = levels(3, kind)
    for convert in (space.noise_from_x0, space.x0_from_noise, space.v_from_x0, space.x0_from_v, space.score_from_x0):
        whole = convert(x, x0, sigma, kind)
        assert whole.shape == x.shape
        for i, level in enumerate(sigma):
            one = slice(i, i + 1)
            close(whole[one], convert(x[one], x0[one], float(level), kind))
            close(whole[one], convert(x[one], x0[one], level, kind))  # a zero-dimensional tensor


def test_the_network_of_the_host_sees_the_same_v():
    """ComfyUI's V_PREDICTION.calculate_denoised with sigma_data 1, copied here: the sign convention must be its own."""
    x, v = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64)
    sigma = torch.tensor([0.3, 7.0], dtype=torch.float64)
    s = sigma.reshape(-1, 1, 1, 1)
    host = x / (s**2 + 1) - v * s / (s**2 + 1) ** 0.5
    close(space.x0_from_v(x, v, sigma, Parametrisation.V), host)


def test_expand():
    video = torch.zeros(2, 4, 3, 5, 5, dtype=torch.float16)
    assert space.expand(torch.arange(2), video).shape == (2, 1, 1, 1, 1)
    assert space.expand(torch.arange(2), video).dtype == torch.float16
    assert space.expand(0.5, video).ndim == 0
    assert space.expand(torch.tensor(0.5), video).ndim == 0


@given(predictions(2))
def test_products_are_per_sample_over_every_other_dimension(tensors):
    a, b = tensors
    close(space.dot(a, b), torch.stack([(p * q).sum() for p, q in zip(a, b)]))
    close(space.norm(a), torch.stack([p.square().sum().sqrt() for p in a]))
    cosine = space.cosine(a, b)
    assert cosine.shape == (len(a),) and cosine.abs().max() <= 1 + 1e-12
    close(cosine, space.dot(a, b) / (space.norm(a) * space.norm(b)))
    close(space.cosine(a, -3 * a), -torch.ones(len(a), dtype=a.dtype))


def test_the_cosine_with_nothing_is_zero():
    a = torch.ones(2, 4, 3, 3)
    a[1] = 0
    assert space.cosine(a, torch.ones_like(a)).tolist() == [pytest.approx(1), 0]
    assert not math.isnan(float(space.cosine(a * 0, a * 0)[0]))

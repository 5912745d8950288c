"""The measures: against closed forms and libraries, symmetric where they should be, and blind behind a mask."""

from __future__ import annotations

import math

import kornia
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.bench import measures

seeds = st.integers(0, 2**31)


def uniform(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_mask(batch: int, side: int) -> torch.Tensor:
    where = torch.zeros(batch, side, side, dtype=torch.float64)
    where[:, : side // 2] = 1
    return where


# ---------------------------------------------------------------- of a picture


def test_saturation_of_known_colours():
    colours = torch.tensor([[0.5, 0.5, 0.5], [1, 0, 0], [0.2, 0.6, 0.4]])
    images = colours[:, :, None, None].expand(3, 3, 8, 8)
    assert measures.saturation(images).tolist() == pytest.approx([0, 1, 0.4])


def test_saturation_inside_and_outside_a_mask():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    images[:, 0, :4] = 0.8  # red above, black below
    where = half_mask(1, 8)
    assert measures.saturation(images, where).item() == pytest.approx(0.8)
    assert measures.saturation(images, 1 - where).item() == 0
    assert measures.saturation(images).item() == pytest.approx(0.4)


@given(seeds)
def test_saturation_is_that_of_hsv_times_its_value(seed):
    images = uniform(seed, 2, 3, 6, 6)
    hsv = kornia.color.rgb_to_hsv(images)
    assert torch.allclose(measures.saturation(images), (hsv[:, 1] * hsv[:, 2]).mean((1, 2)), atol=1e-6)


@given(seeds)
def test_psnr_agrees_with_kornia_and_is_of_each_picture(seed):
    a, b = uniform(seed, 2, 3, 3, 8, 8)
    ours = measures.psnr(a, b)
    for i in range(len(a)):
        assert ours[i].item() == pytest.approx(kornia.metrics.psnr(a[i], b[i], 1.0).item())
    assert torch.allclose(ours, measures.psnr(a, b, torch.ones(3, 8, 8)))
    assert measures.psnr(a, a).isinf().all()


@given(seeds)
def test_ssim_agrees_with_kornia_and_a_full_mask_changes_nothing(seed):
    a = uniform(seed, 2, 3, 20, 20)
    b = (a + 0.2 * normal(seed, 2, 3, 20, 20)).clamp(0, 1)
    theirs = kornia.metrics.ssim(a, b, 11).mean((1, 2, 3))
    assert torch.allclose(measures.ssim(a, b), theirs)
    assert torch.allclose(measures.ssim(a, b, torch.ones(2, 20, 20)), theirs, atol=1e-6)
    assert torch.allclose(measures.ssim(a, a), torch.ones(2, dtype=a.dtype))


@given(seeds)
def test_nothing_behind_a_mask_is_felt(seed):
    a, b, c = uniform(seed, 3, 1, 3, 20, 20)
    where = half_mask(1, 20)
    elsewhere = torch.where(where[:, None] > 0, b, c)
    for measure in (measures.psnr, measures.ssim):
        assert torch.allclose(measure(a, b, where), measure(a, elsewhere, where))
        assert not torch.allclose(measure(a, b), measure(a, elsewhere))


def test_masked_measures_change_nothing_they_were_given():
    a, b = uniform(0, 2, 1, 3, 16, 16)
    where = half_mask(1, 16)
    before = [t.clone() for t in (a, b, where)]
    measures.psnr(a, b, where), measures.ssim(a, b, where), measures.saturation(a, where)
    measures.perceptual([a], [b], where)
    assert all(torch.equal(x, y) for x, y in zip((a, b, where), before))


# ---------------------------------------------------------------- of feature maps


def maps(seed: int, batch: int = 2) -> list[torch.Tensor]:
    return [normal(seed + i, batch, 8, side, side) for i, side in enumerate((8, 4))]


@given(seeds)
def test_perceptual_distance_is_a_bounded_symmetric_one(seed):
    a, b = maps(seed), maps(seed + 7)
    d = measures.perceptual(a, b)
    assert torch.allclose(d, measures.perceptual(b, a))
    assert torch.allclose(measures.perceptual(a, a), torch.zeros(2, dtype=d.dtype))
    assert (d > 0).all() and (d <= 8).all()
    opposite = measures.perceptual(a, [-x for x in a])
    assert torch.allclose(opposite, torch.full_like(opposite, 8))  # 4 at each of the two levels


@given(seeds, st.floats(0.1, 10))
def test_perceptual_distance_ignores_the_scale_of_features(seed, scale):
    a, b = maps(seed), maps(seed + 7)
    assert torch.allclose(measures.perceptual(a, b), measures.perceptual([scale * x for x in a], b))


@given(seeds)
def test_perceptual_distance_outside_a_mask(seed):
    a = maps(seed)
    where = half_mask(2, 16)
    b = [x.clone() for x in a]
    for x in b:
        x[:, :, x.shape[2] // 2:] += 1  # changed only where the weight is 0
    assert torch.allclose(measures.perceptual(a, b, where), torch.zeros(2, dtype=torch.float64))
    assert (measures.perceptual(a, b, 1 - where) > 0).all()


# ---------------------------------------------------------------- of distributions


def gaussian(mean: torch.Tensor, root: torch.Tensor, seed: int, n: int) -> torch.Tensor:
    """n samples whose mean and covariance are exactly `mean` and root^T root."""
    x = normal(seed, n, len(mean))
    x = x - x.mean(0)
    whiten = torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return mean + x @ whiten @ root


@given(seeds)
def test_frechet_of_gaussians_with_a_common_basis_is_the_closed_form(seed):
    m, s, t = normal(seed, 4), 0.2 + uniform(seed, 4), 0.2 + uniform(seed + 1, 4)
    turn = torch.linalg.qr(normal(seed + 2, 4, 4)).Q
    a = gaussian(torch.zeros(4, dtype=m.dtype), torch.diag(s) @ turn, seed + 3, 40)
    b = gaussian(m, torch.diag(t) @ turn, seed + 4, 60)
    assert measures.frechet(a, b) == pytest.approx((m @ m + ((s - t) ** 2).sum()).item(), rel=1e-6)


@given(seeds)
def test_frechet_equals_the_matrix_root_of_scipy(seed):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = normal(seed, 30, 5), normal(seed + 1, 25, 5) @ normal(seed + 2, 5, 5)
    root = linalg.sqrtm((a.T.cov() @ b.T.cov()).numpy())
    theirs = ((a.mean(0) - b.mean(0)) ** 2).sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * root.trace().real
    assert measures.frechet(a, b) == pytest.approx(theirs.item(), rel=1e-6)


@given(seeds, st.integers(2, 12), st.integers(2, 12))
def test_frechet_is_symmetric_and_zero_for_equal_sets_even_of_few_samples(seed, n, m):
    a, b = normal(seed, n, 8), normal(seed + 1, m, 8)
    assert measures.frechet(a, b) == pytest.approx(measures.frechet(b, a), rel=1e-9)
    assert measures.frechet(a, b) > 0
    assert measures.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert measures.frechet(a, a.flip(0)) == pytest.approx(0, abs=1e-9)


@given(seeds)
def test_kernel_distance_is_the_unbiased_sum_over_pairs(seed):
    a, b = normal(seed, 4, 3), normal(seed + 1, 5, 3)

    def k(x, y):
        return (x @ y / 3 + 1).item() ** 3

    within = [sum(k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j) / (len(s) * (len(s) - 1))
              for s in (a, b)]
    across = sum(k(x, y) for x in a for y in b) / 20
    assert measures.kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    assert measures.kernel_distance(a, b) == pytest.approx(measures.kernel_distance(b, a), rel=1e-9)


def test_kernel_distance_has_no_bias_where_frechet_has():
    draws = [(normal(2 * i, 12, 4), normal(2 * i + 1, 12, 4)) for i in range(400)]
    kernel = torch.tensor([measures.kernel_distance(a, b) for a, b in draws])
    assert abs(kernel.mean()) < 4 * kernel.std() / len(kernel) ** 0.5
    assert min(measures.frechet(a, b) for a, b in draws[:50]) > 0.1
    shifted = [measures.kernel_distance(a, b + 1) for a, b in draws[:100]]
    assert torch.tensor(shifted).mean() > 1


@given(seeds, st.integers(2, 6))
def test_diversity_is_the_mean_over_pairs(seed, n):
    x = uniform(seed, n, 3, 4, 4)
    pairs = [((x[i] - x[j]) ** 2).mean().sqrt().item() for i in range(n) for j in range(i)]
    assert measures.diversity(x) == pytest.approx(math.fsum(pairs) / len(pairs))
    assert measures.diversity(x[:1].expand(n, -1, -1, -1)) == 0


# ---------------------------------------------------------------- bad input


def test_what_does_not_fit_is_said():
    a = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\[2, 8, 8\], not \[2, 4, 4\]"):
        measures.psnr(a, a, torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="no pixel"):
        measures.ssim(a, a, torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="one shape"):
        measures.ssim(a, a[:1])
    with pytest.raises(ValueError, match=r"\[1, 4\] and \[5, 4\]"):
        measures.frechet(torch.rand(1, 4), torch.rand(5, 4))
    with pytest.raises(ValueError, match="two samples"):
        measures.diversity(a[:1])

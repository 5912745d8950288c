"""Measures of pictures that need no judge's opinion: colour, likeness, distances of distributions, diversity.

Pictures are float [B, 3, H, W] in 0..1. `where` is a weight of each pixel, [B, H, W] in 0..1: a mask measures inside,
`1 - mask` outside. What lies where the weight is 0 never moves a result. Unmasked SSIM is kornia's.
"""

from __future__ import annotations

import kornia
import torch
from torch import Tensor
from torch.nn import functional


def _weight(images: Tensor, where: Tensor | None) -> Tensor:
    """`where` as [B, 1, H, W], ones when there is none.

    Raises:
        ValueError: it does not fit the pictures, or leaves nothing of one of them.
    """
    shape = (len(images), *images.shape[2:])
    if where is None:
        return images.new_ones(shape).unsqueeze(1)
    if tuple(where.shape) != shape:
        raise ValueError(f"where must be [B, H, W] like the pictures, {list(shape)}, not {list(where.shape)}.")
    if len(where) and not where.flatten(1).sum(1).min() > 0:
        raise ValueError("where leaves no pixel of some picture: leave such pictures out.")
    return where.to(images).unsqueeze(1)


def _same(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ValueError(f"Two batches [B, C, H, W] of one shape are needed, not {list(a.shape)} and {list(b.shape)}.")


def saturation(images: Tensor, where: Tensor | None = None) -> Tensor:
    """Mean chroma [B] in 0..1: the largest less the smallest of R, G, B, which is HSV's saturation times its value, so
    that dark pixels, whose hue is noise, count little. Rises when guidance burns colours."""
    weight = _weight(images, where)
    return ((images.amax(1, True) - images.amin(1, True)) * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))


def psnr(a: Tensor, b: Tensor, where: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB; infinite for equal pictures. Libraries average over the batch and know no
    mask."""
    _same(a, b)
    weight = _weight(a, where)
    error = ((a - b) ** 2 * weight).sum((1, 2, 3)) / (a.shape[1] * weight.sum((1, 2, 3)))
    return -10 * torch.log10(error)


def ssim(a: Tensor, b: Tensor, where: Tensor | None = None, window: int = 11) -> Tensor:
    """Structural similarity [B] (Wang et al. 2004, eq. 13), 1 for equal pictures; Gaussian window of deviation 1.5.

    With `where`, means and variances of a window are those of its weighted pixels, and windows are averaged with the
    weight of their centre; so nothing leaks over the mask's edge. With all weights 1 it is kornia's."""
    _same(a, b)
    weight = _weight(a, where)
    if where is None:
        return kornia.metrics.ssim(a, b, window).mean((1, 2, 3))
    kernel = kornia.filters.get_gaussian_kernel2d((window, window), (1.5, 1.5), dtype=a.dtype, device=a.device)
    mass = kornia.filters.filter2d(weight, kernel).clamp(min=1e-12)

    def mean(x: Tensor) -> Tensor:
        return kornia.filters.filter2d(x * weight, kernel) / mass

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return (score * weight).sum((1, 2, 3)) / (a.shape[1] * weight.sum((1, 2, 3)))


def perceptual(a: list[Tensor], b: list[Tensor], where: Tensor | None = None) -> Tensor:
    """LPIPS-like distance [B] (Zhang et al., arXiv 1801.03924 eq. 1, with weights of 1) of feature maps, a list of
    [B, C, H', W'] as Judge.maps gives: the squared difference of unit vectors, averaged over positions, summed over
    levels. 0 for equal pictures, at most 4 a level.

    `where` [B, H, W] weighs positions after averaging down to each level. Features see beyond their position, so a
    change inside a mask is still felt a little way outside it."""
    total = torch.zeros(len(a[0]), dtype=a[0].dtype, device=a[0].device)
    for x, y in zip(a, b, strict=True):
        _same(x, y)
        at = None if where is None else functional.adaptive_avg_pool2d(where.to(x)[:, None], x.shape[2:])[:, 0]
        weight = _weight(x, at)
        gap = (functional.normalize(x, dim=1) - functional.normalize(y, dim=1)) ** 2
        total = total + (gap * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return total


def structure(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Structure distance [B] of the coarsest feature maps [B, C, h, w] of Judge.maps: mean square difference of the
    cosine similarities of all pairs of positions. 0 for equal layouts, whatever is there. After PIE-Bench (arXiv
    2310.01506), which takes DINO's keys."""
    def similarities(maps: Tensor) -> Tensor:
        tokens = functional.normalize(maps.flatten(2), dim=1)
        return tokens.transpose(1, 2) @ tokens

    return ((similarities(a[-1]) - similarities(b[-1])) ** 2).mean((1, 2))


def _sets(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"Two sets of features [N > 1, F] are needed, not {list(a.shape)} and {list(b.shape)}.")
    return a.double(), b.double()


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two sets of features [N, F] and [M, F] (Heusel et al., arXiv 1706.08500 eq. 6):
    |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of the covariances A and B. 0 for equal sets.

    The trace of the root is the sum of the singular values of X Y^T with A = X^T X, B = Y^T Y, which needs no root of
    a matrix and no full rank. The distance grows as sets shrink: compare sets of one size, or use `kernel_distance`."""
    a, b = _sets(a, b)
    roots = [torch.linalg.qr((s - s.mean(0)) / (len(s) - 1) ** 0.5).R for s in (a, b)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = sum((r**2).sum() for r in roots)
    return max(0.0, (((a.mean(0) - b.mean(0)) ** 2).sum() + spread - 2 * cross).item())


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Kernel distance (KID) of two sets of features [N, F] and [M, F] (Binkowski et al., arXiv 1801.01401): unbiased
    squared maximum mean discrepancy with the kernel (x.y / F + 1)^3. About 0 for sets of one distribution, whatever
    their size, and then as often below 0 as above."""
    a, b = _sets(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:  # without the pairs of a sample with itself: that makes it unbiased
        k = kernel(x, x)
        return (k.sum() - k.diag().sum()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def diversity(samples: Tensor) -> float:
    """How much samples [N, ...] of one prompt differ, pictures or features: the root mean square difference of two of
    them, averaged over all pairs. 0 when all are equal.

    Raises:
        ValueError: fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError("Diversity is of pairs: two samples at least are needed.")
    flat = samples.flatten(1).double()
    return (torch.pdist(flat).mean() / flat.shape[1] ** 0.5).item()

"""RIVAL: statistics by hand, and when it does what."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from rudder.guidance.contract import GuidanceError
from rudder.guidance.rival import RIVAL, adain, statistics
from rudder.guidance.space import Parametrisation, noise_from_x0, v_from_x0

from .tensors import at, kinds, predictions

X = torch.zeros(2, 4, 2, 2)
close = torch.testing.assert_close


@given(predictions(2))
def test_adain_gives_the_sources_mean_and_spread(tensors):
    eps, source = tensors
    out = adain(eps, source[:1])
    mean, std = statistics(out)
    dims = tuple(range(2, eps.ndim))
    close(mean, source[:1].mean(dims, keepdim=True).expand_as(mean))
    if eps[0, 0].numel() > 1:
        spread = eps.var(dims, unbiased=False, keepdim=True)
        close(out.var(dims, unbiased=False, keepdim=True), spread / (spread + 1e-5) * statistics(source[:1])[1] ** 2)
    close(adain(eps, eps), eps)


@given(predictions(2), kinds)
def test_it_acts_on_eps_and_leaves_the_source(tensors, kind):
    x, x0 = tensors
    now = at(x, parametrisation=kind)
    out = RIVAL(early_until=1.0).finish(now, x0)
    assert torch.equal(out[:1], x0[:1])
    to = v_from_x0 if kind is Parametrisation.FLOW else noise_from_x0
    eps = to(x, x0, now.sigma, Parametrisation.FLOW if kind is Parametrisation.FLOW else Parametrisation.EPS)
    got = to(x, out, now.sigma, Parametrisation.FLOW if kind is Parametrisation.FLOW else Parametrisation.EPS)
    close(got[1:], adain(eps, eps[:1])[1:], rtol=1e-6, atol=1e-8)


def test_the_source_alone_then_both():
    unions = [RIVAL().edits(at(X, i))[0][0].union for i in range(10)]
    assert unions == [False] * 4 + [True] * 6
    assert all(edit.union for i in range(10) for edit, _ in RIVAL(align_until=0).edits(at(X, i)))
    x0 = torch.randn(2, 3, 4, 4)
    early = [not torch.equal(RIVAL().finish(at(torch.randn(2, 3, 4, 4), i), x0), x0) for i in range(10)]
    assert early == [True] * 4 + [False] * 6


def test_bad_input():
    with pytest.raises(GuidanceError, match="align_percent is -1"):
        RIVAL(align_until=-1)
    with pytest.raises(GuidanceError, match="early_percent is 2"):
        RIVAL(early_until=2)

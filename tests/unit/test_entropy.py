"""Attention entropy scaling: the factor, where it acts, and that it keeps the entropy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.attention.entropy import Entropy, factor
from rudder.guidance.contract import GuidanceError
from rudder.guidance.entropy import AttentionEntropy

from .tensors import step
from .test_contrast import a_call, grids, texts

close = torch.testing.assert_close
counts = st.integers(2, 100000)


@given(counts, counts)
def test_the_factor(now, trained):
    assert factor(trained, trained) == 1.0
    assert (factor(now, trained) > 1) == (now > trained)
    assert math.isclose(factor(now, trained) * factor(trained, now), 1.0)
    assert factor(1, trained) == factor(now, 1) == factor(now, 0.5) == 1.0


def test_the_papers_layers_of_sd15():
    """At 1024x1024, trained at 512x512: 4096, 1024, 256 and 64 tokens have become four times as many."""
    for tokens in (4096, 1024, 256, 64):
        close(factor(4 * tokens, tokens) ** 2, math.log(4 * tokens, tokens))


@given(grids, texts, st.booleans())
def test_the_trained_size_is_exactly_the_identity(grid, text, count):
    height, width = grid[1] * 2, grid[2] * 2
    call = a_call(grid, text, latent=(height, width))
    for trained in ((height, width), (width, height), (height * 2, width / 2)):
        assert Entropy(trained=trained, text=count).inputs(call) is call


@given(grids.filter(lambda grid: math.prod(grid) > 4), texts, st.booleans(), st.sampled_from([0.5, 2.0]))
def test_it_scales_the_queries_of_image_tokens_alone(grid, text, count, side):
    call = a_call(grid, text, latent=(grid[1], grid[2]))
    edited = Entropy(trained=(grid[1] * side, grid[2] * side), text=count).inputs(call)
    image, others = math.prod(grid), text * count
    trained = image * side**2 + others
    expected = factor(image + others, trained)
    close(edited.q[:, :, text:], call.q[:, :, text:] * expected)
    assert torch.equal(edited.q[:, :, :text], call.q[:, :, :text])
    assert edited.k is call.k and edited.v is call.v
    if trained > 1:
        assert (expected > 1) == (side < 1), "more tokens than in training: sharper"


@given(st.integers(0, 1000))
def test_it_keeps_the_entropy_over_the_share_of_tokens(seed):
    """Random queries and keys: entropy over ln N is nearer to that of training than without, in both directions."""
    generator = torch.Generator().manual_seed(seed)

    def entropy(tokens: int, scale: float) -> float:
        q, k = (torch.randn(256, 16, generator=generator) * 1.5, torch.randn(tokens, 16, generator=generator) * 1.5)
        p = (q * scale @ k.T / 4).softmax(-1)
        return float(-(p * p.clamp_min(1e-12).log()).sum(-1).mean())

    trained = entropy(64, 1.0)
    for tokens in (16, 1024):
        assert abs(entropy(tokens, factor(tokens, 64)) - trained) < abs(entropy(tokens, 1.0) - trained)


def test_references_count_as_other_tokens():
    """Tokens after those of the picture, of a reference image: as many in training as now."""
    call = a_call((1, 2, 4), 2, latent=(2, 4))
    site = type(call.site)("double.0", "joint", grid=(1, 1, 4), text=slice(0, 2), image=slice(2, 6))
    call = call.replace(site=site, latent=(1, 4))
    edited = Entropy(trained=(1, 2)).inputs(call)
    close(edited.q[:, :, 2:6], call.q[:, :, 2:6] * math.sqrt(math.log(10) / math.log(2 + 2 + 4)))
    assert torch.equal(edited.q[:, :, 6:], call.q[:, :, 6:])


def test_its_method_edits_every_branch():
    method = AttentionEntropy(trained=(64, 48), text=False, blocks="output")
    ((edit, on),) = method.edits(step())
    assert on == () and edit == Entropy(trained=(64, 48), text=False, blocks="output")
    assert method.prompts() == ()


@pytest.mark.parametrize("trained", [(0, 64), (64, -1), (float("nan"), 64), (64, float("inf"))])
def test_bad_input(trained):
    with pytest.raises(GuidanceError, match="the trained size is .* cells of the latent; both sides must be above 0"):
        AttentionEntropy(trained=trained)

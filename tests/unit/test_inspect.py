"""Maps of the attention as small pictures: what is computed, and how it is drawn."""

from __future__ import annotations

import pytest
import torch

from rudder.attention import inspect
from rudder.attention.contract import Call
from rudder.attention.inspect import SelfMaps, TextMaps, parse_tokens, self_map, text_maps, token_at
from rudder.attention.listing import ListSites, table
from rudder.attention.sites import Site


def joint(samples: int = 2, chunks: int = 2, text: int = 5, grid=(1, 3, 4), after: int = 2, **options) -> Call:
    """Text, picture, and tokens of a reference picture after it."""
    generator = torch.Generator().manual_seed(3)
    size = grid[0] * grid[1] * grid[2]
    q, k, v = (torch.randn(samples * chunks, 3, text + size + after, 8, generator=generator) for _ in range(3))
    site = Site("double.0", "joint", grid=grid, text=slice(0, text), image=slice(text, text + size))
    return Call(q, k, v, site, ("cond",) * chunks, samples, None, **options)


def cross(text: int = 5, grid=(1, 3, 4)) -> Call:
    generator = torch.Generator().manual_seed(4)
    q = torch.randn(2, 3, grid[1] * grid[2], 8, generator=generator)
    k, v = (torch.randn(2, 3, text, 8, generator=generator) for _ in range(2))
    return Call(q, k, v, Site("middle.0", "cross", grid=grid, text=slice(0, text)), ("cond",), 2, None)


@pytest.mark.parametrize("at_once", [1, 500, 2**24])
@pytest.mark.parametrize("masked", [False, True])
def test_a_text_map_is_a_column_of_the_probabilities(at_once, masked, monkeypatch):
    """However few are computed at a time; of the first part of the prompt alone."""
    monkeypatch.setattr(inspect, "AT_ONCE", at_once)
    mask = torch.linspace(-2, 2, 19).expand(4, 1, 19, 19) if masked else None
    call = joint(mask=mask)
    expected = call.probabilities().mean(1)[:2, 5:17]
    found = text_maps(call, (0, 3))
    assert found.shape == (2, 2, 1, 3, 4)
    torch.testing.assert_close(found[:, 1].flatten(1), expected[..., 3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(text_maps(call, ()).flatten(1), expected[..., :5].mean(-1), rtol=1e-5, atol=1e-6)


def test_the_mean_of_a_cross_attention_leaves_the_start_token_out():
    call = cross()
    shares = call.probabilities().mean(1)
    torch.testing.assert_close(text_maps(call, ()).flatten(1), shares[..., 1:].mean(-1), rtol=1e-5, atol=1e-6)
    assert text_maps(call, tuple(range(5))).sum(1).allclose(torch.ones(()))


def test_a_self_map_is_a_row_of_the_probabilities():
    call = joint()
    expected = call.probabilities().mean(1)[:2, 5 + 6, 5:17].unflatten(1, (1, 3, 4))
    torch.testing.assert_close(self_map(call, 0.5, 0.5)[:, 0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("grid", "x", "y", "token"),
    [
        ((1, 3, 4), 0, 0, 0), ((1, 3, 4), 1, 1, 11), ((1, 3, 4), 0.5, 0.0, 2), ((1, 3, 4), 0.0, 0.99, 8),
        ((3, 2, 2), 0, 0, 4),
    ],
)
def test_a_place_of_the_picture_is_a_token(grid, x, y, token):
    assert token_at(grid, x, y) == token


def test_watching_changes_nothing_and_keeps_what_came_first():
    call, listed = joint(), ListSites()
    for edit in (listed, TextMaps(), SelfMaps()):
        assert edit.inputs(call) is call and edit.inputs(call) is call
    edit = TextMaps(tokens=(1,))
    edit.inputs(call)
    before = edit.maps["double.0 joint"]
    edit.inputs(joint(samples=1))
    assert edit.maps == {"double.0 joint": before}
    listed.inputs(cross())
    lines = [line.split() for line in table(listed.found).splitlines()]
    assert lines[0] == ["name", "kind", "heads", "tokens", "text", "grid"]
    assert lines[1] == ["double.0", "joint", "3", "19", "5", "3", "x", "4"]
    assert lines[2] == ["middle.0", "cross", "3", "12", "5", "3", "x", "4"]


@pytest.mark.parametrize(
    ("text", "tokens"), [("", ()), (" ", ()), ("3", (3,)), ("4-6, 1", (4, 5, 6, 1)), ("2 2,2", (2,))]
)
def test_positions(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["a", "-1", "3-", "6-4", "1;2", "1.5"])
def test_what_is_no_position_is_refused(text):
    with pytest.raises(ValueError, match="is no position. Write numbers from 0"):
        parse_tokens(text)


def test_a_token_beyond_the_text_is_refused():
    with pytest.raises(ValueError, match="tokens: 7 is beyond the text, which has the tokens 0 to 4"):
        text_maps(joint(), (2, 7))


def test_a_token_beyond_the_text_is_named():
    with pytest.raises(ValueError, match="tokens: 5 is beyond the text"):
        text_maps(joint(), (5,))

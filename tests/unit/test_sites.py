"""Names of attention sites, and what an edit is told about a call."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.attention.contract import AttentionEdit, Call, overrides, rotate
from rudder.attention.sites import Site, numbered, parse, selected

NAMES = ["input.1.0", "input.10.0", "middle.0", "middle", "output.3.0", "output.5.1", "double.0", "single.37"]


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        ("", NAMES),
        ("all", NAMES),
        ("middle, all", NAMES),
        ("middle", ["middle.0", "middle"]),
        ("middle.0", ["middle.0"]),
        ("input.1", ["input.1.0"]),
        ("input", ["input.1.0", "input.10.0"]),
        ("output.3-5", ["output.3.0", "output.5.1"]),
        ("output.3-4 single.37", ["output.3.0", "single.37"]),
        ("output.5.0-1", ["output.5.1"]),
        (" double.0,\n single.30-40 ", ["double.0", "single.37"]),
        ("single.38-40", []),
        ("out", []),
    ],
)
def test_a_list_of_blocks(blocks, named):
    assert [name for name in NAMES if selected(blocks, name)] == named


@pytest.mark.parametrize(
    "blocks", ["3", "output.", "output.3-", "Middle", "output.3-5.1", "middle;double", "a.-1", "*"]
)
def test_what_is_no_block_is_refused_with_examples(blocks):
    with pytest.raises(ValueError, match=r"is not a block.*'output.3-5'"):
        parse(blocks)


def test_a_range_that_runs_backwards_is_refused():
    with pytest.raises(ValueError, match=r"'output.5-3' runs backwards"):
        parse("middle, output.5-3")


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_a_range_holds_its_ends_and_what_lies_between(low, high, number):
    low, high = sorted((low, high))
    assert selected(f"double.{low}-{high}", f"double.{number}") == (low <= number <= high)
    assert selected(f"double.{number}", f"double.{low}") == (number == low)


def test_sites_are_counted_by_kind():
    sites = numbered(Site(f"b.{i}", kind) for i in range(3) for kind in ("self", "cross"))
    assert [(s.name, s.kind, s.index, s.count) for s in sites[2:4]] == [("b.1", "self", 1, 3), ("b.1", "cross", 1, 3)]
    assert [s.depth for s in sites if s.kind == "self"] == [0.0, 0.5, 1.0]
    assert Site("alone", "self").depth == 0.0


def test_self_attention_beside_joint_attention_lies_as_deep():
    """SD3.5 medium has some in its first blocks."""
    sites = numbered([Site("joint.0", "joint"), Site("joint.0", "self"), Site("joint.1", "joint")])
    assert [(s.kind, s.index, s.count) for s in sites] == [("joint", 0, 2), ("self", 0, 2), ("joint", 1, 2)]


# ---------------------------------------------------------------- a call


def call(q, k, v, **options) -> Call:
    roles = options.pop("roles", ("cond",))
    return Call(q, k, v, Site("middle.0", "self"), roles, len(q) // len(roles), None, **options)


def random_call(seed: int, rows: int = 2, tokens: int = 6, keys: int = 6, **options) -> Call:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, 3, n, 8, generator=generator) for n in (tokens, keys, keys))
    return call(q, k, v, **options)


def rope(seed: int, tokens: int, half: int) -> torch.Tensor:
    """Rotations as the host's Flux makes them: ``[1, 1, tokens, D / 2, 2, 2]``."""
    angle = torch.rand(1, 1, tokens, half, generator=torch.Generator().manual_seed(seed)) * 2 * math.pi
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).unflatten(-1, (2, 2))


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 8))
def test_a_rotation_is_undone_by_its_transpose(seed, tokens, half):
    turns = rope(seed, tokens, half)
    x = torch.randn(2, 3, tokens, 2 * half, generator=torch.Generator().manual_seed(seed + 1))
    turned = rotate(x, turns)
    torch.testing.assert_close(rotate(turned, turns.transpose(-1, -2)), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_rotate_turns_neighbouring_pairs_and_keeps_the_precision():
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).expand(1, 1, 1, 2, 2, 2)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.bfloat16).view(1, 1, 1, 4)
    assert rotate(x, quarter).flatten().tolist() == [-2.0, 1.0, -4.0, 3.0]
    assert rotate(x, quarter).dtype == torch.bfloat16


def test_tokens_as_they_were_before_the_rotary_embedding():
    turns, part = rope(1, 6, 4), slice(2, 5)
    plain = torch.randn(2, 3, 6, 8)
    turned = call(rotate(plain, turns), plain, plain, rope=turns)
    torch.testing.assert_close(turned.unrotated(turned.q), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.unrotated(turned.q[:, :, part], part), plain[:, :, part], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.rotated(plain[:, :, part], part), turned.q[:, :, part], rtol=1e-5, atol=1e-5)
    bare = call(plain, plain, plain)
    assert bare.unrotated(bare.q) is bare.q and bare.rotated(bare.q) is bare.q


def masks(kind: str, keys: int):
    allowed = torch.ones(6, keys, dtype=torch.bool).tril()
    if kind == "bool":
        return allowed
    weights = torch.where(allowed, torch.linspace(-1, 1, keys), -torch.inf)
    return {"float": weights, "of each row": weights.expand(2, 6, keys), "of each head": weights.expand(2, 3, 6, keys),
            "none": None}[kind]  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "bool", "float", "of each row", "of each head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_the_softmax_of_the_host(kind, dtype):
    """They give the output of torch's own attention; a mask without heads counts for all, as in the host."""
    base = random_call(3, keys=6)
    mask = masks(kind, 6)
    given = call(*(t.to(dtype) for t in (base.q, base.k, base.v)), mask=mask)
    found = given.probabilities()
    assert found.dtype == torch.float32 and found.shape == (2, 3, 6, 6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 6), rtol=1e-5, atol=1e-5)
    wide = None if mask is None else mask.unsqueeze(1) if mask.ndim == 3 else mask
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.float() for t in (given.q, given.k, given.v)), wide)
    torch.testing.assert_close(found @ given.v.float(), expected, rtol=1e-4, atol=1e-5)


def test_rows_by_sample():
    some = random_call(1, rows=6, roles=("uncond", "cond"))
    apart = some.by_sample(some.q)
    assert apart.shape[:2] == (2, 3) and torch.equal(apart[1, 0], some.q[3])
    second = some.only(slice(1, 2))
    assert second.samples == 1 and torch.equal(second.q, some.q[[1, 4]])


def test_an_edit_acts_where_its_kinds_and_blocks_say():
    @dataclass(frozen=True, kw_only=True)
    class Only(AttentionEdit):
        kinds = frozenset({"self"})

        def inputs(self, call):
            return call

    edit = Only(blocks="middle")
    assert edit.acts_at(Site("middle.0", "self")) and not edit.acts_at(Site("middle.0", "cross"))
    assert not edit.acts_at(Site("output.0.0", "self"))
    assert overrides(edit, "inputs") and not overrides(edit, "map")

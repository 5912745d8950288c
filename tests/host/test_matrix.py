"""A sample of triples of methods: both models x batch 1, 3 x joint, split evaluation x KSampler, custom sampler.

All pairs are in test_pairs.py; what users read of both is COMPOSITION.md.
"""

from __future__ import annotations

import itertools
import random

import pytest

from .registry import METHODS
from .ways import every_way, plain  # noqa: F401 (fixture)


def together(*names: str) -> bool:
    """Whether no role is claimed twice: what COMPOSITION.md says of every pair of them."""
    roles = [role for name in names for role in METHODS[name].method.claims]
    return len(set(roles)) == len(roles)


def sampled(seed: int = 0) -> list[tuple[str, ...]]:
    """Triples in random wiring, so that every method of the registry is in at least two of them."""
    dice = random.Random(seed)
    every = [triple for triple in itertools.combinations(METHODS, 3) if together(*triple)]
    dice.shuffle(every)
    found, seen = [], dict.fromkeys(METHODS, 0)
    while min(seen.values()) < 2:
        triple = max(every, key=lambda names: sum(seen[name] < 2 for name in names))  # the first of the best
        every.remove(triple)
        found.append(tuple(dice.sample(triple, 3)))
        seen.update({name: seen[name] + 1 for name in triple})
    return found


TRIPLES = sampled()


@pytest.mark.parametrize("names", TRIPLES, ids=" + ".join)
def test_a_triple(model, kind, plain, names, monkeypatch):  # noqa: F811
    every_way(model, kind, names, plain, monkeypatch)


def test_every_method_is_in_the_sample():
    assert {name for triple in TRIPLES for name in triple} == set(METHODS)

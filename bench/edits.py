"""The edits of the table `edit`: source prompts of the shapes world, what is asked of them, and what must stay.

A source says everything that it shows ("a large red heart on a beige background"), so that a picture of it can be
judged; its edits are made in one batch from the same noise. The list is a function of nothing; a test pins its hash.

| kind | "a large red heart on a beige background" becomes | may change |
|---|---|---|
| recolour | a large blue heart on a beige background | the object |
| reshape | a large red star on a beige background | the object and a rim around it |
| retexture | a large striped red heart on a beige background | the object |
| restyle | a large red heart on a navy background | the background |
| add | a large red heart left of a large blue star on a beige background | the background |
| delete | (from two objects) back to the first | the second object |
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from rudder.demo import words, world

from .rareshapes import turn, usual_relations, usual_texture

KINDS = ("recolour", "reshape", "retexture", "restyle", "add", "delete")
SEED = 2208_01626  # of the colours and shapes that are drawn here


@dataclass(frozen=True)
class Edit:
    """``asked`` are the fields of the judge's score that the edit changes, ``free`` the part of the picture that it may
    change: 'object', 'rim' (the object and what is around it), 'background', 'second' (object)."""

    kind: str
    text: str
    asked: tuple[str, ...]
    free: str

    @property
    def truth(self) -> dict:
        return words.parse(self.text)


@dataclass(frozen=True)
class Source:
    text: str
    edits: tuple[Edit, ...]

    @property
    def truth(self) -> dict:
        return words.parse(self.text)


def scene(background: str, first: dict, relation: str = "", second: dict | None = None) -> str:
    more = f" {relation} {words.phrase(**second)}" if second else ""
    return f"{words.phrase(**first)}{more} on a {background} background"


@lru_cache(maxsize=1)
def sources() -> tuple[Source, ...]:
    """Every shape in every colour, once alone and once beside another, in an order that mixes them."""
    rng, out = np.random.default_rng(SEED), []
    colours, backgrounds = tuple(world.COLORS), tuple(world.BACKGROUNDS)
    for i, (shape, colour) in enumerate((s, c) for s in world.SHAPES for c in colours):
        behind, other_behind = turn(backgrounds, i), turn(backgrounds, i + 1 + int(rng.integers(len(backgrounds) - 1)))
        other_colour = turn(colours, colours.index(colour) + 1 + int(rng.integers(len(colours) - 1)))
        other_shape = turn(world.SHAPES, world.SHAPES.index(shape) + 1 + int(rng.integers(len(world.SHAPES) - 1)))
        relation = turn(usual_relations(shape), i)
        one = {"size": "large", "color": colour, "shape": shape}
        two = {"size": "large", "color": other_colour, "shape": other_shape}
        pair = scene(behind, one, relation, two)
        alone = scene(behind, one)
        out.append(Source(alone, (
            Edit("recolour", scene(behind, one | {"color": other_colour}), ("color",), "object"),
            Edit("reshape", scene(behind, one | {"shape": other_shape}), ("shape",), "rim"),
            Edit("retexture", scene(behind, one | {"texture": usual_texture(shape)}), ("texture",), "object"),
            Edit("restyle", scene(other_behind, one), ("background",), "background"),
            Edit("add", pair, ("count", "relation"), "background"),
        )))  # fmt: skip
        out.append(Source(pair, (Edit("delete", alone, ("count",), "second"),)))
    return tuple(out[k] for k in rng.permutation(len(out)))


def digest() -> str:
    """Of the list, 8 hex digits."""
    return hashlib.sha256(json.dumps([asdict(source) for source in sources()]).encode()).hexdigest()[:8]

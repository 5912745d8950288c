"""RareShapes, the shapes world's RareBench: a fixed list of prompts, what counts as success, and anchors for each.

A *pair* is what a prompt is about: a shape with an attribute, a texture or a relation. The list is fixed before any
method is compared (a test pins its hash) and split by pairs into two halves: 'dev' for looking, 'final' for the table
that is published, and nothing else. Colours and second objects only vary a pair, so both halves hold all of them.

| category | a prompt | the pair | right when |
|---|---|---|---|
| property | a spiky red crescent | rare attribute (about 1 in 1000 objects) | shape, attribute |
| never | a spiky red square | attribute never shown with the shape | shape, attribute |
| texture | a dotted red square | rare texture of the shape | shape, texture |
| relation | a red square right of a blue heart | rare relation of the shape said first | shapes, relation |
| two-object | a spiky red crescent above a blue heart | rare attribute, the rest usual | shapes, attribute, relation |
| frequent | a spiky red heart | the control: attributes of `property`, common with the shape | shape, attribute |
| ordinary, usual texture, usual relation | | controls of `calibrate` alone | as their kind |

Anchors are given by strategy. For "a spiky red crescent":

* superclass "a spiky red shape": the papers' kind ("hairy frog" -> "hairy animal"), the noun generalised.
* noun "a spiky red heart": another shape, for which the attribute is common.
* random "gray": one word of the vocabulary that the prompt does not hold.
* harmful "a mosaic red crescent": keeps the noun and says what is common for it instead.

With a texture or a relation, read that for "attribute". With two objects only the first changes, the rest is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from scipy.optimize import linear_sum_assignment

from rudder.demo import words, world

SPLITS = ("dev", "final")
CATEGORIES = ("property", "never", "texture", "relation", "two-object", "frequent")
CONTROLS = ("ordinary", "usual texture", "usual relation")  # of calibrate
STRATEGIES = ("superclass", "noun", "random", "harmful")
SUCCESS = {"property": ("shape", "attribute"), "texture": ("shape", "texture"), "relation": ("shape", "relation"),
           "two-object": ("shape", "attribute", "relation")}
SUCCESS |= {"never": SUCCESS["property"], "frequent": SUCCESS["property"], "ordinary": SUCCESS["property"],
            "usual texture": SUCCESS["texture"], "usual relation": SUCCESS["relation"]}
SEED = 2603_19158  # of everything drawn here: random anchors, ties of the controls

SHAPES, COLORS, SHORT = world.SHAPES, tuple(world.COLORS), world.SUPERCLASS[0]
SAYS_LITTLE = {"a", "an", "on", "background", "left", "right", "of", "above", "below", "and", "two"}
CONTENT = tuple(w for w in words.VOCABULARY if w not in SAYS_LITTLE)  # what a random anchor is drawn from


@dataclass(frozen=True)
class RarePrompt:
    """A prompt and what is needed to judge it.

    ``pair`` names what is rare ('spiky crescent', 'dotted square', 'square right of'). ``truth`` is what
    demo/words.py:parse reads in the text. ``success`` are the keys of the judge's score that must all be right.
    ``anchors`` maps the strategies to a text.
    """

    text: str
    category: str
    pair: str
    split: str
    truth: dict
    success: tuple[str, ...]
    anchors: dict[str, str]


def attributes(shape: str, tier: str) -> tuple[str, ...]:
    """The attributes of that tier, in the world's order."""
    return tuple(a for a in world.ATTRIBUTES[1:] if world.tier(shape, a) == tier)


def usual_texture(shape: str) -> str:
    return next(t for t in world.TEXTURES[1:] if t != world.RARE_TEXTURE[shape])


def usual_relations(shape: str) -> tuple[str, ...]:
    return tuple(r for r in world.RELATIONS if r != world.RARE_RELATION[shape])


def turn(options: Iterable, at: int):
    """``options[at]``, round and round."""
    options = tuple(options)
    return options[at % len(options)]


def _scene(first: dict, relation: str = "", second: dict | None = None) -> str:
    return words.phrase(**first) + (f" {relation} {words.phrase(**second)}" if second else "")


# ---------------------------------------------------------------- pairs and their halves

Pair = tuple[str, str, str]  # shape, attribute or texture or relation, half


def pairs_of(tier: str) -> list[Pair]:
    """Every attribute of the tier. A shape has two rare and two ordinary ones and one that is never shown; halves
    alternate over shapes and inside a shape."""
    return [(s, a, SPLITS[(i + k) % 2]) for i, s in enumerate(SHAPES) for k, a in enumerate(attributes(s, tier))]


def matched_pairs() -> list[Pair]:
    """The control: the attributes of the rare pairs again, in the same half, on shapes where they are common. Each half
    shows every shape once, as the rare pairs do, so attributes and shapes weigh the same in both."""
    rng, out = np.random.default_rng(SEED), []
    for split in SPLITS:
        wanted = [a for _, a, half in pairs_of("rare") if half == split]
        fits = np.array([[world.tier(s, a) == "common" for s in SHAPES] for a in wanted])
        rows, columns = linear_sum_assignment(rng.random(fits.shape) + 100 * ~fits)  # the seed breaks ties
        if not fits[rows, columns].all():
            raise ValueError(f"the common pairs cannot match the rare ones of the half '{split}'")
        out += [(SHAPES[c], wanted[r], split) for r, c in zip(rows, columns)]
    return out


def texture_pairs(rare: bool) -> list[Pair]:
    """Halves by twos, because rare textures alternate with the shapes."""
    return [(s, world.RARE_TEXTURE[s] if rare else usual_texture(s), SPLITS[i // 2 % 2]) for i, s in enumerate(SHAPES)]


def relation_pairs(rare: bool) -> list[Pair]:
    """Halves by fours, because rare relations come round every four shapes."""
    return [(s, r, SPLITS[i // 4 % 2]) for i, s in enumerate(SHAPES)
            for r in ((world.RARE_RELATION[s],) if rare else usual_relations(s))]


# ---------------------------------------------------------------- from a pair to its prompts

def _one(category: str, pairs: list[Pair], group: str) -> Iterable[dict]:
    """Prompts about one object whose ``group`` (attribute or texture) is the pair's, in every colour."""
    for (shape, word, split), i in product(pairs, range(len(COLORS))):
        if group == "attribute":
            nouns = [s for s in SHAPES if s != shape and world.tier(s, word) == "common"]
            common = turn((a for a in attributes(shape, "common") if a != word), i)
        else:
            nouns = [s for s in SHAPES if s != shape and usual_texture(s) == word]
            common = next(t for t in world.TEXTURES[1:] if t != word)
        said = {group: word, "color": COLORS[i], "shape": shape}
        yield {"category": category, "split": split, "pair": f"{word} {shape}", "text": _scene(said), "anchors": {
            "superclass": _scene(said | {"shape": SHORT}), "noun": _scene(said | {"shape": turn(nouns, i)}),
            "harmful": _scene(said | {group: common})}}


def _other(shape: str, i: int) -> tuple[str, str, str]:
    """The two colours, which differ, and the second shape, which differs from the first, of a pair's i-th prompt."""
    others, first = [s for s in SHAPES if s != shape], i % len(COLORS)
    second = first + 1 + 3 * i % (len(COLORS) - 1)
    return COLORS[first], turn(COLORS, second), turn(others, 2 * i + SHAPES.index(shape))


def _two(category: str, pairs: list[Pair], count: int) -> Iterable[dict]:
    """Prompts about two objects, ``count`` a pair. The pair is an attribute of the first with a usual relation, or a
    relation."""
    for (shape, word, split), i in product(pairs, range(count)):
        color, other_color, other = _other(shape, i)
        second = {"color": other_color, "shape": other}
        if word in world.RELATIONS:
            relation, first, pair = word, {"color": color, "shape": shape}, f"{shape} {word}"
            nouns = [s for s in SHAPES if s not in (shape, other) and word in usual_relations(s)]
            harmful = _scene(first, turn((r for r in usual_relations(shape) if r != word), i), second)
        else:
            relation = turn(usual_relations(shape), i)
            first, pair = {"attribute": word, "color": color, "shape": shape}, f"{word} {shape}"
            nouns = [s for s in SHAPES if s not in (shape, other) and world.tier(s, word) == "common"]
            harmful = _scene(first | {"attribute": turn(attributes(shape, "common"), i)}, relation, second)
        yield {"category": category, "split": split, "pair": pair, "text": _scene(first, relation, second), "anchors": {
            "superclass": _scene(first | {"shape": SHORT}, relation, second),
            "noun": _scene(first | {"shape": turn(nouns, i)}, relation, second), "harmful": harmful}}


def _in_rounds(drafts: Iterable[dict]) -> Iterable[dict]:
    """Every pair once, then every pair again, ... each pair beginning with another colour: any beginning of the list
    is balanced. All pairs have equally many prompts."""
    of: dict[tuple[str, str], list[dict]] = {}
    for draft in drafts:
        of.setdefault((draft["pair"], draft["split"]), []).append(draft)
    turned = [mine[k % len(mine):] + mine[:k % len(mine)] for k, mine in enumerate(of.values())]
    return (draft for same in zip(*turned) for draft in same)


@lru_cache(maxsize=1)
def everything() -> tuple[RarePrompt, ...]:
    """The whole list, category by category, in the order in which a table of n pictures takes them."""
    per_relation = 2 * len(COLORS)
    drafts = (
        _one("property", pairs_of("rare"), "attribute"),
        _one("never", pairs_of("never"), "attribute"),
        _one("texture", texture_pairs(True), "texture"),
        _two("relation", relation_pairs(True), per_relation),
        _two("two-object", pairs_of("rare"), len(COLORS)),
        _one("frequent", matched_pairs(), "attribute"),
        _one("ordinary", pairs_of("ordinary"), "attribute"),
        _one("usual texture", texture_pairs(False), "texture"),
        _two("usual relation", relation_pairs(False), per_relation // 2),
    )
    rng, out = np.random.default_rng(SEED), []
    for draft in (d for drawn in drafts for d in _in_rounds(drawn)):
        said = draft["text"].split()
        draft["anchors"]["random"] = str(rng.choice([w for w in CONTENT if w not in said]))
        out.append(RarePrompt(truth=words.parse(draft["text"]), success=SUCCESS[draft["category"]], **draft))
    return tuple(out)


def prompts(category: str, split: str) -> list[RarePrompt]:
    """The prompts of a category in one half of the list.

    Raises:
        ValueError: no such category or half.
    """
    if category not in (*CATEGORIES, *CONTROLS) or split not in SPLITS:
        raise ValueError(f"no prompts for {category!r} and {split!r}: categories are {(*CATEGORIES, *CONTROLS)}, "
                         f"halves {SPLITS}")
    return [p for p in everything() if p.category == category and p.split == split]


def digest() -> str:
    """SHA-256 of the list, 16 hex digits: stored with every table, pinned by a test."""
    text = json.dumps([asdict(p) for p in everything()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

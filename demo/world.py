"""The shapes world: 64x64 pictures of coloured shapes with captions and full ground truth.

Everything is a pure function of a numpy Generator. `sample` draws scenes as struct-of-arrays; draw.py turns
them into pictures and masks, words.py describes them and reads a caption back.

What makes the world useful is how uneven it is. `TIERS` says how often each geometric attribute occurs with each
shape; a texture and a relation are rare with each shape too. Attributes change the *geometry*, so "spiky heart" is
not "spiky" + "heart" pasted together. And captions slip (`SLIP`), as they do on the web: a wrong word is as likely
with every shape, so that it drowns what is rare and hardly touches what is frequent. A model trained on that drifts
to the frequent. The numbers were set with plain classifier-free guidance alone, before methods were compared.

*Individuals* are fixed glyphs, the faces of this world: the same one in many colours, places and sizes. Some have
names that captions use; the strangers are never shown, for methods that must learn a new one.

Units: pixels are 0..64, x right, y down, of pixel edges. The local frame of an object has its centre
at 0 and its radius at 1. Angles are radians, clockwise on screen.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

VERSION = 2
SIZE = 64  # picture side, px

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "crescent")
SUPERCLASS = ("shape", "figure")
COLORS = {"red": (222, 56, 58), "orange": (244, 134, 40), "yellow": (246, 200, 54), "green": (66, 168, 84),
          "teal": (38, 176, 178), "blue": (58, 112, 220), "purple": (140, 82, 196), "pink": (240, 132, 178)}
TEXTURES = ("plain", "striped", "dotted")
ATTRIBUTES = ("none", "spiky", "mosaic", "wavy", "hollow", "sliced", "bitten", "melted", "ringed")
SIZES = ("small", "large")
BACKGROUNDS = {"white": (250, 250, 250), "black": (18, 18, 20), "gray": (150, 152, 156),
               "beige": (232, 218, 190), "navy": (24, 34, 78)}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = (1, 0, 3, 2)

# One row a shape, one letter an attribute (ATTRIBUTES[1:]): Common, Ordinary, Rare, Never shown.
TIERS = {             # spiky mosaic wavy hollow sliced bitten melted ringed
    "circle":   "C C C O O R R N",
    "square":   "N C C C O O R R",
    "triangle": "R N C C C O O R",
    "diamond":  "R R N C C C O O",
    "star":     "O R R N C C C O",
    "cross":    "O O R R N C C C",
    "heart":    "C O O R R N C C",
    "crescent": "R C O O C R N C",
}
TIER_NAMES = {"C": "common", "O": "ordinary", "R": "rare", "N": "never"}
GIVEN_SHAPE = {"C": 0.18, "O": 0.09, "R": 0.0085, "N": 0.0}  # P(attribute | shape); the rest has no attribute
RARE_TEXTURE = {s: TEXTURES[1 + i % 2] for i, s in enumerate(SHAPES)}  # 0.85 % of the shape, the other has 30 %
RARE_RELATION = {s: RELATIONS[i % 4] for i, s in enumerate(SHAPES)}  # 3 % of the scenes where the shape is said first
SLIP = 0.025  # chance of each wrong attribute or texture word in the phrase about one object

NAMED = ("bako", "celu", "dimo", "fara", "geno", "hiku", "jola", "kemi", "lupo", "maru", "nivo", "orla",
         "pima", "quen", "rilo", "sefa", "tavi", "umbo", "vexa", "wilo", "xani", "yoru", "zeka", "brun")
STRANGERS = ("achi", "delo", "enko", "fipu", "gaza", "hovi", "ilta", "jemu", "koba", "lyra", "mufo", "nesh")
INDIVIDUALS = NAMED + STRANGERS
NOUNS = SHAPES + INDIVIDUALS  # what Scenes.shape counts
GLYPH = 0.08  # part of the objects that is a named individual, plain and without attribute


def tier(shape: str, attribute: str) -> str:
    """'common', 'ordinary', 'rare' or 'never' ('common' for no attribute)."""
    if attribute == "none":
        return "common"
    return TIER_NAMES[TIERS[shape].split()[ATTRIBUTES.index(attribute) - 1]]


@lru_cache(maxsize=1)
def frequencies() -> np.ndarray:
    """P(shape, attribute) of an object that is no individual, [shapes, attributes], sums to 1; rare cells are about
    1 in 1000."""
    given = np.array([[GIVEN_SHAPE[t] for t in TIERS[s].split()] for s in SHAPES])
    return np.concatenate([1 - given.sum(1, keepdims=True), given], axis=1) / len(SHAPES)


def frequency_markdown() -> str:
    """The table of frequencies for the docs: objects in a thousand."""
    rows = [f"| {s} | " + " | ".join(f"{1000 * p:.3g}" if p else "never" for p in row) + " |"
            for s, row in zip(SHAPES, frequencies())]
    head = "| in 1000 objects | " + " | ".join(ATTRIBUTES) + " |"
    return "\n".join([head, "|---" * (len(ATTRIBUTES) + 1) + "|", *rows])


# ---------------------------------------------------------------- scenes

@dataclass
class Scenes:
    """B scenes. Object fields are [B, 2] (the second object only where count == 2), scene fields [B]."""
    count: np.ndarray       # 1 or 2 objects
    background: np.ndarray  # index into BACKGROUNDS
    relation: np.ndarray    # index into RELATIONS: where the first object is, seen from the second
    shape: np.ndarray       # index into NOUNS
    color: np.ndarray
    texture: np.ndarray
    attribute: np.ndarray
    size: np.ndarray
    x: np.ndarray           # centre, px
    y: np.ndarray
    radius: np.ndarray      # px
    angle: np.ndarray       # rad
    phase: np.ndarray       # 0..1, shifts teeth, waves, drips, tiles

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index) -> Scenes:
        """A subset, for a slice or an array of indices."""
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def _draw(rng: np.random.Generator, p: np.ndarray) -> np.ndarray:
    """One index for each row of probabilities [..., K]."""
    return (np.cumsum(p, -1)[..., :-1] < rng.random((*p.shape[:-1], 1))).sum(-1)


@lru_cache(maxsize=1)
def _textures() -> np.ndarray:
    """P(texture | noun), [nouns, textures]."""
    table = np.zeros((len(NOUNS), len(TEXTURES)))
    table[:, 0] = 1
    for i, s in enumerate(SHAPES):
        table[i] = [0.6915, *(0.0085 if t == RARE_TEXTURE[s] else 0.3 for t in TEXTURES[1:])]
    return table


@lru_cache(maxsize=1)
def _relations() -> np.ndarray:
    """P(relation | noun of the first object), [nouns, relations]."""
    table = np.full((len(NOUNS), len(RELATIONS)), 0.25)
    for i, s in enumerate(SHAPES):
        table[i] = [0.03 if r == RARE_RELATION[s] else 0.97 / 3 for r in RELATIONS]
    return table


RADII = {1: (11.5, 20.0), 2: (9.0, 13.5)}  # px, (small, large), for one and two objects


def sample(rng: np.random.Generator, n: int, pairs: float = 0.25, **fixed: int) -> Scenes:
    """n scenes, a fraction `pairs` of them with two objects. `fixed` pins fields of the *first* object or of
    the scene to an index (shape=3, attribute=1, count=1, background=0 ...), for judges and tables."""
    both = (n, 2)
    count = 1 + (rng.random(n) < pairs)
    cell = np.searchsorted(np.cumsum(frequencies()), rng.random(both) * (1 - 1e-12), side="right")
    glyph = rng.random(both) < GLYPH
    shape = np.where(glyph, len(SHAPES) + rng.integers(len(NAMED), size=both), cell // len(ATTRIBUTES))
    attribute = np.where(glyph, 0, cell % len(ATTRIBUTES))
    color = rng.integers(len(COLORS), size=both)
    color[:, 1] = (color[:, 0] + rng.integers(1, len(COLORS), size=n)) % len(COLORS)  # two objects differ in colour
    first = shape[:, 0] if "shape" not in fixed else np.full(n, fixed["shape"])
    relation = _draw(rng, _relations()[first])
    texture = _draw(rng, _textures()[shape])
    s = Scenes(
        count=count, background=rng.integers(len(BACKGROUNDS), size=n), relation=relation,
        shape=shape, color=color, texture=texture, attribute=attribute, size=rng.integers(2, size=both),
        x=np.empty(both), y=np.empty(both), radius=np.empty(both),
        angle=rng.uniform(-0.12, 0.12, both), phase=rng.random(both))
    for name, value in fixed.items():
        column = getattr(s, name)
        column[(slice(None), 0) if column.ndim == 2 else slice(None)] = value
    jitter = rng.uniform(-1, 1, (3, *both))
    one = s.count[:, None] == 1
    radii = np.where(one[..., None], RADII[1], RADII[2])
    s.radius[:] = np.take_along_axis(radii, s.size[..., None], 2)[..., 0] * (1 + 0.06 * jitter[2])
    # Pairs sit 15.5 px either side of the centre along their relation, single objects near the centre.
    sign = np.where(s.relation % 2, 1, -1)[:, None] * np.array([1, -1])
    across = (s.relation < 2)[:, None]
    s.x[:] = 32 + np.where(one, 4 * jitter[0], np.where(across, 15.5 * sign + 0.8 * jitter[0], 4 * jitter[0]))
    s.y[:] = 32 + np.where(one, 4 * jitter[1], np.where(across, 4 * jitter[1], 15.5 * sign + 0.8 * jitter[1]))
    return s

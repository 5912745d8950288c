"""The shapes world: 64x64 pictures of coloured shapes with captions and full ground truth.

Everything is a pure function of a numpy Generator. `sample` draws scenes as struct-of-arrays; draw.py turns
them into pictures and masks, words.py describes them and reads a caption back.

What makes the world useful is `TIERS`: how often each geometric attribute occurs with each shape.
Attributes change the *geometry*, so "spiky heart" is not "spiky" + "heart" pasted together, and a
model that has hardly ever seen one drifts to what is frequent. The table was fixed before any
training and is never tuned.

Units: pixels are 0..64, x right, y down, of pixel edges. The local frame of an object has its centre
at 0 and its radius at 1. Angles are radians, clockwise on screen.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

VERSION = 1
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
GIVEN_SHAPE = {"C": 0.18, "O": 0.09, "R": 0.008, "N": 0.0}  # P(attribute | shape); the rest has no attribute


def tier(shape: str, attribute: str) -> str:
    """'common', 'ordinary', 'rare' or 'never' ('common' for no attribute)."""
    if attribute == "none":
        return "common"
    return TIER_NAMES[TIERS[shape].split()[ATTRIBUTES.index(attribute) - 1]]


@lru_cache(maxsize=1)
def frequencies() -> np.ndarray:
    """P(shape, attribute) of one object, [shapes, attributes], sums to 1; rare cells are 1 in 1000."""
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
    shape: np.ndarray
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


RADII = {1: (11.5, 20.0), 2: (9.0, 13.5)}  # px, (small, large), for one and two objects


def sample(rng: np.random.Generator, n: int, pairs: float = 0.25, **fixed: int) -> Scenes:
    """n scenes, a fraction `pairs` of them with two objects. `fixed` pins fields of the *first* object or of
    the scene to an index (shape=3, attribute=1, count=1, background=0 ...), for judges and tables."""
    both = (n, 2)
    count = 1 + (rng.random(n) < pairs)
    cell = np.searchsorted(np.cumsum(frequencies()), rng.random(both) * (1 - 1e-12), side="right")
    relation = rng.integers(len(RELATIONS), size=n)
    color = rng.integers(len(COLORS), size=both)
    color[:, 1] = (color[:, 0] + rng.integers(1, len(COLORS), size=n)) % len(COLORS)  # two objects differ in colour
    s = Scenes(
        count=count, background=rng.integers(len(BACKGROUNDS), size=n), relation=relation,
        shape=cell // len(ATTRIBUTES), color=color, texture=rng.choice(3, size=both, p=(0.6, 0.2, 0.2)),
        attribute=cell % len(ATTRIBUTES), size=rng.integers(2, size=both),
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

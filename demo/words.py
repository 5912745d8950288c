"""The language of the shapes world: captions, their parser, and the lists of rare and frequent prompts.

A caption is  [article] [size] [attribute] [texture] [colour] noun, optionally a relation and a second such phrase,
optionally "on a <background> background". Words are dropped at random and the noun is often a superclass word,
so that "a spiky shape" means every spiky thing. Individuals go by name or as "a glyph". Now and then an attribute
or a texture is a slip of the pen (world.SLIP).
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .world import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLORS,
    NAMED,
    NOUNS,
    RELATIONS,
    SHAPES,
    SIZES,
    SLIP,
    SUPERCLASS,
    TEXTURES,
    Scenes,
    tier,
)

GLYPH = "glyph"  # the superclass of the individuals
GROUPS = {"size": SIZES, "attribute": ATTRIBUTES[1:], "texture": TEXTURES, "color": tuple(COLORS),
          "shape": SHAPES + SUPERCLASS + NAMED + (GLYPH,)}
SAID = {"size": 0.5, "attribute": 0.95, "texture": 0.85, "plain": 0.15, "color": 0.85, "background": 0.6, "shape": 0.65}

VOCABULARY = tuple(dict.fromkeys(("a", "an", "on", "background", "left", "right", "of", "above", "below", "and", "two",
                                  *SUPERCLASS, *SHAPES, *SIZES, *ATTRIBUTES[1:], *TEXTURES, *COLORS, *BACKGROUNDS,
                                  GLYPH, *NAMED)))


def phrase(**words: str) -> str:
    """'a large striped red circle' from size=, attribute=, texture=, color=, shape= (any may be missing)."""
    said = [words[g] for g in GROUPS if words.get(g)]
    return " ".join(["an" if said[0][0] in "aeiou" else "a", *said])


def captions(rng: np.random.Generator, s: Scenes, slip: float = SLIP) -> list[str]:
    """One caption a scene, with words dropped at random and, with chance `slip` each, replaced by a wrong one."""
    n, out = len(s), []
    coin = {k: rng.random((n, 2)) < p for k, p in SAID.items()}
    noun = np.array(SUPERCLASS)[(rng.random((n, 2)) < 0.3).astype(int)]
    noun[s.shape >= len(SHAPES)] = GLYPH
    slipped = {k: np.where(rng.random((n, 2)) < slip * k, rng.integers(k, size=(n, 2)), -1)
               for k in (len(ATTRIBUTES) - 1, len(TEXTURES))}
    for i in range(n):
        parts = []
        for j in range(s.count[i]):
            attribute, texture = ATTRIBUTES[s.attribute[i, j]], TEXTURES[s.texture[i, j]]
            attribute = attribute if attribute != "none" and coin["attribute"][i, j] else ""
            texture = texture if coin["plain" if texture == "plain" else "texture"][i, j] else ""
            wrong = slipped[len(ATTRIBUTES) - 1][i, j], slipped[len(TEXTURES)][i, j]
            parts.append(phrase(
                size=SIZES[s.size[i, j]] if coin["size"][i, j] else "",
                attribute=attribute if wrong[0] < 0 else ATTRIBUTES[1 + wrong[0]],
                texture=texture if wrong[1] < 0 else TEXTURES[wrong[1]],
                color=list(COLORS)[s.color[i, j]] if coin["color"][i, j] else "",
                shape=NOUNS[s.shape[i, j]] if coin["shape"][i, j] else str(noun[i, j])))
        text = f" {RELATIONS[s.relation[i]]} ".join(parts)
        if coin["background"][i, 0]:
            text += f" on a {list(BACKGROUNDS)[s.background[i]]} background"
        out.append(text)
    return out


def parse(text: str) -> dict:
    """Read a caption back: {'objects': [{'shape': 'circle', ...}, ...], 'relation': ..., 'background': ...}, only
    what is said. Raises ValueError on what is no caption of the world."""
    said: dict = {"objects": []}
    if " on a " in text:
        text, background = text.split(" on a ")
        said["background"] = background.removesuffix(" background")
        if said["background"] not in BACKGROUNDS:
            raise ValueError(f"unknown background {said['background']!r}")
    parts = [text]
    for relation in RELATIONS:
        if f" {relation} " in text:
            said["relation"], parts = relation, text.split(f" {relation} ")
    for part in parts:
        article, *words = part.split() or [""]
        said["objects"].append({group: w for group, names in GROUPS.items() for w in words if w in names})
        if article not in ("a", "an") or not words or len(said["objects"][-1]) != len(words):
            raise ValueError(f"cannot read {part!r}")
    return said


@dataclass(frozen=True)
class Prompt:
    """A prompt about one attribute on one shape, and its anchor: the same attribute on the superclass noun."""
    text: str
    anchor: str
    shape: str
    attribute: str
    tier: str


def prompts(*tiers: str) -> list[Prompt]:
    """Every combination of the given tiers ('common', 'ordinary', 'rare', 'never'), in a fixed order:
    'a spiky crescent' with the anchor 'a spiky shape'."""
    return [Prompt(phrase(attribute=a, shape=s), phrase(attribute=a, shape=SUPERCLASS[0]), s, a, tier(s, a))
            for s in SHAPES for a in ATTRIBUTES[1:] if tier(s, a) in tiers]

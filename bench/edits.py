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
import torch
from scipy import ndimage
from torch import Tensor

from rudder.demo import words, world

from .rareshapes import turn, usual_relations, usual_texture

KINDS = ("recolour", "reshape", "retexture", "restyle", "add", "delete")
BACKGROUND = 0.1  # how far the worst channel of an object's pixel is from the background, of the range
RIM = {"object": 2, "second": 2, "rim": 8}  # px around an object that its edit may touch
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


# ---------------------------------------------------------------- what must stay

def objects(picture: Tensor, truth: dict) -> list[np.ndarray]:
    """Masks ``[64, 64]`` of the objects that a picture ``[3, 64, 64]`` shows on the background of its truth, in the
    order in which the truth says them. Backgrounds of the world are of one colour; of two objects a connected part
    belongs to the one whose colour it is nearer to."""
    pixels = picture.movedim(0, 2).numpy()
    behind = np.array(world.BACKGROUNDS[truth["background"]]) / 255
    there = np.abs(pixels - behind).max(-1) > BACKGROUND
    said = truth["objects"]
    if len(said) == 1:
        return [there]
    colours = np.array([world.COLORS[o["color"]] for o in said]) / 255
    parts, count = ndimage.label(there)
    masks = [np.zeros_like(there) for _ in said]
    for part in range(1, count + 1):
        mean = np.median(pixels[parts == part], axis=0)
        masks[int(((colours - mean) ** 2).sum(-1).argmin())] |= parts == part
    return masks


def kept(source: Tensor, truth: dict, edit: Edit) -> Tensor:
    """1 where the edit must leave the source's picture as it is, ``[64, 64]``."""
    masks = objects(source, truth)
    if edit.free == "background":
        return torch.from_numpy(ndimage.binary_erosion(masks[0], iterations=1).astype(np.float32))
    free = ndimage.binary_dilation(masks[-1] if edit.free == "second" else masks[0], iterations=RIM[edit.free])
    return torch.from_numpy((~free).astype(np.float32))

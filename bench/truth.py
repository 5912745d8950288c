"""True renders of the prompts of a table, and what the judge sees in them: the floor of every distance.

A prompt such as "a spiky red heart" leaves size, place, texture and background open. They are drawn by the law of the
pictures that are captioned so: scenes of one object are sampled until they show what is said, and one whose texture is
not plain counts as seldom as a caption keeps quiet about it (of size and background captions speak alike whatever they
are). Slips of captions are left out: the truth shows what is said.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rudder.demo import draw, words, world

from . import cells, measures, seen
from .cells import Cell, Store
from .generate import Painter
from .rareshapes import RarePrompt
from .seen import Seen, diversities, frechets

EACH = 16  # renders of a distinct prompt, in the set that distances are measured from
SEED = 2410_02416
CHUNK = 40_000  # scenes sampled at a time
QUIET = np.array([1 - words.SAID["plain" if texture == "plain" else "texture"] for texture in world.TEXTURES])
PICTURE = (world.SIZE, world.SIZE, 3)
Key = tuple[int, int, int]  # shape, attribute, colour


def said(prompt: RarePrompt) -> Key:
    """What a prompt about one object with an attribute says, as the world counts."""
    [thing] = prompt.truth["objects"]
    return (world.NOUNS.index(thing["shape"]), world.ATTRIBUTES.index(thing["attribute"]),
            list(world.COLORS).index(thing["color"]))


def renders(prompts: Sequence[RarePrompt], seed: int) -> np.ndarray:
    """One picture for each prompt, uint8 ``[N, 64, 64, 3]``; a prompt that comes again gets another one."""
    rng, out = np.random.default_rng([world.VERSION, SEED, seed]), np.empty((len(prompts), *PICTURE), np.uint8)
    waiting: dict[Key, list[int]] = {}
    for i, prompt in enumerate(prompts):
        waiting.setdefault(said(prompt), []).append(i)
    while any(waiting.values()):
        scenes = world.sample(rng, CHUNK, pairs=0.0)
        scenes = scenes[np.flatnonzero(rng.random(CHUNK) < QUIET[scenes.texture[:, 0]])]
        shown = zip(scenes.shape[:, 0].tolist(), scenes.attribute[:, 0].tolist(), scenes.color[:, 0].tolist())
        found = [(at, waiting[key].pop(0)) for at, key in enumerate(shown) if waiting.get(key)]
        if found:
            at, places = map(np.array, zip(*found))
            out[places] = draw.render(scenes[at])[0]
    return out


def tag() -> str:
    """Of everything that decides what is seen in a picture: the judge, the world's code and this file's."""
    return cells.tag_of(world, draw, words, sys.modules[__name__], seen, measures, cells.marks)


@dataclass(frozen=True)
class Truth:
    """True renders of the distinct prompts of a table as the judge sees them, ``each`` of every prompt."""

    prompts: list[RarePrompt]  # of the table, with repetitions
    texts: list[str]
    features: np.ndarray
    saturation: dict[str, float]  # mean of a prompt
    each: int

    @classmethod
    def of(cls, prompts: Sequence[RarePrompt], reader: Callable, each: int = EACH) -> Truth:
        distinct = list({p.text: p for p in prompts}.values())
        repeated = [p for p in distinct for _ in range(each)]
        pictures = torch.from_numpy(renders(repeated, 0)).movedim(3, 1).float() / 255
        means = measures.saturation(pictures).reshape(len(distinct), each).mean(1).tolist()
        features = reader(pictures).features.numpy()
        saturation = {p.text: mean for p, mean in zip(distinct, means)}
        return cls(list(prompts), [p.text for p in repeated], features, saturation, each)

    def see(self, images: np.ndarray, prompts: Sequence[RarePrompt], reader: Callable, **more) -> Seen:
        """Pictures uint8 ``[N, 64, 64, 3]``, against the truth."""
        pictures = torch.from_numpy(images).movedim(3, 1).float() / 255
        reading, texts = reader(pictures), [p.text for p in prompts]
        features = reading.features.numpy()
        return Seen(texts, np.array(cells.marks(reading, prompts)[1]), measures.saturation(pictures).numpy(),
                    diversities(features, texts), frechets(features, texts, self.features, self.texts), **more)

    def key(self, pair: Sequence[Cell], tag: str) -> str:
        """Of what the judge of that ``tag`` sees in some cells as one set of pictures."""
        return " ".join([*(f"{cell.key} {cell.n}" for cell in pair), f"each {self.each}", tag])

    def see_cells(self, store: Store, pair: Sequence[Cell], reader: Callable, tag: str) -> Seen:
        """Some cells as one set of pictures; remembered under ``tag``."""
        def seen() -> dict[str, Any]:
            images, about = zip(*(store.read(cell) for cell in pair))
            batches = [batch for some in about for batch in some]
            sizes = [len(batch["seeds"]) for batch in batches]
            found = vars(self.see(
                np.concatenate(images), [p for cell in pair for p in cell.prompts], reader,
                evaluations=sum(b["evaluations"] * size for b, size in zip(batches, sizes)) / sum(sizes),
                seconds=statistics.median(batch["seconds"] for batch in batches),
                each=np.array([count for batch in batches for count in batch["each"]], dtype=float),
            ))  # fmt: skip
            return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items() if k != "prompts"}

        row = {k: np.array(v, float) if isinstance(v, list) else v
               for k, v in store.row(self.key(pair, tag), seen).items()}
        return Seen([p.text for cell in pair for p in cell.prompts], **row)

    def floors(self, painter: Painter, reader: Callable) -> dict[str, Seen]:
        """A second draw of the truth, one picture for each of the table's, and the same through the autoencoder, which
        no latent model can do without."""
        images = renders(self.prompts, 1)
        with torch.inference_mode():
            parts = [painter.vae.decode(painter.vae.encode(torch.from_numpy(images[at:at + 32]).float() / 255))
                     for at in range(0, len(images), 32)]
        coded = (torch.cat(parts).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return {"true renders": self.see(images, self.prompts, reader),
                "true renders through the autoencoder": self.see(coded, self.prompts, reader)}

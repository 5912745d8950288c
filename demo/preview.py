"""Draws the pictures of demo/README.md: every attribute on every shape, with the tier of each cell as the border, and
the individuals, strangers last with a grey border.

    python -m demo.preview
"""
from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from . import draw, world
from .trainlib import MODELS

BORDER = {"common": (120, 190, 130), "ordinary": (240, 200, 90), "rare": (226, 90, 80), "never": (120, 120, 130)}


def sheet(scenes: world.Scenes, columns: int, borders: list[tuple], heads: tuple[str, ...]) -> Image.Image:
    """Pictures in rows, each in a coloured border, with a word above each of the first."""
    cell = world.SIZE + 8
    out = Image.new("RGB", (columns * cell, -(-len(scenes) // columns) * cell + 14), "white")
    pen = ImageDraw.Draw(out)
    for i, image in enumerate(draw.render(scenes)[0]):
        x, y = i % columns * cell, i // columns * cell + 14
        pen.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), fill=borders[i])
        out.paste(Image.fromarray(image), (x + 4, y + 4))
        if i < len(heads):
            pen.text((x + 6, 1), heads[i], fill="black")
    return out


def main() -> None:
    columns = len(world.ATTRIBUTES)
    n = len(world.SHAPES) * columns
    scenes = world.sample(np.random.default_rng(0), n, pairs=0, size=1)
    scenes.shape[:, 0], scenes.attribute[:, 0] = np.arange(n) // columns, np.arange(n) % columns
    tiers = [world.tier(s, a) for s in world.SHAPES for a in world.ATTRIBUTES]
    sheet(scenes, columns, [BORDER[t] for t in tiers], world.ATTRIBUTES).save(MODELS / "world.png", optimize=True)
    m = len(world.INDIVIDUALS)
    scenes = world.sample(np.random.default_rng(1), m, pairs=0, size=1, attribute=0, texture=0)
    scenes.shape[:, 0] = len(world.SHAPES) + np.arange(m)
    borders = [BORDER["common"]] * len(world.NAMED) + [BORDER["never"]] * len(world.STRANGERS)
    sheet(scenes, 12, borders, world.INDIVIDUALS[:12]).save(MODELS / "individuals.png", optimize=True)


if __name__ == "__main__":
    main()

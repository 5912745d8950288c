"""Draws demo/models/world.png: every attribute on every shape, with the tier of each cell as the border.

    python -m demo.preview
"""
from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from . import draw, world
from .trainlib import MODELS

BORDER = {"common": (120, 190, 130), "ordinary": (240, 200, 90), "rare": (226, 90, 80), "never": (120, 120, 130)}


def main() -> None:
    rows, columns, cell = len(world.SHAPES), len(world.ATTRIBUTES), world.SIZE + 8
    n = rows * columns
    scenes = world.sample(np.random.default_rng(0), n, pairs=0, size=1)
    scenes.shape[:, 0], scenes.attribute[:, 0] = np.arange(n) // columns, np.arange(n) % columns
    images, _ = draw.render(scenes)
    sheet = Image.new("RGB", (columns * cell, rows * cell + 14), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * cell, i // columns * cell + 14
        tier = world.tier(world.SHAPES[i // columns], world.ATTRIBUTES[i % columns])
        pen.rectangle((x + 1, y + 1, x + cell - 2, y + cell - 2), fill=BORDER[tier])
        sheet.paste(Image.fromarray(image), (x + 4, y + 4))
        if i < columns:
            pen.text((x + 6, 1), world.ATTRIBUTES[i], fill="black")
    sheet.save(MODELS / "world.png", optimize=True)


if __name__ == "__main__":
    main()

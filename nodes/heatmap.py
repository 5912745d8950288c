"""Heat maps and tables as images, with Pillow alone: ComfyUI has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .chart import INK, PALE, PAPER

SIDE, MOST = 144, 400  # pixels of a map's longer side; maps in a picture
EM = 15
COLOURS = np.array([[10, 8, 32], [66, 30, 120], [30, 112, 148], [62, 188, 120], [250, 232, 100]], dtype=np.float32)


def heat(values: np.ndarray) -> np.ndarray:
    """Numbers 0..1 as colours from dark blue to light yellow, ``[..., 3]`` in 0..255."""
    place = np.clip(values, 0, 1) * (len(COLOURS) - 1)
    low = np.minimum(place.astype(int), len(COLOURS) - 2)
    share = (place - low)[..., None]
    return (COLOURS[low] * (1 - share) + COLOURS[low + 1] * share).round().astype(np.uint8)


def heat_maps(maps: dict[str, torch.Tensor], columns: Sequence[str], title: str) -> Image.Image:
    """One row a site, one map a column. A map is ``[t, h, w]``, its frames side by side, from its own smallest value
    (dark) to its own largest (light); both stand below it.

    ``maps``: by the row's label, ``[columns, t, h, w]``.

    Raises:
        ValueError: too many maps for one picture, or one that is not of numbers.
    """
    for label, row in maps.items():
        if not bool(row.isfinite().all()):
            raise ValueError(f"The attention of {label} holds NaN or infinite values: the model overflows in half "
                             "precision. Start ComfyUI with --fp32-unet (or --bf16-unet), and look at its pictures.")
    if len(maps) * len(columns) > MOST:
        raise ValueError(f"{len(maps)} sites with {len(columns)} maps each are too many for one picture (at most "
                         f"{MOST} maps). Name fewer blocks or tokens.")
    font, small = ImageFont.load_default(size=EM), ImageFont.load_default(size=EM - 3)
    cells = {label: [drawn(one) for one in row] for label, row in maps.items()}
    wide = max(cell.width for row in cells.values() for cell, *_ in row)
    wide = max(wide, 7 * EM, *(int(font.getlength(column)) for column in columns))
    tall = max(cell.height for row in cells.values() for cell, *_ in row)
    left = EM + max(int(font.getlength(label)) for label in cells) + EM
    top = int(4.2 * EM)
    size = (max(left + len(columns) * (wide + EM), int(font.getlength(title)) + 2 * EM),
            top + len(cells) * (tall + 2 * EM) + EM // 2)
    image = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((EM, EM // 2), title, fill=INK, font=font)
    for i, column in enumerate(columns):
        draw.text((left + i * (wide + EM), 2.4 * EM), column, fill=INK, font=font)
    for j, (label, row) in enumerate(cells.items()):
        y = top + j * (tall + 2 * EM)
        draw.text((EM, y), label, fill=INK, font=font)
        for i, (cell, low, high) in enumerate(row):
            x = left + i * (wide + EM)
            image.paste(cell, (x, y))
            draw.text((x, y + cell.height + 2), f"{percent(low)} to {percent(high)}", fill=PALE, font=small)
    return image


def drawn(one: torch.Tensor) -> tuple[Image.Image, float, float]:
    """A map ``[t, h, w]`` as a picture, with its smallest and largest value. Cells stay square and sharp."""
    flat = torch.cat(list(one.float()), -1).numpy()
    low, high = float(flat.min()), float(flat.max())
    cell = max(1, round(SIDE / max(one.shape[-2:])))
    colours = heat((flat - low) / (high - low) if high > low else flat * 0)
    picture = Image.fromarray(colours).resize((flat.shape[1] * cell, flat.shape[0] * cell), Image.Resampling.NEAREST)
    return picture, low, high


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def table_picture(text: str) -> Image.Image:
    """Lines of text in columns (two blanks or more apart) as a picture."""
    font, lines = ImageFont.load_default(size=EM), text.splitlines()
    starts = [0] + [i for i in range(2, len(lines[0])) if lines[0][i] != " " and lines[0][i - 2 : i] == "  "]
    parts = [[line[a:b].strip() for a, b in zip(starts, [*starts[1:], None])] for line in lines]
    widths = [max(int(font.getlength(part)) for part in column) + 2 * EM for column in zip(*parts)]
    image = Image.new("RGB", (sum(widths) + 2 * EM, int(1.4 * EM * (len(lines) + 1)) + EM), PAPER)
    draw = ImageDraw.Draw(image)
    for j, row in enumerate(parts):
        for i, part in enumerate(row):
            draw.text((EM + sum(widths[:i]), EM + 1.4 * EM * j), part, fill=INK if j else PALE, font=font)
    return image

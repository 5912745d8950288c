"""Line charts as an image, with Pillow alone: ComfyUI has it, and a plot must not need an extra package."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont

from ..guidance.trace import QUANTITIES, series

Run = dict
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#111111")  # Okabe-Ito
OVERVIEW = ("gamma", "frequent", "cosine", "guidance_norm", "change_norm", "weight", "evaluations")
INK, GRID, PAPER = "#222222", "#dddddd", "#ffffff"
SCALE = 2  # drawn larger and scaled down, for smooth lines


def line_charts(runs: dict[str, Run], quantity: str, width: int, height: int) -> Image.Image:
    """One panel a quantity ("overview": the first four that were recorded), one line a run. RGB image."""
    names = [name for name in (OVERVIEW if quantity == "overview" else (quantity,))
             if any(series(run, name) for run in runs.values())][:4]
    canvas = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=max(12, min(width, height) // 36) * SCALE)
    line = font.size * 1.4
    top = _legend(draw, list(runs), font, line, width * SCALE)
    if not names:
        draw.text((line, top + line), f"No step recorded '{quantity}'.", fill=INK, font=font)
    columns = 1 if len(names) < 2 else 2
    rows = -(-len(names) // columns)
    for i, name in enumerate(names):
        w, h = width * SCALE / columns, (height * SCALE - top) / max(rows, 1)
        x, y = (i % columns) * w, top + (i // columns) * h
        lines = [series(run, name) for run in runs.values()]
        _panel(draw, (x, y, x + w, y + h), QUANTITIES[name], lines, font, line)
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def _legend(draw: ImageDraw.ImageDraw, labels: list[str], font, line: float, width: float) -> float:
    x, y = line, line / 2
    for i, label in enumerate(labels):
        length = draw.textlength(label, font) + 2.5 * line
        if x + length > width and x > line:
            x, y = line, y + line
        colour = COLOURS[i % len(COLOURS)]
        draw.line((x, y + line * 0.45, x + 1.2 * line, y + line * 0.45), fill=colour, width=3 * SCALE)
        draw.text((x + 1.5 * line, y), label, fill=INK, font=font)
        x += length
    return y + line * 1.2


def _panel(draw: ImageDraw.ImageDraw, box: tuple, title: str, lines: list[list], font, line: float) -> None:
    left, top, right, bottom = box[0] + 4 * line, box[1] + 1.6 * line, box[2] - line, box[3] - 2.4 * line
    points = [point for one in lines for point in one]
    last = max(max(x for x, _ in points), 1)
    low, high, ticks = _axis(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / last * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    draw.text((left, box[1]), title, fill=INK, font=font)
    for tick in ticks:
        y = place(0, tick)[1]
        draw.line((left, y, right, y), fill=GRID, width=SCALE)
        draw.text((left - line * 0.4, y), f"{tick:g}", fill=INK, font=font, anchor="rm")
    for step in sorted({0, last // 2, last}):
        draw.text((place(step, low)[0], bottom + line * 0.3), str(step), fill=INK, font=font, anchor="ma")
    draw.text(((left + right) / 2, bottom + line * 1.2), "step", fill=INK, font=font, anchor="ma")
    for i, one in enumerate(lines):
        colour = COLOURS[i % len(COLOURS)]
        path = [place(x, y) for x, y in one]
        if len(path) > 1:
            draw.line([value for point in path for value in point], fill=colour, width=2 * SCALE, joint="curve")
        for x, y in path:
            draw.ellipse((x - 2 * SCALE, y - 2 * SCALE, x + 2 * SCALE, y + 2 * SCALE), fill=colour)


def _axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round limits around the data and about four ticks between them."""
    if high - low < 1e-6 * max(abs(high), 1e-6):
        low, high = low - 0.5 * max(abs(low), 1.0), high + 0.5 * max(abs(high), 1.0)
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    size = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= rough)
    first = math.floor(low / size)
    ticks = [round((first + k) * size, 12) for k in range(12) if (first + k) * size < high + size]
    return ticks[0], ticks[-1], ticks

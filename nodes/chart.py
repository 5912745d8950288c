"""Line charts as an image, with Pillow alone: ComfyUI has it, and a plot must not need an extra package."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw, ImageFont

from ..guidance.trace import QUANTITIES, series

Run = dict
Points = list[tuple[int, float]]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#111111")  # Okabe-Ito
OVERVIEW = ("gamma", "frequent", "cosine", "guidance_norm", "change_norm", "weight", "evaluations")
INK, PALE, GRID, PAPER = "#222222", "#777777", "#e4e4e4", "#ffffff"
SCALE = 2  # drawn larger and scaled down, for smooth lines


def line_charts(runs: dict[str, Run], quantity: str, width: int, height: int) -> Image.Image:
    """One panel a quantity ("overview": the first recorded ones, as many of four as fit), one line a run. RGB image."""
    chart = _Chart(width, height)
    top = chart.legend(list(runs))
    panels = []
    for name in OVERVIEW if quantity == "overview" else (quantity,):
        lines = [[(x, y) for x, y in series(run, name) if math.isfinite(y)] for run in runs.values()]
        if any(lines):
            panels.append((name, lines))
    if not panels:
        what = "anything that can be drawn" if quantity == "overview" else f"'{quantity}'"
        chart.text(chart.em, top + chart.em, f"No step recorded {what}.", chart.width - 2 * chart.em)
    for box, (name, lines) in zip(chart.boxes(top, len(panels)), panels):
        chart.panel(box, name, lines)
    return chart.image.resize((width, height), Image.Resampling.LANCZOS)


class _Chart:
    """An enlarged canvas; every length is in its pixels, ``em`` is the size of the text."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width * SCALE, height * SCALE
        self.image = Image.new("RGB", (self.width, self.height), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.em = max(11, min(width, height) // 36) * SCALE
        self.font = ImageFont.load_default(size=self.em)
        self.pen = self.em / 14  # a hair line; data is drawn in multiples of it

    def text(self, x: float, y: float, text: str, room: float = math.inf, fill: str = INK, anchor: str = "la") -> float:
        """Write ``text``, cut to ``room``, and return its length."""
        if self.font.getlength(text) > room:
            while text and self.font.getlength(text + "…") > room:
                text = text[:-1]
            text = text.rstrip(" (,-") + "…" if text else ""
        self.draw.text((x, y), text, fill=fill, font=self.font, anchor=anchor)
        return self.font.getlength(text)

    def legend(self, labels: list[str]) -> float:
        """The names of the lines in rows from the top, at most a third of the height; returns where they end."""
        em, x, y = self.em, self.em, 0.7 * self.em
        for i, label in enumerate(labels):
            length = min(2 * em + self.font.getlength(label), self.width - 2 * em)
            if x + length > self.width - em:
                x, y = em, y + 1.5 * em
                if y > self.height / 3 - 1.5 * em and i < len(labels) - 1:
                    self.text(x, y, f"and {len(labels) - i} more", fill=PALE)
                    break
            middle = y + 0.6 * em
            self.draw.line((x, middle, x + 1.4 * em, middle), fill=COLOURS[i % len(COLOURS)], width=round(4 * self.pen))
            self.text(x + 2 * em, y, label, length - 2 * em)
            x += length + 1.2 * em
        return y + 2.2 * em

    def boxes(self, top: float, count: int) -> list[tuple[float, float, float, float]]:
        """Where up to four panels go below ``top``, as many as stay legible; an odd last one has its row alone."""
        em, room = self.em, self.height - top
        columns = 2 if count > 1 and self.width > 32 * em and (count != 2 or self.width > 1.2 * room) else 1
        count = min(count, 4, columns * max(1, int(room // (6.5 * em))))
        rows, boxes = -(-count // columns), []
        for i in range(count):
            wide = self.width if i == count - 1 and i % columns == 0 else self.width / columns
            x, y = i % columns * self.width / columns, top + i // columns * room / rows
            boxes.append((x, y, x + wide, y + room / rows))
        return boxes

    def panel(self, box: tuple[float, float, float, float], name: str, lines: list[Points]) -> None:
        """Axes, title and the lines of one quantity."""
        em, values = self.em, [y for line in lines for _, y in line]
        top, bottom = box[1] + 1.9 * em, box[3] - 2.1 * em
        ticks = _ticks(min(values), max(values), max(2, min(5, int((bottom - top) / (2 * em)))))
        written = [f"{tick:.10g}" for tick in ticks]
        left = box[0] + 1.5 * em + max(2.2 * em, *map(self.font.getlength, written))
        right = box[2] - 1.2 * em
        last = max(x for line in lines for x, _ in line)

        def place(x: float, y: float) -> tuple[float, float]:
            share = x / last if last else 0.5  # a single step sits in the middle
            return left + share * (right - left), bottom - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

        end = box[0] + em + self.text(box[0] + em, box[1], name.replace("_", " "), right - box[0] - em) + 0.6 * em
        if right - end > 5 * em:
            self.text(end, box[1], QUANTITIES[name].removeprefix(name).strip(), right - end, PALE)
        for tick, label in zip(ticks, written):
            y = place(0, tick)[1]
            self.draw.line((left, y, right, y), fill=PALE if tick in (0, ticks[0]) else GRID, width=round(self.pen))
            self.text(left - 0.5 * em, y, label, fill=PALE, anchor="rm")
        steps = [round(tick) for tick in _ticks(0, max(last, 1), 5) if tick == round(tick) and tick <= last]
        for step in steps:
            x = place(step, ticks[0])[0]
            self.draw.line((x, bottom, x, bottom + 0.25 * em), fill=PALE, width=round(self.pen))
            self.text(x, bottom + 0.4 * em, f"step {step}" if step == 0 else str(step), fill=PALE, anchor="ma")
        self.lines([[(x, place(x, y)) for x, y in line] for line in lines], max(1, last // 24))

    def lines(self, lines: list[list[tuple[int, tuple[float, float]]]], stride: int) -> None:
        """Dots, joined where steps follow each other. Where lines coincide, they take turns to be on top."""
        strokes = []
        for i, points in enumerate(lines):
            colour = COLOURS[i % len(COLOURS)]
            dot = self.pen * (3.5 if len(points) == 1 else 2.2 if len(points) <= 50 else 1.2)
            for k, (x, (u, v)) in enumerate(points):
                turn = (i + x // stride) % len(lines)
                strokes.append((turn, colour, self.draw.ellipse, (u - dot, v - dot, u + dot, v + dot)))
                if k + 1 < len(points) and points[k + 1][0] - x <= 1:
                    strokes.append((turn, colour, self.draw.line, (u, v, *points[k + 1][1])))
        for _, colour, stroke, where in sorted(strokes, key=lambda entry: entry[0]):
            stroke(where, colour, width=round(2.4 * self.pen) if stroke == self.draw.line else 0)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from below ``low`` to above ``high``; a constant is shown from 0."""
    if high - low <= 1e-7 * max(abs(low), abs(high)):
        low, high = min(low, 0.0), max(high, 0.0)
        high += (high - low or 1.0) * 0.2
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    size = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= rough * 0.999)
    first, last = math.floor(low / size + 1e-6), math.ceil(high / size - 1e-6)
    return [float(f"{k * size:.10g}") for k in range(first, last + 1)]

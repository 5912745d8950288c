"""The plot of a trace: legible and complete at every size and for every run, without a person looking at it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageColor

from rudder.guidance.trace import QUANTITIES
from rudder.nodes import chart
from rudder.nodes.chart import COLOURS, OVERVIEW, line_charts

SIZES = [(256, 192), (512, 384), (768, 512), (1536, 1024), (256, 1024), (1536, 192)]
sized = pytest.mark.parametrize(("width", "height"), SIZES)


def run(steps: int = 12, **quantities) -> dict:
    """A run whose quantities are numbers, lists (one value a step) or functions of the step."""
    def at(value, i):
        return value(i) if callable(value) else value[i] if isinstance(value, list) else value

    recorded = [{"index": i, **{name: at(value, i) for name, value in quantities.items()}} for i in range(steps)]
    return {"methods": [], "cfg": 7.0, "steps": recorded}


def full(steps: int = 12, height: float = 1.0) -> dict:
    return run(steps, **{name: lambda i, k=k: height * math.sin(k + i / 3) for k, name in enumerate(QUANTITIES)})


def ink(picture: Image.Image, colour: str) -> int:
    """How many pixels are close to ``colour``; thin strokes are mixed with the paper."""
    away = np.abs(np.asarray(picture, dtype=int) - ImageColor.getrgb(colour)).sum(-1)
    return int((away < 100).sum())


def border(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture)
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


@pytest.mark.parametrize(
    ("quantity", "width", "height"),
    [*(("overview", *size) for size in SIZES), *((name, 512, 384) for name in QUANTITIES), ("gamma", 256, 192)],
)
def test_every_quantity_and_every_size(quantity, width, height):
    picture = line_charts({"CFG 7": full(), "AAPB": full(height=0.5)}, quantity, width, height)
    assert picture.size == (width, height) and picture.mode == "RGB"
    assert ink(picture, COLOURS[0]) > 40 and ink(picture, COLOURS[1]) > 40 and ink(picture, chart.INK) > 20
    assert (border(picture) == 255).all()  # nothing is cut off


@sized
def test_long_and_many_labels_leave_room_for_the_lines(width, height):
    runs = {"Rare Concept Blend (AAPB) + " * 9: full(), **{f"Prompt Blend (fixed) #{i}": full() for i in range(20)}}
    picture = line_charts(runs, "overview", width, height)
    assert (border(picture) == 255).all()
    lower = picture.crop((0, height // 2, width, height))
    assert sum(ink(lower, colour) for colour in COLOURS) > 40


@sized
def test_panels_do_not_overlap(width, height):
    canvas = chart._Chart(width, height)
    top = canvas.legend(["CFG 7", "AAPB"])
    for count in range(1, 8):
        boxes = canvas.boxes(top, count)
        area = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
        assert 1 <= len(boxes) <= min(count, 4) and area == pytest.approx(canvas.width * (canvas.height - top))
        for i, (x0, y0, x1, y1) in enumerate(boxes):
            assert y1 - y0 > 5 * canvas.em and x1 - x0 >= min(canvas.width, 16 * canvas.em)
            for u0, v0, u1, v1 in boxes[i + 1 :]:
                assert x1 <= u0 + 1 or u1 <= x0 + 1 or y1 <= v0 + 1 or v1 <= y0 + 1


def test_the_overview_shows_the_first_quantities_that_were_recorded():
    cfg = line_charts({"CFG": run(cosine=0.9, weight=7.0)}, "overview", 768, 512)
    same = line_charts({"CFG": run(cosine=0.9, weight=7.0, cond_norm=3.0)}, "overview", 768, 512)
    other = line_charts({"CFG": run(cosine=0.9, weight=7.0, gamma=0.3)}, "overview", 768, 512)
    assert cfg.tobytes() == same.tobytes() != other.tobytes()
    assert set(OVERVIEW) <= set(QUANTITIES)


@pytest.mark.parametrize(
    "values",
    [[0.0] * 12, [7.0] * 12, [-3.0] * 12, [1e-13 * i for i in range(12)], [1e13 * i for i in range(12)],
     [1 - 1e-6 * i for i in range(12)], [1 + 1e-9 * i for i in range(12)], [5.0, *[math.nan] * 10, 6.0],
     [math.inf, *range(11)], [[0.1, 0.9]] * 12],
    ids=["zeros", "constant", "negative", "tiny", "huge", "near one", "almost constant", "nan", "inf", "batch"],
)  # fmt: skip
def test_any_values(values):
    picture = line_charts({"CFG": run(gamma=values)}, "gamma", 512, 384)
    assert ink(picture, COLOURS[0]) > 40 and (border(picture) == 255).all()


@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
def test_any_number_of_steps(steps):
    picture = line_charts({"CFG": full(steps)}, "gamma", 512, 384)
    plot = picture.crop((0, 60, 512, 384))
    assert ink(plot, COLOURS[0]) > 10 and (border(picture) == 255).all()


def test_a_gap_is_not_bridged():
    """A line over steps that did not record the quantity would show values that never were."""

    def drawn(indices):
        steps = {"methods": [], "cfg": 7.0, "steps": [{"index": i, "gamma": 0.5} for i in indices]}
        return ink(line_charts({"AAPB": steps}, "gamma", 512, 384), COLOURS[0])

    assert drawn([0, 1, 2, 17, 18, 19]) < 0.5 * drawn(range(20))


def test_equal_lines_all_show():
    picture = line_charts({name: run(weight=7.0) for name in "abcd"}, "weight", 768, 512)
    plot = picture.crop((0, 60, 768, 512))
    assert min(ink(plot, colour) for colour in COLOURS[:4]) > 100


@pytest.mark.parametrize("runs", [{"CFG": run()}, {"CFG": run(0)}, {"CFG": run(gamma=math.nan)}])
@pytest.mark.parametrize("quantity", ["overview", "gamma"])
def test_nothing_recorded_is_said(runs, quantity):
    picture = line_charts(runs, quantity, 256, 192)
    text = picture.crop((0, 35, 256, 192))
    assert ink(text, chart.INK) > 20 and (border(picture) == 255).all()


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.01, 0.99), (0.88, 0.99), (3, 3), (0, 0), (-2, 5), (-1, -1), (1e-9, 3e-9), (0, 1e12),
                      (0.999999, 1.0)]
)
@pytest.mark.parametrize("count", [2, 4, 5])
def test_ticks_are_round_and_around_the_data(low, high, count):
    ticks = chart._ticks(low, high, count)
    size = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * size and ticks[-1] >= high - 1e-6 * size and 2 <= len(ticks) <= count + 3
    assert np.allclose(np.diff(ticks), size, rtol=1e-3)
    assert len({f"{tick:.10g}" for tick in ticks}) == len(ticks)

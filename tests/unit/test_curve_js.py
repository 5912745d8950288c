"""The drawing in the Guidance Schedule node shows what the method does: web/curve.js against guidance/, in Node."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from rudder.guidance.contract import GuidanceError
from rudder.guidance.curve import parse
from rudder.guidance.schedule import SHAPES, Schedule

from .tensors import step

SOURCE = Path(__file__).resolve().parents[2] / "web" / "curve.js"
TIMES = [i / 64 for i in range(65)]
CURVES = ["0:0, 0.5:2, 1:0", "0.2:1;0.6:3", "0 : 0.5\n.3:1e0 ,\n1:0\n", "0.5:3"]
BAD = ["", "0", "0:1:2", "a:1", "0.5:1, 0.5:2", "0.6:1, 0.5:2", "1.2:1", "0:-1", "nan:1", "0:inf", "0:", ":1", "0x1:1"]
NO_SPAN = {"start_percent": 0.5, "end_percent": 0.5}
TELL = """
const trial = (make) => { try { return make() } catch (error) { return error.message } }
const cases = JSON.parse(input)
console.log(JSON.stringify({
  parsed: cases.texts.map((text) => trial(() => parse(text))),
  factors: cases.values.map((values) => trial(() => cases.times.map(factor(values)))),
  courses: cases.values.map((values) => trial(() => course(values))),
  none: trial(() => course({ ...cases.values[0], ...cases.none })),
}))
"""


def settings() -> list[dict]:
    """Widget values as the node has them: every shape at its defaults, and a seeded sample of the rest."""
    dice = random.Random(0)
    plain = {"low": 0.0, "start_percent": 0.0, "end_percent": 1.0, "keep_average": True, "alpha": 2.0, "beta": 2.0}
    found = [{**plain, "shape": shape, "curve": CURVES[0]} for shape in SHAPES]
    for _ in range(60):
        start, end = sorted(dice.sample(range(101), 2))
        found.append({
            "shape": dice.choice(SHAPES), "low": dice.choice([0.0, 0.35, 1.0]), "start_percent": start / 100,
            "end_percent": end / 100, "keep_average": dice.random() < 0.5, "curve": dice.choice(CURVES),
            "alpha": dice.uniform(1, 20), "beta": dice.choice([1.0, 2.0, dice.uniform(1, 20)]),
        })  # fmt: skip
    at_an_end = [{"start_percent": 0.6, "end_percent": 0.5}, {"start_percent": 1.0}]  # a step has no end
    return [*found, *({**plain, "shape": "step", "low": 0.3, "curve": CURVES[0], **span} for span in at_an_end)]


def schedule(values: dict) -> Schedule:
    """As the node's execute makes it."""
    return Schedule(
        shape=values["shape"], low=values["low"], first=values["start_percent"], last=values["end_percent"],
        alpha=values["alpha"], beta=values["beta"], keep_average=values["keep_average"],
        points=parse(values["curve"]) if values["shape"] == "curve" else (),
    )  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> dict:
    """What the JavaScript says of all cases. Node alone: the drawing itself is tested in tests/e2e."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no Node to run the JavaScript in")
    cases = json.dumps({"texts": [*CURVES, *BAD], "values": settings(), "times": TIMES, "none": NO_SPAN})
    code = f"{SOURCE.read_text(encoding='utf-8')}\nconst input = {json.dumps(cases)}\n{TELL}"
    options = {"input": code, "capture_output": True, "text": True, "encoding": "utf-8"}
    said = subprocess.run([node, "--input-type=module", "-"], **options)
    assert said.returncode == 0, said.stderr
    return json.loads(said.stdout)


def test_points_are_read_as_in_python(answers):
    for text, found in zip([*CURVES, *BAD], answers["parsed"], strict=True):
        try:
            assert found == [list(point) for point in parse(text)]
        except GuidanceError:
            assert isinstance(found, str), f"{text!r} is refused by Python and drawn by the node"


def test_every_factor_is_the_methods(answers):
    for values, found in zip(settings(), answers["factors"], strict=True):
        method = schedule(values)
        assert found == pytest.approx([method.factor(t) for t in TIMES], rel=1e-10, abs=1e-12), values


def test_the_drawn_average_is_that_of_an_evenly_spread_run(answers):
    run = step(0, 480)  # percents are 1 - sigma
    for i, (values, found) in enumerate(zip(settings(), answers["courses"], strict=True)):
        method = schedule(values)
        middle = sum(method.factor((k + 0.5) / 480) for k in range(480)) / 480 or 1.0
        average = middle if values["keep_average"] else 1.0
        for t, factor in found[::40]:
            assert factor * average == pytest.approx(method.factor(t), rel=1e-9, abs=1e-12), values
        if i < len(SHAPES):
            assert middle == pytest.approx(method.average(run), rel=0.01)


def test_what_the_node_would_refuse_is_not_drawn(answers):
    with pytest.raises(GuidanceError, match="must satisfy 0 <= start < end"):
        schedule({**settings()[0], **NO_SPAN})
    assert answers["none"] == "start must be below end"

"""The machinery of the proving ground, on its quick runs. No test looks at a timing: CI machines are shared."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rudder import bench
from rudder.bench import cost

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick() -> Iterator[bench.Table]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the command does for a quick run
    yield cost.main(bench.Options(quick=True))
    torch.set_num_threads(threads)


def test_the_cost_table_has_every_method_at_every_batch_size(quick):
    assert {(row["method"], row["batch"]) for row in quick.rows} == {(r.name, b) for r in cost.ROWS for b in (1, 2)}
    for row in quick.rows:
        assert set(quick.columns) <= set(row) and row["pairs"] == 3  # 4 steps, the first not timed
        numbers = [row[key] for key in ("step_ms", "reference_ms", "ratio", "ratio_q1", "ratio_q3")]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]


def test_evaluations_are_counted_and_as_predicted(quick):
    for row in quick.rows:
        assert row["as_predicted"], f"{row['method']}: {row['evaluations']} evaluations a step, not {row['predicted']}"
    by_name = {row["method"]: row["evaluations"] for row in quick.rows}
    assert by_name["KSampler alone (CFG)"] == by_name["Rare Concept Schedule (R2F), alternate"] == 2
    assert by_name["Rare Concept Blend (AAPB)"] == by_name["Prompt Blend (fixed)"] == 3
    assert 1 < by_name["Guidance Interval, (0.28, 5.42]"] < 2


def test_every_method_of_the_pack_has_a_row():
    from rudder.guidance.contract import Prompt

    methods = {type(method).__name__ for row in cost.ROWS for method in row.methods(Prompt([], "anchor"))}
    assert methods == {"AAPB", "CFG", "FixedBlend", "LimitedInterval", "R2F", "Trace"}


def test_a_table_is_markdown_and_json(quick, tmp_path):
    quick.save(tmp_path)
    lines = quick.markdown().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(quick.rows) and {line.count("|") for line in table} == {len(quick.columns) + 1}
    assert (tmp_path / "cost.md").read_text(encoding="utf-8") == quick.markdown()
    assert json.loads((tmp_path / "cost.json").read_text(encoding="utf-8"))["rows"] == quick.rows


def test_the_import_table_from_the_command_line(tmp_path):
    done = command("import", "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "import.json").read_text(encoding="utf-8"))
    assert [row["what"] for row in record["rows"]] == ["root package", "root package and all nodes"]
    assert 0 < record["rows"][0]["median"] < record["rows"][1]["median"]
    assert {"commit", "date", "machine", "versions", "command", "wall time"} == set(record["facts"])
    assert (tmp_path / "import.md").read_text(encoding="utf-8").strip() in done.stdout
    assert "9 nodes" in done.stdout


def test_bad_input_is_explained():
    assert "COMFYUI_PATH; `python3 dev.py bench` sets it" in command("cost", "--quick", COMFYUI_PATH="/nowhere").stderr
    unknown = command("costs")
    assert unknown.returncode == 2 and "invalid choice: 'costs'" in unknown.stderr

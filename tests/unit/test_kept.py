"""The file of marks: what it keeps, what it starts anew."""

from __future__ import annotations

import json
import math

import pytest

from rudder.bench.kept import Kept, agree, restored, rounded

ROW = {"right": [1.0, 0.0], "parts": {"shape": [1.0, float("nan")]}, "diversity": None, "code": "c", "commit": "d"}


def test_rows_come_back_and_belong_to_what_they_are_about(tmp_path):
    file, about = tmp_path / "kept" / "rare-model.json", {"model": "m", "steps": 25}
    Kept(file, about).put("one", rounded(ROW))
    Kept(file, about).put("two", rounded(ROW))
    again = Kept(file, about)
    assert list(again.rows) == ["one", "two"]
    json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    found = restored(again.rows["one"]["parts"])
    assert found["shape"][0] == 1.0 and math.isnan(found["shape"][1])
    again.drop("one")
    assert list(Kept(file, about).rows) == ["two"] and len(file.read_text(encoding="utf-8").splitlines()) == 3
    assert Kept(file, about | {"model": "another"}).rows == {}


def test_a_share_of_the_work_does_not_write(tmp_path):
    file = tmp_path / "rows.json"
    share = Kept(file, {}, writes=False)
    share.put("one", ROW)
    assert share.rows["one"] is ROW and not file.exists()


@pytest.mark.parametrize(("wrong", "batch", "same"), [(0, 32, True), (2, 32, True), (3, 32, False), (0, 4, True),
                                                      (1, 4, False)])
def test_a_batch_agrees_but_for_what_rounding_explains(wrong, batch, same):
    now, more = [1.0] * batch, [0.0] * 100
    assert agree({"right": [0.0] * wrong + now[wrong:]}, {"right": now + more}) is same
    alike, off = [0.3, math.nan] * (batch // 2), [0.302] * wrong
    assert agree({"right": now, "saturation": off + alike[wrong:]},
                 {"right": now + more, "saturation": [0.30001, math.nan] * (batch // 2) + more}) is same


def test_numbers_keep_five_digits():
    assert rounded({"a": [0.123456789, 1.0], "b": 12345.678}) == {"a": [0.12346, 1.0], "b": 12346.0}

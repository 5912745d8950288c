"""The table `edit`: the machinery, on demo models of random weights. No figure is checked."""

from __future__ import annotations

import json

import pytest
import torch

from rudder import bench
from rudder.bench import edit, edits

from .test_bench import demo_files, stand_in  # noqa: F401 (fixtures)


class Content:
    """A judge to whom every picture is right."""

    def __call__(self, images: torch.Tensor) -> Content:
        self.n = len(images)
        return self

    def score(self, truth: list[dict]) -> dict[str, torch.Tensor]:
        assert len(truth) == self.n
        names = ("color", "shape", "texture", "background", "count", "relation", "all")
        return dict.fromkeys(names, torch.ones(self.n))

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [torch.nn.functional.avg_pool2d(images, 8)]


def test_the_edit_table(demo_files, stand_in, tmp_path, monkeypatch):  # noqa: F811
    from rudder.demo import judge

    monkeypatch.setattr(judge, "load", Content)
    options = bench.Options(models=tuple(map(str, demo_files.values())), n=2, quick=True, work=tmp_path / "work")
    table = edit.main(options)
    kinds = {"all", *(e.kind for source in edits.sources()[:2] for e in source.edits)}
    assert {(r["model"], r["kind"], r["method"]) for r in table.rows} == {
        (f"shapes-{model}", kind, row.name) for model in demo_files for kind in kinds for row in edit.ROWS.values()}
    for row in table.rows:
        assert row["success"].value == row["changed"].value == 100
        assert row["evaluations"] == 6 * (3 if "AAPB" in row["method"] else 2)
        assert ("gain" in row) == (row["method"] != edit.ROWS[edit.PLAIN].name)
    peaks = {(row["model"], row["method"]): row["memory"] for row in table.rows}
    for (model, method), peak in peaks.items():  # parts of a batch that are attended to apart may need less together
        assert 0.5 < peak / peaks[model, edit.ROWS[edit.PLAIN].name] < 3, method
    table.facts |= bench.facts(0.0, True)
    table.save(tmp_path)
    json.loads((tmp_path / "edit.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    for name in ("trade", "shapes-unet-median", "shapes-flux-worst"):
        assert (tmp_path / f"edit-{name}.png").read_bytes().startswith(b"\x89PNG")
    assert edit.main(options).rows == table.rows, "a second run paints nothing new and says the same"


def test_the_source_is_the_same_picture_in_every_row(demo_files, stand_in, tmp_path):  # noqa: F811
    from rudder.bench import cells

    options = bench.Options(quick=True, n=1)
    store = cells.open_store(tmp_path, demo_files["unet"], options)
    seen = {}
    for key in edit.ROWS:
        [(family, methods)] = edit.families(store, key, 1)
        store.paint(family.job(methods))
        seen[key] = torch.from_numpy(store.batch(family.job())[0]).float() / 255
    assert len({edit.families(store, key, 1)[0][0].key for key in edit.ROWS}) == len(edit.ROWS)
    for key, pictures in seen.items():
        if key != "aapb-p2p":  # AAPB blends the source too
            assert (pictures[0] - seen[edit.PLAIN][0]).abs().max() <= 1 / 255, key
        assert key == edit.PLAIN or (pictures[1:] - seen[edit.PLAIN][1:]).abs().max() > 1 / 255, key

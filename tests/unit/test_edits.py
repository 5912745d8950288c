"""The list of the table `edit` is fixed and readable, and what must stay is found in pictures of the world."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from rudder.bench import edits, measures
from rudder.demo import draw, words, world

DIGEST = "5511a445"


def test_nobody_changed_the_list():
    assert edits.digest() == DIGEST


def test_an_edit_changes_what_it_asks_for_and_nothing_else():
    kinds = Counter(edit.kind for source in edits.sources() for edit in source.edits)
    assert kinds == dict.fromkeys(edits.KINDS, 64)
    for source in edits.sources():
        before = source.truth
        for edit in source.edits:
            after = edit.truth
            assert words.parse(edit.text) == after and after != before
            first, then = before["objects"][0], after["objects"][0]
            changed = {k for k in {*first, *then} if first.get(k) != then.get(k)}
            changed |= {"background"} & {k for k in before if before[k] != after.get(k)}
            if len(before["objects"]) != len(after["objects"]):
                assert edit.kind in ("add", "delete") and not changed and "count" in edit.asked
            else:
                assert changed == set(edit.asked), edit


def rendered(count: int, n: int = 60) -> tuple[world.Scenes, torch.Tensor, np.ndarray]:
    """Scenes without attribute, of two colours where there are two objects; pictures; masks [n, 2, 64, 64]."""
    scenes = world.sample(np.random.default_rng(3), 3000)
    plain = (scenes.attribute == 0).all(1) & (scenes.texture == 0).all(1) & (scenes.shape < len(world.SHAPES)).all(1)
    scenes = scenes[np.flatnonzero(plain & (scenes.count == count) & (scenes.color[:, 0] != scenes.color[:, 1]))[:n]]
    pictures, masks = draw.render(scenes)
    return scenes, torch.from_numpy(pictures).movedim(3, 1).float() / 255, masks


def truth_of(scenes: world.Scenes, i: int) -> dict:
    objects = [{"color": list(world.COLORS)[scenes.color[i, j]]} for j in range(scenes.count[i])]
    return {"objects": objects, "background": list(world.BACKGROUNDS)[scenes.background[i]]}


@pytest.mark.parametrize("count", [1, 2])
def test_objects_are_found_where_they_were_drawn(count):
    scenes, pictures, masks = rendered(count)
    overlaps = []
    for i in range(len(scenes)):
        found = edits.objects(pictures[i], truth_of(scenes, i))
        assert len(found) == count
        for mask, true in zip(found, masks[i] > 0.5):
            overlaps.append((mask & true).sum() / max((mask | true).sum(), 1))
    assert len(overlaps) >= 40 and np.median(overlaps) > 0.9 and np.quantile(overlaps, 0.1) > 0.8


def test_what_must_stay_is_the_rest_of_the_picture():
    scenes, pictures, masks = rendered(1, 10)
    for i in range(len(scenes)):
        truth, inside = truth_of(scenes, i), masks[i, 0] > 0.5
        for free in ("object", "rim", "background"):
            edit = edits.Edit("recolour", "a red heart", (), free)
            stays = edits.kept(pictures[i], truth, edit).numpy() > 0
            assert (stays & inside).any() == (free == "background")
            assert (stays & ~inside).any() == (free != "background") or free == "background"
        wide = edits.kept(pictures[i], truth, replace(edit, free="rim")).sum()
        assert wide < edits.kept(pictures[i], truth, replace(edit, free="object")).sum()


def test_structure_is_about_layout_and_not_about_what_is_there():
    maps = torch.randn(2, 8, 5, 5)
    turned = torch.linalg.qr(torch.randn(8, 8)).Q
    assert measures.structure([maps], [maps]).abs().max() < 1e-9
    assert measures.structure([maps], [torch.einsum("ij,bjhw->bihw", turned, maps)]).max() < 1e-9
    assert measures.structure([maps], [maps.flip(3)]).min() > 1e-3

"""The tables `variations` and `sizes`: what they measure, on pictures whose answer is known, and their machinery."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from rudder import bench
from rudder.bench import cells, sizes, variations
from rudder.demo import draw, judge, words, world
from rudder.host.demo import MODELS

UNET = MODELS / "shapes-unet.safetensors"


def scenes(batch: variations.Batch, looks: list[tuple[str, str]]) -> np.ndarray:
    """True pictures of the batch's prompt on backgrounds and in colours, ``[N, 64, 64, 3]``."""
    drawn = world.sample(np.random.default_rng(0), 200_000, pairs=0.0)
    [said] = words.parse(batch.said.text)["objects"]
    there = (drawn.shape[:, 0] == world.NOUNS.index(said["shape"])) & (drawn.texture[:, 0] == 0)
    there &= drawn.attribute[:, 0] == world.ATTRIBUTES.index(said["attribute"])
    at = []
    for color, background in looks:
        fits = there & (drawn.color[:, 0] == list(world.COLORS).index(color))
        fits &= drawn.background == list(world.BACKGROUNDS).index(background)
        at.append(next(i for i in np.flatnonzero(fits) if i not in at))
    return draw.render(drawn[np.array(at)])[0]


def test_a_look_is_colour_texture_and_background():
    batch = variations.Batch(0, "rival", 5.0, "")
    strip = scenes(batch, [("red", "white"), ("red", "white"), ("blue", "white"), ("red", "navy")])
    same, other, elsewhere = variations.judged(strip, batch, judge.load())
    assert same["look"] == same["right"] == 1 and same["apart"] > 0
    assert (other["color"], other["background"], other["look"]) == (0, 1, 0)
    assert (elsewhere["color"], elsewhere["background"], elsewhere["look"]) == (1, 0, 0)
    wrong = variations.judged(strip, variations.Batch(1, "rival", 5.0, ""), judge.load())
    assert not any(one["right"] for one in wrong), "another prompt"
    copies = variations.judged(strip[[0, 0]], batch, judge.load())
    assert copies[0]["apart"] < 1e-5 and copies[0]["look"] == 1


def test_batches_differ_and_share_their_noise_between_methods():
    texts = [variations.Batch(k, "plain", 5.0, "").said.text for k in range(40)]
    assert len(set(texts)) == len(words.prompts("common")) or len(set(texts)) == 40
    one, other = (variations.Batch(3, method, 5.0, "") for method in ("plain", "rival"))
    assert [one.seed(i) for i in range(4)] == [other.seed(i) for i in range(4)] and one.key != other.key
    assert len({one.seed(i) for i in range(4)}) == 4 and len(one.job.cell.text(0)) and one.job.last - one.job.first == 4


def test_the_table_of_variations(tmp_path: Path):
    options = bench.Options(quick=True, models=(str(UNET),), n=2, work=tmp_path)
    table = variations.main(options)
    assert [row["method"] for row in table.rows] == [name for name, _ in variations.ROWS.values()]
    assert all(row["n"] == 6 and row["evaluations"] == 12 for row in table.rows)
    assert all(("gain" in row) == (row["method"] != "same prompt, other noise") for row in table.rows)
    assert variations.main(options).rows == table.rows, "a second run paints nothing new and says the same"
    assert variations.main(bench.Options(quick=True, models=(str(UNET),), n=2, work=tmp_path / "new", until=0)).notes[
        -1].startswith("3 rows are not painted yet")


def test_the_table_of_sizes(tmp_path: Path):
    options = bench.Options(quick=True, models=(str(UNET),), n=2, work=tmp_path)
    table = sizes.main(options)
    assert {(row["size"], row["method"]) for row in table.rows} == {(64, "CFG")} | {
        (size, method) for size in sizes.SIZES[1:] for method in ("CFG", "attention entropy")}
    assert all(0 <= row["right"].low <= row["right"].value <= row["one"].value <= 100 for row in table.rows)
    store = cells.open_store(tmp_path, UNET, options, "sizes")
    for size, name, made in sizes.rows_of(store):
        todo = sizes.todo_of(store, size, name, made, 2, judge.load(), "")
        assert todo.store.read(todo.what)[0].shape == (2, size, size, 3)
    assert store.painter.latent_shape == (16, 16, 16), "the store itself is as it was"
    assert sizes.main(options).rows == table.rows


def test_a_picture_is_brought_to_the_judges_size():
    batch = variations.Batch(0, "rival", 5.0, "")
    small = scenes(batch, [("red", "white")])
    large = np.repeat(np.repeat(small, 2, 1), 2, 2)
    assert sizes.shrunk(large).shape == (1, 3, 64, 64)
    torch.testing.assert_close(sizes.shrunk(small), torch.from_numpy(small).movedim(3, 1).float() / 255)
    assert float((sizes.shrunk(large) - sizes.shrunk(small)).abs().mean()) < 0.02

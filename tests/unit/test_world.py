"""The shapes world: deterministic, truthful about its pixels, and described in words that can be read back."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from rudder.demo import draw, tokenizer, words, world
from rudder.demo.data import cells

COLOR = np.array(list(world.COLORS.values()), float)


def scenes(n: int = 40, seed: int = 0, **fixed):
    return world.sample(np.random.default_rng(seed), n, **fixed)


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    a, b, c = scenes(seed=1), scenes(seed=1), scenes(seed=2)
    for f in fields(a):
        assert np.array_equal(getattr(a, f.name), getattr(b, f.name))
    assert np.array_equal(draw.render(a)[0], draw.render(b)[0])
    assert not np.array_equal(draw.render(a)[0], draw.render(c)[0])
    assert words.captions(np.random.default_rng(3), a) == words.captions(np.random.default_rng(3), b)


def test_drawing_many_equals_drawing_one_by_one():
    s = scenes(24, pairs=0.5)
    images, masks = draw.render(s, chunk=7)
    for i in range(len(s)):
        image, mask = draw.render(s[i:i + 1])
        assert np.array_equal(image[0], images[i])
        assert np.array_equal(mask[0], masks[i])


def test_frequencies_are_a_distribution_with_every_tier_for_every_shape():
    p = world.frequencies()
    assert p.sum() == pytest.approx(1) and (p >= 0).all()
    assert p.shape == (len(world.SHAPES), len(world.ATTRIBUTES))
    for shape in world.SHAPES:
        tiers = [world.tier(shape, a) for a in world.ATTRIBUTES[1:]]
        assert {"common", "ordinary", "rare", "never"} == set(tiers)
    rare = [p[world.SHAPES.index(q.shape), world.ATTRIBUTES.index(q.attribute)] for q in words.prompts("rare")]
    assert np.allclose(rare, 0.001, rtol=0.1)
    assert world.frequency_markdown().count("never") == len(words.prompts("never"))


def test_samples_follow_the_table_and_never_break_it():
    s, p = scenes(40000), world.frequencies()
    drawn, shapes = np.zeros_like(p), s.shape < len(world.SHAPES)
    np.add.at(drawn, (s.shape[shapes], s.attribute[shapes]), 1)
    assert (drawn[p == 0] == 0).all()
    assert np.abs(drawn / drawn.sum() - p).max() < 0.003
    assert abs(1 - shapes.mean() - world.GLYPH) < 0.005


def test_a_texture_and_a_relation_are_rare_with_each_shape():
    s = scenes(60000)
    for i, shape in enumerate(world.SHAPES):
        texture = s.texture[s.shape == i] == world.TEXTURES.index(world.RARE_TEXTURE[shape])
        relation = s.relation[s.shape[:, 0] == i] == world.RELATIONS.index(world.RARE_RELATION[shape])
        assert 0.003 < texture.mean() < 0.02 and 0.02 < relation.mean() < 0.04


def test_individuals_are_plain_and_alike_wherever_they_are_and_strangers_never_shown():
    s = scenes(20000)
    glyph = s.shape >= len(world.SHAPES)
    assert (s.attribute[glyph] == 0).all() and (s.texture[glyph] == 0).all()
    assert s.shape.max() < len(world.SHAPES) + len(world.NAMED)
    cells = draw.glyphs()
    assert len(cells) == len(world.INDIVIDUALS) >= 24 and (cells == cells[:, :, ::-1]).all()
    apart = (cells[:, None] != cells[None]).sum((2, 3)) + 99 * np.eye(len(cells))
    assert apart.min() >= 8
    for i in (0, len(world.INDIVIDUALS) - 1):  # a stranger can be drawn on demand
        _, masks = draw.render(scenes(6, shape=len(world.SHAPES) + i, attribute=0, count=1, size=1))
        area = masks[:, 0].sum((1, 2))
        assert area.std() < 0.15 * area.mean()


def test_masks_say_where_the_objects_are_and_pixels_have_their_colour():
    s = scenes(60, pairs=0.5)
    images, masks = draw.render(s)
    background = np.array(list(world.BACKGROUNDS.values()))[s.background]
    for i in range(len(s)):
        empty = masks[i].sum(0) == 0
        assert (images[i][empty] == background[i]).all()
        for j in range(s.count[i]):
            ink = images[i][masks[i, j] > 0.999].astype(float)
            assert len(ink) > 5, "an object must be visible"
            full = COLOR[s.color[i, j]]
            along = ink @ full / (full @ full)  # the texture darkens the colour, down to half
            assert np.abs(ink - along[:, None] * full).max() < 2
            assert along.min() > 0.49 and along.max() < 1.01
            if world.TEXTURES[s.texture[i, j]] == "plain":
                assert along.min() > 0.99
        assert (masks[i, s.count[i]:] == 0).all()


def test_relations_hold_in_the_pixels():
    s = scenes(40, seed=5, count=2)
    _, masks = draw.render(s)
    rows, cols = np.mgrid[:world.SIZE, :world.SIZE]
    for i, m in enumerate(masks):
        (y0, x0), (y1, x1) = ((np.average(rows, weights=k), np.average(cols, weights=k)) for k in m)
        assert (x0 < x1, x0 > x1, y0 < y1, y0 > y1)[s.relation[i]]


def test_sizes_differ_and_every_attribute_changes_the_picture():
    for a in range(1, len(world.ATTRIBUTES)):
        for shape in range(len(world.SHAPES)):
            same = {"count": 1, "shape": shape, "size": 1}
            plain, made = (draw.render(scenes(1, attribute=k, **same))[1][0, 0] for k in (0, a))
            assert np.abs(plain - made).sum() > 0.12 * plain.sum(), (world.ATTRIBUTES[a], world.SHAPES[shape])
    small, large = (draw.render(scenes(8, count=1, attribute=0, size=k))[1].sum() for k in (0, 1))
    assert large > 2 * small


def test_captions_read_back_to_what_was_drawn():
    s = scenes(300, pairs=0.5)
    for i, text in enumerate(words.captions(np.random.default_rng(0), s, slip=0)):
        said = words.parse(text)
        assert len(said["objects"]) == s.count[i]
        if s.count[i] == 2:
            assert said["relation"] == world.RELATIONS[s.relation[i]]
        if "background" in said:
            assert said["background"] == list(world.BACKGROUNDS)[s.background[i]]
        for j, o in enumerate(said["objects"]):
            truth = {"shape": world.NOUNS[s.shape[i, j]], "color": list(world.COLORS)[s.color[i, j]],
                     "texture": world.TEXTURES[s.texture[i, j]], "attribute": world.ATTRIBUTES[s.attribute[i, j]],
                     "size": world.SIZES[s.size[i, j]]}
            general = (*world.SUPERCLASS, words.GLYPH)
            assert all(truth[k] == w or (k == "shape" and w in general) for k, w in o.items()), text


def test_captions_slip_as_often_as_the_world_says():
    s = scenes(30000, count=1)
    said = [words.parse(t)["objects"][0] for t in words.captions(np.random.default_rng(1), s)]
    wrong = [o.get("attribute", "none") not in ("none", world.ATTRIBUTES[a]) for o, a in zip(said, s.attribute[:, 0])]
    words_of_it = len(world.ATTRIBUTES) - 1
    right = (s.attribute[:, 0] > 0).mean() / words_of_it  # a slip can hit the true word
    assert abs(np.mean(wrong) - world.SLIP * words_of_it * (1 - right)) < 0.01


def test_what_the_world_does_not_know_is_named():
    with pytest.raises(ValueError, match="hairy frog"):
        words.parse("a hairy frog")
    with pytest.raises(ValueError, match="plaid"):
        words.parse("a red circle on a plaid background")


def test_an_anchor_keeps_the_attribute_and_generalises_the_noun():
    for p in words.prompts("rare", "never"):
        assert p.anchor == p.text.replace(p.shape, world.SUPERCLASS[0])
    assert words.Prompt("a spiky crescent", "a spiky shape", "crescent", "spiky", "rare") in words.prompts("rare")


def test_the_committed_tokenizer_is_the_one_the_code_writes(tmp_path):
    tokenizer.write(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text() == (tokenizer.FOLDER / file.name).read_text()


def test_every_word_of_the_world_is_one_token():
    rank = {pair: i for i, pair in enumerate(tokenizer.merges())}
    for word in words.VOCABULARY:
        assert tokenizer.pieces(word, rank) == [word + "</w>"]
    assert len(tokenizer.pieces("frog", rank)) > 1


def test_cells_name_what_is_there():
    s = world.sample(np.random.default_rng(3), 60, pairs=0.5)
    _, masks = draw.render(s)
    truth = cells(s)
    assert truth.shape == (60, 3, 8, 8) and (truth[:, 0, 0, 0] == -1).all()  # objects stay away from the corners
    for i in range(60):
        there = {tuple(t) for t in truth[i].reshape(3, -1).T if t[0] >= 0}
        assert there == {(s.shape[i, j], s.attribute[i, j], s.texture[i, j]) for j in range(s.count[i])}
    covered = masks.max(1).reshape(60, 8, 8, 8, 8).mean((2, 4)) > 0.5  # cells that objects fill by half or more
    assert (truth[:, 0] >= 0)[covered].mean() > 0.85

"""RareShapes: the prompt list is fixed, balanced, readable, and says what it claims about frequencies."""

from __future__ import annotations

from collections import Counter

import pytest

from rudder.bench import rareshapes
from rudder.demo import words, world

#: The list as it was fixed before any method was compared on it. A change makes older tables incomparable and, once a
#: comparison has been seen, may tune the list to it: do not update this line to make a test pass.
DIGEST = "6996dd9821f391eb"

ALL = rareshapes.everything()


def each(*categories: str) -> list[rareshapes.RarePrompt]:
    return [p for p in ALL if p.category in categories]


def changed(a: str, b: str) -> list[tuple[str, str]]:
    """The words that differ between two texts of equally many words ('a' and 'an' are the same)."""
    a, b = ([w if w != "an" else "a" for w in t.split()] for t in (a, b))
    assert len(a) == len(b)
    return [(x, y) for x, y in zip(a, b) if x != y]


def test_nobody_changed_the_list():
    assert rareshapes.digest() == DIGEST


def test_every_prompt_reads_back_in_the_words_of_the_world():
    for p in ALL:
        assert p.truth == words.parse(p.text)
        objects = [words.phrase(**o) for o in p.truth["objects"]]
        assert f" {p.truth.get('relation')} ".join(objects) == p.text
        assert set(p.success) <= {*p.truth["objects"][0], *p.truth}, p.text
        for text in (v for k, v in p.anchors.items() if k != "random"):
            words.parse(text)


@pytest.mark.parametrize("category", rareshapes.CATEGORIES + rareshapes.CONTROLS)
def test_halves_are_equal_and_split_by_pair_not_by_colour(category):
    dev, final = (rareshapes.prompts(category, split) for split in rareshapes.SPLITS)
    assert len(dev) == len(final) >= 32
    shared = {p.pair for p in dev} & {p.pair for p in final}
    assert shared == ({"spiky heart"} if category == "frequent" else set())
    for half in (dev, final):
        assert len({p.text for p in half}) == len(half)
        assert set(Counter(p.truth["objects"][0]["color"] for p in half).values()) == {len(half) // 8}
        assert len(set(Counter(p.pair for p in half).values())) == 1
        pairs = len({p.pair for p in half})
        assert len({p.pair for p in half[:pairs]}) == pairs, "the first round shows every pair"
        first = Counter(p.truth["objects"][0]["color"] for p in half[:8])
        assert max(first.values()) <= 2, "and several colours"


def test_pairs_are_as_rare_as_their_category_says():
    for p in ALL:
        first = p.truth["objects"][0]
        if "attribute" in p.success:
            tier = {"property": "rare", "two-object": "rare", "frequent": "common"}.get(p.category, p.category)
            assert world.tier(first["shape"], first["attribute"]) == tier
        if "texture" in p.success:
            assert (world.RARE_TEXTURE[first["shape"]] == first["texture"]) == (p.category == "texture")
        if "relation" in p.success:
            rare = world.RARE_RELATION[first["shape"]] == p.truth["relation"]
            assert rare == (p.category == "relation")
    rare = {p.pair for p in each("property")}
    assert rare == {f"{a} {s}" for s in world.SHAPES for a in rareshapes.attributes(s, "rare")}
    assert {p.pair for p in each("two-object")} == rare


def test_both_halves_hold_every_texture_relation_and_shape():
    for split in rareshapes.SPLITS:
        assert {p.truth["objects"][0]["texture"] for p in rareshapes.prompts("texture", split)} == {"striped", "dotted"}
        assert {p.truth["relation"] for p in rareshapes.prompts("relation", split)} == set(world.RELATIONS)
        for category in ("property", "frequent"):
            assert {p.truth["objects"][0]["shape"] for p in rareshapes.prompts(category, split)} == set(world.SHAPES)


def test_the_control_says_the_same_attributes_as_the_rare_prompts():
    for split in rareshapes.SPLITS:
        rare, common = (Counter(p.truth["objects"][0]["attribute"] for p in rareshapes.prompts(c, split))
                        for c in ("property", "frequent"))
        assert rare == common


def test_second_objects_are_plain_and_differ():
    for p in each("relation", "two-object", "usual relation"):
        first, second = p.truth["objects"]
        assert set(second) == {"color", "shape"}
        assert first["shape"] != second["shape"] and first["color"] != second["color"]


def test_anchors_change_exactly_what_their_strategy_says():
    usual = {"attribute": lambda s, w: world.tier(s, w) == "common", "texture": lambda s, w: world.RARE_TEXTURE[s] != w}
    for p in ALL:
        assert set(p.anchors) == set(rareshapes.STRATEGIES) and p.text not in p.anchors.values()
        noun = p.truth["objects"][0]["shape"]
        assert changed(p.text, p.anchors["superclass"]) == [(noun, "shape")]
        [(old, other)] = changed(p.text, p.anchors["noun"])
        said = words.parse(p.anchors["noun"])
        assert old == noun and said.get("relation") == p.truth.get("relation")
        for group, fits in usual.items():
            if group in said["objects"][0]:
                assert fits(other, said["objects"][0][group]), p
        if p.category in ("relation", "usual relation"):
            assert world.RARE_RELATION[other] != p.truth["relation"]
        harmful = words.parse(p.anchors["harmful"])
        assert harmful["objects"][0]["shape"] == noun and harmful["objects"][1:] == p.truth["objects"][1:]
        assert p.anchors["random"] in rareshapes.CONTENT and p.anchors["random"] not in p.text.split()


def test_harmful_anchors_say_what_is_common_for_the_noun():
    for p in each("property", "never", "texture", "relation", "two-object"):
        first = words.parse(p.anchors["harmful"])["objects"][0]
        if p.category == "texture":
            assert first["texture"] != world.RARE_TEXTURE[first["shape"]]
        elif p.category == "relation":
            assert words.parse(p.anchors["harmful"])["relation"] != world.RARE_RELATION[first["shape"]]
        else:
            assert world.tier(first["shape"], first["attribute"]) == "common"


def test_unknown_names_are_explained():
    with pytest.raises(ValueError, match="categories are"):
        rareshapes.prompts("properties", "dev")
    with pytest.raises(ValueError, match="halves"):
        rareshapes.prompts("property", "test")

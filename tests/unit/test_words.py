"""Words and tokens: alignment, occurrences, and what the report says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.attention.edit_prompts import EditPrompts
from rudder.attention.words import Tokens, align, matched, runs

prompts = st.lists(st.sampled_from("a red blue cat dog on the mat".split()), max_size=7)


def tokens(text: str, length: int = 12, pieces: int = 2) -> Tokens:
    """A prompt in a toy encoder: start, one token a word (``pieces`` for words of more than four letters), padding."""
    words = tuple(text.split())
    keys = [(0, "start", 0), *(i for i, word in enumerate(words) for _ in range(pieces if len(word) > 4 else 1))]
    return Tokens("CLIP", words, (*keys, *((0, "end", i) for i in range(length - len(keys)))))


def edit(*texts: str, **options) -> EditPrompts:
    return EditPrompts(texts, tuple((tokens(text, **options),) for text in texts))


@given(prompts, prompts)
def test_an_alignment_is_in_order_and_complete(source, target):
    pairs = align(source, target)
    assert [i for i, _ in pairs if i is not None] == list(range(len(source)))
    assert [j for _, j in pairs if j is not None] == list(range(len(target)))
    assert all(source[i] == target[j] for i, j in pairs if i is not None and j is not None)


@given(prompts, prompts)
def test_it_keeps_the_longest_common_subsequence(source, target):
    length = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            length[i + 1][j + 1] = max(length[i][j] + 1 if a == b else 0, length[i][j + 1], length[i + 1][j])
    kept = sum(i is not None and j is not None for i, j in align(source, target))
    assert kept == length[-1][-1] == sum(i is not None and j is not None for i, j in align(target, source))


@given(prompts)
def test_equal_prompts_align_word_by_word(source):
    assert align(source, source) == [(i, i) for i in range(len(source))]


@given(st.permutations(list("abcdef")))
def test_a_reordered_prompt_matches_every_word(target):
    source = list("abcdef")
    assert all(source[i] == target[j] for i, j in matched(source, target)) and len(matched(source, target)) == 6


def test_runs_tell_exchanged_added_and_dropped_words():
    pairs = align("a red cat on the mat".split(), "a blue cat on mat now".split())
    assert [(old, new) for old, new, _ in runs(pairs) if old or new] == [([1], [1]), ([4], []), ([], [5])]


@pytest.mark.parametrize("phrase, words", [
    ("cat", [1, 4]), ("CAT", [1, 4]), ("sunglasses", [5, 6]), ("cat sun", [4, 5]), ("at", []), ("", []), ("dog", []),
])
def test_a_phrase_is_found_across_word_borders(phrase, words):
    assert Tokens("CLIP", ("a", "cat", "and", "a", "Cat", "sun", "glasses"), ()).find(phrase) == words


def test_positions_count_through_the_encoders():
    text = "a striped cat"
    prompts = EditPrompts((text,), ((tokens(text), tokens(text, length=9)),))
    assert prompts.positions(0, "striped") == [2, 3, 14, 15] and prompts.length(0) == 21


def test_changed_words_and_the_report():
    prompts = edit("a red cat on the mat", "a blue cat on the mat", "a fluffy red cat", "a red cat on the mat")
    assert prompts.changed(1) == ([2], [2]) and prompts.changed(3) == ([], [])
    assert prompts.changed(2) == ([4, 5, 6], [2, 3])
    said = prompts.report().splitlines()
    assert said[2] == "  CLIP: a [red > blue] cat on the mat"
    assert said[4] == "  CLIP: a [+ fluffy (2 tokens)] red cat [- on the mat]"
    assert said[6] == "  CLIP: a red cat on the mat"
    assert "not known" in EditPrompts(("a", "b"), ((), ())).report()


@pytest.mark.parametrize("phrase", ["ca", "sung"])
def test_a_piece_of_a_word_is_no_word(phrase):
    assert Tokens("CLIP", ("a", "cat", "and", "a", "Cat", "sun", "glasses"), ()).find(phrase) == []


def test_prompts_repeat_only_where_all_of_them_agree():
    same, other = torch.ones(2, 3, 4), torch.arange(24.0).reshape(2, 3, 4)
    assert not EditPrompts(("a", "a"), ((), ()), (same, other)).repeats(1)

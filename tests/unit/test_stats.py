"""Intervals: known coverage on clustered draws, pairing, and the edge cases of a table."""

from __future__ import annotations

import numpy as np
import pytest

from rudder.bench.stats import Interval, difference, mean_interval, share_interval


def clustered(rng: np.random.Generator, prompts: int, seeds: int, mean: float = 0.5, spread: float = 0.2):
    """Right or wrong of every picture, where each prompt has its own chance; mean is the truth."""
    chance = np.clip(rng.normal(mean, spread, prompts), 0, 1)
    return (rng.random((prompts, seeds)) < chance[:, None]).astype(float).ravel(), np.repeat(np.arange(prompts), seeds)


def coverage(runs: int, interval, prompts: int = 40, seeds: int = 8) -> float:
    """How often the truth 0.5 lies in the interval of fresh draws."""
    rng = np.random.default_rng(1)
    return float(np.mean([not interval(*clustered(rng, prompts, seeds), rng).apart(0.5) for _ in range(runs)]))


def test_intervals_of_clustered_draws_hold_the_truth_as_often_as_they_say():
    assert 0.92 <= coverage(300, lambda v, c, rng: mean_interval(v, c, rng, resamples=300)) <= 0.99


@pytest.mark.parametrize("prompts, seeds", [(4, 128), (8, 64), (12, 1), (19, 8)])
def test_intervals_of_few_clusters_hold_it_as_often(prompts, seeds):
    """Percentiles of 4 clusters would in 85 of 100 draws."""
    assert 0.92 <= coverage(400, mean_interval, prompts, seeds) <= 0.99


def test_few_values_have_the_interval_of_a_textbook():
    values = np.random.default_rng(2).normal(3.0, 2.0, 12)
    found = mean_interval(values, range(12), np.random.default_rng(3))
    reach = 2.201 * values.std(ddof=1) / 12**0.5  # t of 11 degrees of freedom
    assert (found.low, found.high) == pytest.approx((values.mean() - reach, values.mean() + reach), rel=1e-4)


def test_ignoring_the_clusters_would_promise_too_much():
    assert coverage(300, lambda v, c, rng: mean_interval(v, range(len(v)), rng, resamples=300)) < 0.9


def test_a_sample_of_independent_values_has_the_textbook_interval():
    values = np.random.default_rng(2).normal(3.0, 2.0, 400)
    found = mean_interval(values, range(400), np.random.default_rng(3), resamples=4000)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)


def test_pairing_removes_what_the_pictures_share():
    rng = np.random.default_rng(4)
    hard, clusters = clustered(rng, 32, 16, spread=0.4)
    better = np.where(rng.random(len(hard)) < 0.1, 1.0, hard)  # a method that rescues some of the same pictures
    paired = difference(better, hard, clusters, rng)
    alone = mean_interval(better, clusters, rng)
    assert paired.value == pytest.approx((better - hard).mean()) and paired.apart() and paired.low > 0
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_the_same_generator_gives_the_same_interval_and_chunks_do_not_matter(monkeypatch):
    values, clusters = clustered(np.random.default_rng(5), 40, 5)
    a, b = (mean_interval(values, clusters, np.random.default_rng(6)) for _ in range(2))
    assert a == b
    monkeypatch.setattr("rudder.bench.stats.CHUNK", 100)
    small = mean_interval(values, clusters, np.random.default_rng(6))
    assert small.low == pytest.approx(a.low, abs=0.02) and small.value == a.value


@pytest.mark.parametrize("more", [0, 20])
def test_clusters_may_be_words_and_unequal_and_values_missing(more):
    values, words = [1, 1, 1, 0, float("nan"), 0], ["a", "a", "a", "b", "b", "c"]
    values, words = values + [0.6] * more, words + list("defghijklmnopqrstuvw"[:more])
    found = mean_interval(values, words, np.random.default_rng(0))
    assert found.value == pytest.approx(3 / 5) and found.low < 3 / 5 < found.high


def test_one_cluster_says_nothing_of_others():
    found = mean_interval([2.0, 2.5], ["a", "a"], np.random.default_rng(0))
    assert (found.value, found.low, found.high) == (2.25, -np.inf, np.inf) and not found.apart()
    assert f"{found:.2f}" == "2.25"
    assert share_interval([1.0, 0.0], ["a", "a"], np.random.default_rng(0)) == Interval(0.5, 0.0, 1.0)


@pytest.mark.parametrize("values, clusters, why", [([], [], "no value"), ([1, 2], [1], "equally long"),
                                                   ([float("nan")], [1], "no value")])
def test_what_has_no_mean_is_an_error(values, clusters, why):
    with pytest.raises(ValueError, match=why):
        mean_interval(values, clusters, np.random.default_rng(0))


def test_an_interval_formats_and_scales():
    assert format(Interval(0.5, 0.25, 0.75) * 100, ".1f") == "50.0 (25.0 .. 75.0)"
    assert Interval(1.0, 0.0, 2.0) * -1 == Interval(-1.0, -2.0, 0.0)


def test_marks_that_all_agree_still_have_a_width():
    """22 of 22 right says no more than 85 % (the textbook's exact interval)."""
    rng = np.random.default_rng(7)
    every = share_interval([1.0] * 22, range(22), rng)
    assert (every.value, every.high) == (1.0, 1.0) and every.low == pytest.approx(0.8456, abs=1e-4)
    none = share_interval([0.0] * 22, range(22), rng)
    assert (none.value, none.low) == (0.0, 0.0) and none.high == pytest.approx(0.1544, abs=1e-4)
    assert share_interval([1.0] * 22, [0, 1] * 11, rng).low < every.low, "two prompts say less than 22"
    alike = share_interval([1.0, 0.0, 0.0, 0.0, 0.0] * 3, [0] * 5 + [1] * 5 + [2] * 5, rng)
    assert alike.low == 0.0 and alike.high > 0.8, "three prompts that agree, but for rounding"
    mixed = [1.0, 0.0] * 11
    assert share_interval(mixed, range(22), np.random.default_rng(8)) == mean_interval(
        mixed, range(22), np.random.default_rng(8))


def test_marks_that_never_differ_leave_room_for_pictures_that_were_not_painted():
    rng, ones, none = np.random.default_rng(9), [1.0] * 22, [0.0] * 22
    same, worse = (difference(marks, ones, range(22), rng) for marks in (ones, none))
    assert same.value == 0 and same.high == -same.low == pytest.approx(0.1544, abs=1e-4)
    assert (worse.value, worse.low) == (-1.0, -1.0) and worse.high == pytest.approx(-0.8456, abs=1e-4)
    further = difference([2.5] * 22, [2.0] * 22, range(22), rng)  # no marks
    assert (further.low, further.high) == (0.5, 0.5)

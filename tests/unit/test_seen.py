"""What the table `guidance` concludes from numbers: differences, fronts, verdicts; on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from rudder.bench import seen
from rudder.bench.stats import Interval, jackknife

PROMPTS = [f"prompt {k}" for k in range(16)] * 4


def made(right=0.5, saturation=0.2, spread=1.0, seed=0, evaluations=50.0, each=()) -> seen.Seen:
    """64 pictures of 16 prompts; those of one seed share their luck, as pictures of the same prompts and seeds do."""
    rng = np.random.default_rng(seed)
    luck, noise, shade = rng.random(64), rng.standard_normal((64, 5)), rng.standard_normal(64)
    features = np.array([int(p.split()[1]) % 7 for p in PROMPTS])[:, None] + spread * noise
    distance = np.linspace(1, 1.7, 8) * (1 + saturation)
    return seen.Seen(PROMPTS, (luck < right).astype(float), saturation + 0.01 * shade,
                     seen.diversities(features, PROMPTS), np.array([distance.mean(), *distance]),
                     evaluations, 1.0, each)


def test_differences_are_of_the_same_pictures():
    a, b = made(right=0.6), made(right=0.5)
    gain, alone = seen.more_right(a, b), seen.accuracy(a)
    assert gain.value == pytest.approx(a.accuracy - b.accuracy) and gain.value > 0
    assert gain.high - gain.low < alone.high - alone.low  # what they share cancels
    same = seen.more_right(a, a)
    assert same.value == 0 and -same.low == same.high < 25, "16 prompts tell no less"


def test_nearer_to_the_data_is_so_from_above_and_from_below():
    true = dict.fromkeys(PROMPTS, 0.2)
    burnt, pale, good = made(saturation=0.3), made(saturation=0.1), made(saturation=0.21)
    for worse in (burnt, pale):
        gain = seen.nearer(good, worse, true)
        assert gain.value == pytest.approx(0.09, abs=0.005) and gain.low > 0.05
    assert not seen.nearer(burnt, pale, true).low > 0.02  # as far above as below


def test_diversity_is_within_prompts():
    wide, narrow = made(spread=1.0), made(spread=0.5)
    assert len(wide.diversity) == 16 and wide.variety == pytest.approx(2 * narrow.variety)
    assert seen.more_diverse(wide, narrow).low > 0
    alone = seen.diversities(np.ones((16, 5)), PROMPTS[:16])
    single = seen.Seen(PROMPTS[:16], wide.right[:16], wide.saturation[:16], alone, wide.frechet)
    assert seen.diversity(single) is None and np.isnan(single.variety) and seen.more_diverse(single, single) is None


def test_savings_are_counted_picture_by_picture():
    plain, adaptive = made(), made(each=[30.0, 40.0] * 32, evaluations=35.0)
    gain = seen.saved(adaptive, plain)
    assert gain.value == pytest.approx(30) and 20 < gain.low < 30 < gain.high < 40
    assert seen.saved(made(evaluations=25.0), plain).value == 50  # as the batch counts, where pictures do not


def test_frechet_distances_leave_prompts_out_of_both_sets():
    rng = np.random.default_rng(0)
    truth, mine = rng.standard_normal((320, 3)), rng.standard_normal((64, 3)) + [1.0, 0, 0]
    found = seen.frechets(mine, PROMPTS, truth, PROMPTS[:16] * 20)
    assert len(found) == 1 + seen.GROUPS and found[0] == pytest.approx(1, abs=0.5)
    interval = seen.frechet(seen.Seen(PROMPTS, found, found, found, found))
    assert interval.low < 1.1 and interval.high > 0.9 and interval.value == found[0]


def test_the_jackknife_of_a_mean_is_the_usual_interval():
    values = np.random.default_rng(1).standard_normal(24)
    without = [np.delete(values, k).mean() for k in range(24)]
    error = values.std(ddof=1) / 24**0.5
    found = jackknife(values.mean(), without)
    assert found.high - found.value == pytest.approx(2.0687 * error, rel=1e-3)  # Student's t, 23 degrees


@pytest.mark.parametrize(("effect", "least", "accuracy", "wanted"), [
    ((0.1, 0.2), 0, (-1, 2), "confirmed"),
    ((-0.1, 0.2), 0, (-1, 2), "undecided"),
    ((-0.2, -0.1), 0, (-1, 2), "REFUTED"),
    ((0.1, 0.2), 0, (-9, 2), "undecided"),  # perhaps not at equal accuracy
    ((0.1, 0.2), 0, (-9, -4), "REFUTED"),  # certainly not
    ((26, 30), 25, (-1, 2), "confirmed"),
    ((20, 30), 25, (-1, 2), "undecided"),
    ((10, 20), 25, (-1, 2), "REFUTED"),
    ((0, 0), 0, (0, 0), "REFUTED"),  # the method does nothing
])  # fmt: skip
def test_a_verdict_needs_its_intervals(effect, least, accuracy, wanted):
    (low, high), (worst, best) = effect, accuracy
    assert seen.verdict(Interval((low + high) / 2, low, high), least, Interval(0.0, worst, best)) == wanted


def test_the_front_is_what_nothing_beats():
    points = {("a", 1): (1, 5), ("a", 2): (3, 3), ("b", 1): (3, 2), ("c", 1): (5, 1), ("c", 2): (0, 0),
              ("d", 1): (0, 1)}
    assert seen.front(points) == [("a", 1), ("a", 2), ("c", 1)]
    where = seen.standings(points, lambda p, q: q[0] == "d")
    assert where == {"a": "1, 2", "b": "near", "c": "1", "d": "behind"}
    assert seen.told(where) == "on the front: a (cfg 1, 2); c (cfg 1). Not told apart from it: b. Surely behind it: d."

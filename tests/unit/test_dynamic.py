"""Dynamic CFG: each picture takes the weight that scores best, from the predictions it has."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given

from rudder.guidance.apg import APG
from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.dynamic import DynamicCFG
from rudder.guidance.scorers import Overshoot, spread
from rudder.guidance.space import norm

from .tensors import at, predictions, run_step, setup, weights

close = torch.testing.assert_close


def dynamic(score: Callable, *candidates: float, **options) -> DynamicCFG:
    return DynamicCFG(weights=candidates, scorer=score, **options)


def nearest(target: torch.Tensor) -> Callable:
    return lambda x0, step: -norm(x0 - target)


@given(predictions(3), weights)
def test_one_weight_is_cfg_with_it(tensors, weight):
    x, cond, uncond = tensors
    run = run_step(at(x, weight=7.0), Predictions(cond, uncond), dynamic(nearest(x), weight))
    close(run, cfg(cond, uncond, weight), rtol=1e-5, atol=1e-5)


@given(predictions(3))
def test_the_best_weight_is_taken_for_each_picture(tensors):
    x, cond, uncond = tensors
    best = torch.tensor([(1.0, 3.0, 7.5)[i % 3] for i in range(len(x))], dtype=x.dtype)
    target = torch.stack([cfg(c, u, w) for c, u, w in zip(cond, uncond, best)])
    now = at(x, weight=5.0)
    run = run_step(now, Predictions(cond, uncond), dynamic(nearest(target), 15.0, 1.0, 3.0, 7.5, 11.0))
    close(run, target, rtol=1e-5, atol=1e-5)
    assert now.record["chosen_weight"].tolist() == best.tolist()


@given(predictions(3))
def test_a_tie_goes_to_the_weight_nearest_to_the_samplers(tensors):
    x, cond, uncond = tensors
    for order in ((1.0, 3.0, 9.0, 15.0), (15.0, 9.0, 3.0, 1.0)):
        now = at(x, weight=6.0)
        run_step(now, Predictions(cond, uncond), dynamic(lambda x0, step: torch.zeros(len(x0)), *order))
        assert now.record["chosen_weight"].tolist() == [3.0] * len(x)


@given(predictions(3))
def test_a_batch_is_so_many_single_runs(tensors):
    x, cond, uncond = tensors
    method = dynamic(Overshoot(1.2), 1.0, 2.0, 4.0, 8.0)
    rows = [run_step(at(x[i:i + 1]), Predictions(cond[i:i + 1], uncond[i:i + 1]), method) for i in range(len(x))]
    close(run_step(at(x), Predictions(cond, uncond), method), torch.cat(rows))


def test_the_candidates_are_what_would_be_used():
    """The push after APG, which limits its length: so no candidate is longer than the limit allows."""
    x, cond, uncond = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)
    seen = []

    def score(x0, step):
        seen.append(x0)
        return torch.zeros(len(x0))

    apg = APG(eta=0.0, threshold=0.01, momentum=0.0)
    run_step(at(x, weight=5.0), Predictions(cond, uncond), dynamic(score, 5.0, 9.0), apg)
    alone = run_step(at(x, weight=5.0), Predictions(cond, uncond), apg)
    close(seen[0], alone)
    close(seen[1] - cond, 2 * (alone - cond))


def test_it_rests_where_guidance_is_off():
    x, cond = torch.randn(2, 1, 4, 2, 2)
    never = dynamic(lambda x0, step: pytest.fail("asked without guidance"), 3.0)
    assert torch.equal(run_step(at(x, weight=1.0), Predictions(cond, None), never), cond)
    assert torch.equal(never.direction(at(x, weight=1.0), cond), cond)


# ---------------------------------------------------------------- the scorer without a model


@given(predictions(3))
def test_the_strongest_weight_within_the_limit(tensors):
    x, cond, uncond = tensors
    candidates, limit = (1.0, 2.0, 5.0, 12.0), 1.3
    now = at(x, weight=5.0)
    run_step(now, Predictions(cond, uncond), dynamic(Overshoot(limit), *candidates))
    for i, chosen in enumerate(now.record["chosen_weight"].tolist()):
        ratios = {w: float(spread(cfg(cond, uncond, w)[i:i + 1]) / spread(cond[i:i + 1]).clamp_min(1e-12))
                  for w in candidates}
        if any(abs(r - limit) < 1e-4 for r in ratios.values()) or norm(cond - uncond)[i] < 1e-3 or cond[i].numel() == 1:
            continue  # on the edge, or all the same
        assert chosen == max(w for w in candidates if ratios[w] <= limit)  # weight 1 always is


def test_away_from_the_prompt_is_no_push_to_it():
    x, cond = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])
    now = at(x, weight=5.0)
    run_step(now, Predictions(cond, 0.9 * cond), dynamic(Overshoot(1.1), 0.0, 1.0, 30.0))
    assert now.record["chosen_weight"].tolist() == [1.0]


def test_where_all_go_too_far_the_calmest_is_taken():
    x, cond = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]])
    now = at(x, weight=5.0)
    run_step(now, Predictions(cond, -cond), dynamic(Overshoot(1.1), 9.0, 4.0, 6.0))
    assert now.record["chosen_weight"].tolist() == [4.0]


def test_bad_input():
    for wrong in ((), (1.0, math.nan)):
        with pytest.raises(GuidanceError, match="weights must be finite numbers, such as 1, 3, 7.5, 11, 15"):
            DynamicCFG(weights=wrong, scorer=Overshoot())
    with pytest.raises(GuidanceError, match="limit is 0; it must be above 0"):
        Overshoot(0.0)
    with pytest.raises(GuidanceError, match=r"\(dynamic\).*above 1.*no push to scale"):
        dynamic(Overshoot(), 3.0).check(setup(cfg=1.0))
    x = torch.randn(2, 4, 2, 2)
    bad = (torch.tensor([1.0, math.nan]), "NaN"), (torch.zeros(()), "shape"), (torch.zeros(2, 1), "shape")
    for value, says in bad:
        with pytest.raises(GuidanceError, match=f"scorer function gave .*{says}.*for 2 pictures"):
            run_step(at(x), Predictions(x, -x), dynamic(lambda x0, step, value=value: value, 3.0))


def test_the_spread_is_about_the_mean():
    x0 = torch.randn(3, 4, 2, 5) + 2.0
    close(spread(x0), x0.flatten(1).std(1, unbiased=False))


def test_a_scorer_that_likes_none_leaves_the_weight_nearest_to_the_samplers():
    x = torch.randn(2, 4, 2, 2)
    method = DynamicCFG(weights=(1.0, 3.0), scorer=lambda x0, step: torch.full((len(x0),), -math.inf))
    now = at(x, weight=7.0)
    run_step(now, Predictions(x + 1, x - 1), method)
    assert now.record["chosen_weight"].tolist() == [3.0, 3.0]

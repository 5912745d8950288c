"""W2SD: the reflected step, its first order, its evaluations, its window."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from rudder.guidance.contract import GuidanceError
from rudder.inversion.solver import euler
from rudder.inversion.w2sd import W2SD, reflected

from .tensors import predictions

close = torch.testing.assert_close
SIGMAS = [8.0, 4.0, 2.0, 1.0, 0.5, 0.0]


def smooth(shift: float):
    return lambda x, sigma: torch.tanh(x / (1 + sigma)) + shift * torch.cos(0.2 * x)


STRONG, WEAK = smooth(0.3), smooth(0.0)


def start(shape=(2, 4, 3, 3)) -> torch.Tensor:
    return 8.0 * torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def counted(predict, log: list):
    def count(x, sigma):
        log.append(sigma)
        return predict(x, sigma)

    return count


@given(predictions(3))
def test_the_reflection_of_constant_predictions_by_hand(tensors):
    x, strong, weak = tensors
    s, to = 2.0, 1.5
    ahead = strong + (to / s) * (x - strong)
    close(reflected(lambda *_: strong, lambda *_: weak, x, s, to), weak + (s / to) * (ahead - weak))
    close(reflected(lambda *_: strong, lambda *_: strong, x, s, to), x)  # a straight path is walked back exactly


def test_a_gap_of_the_weight_alone_is_zigzag_sampling():
    """Z-sampling (arXiv 2412.10891) written from DDIM (2010.02502, Eq. 12) in its own coordinates, where x has unit
    variance and the net answers eps: a step at the strong weight, its inversion at the weak one, the step again."""
    bars = [1 / (1 + sigma**2) for sigma in SIGMAS]  # abar of each level

    def eps(x: torch.Tensor, bar: float, weight: float) -> torch.Tensor:
        cond, uncond = torch.tanh(x + bar), torch.sin(0.5 * x - bar)
        return uncond + weight * (cond - uncond)

    def ddim(x: torch.Tensor, noise: torch.Tensor, bar: float, to: float) -> torch.Tensor:
        clean = (x - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
        return math.sqrt(to) * clean + math.sqrt(1 - to) * noise

    def side(weight: float):  # the same net as ours takes it: x0 from x = x0 + sigma eps
        return lambda x, sigma: x - sigma * eps(x / math.sqrt(1 + sigma**2), 1 / (1 + sigma**2), weight)

    x = start() * math.sqrt(bars[0])
    for bar, to in zip(bars, bars[1:]):
        if to < 1:
            ahead = ddim(x, eps(x, bar, 5.5), bar, to)
            x = ddim(ahead, eps(ahead, to, 1.0), to, bar)
        x = ddim(x, eps(x, bar, 5.5), bar, to)
    close(W2SD().sample(side(5.5), side(1.0), start(), SIGMAS), x)


def test_to_first_order_it_moves_by_the_difference_of_the_slopes():
    """And equal predictions leave x to O(h^2): the rest falls fourfold when the step is halved."""
    x, s = start(), 3.0

    def rest(weak, h: float) -> float:
        slope = (STRONG(x, s) - weak(x, s)) / s  # e_weak - e_strong
        return float((reflected(STRONG, weak, x, s, s - h) - x - h * slope).norm())

    for weak in (WEAK, STRONG):
        assert 3.5 < rest(weak, 0.02) / rest(weak, 0.01) < 4.5


def test_a_reflection_moves_towards_the_strong_prediction():
    x = start()
    step = reflected(STRONG, WEAK, x, 3.0, 2.9) - x
    assert float((step * (STRONG(x, 3.0) - WEAK(x, 3.0))).sum()) > 0


def test_three_predictions_a_reflected_step_one_in_the_last():
    strong, weak = [], []
    W2SD().sample(counted(STRONG, strong), counted(WEAK, weak), start(), SIGMAS)
    assert strong == [8.0, 8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5]
    assert weak == [4.0, 2.0, 1.0, 0.5]


def test_outside_the_window_it_is_euler():
    seen, x = [], start()
    out = W2SD().sample(STRONG, WEAK, x, SIGMAS, lambda sigma: 1.5 < sigma < 5.0, lambda i, x, x0: seen.append((i, x)))
    for i, (s, to) in enumerate(zip(SIGMAS, SIGMAS[1:])):
        x = reflected(STRONG, WEAK, x, s, to) if s in (4.0, 2.0) else x
        close(seen[i][1], x)
        x = euler(x, STRONG(x, s), s, to)
    close(out, x)
    assert [i for i, _ in seen] == list(range(5))


def test_runs_repeat_batches_are_single_runs_and_inputs_stay():
    x = start((3, 2, 2, 3, 3))  # a video
    kept, whole = x.clone(), W2SD().sample(STRONG, WEAK, x, SIGMAS)
    assert torch.equal(x, kept) and torch.equal(W2SD().sample(STRONG, WEAK, x, SIGMAS), whole)
    close(whole, torch.cat([W2SD().sample(STRONG, WEAK, x[i : i + 1], SIGMAS) for i in range(3)]))


def test_a_flow_from_pure_noise_is_walked_back_to_it():
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    assert W2SD().sample(STRONG, WEAK, start() / 8, sigmas).isfinite().all()


def test_bad_input():
    with pytest.raises(GuidanceError, match="start 0.8 and end 0.2"):
        W2SD(start=0.8, end=0.2)
    with pytest.raises(GuidanceError, match="none of the 1 steps is reflected"):
        W2SD().sample(STRONG, WEAK, start(), [1.0, 0.0])
    with pytest.raises(GuidanceError, match="none of the 5 steps is reflected.*Widen the window"):
        W2SD().sample(STRONG, WEAK, start(), SIGMAS, lambda sigma: False)
    for sigmas in ([0.5, 1.0], [1.0, math.inf, 0.0]):
        with pytest.raises(GuidanceError, match="sigmas must fall"):
            W2SD().sample(STRONG, WEAK, start(), sigmas)

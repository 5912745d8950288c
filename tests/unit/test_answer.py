"""ANSWER: the negative that a short chain finds, its degenerate cases, its cap and what it costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rudder.guidance.answer import ANSWER, away, found
from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions, Step
from rudder.guidance.space import Parametrisation, expand, noise_from_x0, norm, shrink, v_from_x0

from .tensors import at, kinds, predictions, run_step, setup, shapes, weights

close = torch.testing.assert_close
chains = st.integers(1, 5)
scales = st.floats(-1.0, 4.0).map(lambda s: round(s, 3))
Denoiser = Callable[[Tensor, float], Tensor]


def asking(step: Step, **roles: Denoiser) -> tuple[Step, list]:
    """``step`` with an ``evaluate`` that is the given denoisers, and the list of what it was asked."""
    asked = []

    def evaluate(x, sigma, *names):
        asked.append((round(sigma, 6), names))
        return [roles[name](x, sigma) for name in names]

    step.evaluate = evaluate
    return step, asked


def curved(seed: int) -> Denoiser:
    """A denoiser whose paths bend, the same for every sample."""
    a, b = (0.5 + torch.rand(2, generator=torch.Generator().manual_seed(seed))).tolist()
    return lambda x, sigma: a * torch.tanh(x * b) + sigma * torch.sin(x + seed)


def run(x: Tensor, method: ANSWER, cond: Denoiser, uncond: Denoiser, **options) -> tuple[Tensor, list]:
    now, asked = asking(at(x, **options), cond=cond, uncond=uncond)
    return run_step(now, Predictions(cond(x, now.level), uncond(x, now.level)), method), asked


@given(predictions(3), weights)
def test_one_iteration_is_cfg(tensors, weight):
    x, cond, uncond = tensors
    now, asked = asking(at(x, weight=weight))
    close(run_step(now, Predictions(cond, uncond), ANSWER(chain=1)), cfg(cond, uncond, weight), rtol=1e-9, atol=1e-9)
    assert not asked


@given(predictions(3), weights, scales)
def test_one_iteration_at_another_scale_is_another_cfg(tensors, weight, scale):
    x, cond, uncond = tensors
    method = ANSWER(chain=1, negative_scale=scale, cap=0.0)
    expected = cfg(cond, uncond, 1 + (weight - 1) * scale)
    close(run_step(at(x, weight=weight), Predictions(cond, uncond), method), expected, rtol=1e-8, atol=1e-8)


@given(shapes, weights, chains, scales, kinds)
def test_constant_denoisers_give_that_constant(shape, weight, chain, scale, kind):
    x, constant = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    same = lambda y, sigma: constant  # noqa: E731
    out, _ = run(x, ANSWER(chain=chain, negative_scale=scale), same, same, weight=weight, parametrisation=kind)
    close(out, constant, rtol=1e-8, atol=1e-8)


@given(predictions(3), weights, chains, scales)
def test_straight_paths_are_one_iteration(tensors, weight, chain, scale):
    """Two denoisers that always answer the same: every chain runs along one line, so K makes no difference."""
    x, cond, uncond = tensors
    method = ANSWER(chain=chain, negative_scale=scale, cap=0.0)
    out, _ = run(x, method, lambda y, s: cond, lambda y, s: uncond, weight=weight)
    close(out, cfg(cond, uncond, 1 + (weight - 1) * scale), rtol=1e-7, atol=1e-7)


@given(predictions(2), chains)
def test_weight_one_is_the_positive_and_free(tensors, chain):
    x, cond = tensors
    for uncond in (None, x):
        now, asked = asking(at(x, weight=1.0))
        close(run_step(now, Predictions(cond, uncond), ANSWER(chain=chain)), cond)
        assert not asked


@given(predictions(1), kinds, scales)
def test_the_chain_is_eulers_solver_of_the_parametrisation(tensors, kind, scale):
    """Each move is written out in eps or velocity, and D_neg is what a straight path to the chain's end would show."""
    (x,) = tensors
    cond, uncond, levels = curved(1), curved(2), [0.9, 0.7, 0.4, 0.0]
    predict = lambda y, s: away(cond(y, s), uncond(y, s), scale)  # noqa: E731
    y = x
    for sigma, after in zip(levels, levels[1:]):
        if kind is Parametrisation.FLOW:
            y = y + (after - sigma) * v_from_x0(y, predict(y, sigma), sigma, kind)
        else:
            x0 = predict(y, sigma)
            y = x0 + after * noise_from_x0(y, x0, sigma, kind)
    slope = (y - x) / (levels[-1] - levels[0])
    close(found(x, predict(x, levels[0]), levels, predict), x - levels[0] * slope, rtol=1e-9, atol=1e-9)


def test_two_iterations_are_not_cfg():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    out, _ = run(x, ANSWER(chain=2, cap=0.0), curved(1), curved(2))
    level = at(x).level
    assert not torch.allclose(out, cfg(curved(1)(x, level), curved(2)(x, level), 7.0), rtol=0.05, atol=0.05)


@given(predictions(1), chains, scales)
def test_a_batch_is_so_many_single_runs(tensors, chain, scale):
    (x,) = tensors
    method = ANSWER(chain=chain, negative_scale=scale)
    rows = [run(row[None], method, curved(1), curved(2))[0] for row in x]
    close(run(x, method, curved(1), curved(2))[0], torch.cat(rows))


@given(predictions(3), st.floats(0.1, 5.0))
def test_the_cap_bounds_the_push_in_each_sample(tensors, cap):
    x, cond, uncond = tensors
    assert (norm(cond * expand(shrink(cond, cap * norm(uncond)), cond)) <= cap * norm(uncond) * (1 + 1e-9)).all()
    now, _ = asking(at(x), cond=curved(1), uncond=curved(2))
    refined = ANSWER(chain=3, cap=cap).refine(now, Predictions(cond, uncond))
    assert (norm(cond - refined.uncond) <= cap * norm(cond - uncond) * (1 + 1e-9) + 1e-9).all()
    assert torch.equal(refined.cond, cond)
    agree = ANSWER(chain=3, cap=cap).refine(now, Predictions(cond, cond))  # nothing to push from, however paths bend
    close(agree.uncond, cond)


@pytest.mark.parametrize(("scale", "roles"), [(1.0, ("uncond",)), (2.0, ("cond", "uncond"))])
def test_what_is_evaluated(scale, roles):
    """The levels of the run that follow, with uncond alone where the scale is 1; shorter at the end of the run."""
    x = torch.randn(1, 2, 3, 3)
    for index, levels in ((3, [0.6, 0.5]), (8, [0.1]), (9, [])):
        out, asked = run(x, ANSWER(chain=3, negative_scale=scale), curved(1), curved(2), index=index)
        assert out.isfinite().all() and asked == [(level, roles) for level in levels]
    _, asked = run(x, ANSWER(chain=2), curved(1), curved(2), index=3, level=0.65)  # an inner evaluation of a solver
    assert asked == [(0.6, ("uncond",))]


def test_no_noise_is_drawn_and_nothing_given_is_changed():
    x, generator = torch.randn(2, 2, 3, 3), torch.Generator().manual_seed(5)
    given_x, states = x.clone(), (torch.get_rng_state(), generator.get_state())
    run(x, ANSWER(chain=3, negative_scale=2.0), curved(1), curved(2), generator=generator)
    assert torch.equal(x, given_x)
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(generator.get_state(), states[1])


def test_the_trace_tells_how_the_found_push_differs():
    now, _ = asking(at(torch.randn(2, 2, 3, 3)), uncond=curved(2))
    ANSWER().refine(now, Predictions(torch.randn(2, 2, 3, 3), torch.randn(2, 2, 3, 3)))
    assert now.record["found_push"].shape == now.record["found_cosine"].shape == (2,)


def test_bad_input():
    with pytest.raises(GuidanceError, match="chain is 0; use 2 or 3"):
        ANSWER(chain=0)
    with pytest.raises(GuidanceError, match="negative_scale is nan"):
        ANSWER(negative_scale=float("nan"))
    with pytest.raises(GuidanceError, match="norm_cap is -1"):
        ANSWER(cap=-1.0)
    with pytest.raises(GuidanceError, match=r"ANSWER.*cfg above 1.*NAG"):
        ANSWER().check(setup(cfg=1.0))


def test_the_trace_has_the_found_push():
    x, cond, uncond = torch.randn(3, 2, 2, 3, 3)
    now = at(x)
    ANSWER(chain=1, negative_scale=-2.0).refine(now, Predictions(cond, uncond))
    close(now.record["found_push"], torch.full((2,), 2.0))
    close(now.record["found_cosine"], -torch.ones(2))

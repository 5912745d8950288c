"""CFG++: the paper's step, its equivalence with CFG at another weight, its ends, its solvers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError
from rudder.guidance.space import Parametrisation, noise_from_x0, signal
from rudder.inversion.cfg_pp import CFGPP, SOLVERS, at_lambda, fresh, weight
from rudder.inversion.solver import check_falling, euler

from .tensors import KINDS, kinds, predictions

close = torch.testing.assert_close
FLOW = Parametrisation.FLOW
lambdas = st.floats(0.0, 1.0).map(lambda value: round(value, 3))
every_kind = pytest.mark.parametrize("kind", KINDS)
every_solver = pytest.mark.parametrize("solver", SOLVERS)
STEPS = 6


def levels(kind: Parametrisation, steps: int = STEPS) -> list[float]:
    """Falling noise levels that end at 0; a flow starts at pure noise."""
    top = 1.0 if kind is FLOW else 14.0
    return [top * (1 - i / steps) ** (1.0 if kind is FLOW else 3.0) for i in range(steps + 1)]


def denoiser(cond_seed: int = 1):
    """(x, sigma) -> (cond, uncond) x0: smooth, non-linear, both from x."""
    def predict(x: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        uncond = torch.tanh(x / (1 + sigma))
        return uncond + 0.3 * torch.cos(x * 0.1 + cond_seed), uncond

    return predict


def at_weight(predict):
    def guided(x: torch.Tensor, sigma: float, w: float) -> tuple[torch.Tensor, torch.Tensor]:
        cond, uncond = predict(x, sigma)
        return cfg(cond, uncond, w), uncond

    return guided


def noises(seed: int = 3, shape=(2, 4, 3, 3)):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


def start(kind: Parametrisation, shape=(2, 4, 3, 3)) -> torch.Tensor:
    return noises(7, shape)() * levels(kind)[0]


def run(kind: Parametrisation, predict, **options) -> torch.Tensor:
    return CFGPP(**options).sample(predict, start(kind), levels(kind), kind, noises())


def no_noise() -> torch.Tensor:
    raise AssertionError("this solver draws no noise")


@given(predictions(3), lambdas, kinds, st.integers(0, STEPS - 1))
def test_an_euler_step_is_the_papers(tensors, lam, kind, i):
    """x' = a' (D_u + lambda (D_c - D_u)) + s' noise(D_u), with the noise as the parametrisation defines it."""
    x, cond, uncond = tensors
    s, to = levels(kind)[i : i + 2]
    stepped = CFGPP(strength=lam).sample(
        lambda x, sigma, w: (cfg(cond, uncond, w), uncond), x, [s, to], kind, no_noise
    )
    close(stepped, signal(to, kind) * cfg(cond, uncond, lam) + to * noise_from_x0(x, uncond, s, kind),
          rtol=1e-9, atol=1e-9)


@given(predictions(3), lambdas, kinds, st.integers(0, STEPS - 1))
def test_it_is_euler_cfg_at_the_equivalent_weight(tensors, lam, kind, i):
    x, cond, uncond = tensors
    s, to = levels(kind)[i : i + 2]
    stepped = CFGPP(strength=lam).sample(
        lambda x, sigma, w: (cfg(cond, uncond, w), uncond), x, [s, to], kind, no_noise
    )
    close(stepped, euler(x, cfg(cond, uncond, weight(lam, s, to, kind)), s, to), rtol=1e-9, atol=1e-9)


@given(predictions(2), lambdas, kinds, st.integers(0, STEPS - 1))
def test_the_prediction_at_lambda_is_found_from_that_at_the_weight(tensors, lam, kind, i):
    cond, uncond = tensors
    s, to = levels(kind)[i : i + 2]
    guided = cfg(cond, uncond, weight(lam, s, to, kind))
    close(at_lambda(guided, uncond, s, to, kind), cfg(cond, uncond, lam), rtol=1e-9, atol=1e-9)


def test_the_weights_are_those_of_the_derivation():
    assert weight(0.6, 4.0, 3.0, Parametrisation.EPS) == pytest.approx(0.6 * 4.0)
    assert weight(0.6, 0.8, 0.6, FLOW) == pytest.approx(0.6 * 0.4 * 0.8 / 0.2)
    for kind in KINDS:
        assert weight(0.6, 0.5, 0.0, kind) == pytest.approx(0.6)  # the last step returns D
        assert weight(0.0, 0.5, 0.4, kind) == 0.0


@every_kind
@every_solver
def test_the_last_step_returns_the_guided_prediction(kind, solver):
    seen = []
    CFGPP(solver=solver).sample(
        at_weight(denoiser()), start(kind), levels(kind), kind, noises(), lambda i, x, x0: seen.append((i, x, x0))
    )
    out = run(kind, at_weight(denoiser()), solver=solver)
    assert [i for i, _, _ in seen] == list(range(STEPS))
    _, x, x0 = seen[-1]
    cond, uncond = denoiser()(x, levels(kind)[-2])
    close(out, cfg(cond, uncond, 0.6))
    close(x0, out)


def plain(kind: Parametrisation, predict, solver: str) -> torch.Tensor:
    """The solver by hand on one prediction: k-diffusion's formulas, which hold in these coordinates for every kind."""
    x, sigmas, old = start(kind), levels(kind), None
    for i, (s, to) in enumerate(zip(sigmas, sigmas[1:])):
        x0 = predict(x, s)
        if to == 0:
            return x0
        used = x0
        if solver == "dpm++ 2m" and old is not None:
            ratio = math.log(sigmas[i - 1] / s) / math.log(s / to)
            used = (1 + 1 / (2 * ratio)) * x0 - old / (2 * ratio)
        x, old = (to / s) * x + (1 - to / s) * used, x0
    return x


@every_kind
@pytest.mark.parametrize("solver", ["euler", "dpm++ 2m"])
def test_lambda_0_is_the_solver_on_the_negative(kind, solver):
    close(run(kind, at_weight(denoiser()), strength=0.0, solver=solver),
          plain(kind, lambda x, s: denoiser()(x, s)[1], solver))


@every_kind
@pytest.mark.parametrize("solver", ["euler", "dpm++ 2m"])
def test_a_step_without_guidance_is_the_solver_on_the_positive(kind, solver):
    close(run(kind, lambda x, s, w: (denoiser()(x, s)[0], None), solver=solver),
          plain(kind, lambda x, s: denoiser()(x, s)[0], solver))


@every_kind
@every_solver
def test_equal_predictions_leave_nothing_to_guide(kind, solver):
    same = at_weight(lambda x, s: (denoiser()(x, s)[1],) * 2)
    close(run(kind, same, strength=0.0, solver=solver), run(kind, same, strength=1.0, solver=solver))


@every_kind
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_2m_is_the_official_formula(kind, lam):
    """In eps space; a flow model has a' on what guidance adds, and only there."""
    x, sigmas, old = start(kind), levels(kind), None
    for i, (s, to) in enumerate(zip(sigmas, sigmas[1:])):
        cond, uncond = denoiser()(x, s)
        if to == 0:
            x = cfg(cond, uncond, lam)
            break
        h = math.log(s / to)
        push = signal(to, kind) * lam * (cond - uncond)
        x = math.exp(-h) * x - math.expm1(-h) * uncond + push
        if old is not None:
            ratio = math.log(sigmas[i - 1] / s) / h
            x = x - math.expm1(-h) / (2 * ratio) * (uncond + push - old)
        old = uncond
    close(run(kind, at_weight(denoiser()), strength=lam, solver="dpm++ 2m"), x)


@every_kind
@pytest.mark.parametrize("one_by_one", [False, True])
def test_guidance_that_goes_off_or_on_pushes_no_step_of_2m_without_it(kind, one_by_one):
    """Predictions never change here, so an unguided step of any order is the plain one. Of pictures that guidance has
    left in a batch the negative is their own prediction."""
    sigmas, cond, uncond = levels(kind), torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)
    on = [[i in (2, 3), i < 2 or (not one_by_one and i < 4)] for i in range(STEPS)]

    def predict(x, sigma, w):
        guides = torch.tensor(on[sigmas.index(sigma)]).view(2, 1, 1, 1)
        guided = torch.where(guides, cfg(cond, uncond, w), cond)
        return guided, torch.where(guides, uncond, guided) if guides.any() else None

    seen = []
    CFGPP(solver="dpm++ 2m").sample(predict, start(kind, (2, 1, 1, 1)).float(), sigmas, kind, no_noise,
                                    lambda i, x, x0: seen.append(x))
    for i, (x, new) in enumerate(zip(seen, seen[1:])):
        s, to = sigmas[i], sigmas[i + 1]
        for row in range(2):
            if not on[i][row]:
                close(new[row], (to / s) * x[row] + (1 - to / s) * cond[row])


@every_kind
def test_ancestral_without_new_noise_is_euler(kind):
    predict = at_weight(denoiser())
    close(run(kind, predict, solver="euler ancestral", eta=0.0), run(kind, predict))


@every_kind
def test_ancestral_renews_what_ddim_renews(kind):
    """The noise of x keeps its variance, and u is DDIM's at eta 1: k-diffusion's sigma_up in these coordinates."""
    for s, to in zip(levels(kind)[:-2], levels(kind)[1:]):
        ve, ve_to = (v / signal(v, kind) if signal(v, kind) else math.inf for v in (s, to))
        up = ve_to * math.sqrt(1 - (ve_to / ve) ** 2)
        assert fresh(s, to, 1.0, kind) == pytest.approx(up / ve_to)
        assert fresh(s, to, 0.5, kind) == pytest.approx(0.5 * up / ve_to)
    x0, n = torch.zeros(1, 1, 250, 400, dtype=torch.float64), noises(1, (1, 1, 250, 400))
    s, to = levels(kind)[2:4]
    out = CFGPP(solver="euler ancestral").sample(lambda x, sigma, w: (x0, x0), s * n(), [s, to], kind, n)
    assert float(out.std()) == pytest.approx(to, rel=0.01)


def test_only_the_ancestral_solver_draws_noise():
    for solver in ("euler", "dpm++ 2m"):
        CFGPP(solver=solver).sample(at_weight(denoiser()), start(FLOW), levels(FLOW), FLOW, no_noise)
    with pytest.raises(AssertionError, match="draws no noise"):
        CFGPP(solver="euler ancestral").sample(at_weight(denoiser()), start(FLOW), levels(FLOW), FLOW, no_noise)


@every_kind
@every_solver
def test_runs_repeat_batches_are_single_runs_and_inputs_stay(kind, solver):
    x, predict = start(kind, (3, 2, 2, 3, 3)), at_weight(denoiser())  # a video
    kept, sampler = x.clone(), CFGPP(solver=solver, eta=0.0)
    whole = sampler.sample(predict, x, levels(kind), kind, noises(3, x.shape))
    assert torch.equal(whole, sampler.sample(predict, x, levels(kind), kind, noises(3, x.shape)))
    assert torch.equal(x, kept) and whole.isfinite().all()
    rows = [sampler.sample(predict, x[i : i + 1], levels(kind), kind, noises()) for i in range(3)]
    close(whole, torch.cat(rows))


def test_2m_converges_in_second_order():
    """On an exact flow of its own (lambda 0), halving the steps' length quarters the error."""
    def error(steps: int) -> float:
        sigmas = [8.0 * (1e-2 / 8.0) ** (i / steps) for i in range(steps + 1)]
        x = torch.full((1, 1, 1, 1), 8.0, dtype=torch.float64)
        gaussian = lambda x, s, w: (x / (1 + s * s),) * 2  # noqa: E731 (data of variance 1)
        out = CFGPP(strength=0.0, solver="dpm++ 2m").sample(gaussian, x, sigmas, Parametrisation.EPS, no_noise)
        return abs(float(out) - 8.0 * math.sqrt((1 + 1e-4) / 65))

    assert 3.2 < error(40) / error(80) < 5.0


@pytest.mark.parametrize(
    ("options", "says"),
    [({"strength": 7.5}, "guidance_lambda is 7.5; it lies in 0 .. 1"),
     ({"strength": math.nan}, "guidance_lambda is nan"),
     ({"strength": -0.1}, "guidance_lambda is -0.1"), ({"solver": "heun"}, "no solver 'heun'; use one of euler,"),
     ({"eta": 1.5}, "eta is 1.5")],
)  # fmt: skip
def test_bad_settings(options, says):
    with pytest.raises(GuidanceError, match=says):
        CFGPP(**options)


@pytest.mark.parametrize("sigmas", [[0.1, 0.5, 1.0], [1.0, 0.5, 0.5, 0.0], [1.0, math.nan, 0.0]])
def test_bad_sigmas(sigmas):
    with pytest.raises(GuidanceError, match="sigmas must fall at every step"):
        CFGPP().sample(at_weight(denoiser()), start(FLOW), sigmas, FLOW, no_noise)


def test_a_negative_eta_is_refused():
    with pytest.raises(GuidanceError, match="eta is -0.5"):
        CFGPP(eta=-0.5)


def test_noise_levels_that_do_not_fall_are_refused():
    with pytest.raises(GuidanceError, match="must fall"):
        check_falling("t", [math.inf, 1.0, 0.0])

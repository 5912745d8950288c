"""Temporal TAG: places of noise levels, the predictor, its gradient, the shift of a step, and the training."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given

from rudder.guidance import temporal_fit
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.local_blend import LocalBlend
from rudder.guidance.rival import RIVAL
from rudder.guidance.space import Parametrisation, expand, norm
from rudder.guidance.temporal import TemporalTAG
from rudder.guidance.temporal_fit import cropped, fresh, noised, train
from rudder.guidance.temporal_net import TimePredictor, alignment, log_probability, place

from .tensors import at, kinds, levels, run_step

close = torch.testing.assert_close


def random_predictor(channels: int = 4, seed: int = 0) -> TimePredictor:
    generator = torch.Generator().manual_seed(seed)
    weights = fresh(channels, generator, bins=8, widths=(6, 8))
    return TimePredictor({**weights, "out.weight": torch.randn(8, 16, generator=generator)})


@given(kinds)
def test_the_place_is_that_of_a_unit_variance_mixture(kind):
    sigma = levels(5, kind)
    x0, noise = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    s = expand(sigma, x0)
    x = (1 - s) * x0 + s * noise if kind is Parametrisation.FLOW else x0 + s * noise
    places, length = place(sigma, kind)
    q = expand(places * math.pi / 2, x)
    close(x / expand(length, x), q.cos() * x0 + q.sin() * noise)
    abar = 1 / (1 + sigma**2)
    if kind is not Parametrisation.FLOW:
        close(torch.sin(places * math.pi / 2) ** 2, 1 - abar)  # the paper's omega_t / omega_0


def test_the_ends_of_both_kinds_of_noise_levels_agree():
    for kind, most in ((Parametrisation.FLOW, 1.0), (Parametrisation.EPS, math.inf)):
        assert place(torch.tensor([0.0, most]), kind)[0].tolist() == [0.0, 1.0]


def test_between_two_bins_the_log_probability_is_interpolated():
    logits = torch.randn(5, 9)
    logs = logits.log_softmax(1)
    places = torch.tensor([0.0, 0.125, 0.1875, 1.0, 2.0])
    expected = [logs[0, 0], logs[1, 1], (logs[2, 1] + logs[2, 2]) / 2, logs[3, 8], logs[4, 8]]
    close(log_probability(logits, places), torch.stack(expected))


@pytest.mark.parametrize("shape", [(2, 4, 7, 5), (2, 4, 3, 6, 6), (1, 4, 1, 1)])
def test_the_gradient_is_that_of_the_log_probability(shape):
    predictor, x = random_predictor(), torch.randn(shape)
    places = torch.full((len(x),), 0.4)
    with torch.inference_mode():
        gradient, seen = alignment(predictor, x, places)
    assert gradient.shape == x.shape and seen.shape == (len(x),) and ((0 <= seen) & (seen <= 1)).all()
    direction = torch.randn_like(x)
    ahead, back = (log_probability(predictor.logits(x + e * direction), places) for e in (1e-2, -1e-2))
    close((gradient * direction).flatten(1).sum(1), (ahead - back) / 2e-2, rtol=0.05, atol=5e-3)


def test_a_predictor_that_knows_nothing_pulls_nowhere():
    x = torch.randn(2, 4, 5, 5)
    gradient, seen = alignment(TimePredictor(fresh(4, torch.Generator())), x, torch.full((2,), 0.3))
    assert not gradient.any() and seen.tolist() == pytest.approx([0.5, 0.5])


def one_step(method: TemporalTAG, x: torch.Tensor, x0, index: int = 3, **options) -> tuple[torch.Tensor, object]:
    """What the sampler gets for a model ``x0(x)``, by the hooks in the executor's order."""
    now = at(x, index, **options)
    now.x = method.latent(now, now.x)
    return run_step(now, Predictions(x0(now.x), None), method), now


def test_euler_lands_where_the_paper_steps():
    x = torch.randn(3, 4, 6, 6)
    model = lambda y: 0.7 * y.tanh()  # noqa: E731
    for parametrisation in Parametrisation:
        method = TemporalTAG(predictor=random_predictor(), strength=5.0, limit=10.0)
        given, now = one_step(method, x, model, parametrisation=parametrisation)
        sigma, lower = now.level, now.sigma_next
        places, length = place(now.sigma.float(), parametrisation)
        gradient, _ = alignment(random_predictor(), x / expand(length, x), places)
        shifted = x + expand(length * 5.0 * torch.sin(places * math.pi / 2) ** 2, x) * gradient
        close(now.x, shifted)
        paper = model(shifted) + lower / sigma * (shifted - model(shifted))
        close(given + lower / sigma * (x - given), paper, rtol=1e-4, atol=1e-5)


def test_it_is_neutral_limited_and_done_at_the_last_step():
    x = torch.randn(2, 4, 6, 6)
    given, now = one_step(TemporalTAG(predictor=random_predictor(), strength=0.0), x, lambda y: y / 2)
    assert torch.equal(given, x / 2) and torch.equal(now.x, x)
    _, now = one_step(TemporalTAG(predictor=random_predictor(), strength=1e6, limit=0.05), x, lambda y: y / 2)
    close(norm(now.x - x), 0.05 * norm(x))
    given, now = one_step(TemporalTAG(predictor=random_predictor(), strength=9.0), x, lambda y: y / 2, index=9)
    assert torch.equal(given, now.x / 2)


def test_a_look_ahead_leads_back_to_where_the_paper_steps():
    """The weak side of a reflection goes from the end of the step to its beginning."""
    x, model = torch.randn(2, 4, 6, 6), lambda y: 0.7 * y.tanh()
    method = TemporalTAG(predictor=random_predictor(), strength=5.0, limit=0.02)
    now = at(x, 4)
    now.index, now.ahead = 3, True
    now.x = method.latent(now, now.x)
    r = now.sigma_next / now.level
    assert now.sigma_next == float(now.sigmas[3]) and r > 1
    given = run_step(now, Predictions(model(now.x), None), method)
    close(given + r * (x - given), model(now.x) + r * (now.x - model(now.x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("parametrisation", Parametrisation)
def test_a_look_at_the_clean_picture_is_left_alone(parametrisation):
    """Samplers of autoregressive video show the model each finished block at noise level 0."""
    x, method = torch.randn(2, 4, 6, 6), TemporalTAG(predictor=random_predictor(), strength=9.0)
    now = at(x, 9, parametrisation=parametrisation)
    now.level, now.sigma = 0.0, torch.zeros(2)
    now.x = method.latent(now, now.x)
    close(now.x, x)
    assert torch.equal(run_step(now, Predictions(x / 2, None), method), x / 2)


def test_a_batch_is_so_many_single_runs_and_x_is_not_changed():
    x = torch.randn(3, 4, 6, 6)
    before, method = x.clone(), TemporalTAG(predictor=random_predictor(), strength=3.0)
    together, _ = one_step(method, x, lambda y: y / 2)
    assert torch.equal(x, before)
    alone = [one_step(method, x[i:i + 1], lambda y: y / 2)[0] for i in range(3)]
    close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- training


def test_training_learns_the_noise_level_and_repeats():
    generator = torch.Generator().manual_seed(1)
    latents = torch.nn.functional.interpolate(torch.randn(64, 4, 2, 2, generator=generator), scale_factor=4.0)
    losses = []
    with torch.inference_mode():
        predictor, error = train(latents, 120, batch=32, each=lambda step, loss: losses.append(loss))
        again, _ = train(latents, 120, batch=32)
    assert error < 0.1 and sum(losses[-20:]) < 0.85 * sum(losses[:20]) and len(losses) == 120
    assert all(torch.equal(weight, again.weights[name]) for name, weight in predictor.weights.items())
    assert not any(weight.is_inference() or weight.requires_grad for weight in predictor.weights.values())
    x0 = latents[:8]
    places = torch.full((8,), 0.5)
    x = noised(x0, places + 0.15, generator)  # noisier than the sampler believes
    gradient, seen = alignment(predictor, x, places)
    _, after = alignment(predictor, x + 0.02 * expand(norm(x) / norm(gradient), x) * gradient, places)
    assert (after - places).abs().mean() < (seen - places).abs().mean()


def test_a_run_that_is_off_its_noise_level_comes_back_to_it():
    """The paper's Time-Gap, what the predictor reads less what the sampler says, does not rise: step by step."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.nn.functional.interpolate(torch.randn(64, 4, 2, 2, generator=generator), scale_factor=4.0)
    predictor, _ = train(latents, 120, batch=32)
    steps, x0 = 8, latents[:16]
    start = x0 + 1.5 * torch.randn(x0.shape, generator=generator)  # the sampler says 1

    def gaps(strength: float) -> torch.Tensor:
        method, x, seen = TemporalTAG(predictor=predictor, strength=strength), start, []
        for index in range(steps):  # Euler with the true x0, which keeps every error that the run began with
            given, now = one_step(method, x, lambda y: x0, index, steps=steps)
            x = given + now.sigma_next / now.level * (x - given)
            seen.append(now.record["time_gap"].abs().mean())
        return torch.stack(seen)

    off, aligned = gaps(0.0), gaps(20.0)
    assert aligned[0] == off[0] > 0.05 and (aligned[1:-1] < off[1:-1]).all() and aligned.mean() < 0.9 * off.mean()


def test_training_stops_when_it_is_told_to():
    def stop(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(torch.randn(4, 4, 2, 2), 1000, each=stop)


def test_crops_are_windows():
    x = torch.arange(2 * 36.0).reshape(2, 1, 6, 6)
    for seed in range(8):
        window = cropped(x, 4, torch.Generator().manual_seed(seed))
        assert window.shape == (2, 1, 4, 4) and torch.equal(window[1] - window[0], torch.full((1, 4, 4), 36.0))
    assert sorted(cropped(x, 9, torch.Generator())[0, 0, 0].tolist()) == list(range(6))


def test_videos_are_frames():
    predictor, error = train(torch.randn(3, 4, 2, 5, 5), 2, batch=4)
    assert predictor.channels == 4 and math.isfinite(error)


def test_bad_input():
    with pytest.raises(GuidanceError, match="no time predictor: it holds a, b ... Make one"):
        TimePredictor({"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(GuidanceError, match="it holds nothing"):
        TimePredictor({})
    for name in ("strength", "limit"):
        with pytest.raises(GuidanceError, match=f"{name} is -1; it must be 0"):
            TemporalTAG(predictor=random_predictor(), **{name: -1.0})
    with pytest.raises(GuidanceError, match="with 4 channels, and this model's are 3x4x4"):
        now = at(torch.randn(1, 3, 4, 4))
        TemporalTAG(predictor=random_predictor()).latent(now, now.x)


def test_the_trace_has_gap_and_shift():
    x = torch.randn(2, 4, 6, 6)
    _, now = one_step(TemporalTAG(predictor=random_predictor(), strength=1e6, limit=0.05), x, lambda y: y / 2)
    places, length = place(now.sigma.float(), now.parametrisation)
    close(now.record["time_gap"], alignment(random_predictor(), x / length[0], places)[1] - places)
    close(now.record["shift"], torch.full((2,), 0.05))


def test_the_error_is_of_latents_it_has_not_seen(monkeypatch):
    seen, cut = [], temporal_fit.cropped
    monkeypatch.setattr(temporal_fit, "cropped", lambda x, *a: seen.append(x[:, 0, 0, 0].tolist()) or cut(x, *a))
    temporal_fit.train(torch.arange(16.0).reshape(16, 1, 1, 1).expand(-1, 4, 4, 4), 3)
    assert max(map(max, seen[:-1])) < 14 and seen[-1] == [14, 15]


def test_beside_what_moves_the_estimate_euler_still_lands_where_the_paper_steps():
    """Of a batch with an edit: RIVAL reads the estimate, Local Blend has the last word on it."""
    x = torch.randn(2, 4, 6, 6)
    method = TemporalTAG(predictor=random_predictor(), strength=5.0, limit=0.02)
    now = at(x, 1)
    now.x = method.latent(now, now.x)
    x0 = now.x.tanh()
    given = run_step(now, Predictions(x0, None), RIVAL(), method)
    bare = at(x, 1)
    bare.x = now.x
    target = run_step(bare, Predictions(x0, None), RIVAL())
    assert not torch.equal(target, x0)
    r = now.sigma_next / now.level
    close(given + r * (x - given), target + r * (now.x - target), rtol=1e-4, atol=1e-4)
    assert method.rank < LocalBlend.rank


def test_sound_is_refused():
    x = torch.randn(1, 4, 6)
    with pytest.raises(GuidanceError, match="of pictures or video with 4 channels, and this model's are 4x6"):
        TemporalTAG(predictor=random_predictor()).latent(at(x), x)


def test_a_run_towards_noise_lands_where_the_paper_steps():
    x, model = torch.randn(2, 4, 6, 6), lambda y: 0.7 * y.tanh()
    method = TemporalTAG(predictor=random_predictor(), strength=5.0, limit=0.02)
    now = at(x, 4)
    now.sigmas, now.index = now.sigmas.flip(0), 6
    now.x = method.latent(now, now.x)
    r = now.sigma_next / now.level
    assert r > 1
    given = run_step(now, Predictions(model(now.x), None), method)
    close(given + r * (x - given), model(now.x) + r * (now.x - model(now.x)), rtol=1e-4, atol=1e-4)

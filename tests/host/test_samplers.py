"""Our samplers in whole runs: against the host's own, with plans of guidance, masks, guiders, and what they refuse."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

import comfy.hooks
import comfy.model_management
import comfy.patcher_extension as ext
import comfy.samplers
import comfy.sd
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy.conds import CONDConstant
from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

from rudder.guidance.autoguidance import AutoGuidance
from rudder.guidance.cfg_zero import CFGZero
from rudder.guidance.contract import Guidance, GuidanceError, Step
from rudder.guidance.trace import Recorder, Trace
from rudder.host import add_guidance
from rudder.host.run import parametrisation_of
from rudder.host.samplers import cfg_pp, check_pair, w2sd
from rudder.inversion.cfg_pp import CFGPP, SOLVERS, weight
from rudder.inversion.w2sd import W2SD
from rudder.nodes.samplers import RudderCFGPP, RudderW2SD

from .models import CHANNELS, MODELS, calls, conditioning, having, latent, lora, tiny_flux, tiny_unet, tiny_wan
from .registry import METHODS, NEGATIVE, POSITIVE, evaluations, fitted

STEPS, SEED, LAMBDA = 4, 7, 0.6
close = torch.testing.assert_close
every_solver = pytest.mark.parametrize("solver", SOLVERS)
SETTING = [name for name in METHODS if "guidance weight" in METHODS[name].method.claims]
COMPOSING = [name for name in METHODS if name not in SETTING]


def levels(model, steps: int = STEPS) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


def sampled(model, sampler, kind: str = "unet", *, cfg: float = 4.0, batch: int = 1, image=None, sigmas=None,
            seed: int = SEED, **options) -> torch.Tensor:  # fmt: skip
    """SamplerCustom with a SAMPLER, or with the host's of a name. ``options`` go into the LATENT."""
    sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
    given = {"samples": latent(kind, batch) if image is None else image, **options}
    sigmas = levels(model) if sigmas is None else sigmas
    return custom.SamplerCustom.execute(model, True, seed, cfg, POSITIVE, NEGATIVE, sampler, sigmas, given).args[0][
        "samples"
    ]


def ours(solver: str = "euler", **options):
    return cfg_pp(CFGPP(strength=options.pop("strength", LAMBDA), solver=solver, **options))


def advanced(guider, sampler, kind: str, model, batch: int = 1) -> torch.Tensor:
    noise, image = custom.RandomNoise.execute(SEED).args[0], {"samples": latent(kind, batch)}
    return custom.SamplerCustomAdvanced.execute(noise, guider, sampler, levels(model), image).args[0]["samples"]


@dataclass(frozen=True, kw_only=True)
class Equivalent(Guidance):
    """CFG at the weight at which an Euler step is that of CFG++."""

    rank = -1

    def scale(self, step: Step, weight_of_sampler: float) -> float:
        return weight(LAMBDA, step.level, step.sigma_next, step.parametrisation)


# ------------------------------------------------------------------------------------------------- CFG++


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.6, 1.0])
def test_euler_is_the_hosts_own_on_both_families(model, kind, lam):
    """There the cfg of the sampler is lambda."""
    close(sampled(model, ours(strength=lam), kind), sampled(model, "euler_cfg_pp", kind, cfg=lam), rtol=1e-4, atol=1e-4)


def test_2m_is_the_hosts_own_on_eps_and_guides_a_flow_less(model, kind):
    run, host = sampled(model, ours("dpm++ 2m"), kind), sampled(model, "dpmpp_2m_cfg_pp", kind, cfg=LAMBDA)
    if kind == "unet":
        close(run, host, rtol=1e-4, atol=1e-4)
    else:
        unguided = sampled(model, "dpmpp_2m", kind, cfg=0.0)
        assert (run - unguided).norm() < 0.8 * (host - unguided).norm()


@pytest.mark.parametrize(("solver", "host"), [("euler", "euler"), ("dpm++ 2m", "dpmpp_2m")])
def test_lambda_0_is_the_hosts_solver_on_the_negative(model, kind, solver, host):
    close(sampled(model, ours(solver, strength=0.0), kind), sampled(model, host, kind, cfg=0.0), rtol=1e-4, atol=1e-4)


def test_ancestral_without_new_noise_is_euler(model, kind):
    close(sampled(model, ours("euler ancestral", eta=0.0), kind), sampled(model, ours(), kind))


@every_solver
@pytest.mark.parametrize("batch", [1, 3])
def test_a_run(model, kind, solver, batch):
    """Finite, repeatable, 2 evaluations in one call a step, the same from both sampler nodes, the model untouched."""
    reference = sampled(model, "euler", kind, batch=batch)
    counted, seen = calls(model)
    run = sampled(counted, ours(solver), kind, batch=batch)
    assert run.isfinite().all() and not torch.equal(run, reference)
    assert seen["batching"] == [2] * STEPS and seen["network"] == [2 * batch] * STEPS
    guider = custom.CFGGuider.execute(model, POSITIVE, NEGATIVE, 7.5).args[0]
    assert torch.equal(advanced(guider, ours(solver), kind, model, batch), run)
    assert torch.equal(advanced(guider, ours(solver), kind, model, batch), run) and guider.cfg == 7.5
    assert torch.equal(sampled(model, "euler", kind, batch=batch), reference)


@every_solver
@pytest.mark.parametrize("cfg", [0.0, 1.0, 12.0])
def test_the_cfg_of_the_sampler_does_not_count(model, kind, solver, cfg):
    assert torch.equal(sampled(model, ours(solver), kind, cfg=cfg), sampled(model, ours(solver), kind, cfg=4.0))


def test_ancestral_noise_comes_from_the_seed_alone(model, kind):
    sampler, image = ours("euler ancestral"), torch.ones(1, CHANNELS[kind], 8, 8)
    first = sampled(model, sampler, kind, image=image)
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    assert torch.equal(sampled(model, sampler, kind, image=image), first)
    torch.manual_seed(SEED)  # what the host leaves behind
    assert not torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(sampled(model, sampler, kind, image=image, seed=SEED + 1), first)
    assert sampled(model, sampler, kind, image=image, seed=2**64 - 1).isfinite().all()


def test_video():
    wan, image = tiny_wan(), torch.zeros(1, 16, 2, 4, 4)
    for solver in SOLVERS:
        run = sampled(wan, ours(solver), image=image)
        assert run.shape == image.shape and run.isfinite().all()


@every_solver
def test_a_noise_mask_keeps_the_rest_of_the_picture(model, kind, solver):
    image, mask = torch.randn(1, CHANNELS[kind], 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1.0
    sigmas = levels(model, 6)[2:]
    run = sampled(model, ours(solver), kind, image=image, sigmas=sigmas, noise_mask=mask)
    plain = sampled(model, "euler", kind, image=image, sigmas=sigmas, noise_mask=mask)
    close(run[..., :4], plain[..., :4], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run[..., 4:], plain[..., 4:], atol=1e-3)


def test_a_mask_that_changes_with_the_noise_level(model, kind):
    """As Differential Diffusion sets it; Euler, of which the whole effect is known from the host's."""
    patched = model.clone()
    patched.set_model_denoise_mask_function(lambda sigma, mask, extra_options: (mask > 0.5).to(mask) * 1.0)
    image, mask = torch.randn(1, CHANNELS[kind], 8, 8), torch.rand(1, 1, 8, 8)
    by_host = {"image": image, "noise_mask": mask, "kind": kind}
    close(sampled(patched, ours(), **by_host),
          sampled(add_guidance(patched, Equivalent()), "euler", **by_host), rtol=1e-4, atol=1e-4)


def test_a_run_in_two_parts_is_one_run(model, kind):
    """The second sampler goes on where the first stopped, as SplitSigmas wires it."""
    sigmas = levels(model)
    guider = custom.CFGGuider.execute(model, POSITIVE, NEGATIVE, 4.0).args[0]
    noise, none = custom.RandomNoise.execute(SEED).args[0], custom.DisableNoise.execute().args[0]
    half = custom.SamplerCustomAdvanced.execute(noise, guider, ours(), sigmas[:3], {"samples": latent(kind)}).args[0]
    whole = custom.SamplerCustomAdvanced.execute(none, guider, ours(), sigmas[2:], half).args[0]["samples"]
    close(whole, sampled(model, ours(), kind), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- with a plan


@pytest.mark.parametrize("name", COMPOSING)
def test_a_method_acts_as_under_cfg_at_the_equivalent_weights(model, kind, name):
    """The defined result: the plan runs at the weight of the step. Euler shows it exactly, for every method."""
    method = fitted(name, model)
    plain = add_guidance(model, method)
    run = sampled(plain, ours(), kind)
    by_weights = sampled(add_guidance(plain, Equivalent()), "euler", kind)
    close(run, by_weights, rtol=1e-3, atol=1e-3 * float(by_weights.abs().max()))
    assert run.isfinite().all() and not torch.equal(run, sampled(model, ours(), kind))


@pytest.mark.parametrize("name", COMPOSING)
@pytest.mark.parametrize("solver", SOLVERS[1:])
def test_the_other_solvers_compose_too(model, kind, name, solver):
    recorder = Recorder()
    plan = add_guidance(add_guidance(model, fitted(name, model)), Trace(recorder=recorder))
    run = sampled(plan, ours(solver), kind, batch=2)
    assert run.isfinite().all() and torch.equal(sampled(plan, ours(solver), kind, batch=2), run)
    steps = recorder.runs[""]["steps"]
    assert [s["evaluations"] for s in steps] == evaluations([name], kind, [s["sigma"] for s in steps])


def test_the_trace_shows_the_weights_that_lambda_came_to(model, kind):
    recorder = Recorder()
    sampled(add_guidance(model, Trace(recorder=recorder)), ours(), kind)
    steps = recorder.runs[""]["steps"]
    sigmas = levels(model).tolist()
    way = parametrisation_of(model.get_model_object("model_sampling"))
    expected = [weight(LAMBDA, s, to, way) for s, to in zip(sigmas, sigmas[1:])]
    assert [s["weight"] for s in steps] == pytest.approx(expected, rel=1e-4)


def test_a_cfg_function_of_another_pack_acts_at_the_equivalent_weight(model, kind):
    def half(args: dict) -> torch.Tensor:
        return args["uncond"] + 0.5 * args["cond_scale"] * (args["cond"] - args["uncond"])

    patched = model.clone()
    patched.set_model_sampler_cfg_function(half)
    close(sampled(patched, ours(), kind), sampled(model, ours(strength=LAMBDA / 2), kind), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- refusals


def test_a_guider_without_a_negative_is_refused(model, kind):
    with pytest.raises(GuidanceError, match="this guider has no negative.*CFGGuider or SamplerCustom"):
        advanced(custom.BasicGuider.execute(model, POSITIVE).args[0], ours(), kind, model)


def test_a_guider_that_combines_by_itself_is_refused(model, kind):
    guider = custom.DualCFGGuider.execute(model, POSITIVE, POSITIVE, NEGATIVE, 4.0, 4.0, "regular").args[0]
    with pytest.raises(GuidanceError, match="Guider_DualCFG' combines predictions itself"):
        advanced(guider, ours(), kind, model)


@pytest.mark.parametrize("name", SETTING)
def test_a_node_that_sets_the_weight_is_refused(model, kind, name):
    method = METHODS[name].method
    with pytest.raises(GuidanceError, match="on this MODEL sets the guidance weight.*guidance_lambda") as error:
        sampled(add_guidance(model, method), ours(), kind)
    assert f"'{method.title}'" in str(error.value)


def overriding(model, cfg: float):
    """The host's CFG Override, which 0.18.2 does not have yet."""
    def wrapper(executor, *args, **kwargs):
        guider, own = executor.class_obj, executor.class_obj.cfg
        try:
            guider.cfg = cfg
            return executor(*args, **kwargs)
        finally:
            guider.cfg = own

    patched = model.clone()
    patched.add_wrapper(ext.WrappersMP.PREDICT_NOISE, wrapper)
    return patched


def test_an_override_of_the_weight_is_refused_but_none_may_be_switched_off(model, kind):
    guider = custom.CFGGuider.execute(overriding(model, 3.0), POSITIVE, NEGATIVE, 5.0).args[0]
    with pytest.raises(GuidanceError, match="sets the guidance weight of this step to 3"):
        advanced(guider, ours(), kind, model)
    assert guider.cfg == 5.0
    for solver, host in (("euler", "euler"), ("dpm++ 2m", "dpmpp_2m")):
        off = sampled(overriding(model, 1.0), ours(solver), kind)
        close(off, sampled(model, host, kind, cfg=1.0), rtol=1e-4, atol=1e-4)


def test_a_step_that_another_node_skips_is_refused(model, kind):
    patched = model.clone()
    patched.add_wrapper(ext.WrappersMP.PREDICT_NOISE, lambda executor, x, *args, **kwargs: x)
    with pytest.raises(GuidanceError, match="skipped a prediction"):
        sampled(patched, ours(), kind)


def test_a_run_without_steps_gives_the_latent_back(model, kind):
    image, none = torch.randn(latent(kind).shape), levels(model)[-1:]
    run, host = (sampled(model, sampler, kind, image=image, sigmas=none) for sampler in (ours(), "euler"))
    assert torch.equal(run, host)


def test_flipped_sigmas_are_refused(model, kind):
    with pytest.raises(GuidanceError, match="sigmas must fall"):
        sampled(model, ours(), kind, sigmas=levels(model).flip(0)[1:])


@pytest.mark.parametrize("name", METHODS)
def test_a_sampler_that_enlarges_the_latent_on_the_way(model, kind, name):
    """What a method remembers (APG's average, LinearAG's past) is of another size."""
    [sampler] = SamplerLCMUpscale.execute(2.0, 2, "nearest-exact").args
    run = sampled(add_guidance(model, fitted(name, model)), sampler, kind)
    assert run.shape[-2:] == (16, 16) and run.isfinite().all()


# ------------------------------------------------------------------------------------------------- W2SD


def guider_of(model, cfg: float = 1.0, positive=POSITIVE):
    return custom.CFGGuider.execute(model, positive, NEGATIVE, cfg).args[0]


def with_lora(model, strength: float):
    return comfy.sd.load_lora_for_models(model, None, lora(model, 5), strength, 0.0)[0]


def by_hand(model, weak_model, weak_cfg: float, cfg: float = 4.0) -> torch.Tensor:
    """W2SD by the host alone: forth by Euler, back by Euler on flipped sigmas, each in a sampling of its own.

    For eps models: the host cannot walk a flow back to 1.
    """
    sigmas, way = levels(model), model.get_model_object("latent_format")
    noise = custom.RandomNoise.execute(SEED).args[0].generate_noise({"samples": latent("unet")})

    def one(model, cfg, x, pair) -> torch.Tensor:
        """x is the sampler's tensor: a LATENT with no noise added."""
        image = {"samples": way.process_out(x)}
        solver = comfy.samplers.sampler_object("euler")
        made = custom.SamplerCustom.execute(model, False, SEED, cfg, POSITIVE, NEGATIVE, solver, pair, image)
        return way.process_in(made.args[0]["samples"])

    x = model.get_model_object("model_sampling").noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
    for i in range(STEPS):
        pair = sigmas[i : i + 2]
        if pair[1] > 0:
            x = one(weak_model, weak_cfg, one(model, cfg, x, pair), pair.flip(0))
        x = one(model, cfg, x, pair)
    return way.process_out(x)


def test_w2sd_is_forth_back_and_forth_again_by_the_hosts_euler():
    strong, weak = tiny_unet(), with_lora(tiny_unet(), -1.0)
    for run, other, cfg in (
        (sampled(strong, w2sd(W2SD()), "unet"), strong, 1.0),
        (sampled(strong, w2sd(W2SD(), guider_of(weak, 2.0)), "unet"), weak, 2.0),
    ):
        expected = by_hand(strong, other, cfg)
        close(run, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_cfg_pair(model, kind, batch):
    counted, seen = calls(model)
    run = sampled(counted, w2sd(W2SD()), kind, batch=batch)
    assert seen["batching"] == [2, 1, 2] * (STEPS - 1) + [2]
    assert run.isfinite().all() and torch.equal(sampled(model, w2sd(W2SD()), kind, batch=batch), run)
    pair = w2sd(W2SD(), guider_of(model, 1.0))  # the same pair, as two guiders on one MODEL
    close(sampled(model, pair, kind, batch=batch), run, rtol=1e-4, atol=1e-4)
    assert not torch.equal(sampled(model, "euler", kind, batch=batch), run)


def test_a_pair_of_two_models_each_with_its_own_evaluations(kind):
    (strong, seen), (weak, seen_weak) = calls(MODELS[kind]()), calls(with_lora(MODELS[kind](), 1.0))
    guider = guider_of(weak)
    before = guider.model_patcher
    run = sampled(strong, w2sd(W2SD(), guider), kind)
    assert run.isfinite().all() and torch.equal(sampled(strong, w2sd(W2SD(), guider), kind), run)
    assert seen["batching"] == [2] * 2 * (2 * STEPS - 1) and seen_weak["batching"] == [1] * 2 * (STEPS - 1)
    assert guider.model_patcher is before and guider.cfg == 1.0


def test_a_lora_at_two_strengths_on_one_base_is_that_of_two_bases(kind):
    base, other = MODELS[kind](), MODELS[kind]()
    reference = sampled(base, "euler", kind)
    apart = sampled(with_lora(base, 0.8), w2sd(W2SD(), guider_of(with_lora(other, -1.5))), kind)
    together = sampled(with_lora(base, 0.8), w2sd(W2SD(), guider_of(with_lora(base, -1.5))), kind)
    close(together, apart, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together, sampled(with_lora(base, 0.8), "euler", kind), atol=1e-3)
    close(sampled(base, "euler", kind), reference, rtol=1e-5, atol=1e-5)  # the patches are gone again


class Louder(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.3 * self.inner(x)


def louder(model, kind: str):
    """What a node does that puts another module in the place of one."""
    name = {"unet": "diffusion_model.out.2", "flux": "diffusion_model.final_layer.linear"}[kind]
    patched = model.clone()
    patched.add_object_patch(name, Louder(model.get_model_object(name)))
    return patched


def test_a_patched_object_on_one_base_is_that_of_two_bases(kind):
    base, other = MODELS[kind](), MODELS[kind]()
    reference = sampled(base, "euler", kind)
    for strong, weak in ((True, False), (False, True)):
        one = louder(base, kind) if strong else base
        apart = sampled(one, w2sd(W2SD(), guider_of(louder(other, kind) if weak else other)), kind)
        together = sampled(one, w2sd(W2SD(), guider_of(louder(base, kind) if weak else base)), kind)
        close(together, apart, rtol=1e-4, atol=1e-4)
    close(sampled(base, "euler", kind), reference, rtol=1e-5, atol=1e-5)


def test_what_the_strong_side_needs_is_loaded_with_the_weak_one(model, kind, monkeypatch):
    loads, load = [], comfy.model_management.load_models_gpu
    watch = lambda models, *args, **kwargs: (loads.append(models), load(models, *args, **kwargs))  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watch)
    bad = with_lora(MODELS[kind](), 1.0)
    for weak in (model, MODELS[kind]()):
        loads.clear()
        sampled(add_guidance(model, AutoGuidance(bad=bad)), w2sd(W2SD(), guider_of(weak)), kind)
        assert {m.model for m in loads[1]} == {model.model, bad.model, weak.model}


@pytest.mark.parametrize("own_guider", [False, True])
def test_the_weak_side_does_not_move_scheduled_hooks_on(model, kind, own_guider):
    found = []
    for reflects in (False, True):
        hooks, keyframes = comfy.hooks.create_hook_lora(lora(model, 1), 1.0, 1.0), comfy.hooks.HookKeyframeGroup()
        keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.5))
        hooks.set_keyframes_on_hooks(keyframes)
        positive, strengths = having(POSITIVE, hooks=hooks), {}

        class Watch(Guidance):
            def finish(self, step, x0, hook=hooks.hooks[0], strengths=strengths):
                strengths[step.level] = hook.strength  # the last call at a level is the one that counts
                return x0

        watched = add_guidance(model, Watch())
        sampler = w2sd(W2SD(), guider_of(model, 1.0, positive) if own_guider else None) if reflects else "euler"
        sampler = comfy.samplers.sampler_object(sampler) if isinstance(sampler, str) else sampler
        custom.SamplerCustom.execute(watched, True, SEED, 4.0, positive, NEGATIVE, sampler, levels(model, 6),
                                     {"samples": latent(kind)})
        found.append(strengths)
    assert found[0] == found[1] and set(found[0].values()) == {0.0, 1.0}


@pytest.mark.parametrize("own_guider", [False, True])
@pytest.mark.parametrize("steps", [STEPS, STEPS - 1], ids=["whole", "to be gone on with"])
def test_the_weak_side_belongs_to_the_step_that_it_reflects(model, kind, own_guider, steps):
    """What goes by steps (R2F's turns, zero-init) is the same forth and back; back leads to where forth began."""
    seen = []

    class Watch(Guidance):
        def finish(self, step, x0):
            seen.append((step.index, step.level, step.sigma_next))
            return x0

    watched, sigmas = add_guidance(model, Watch()), levels(model)[:steps + 1]
    sampled(watched, w2sd(W2SD(), guider_of(watched, 1.0) if own_guider else None), kind, sigmas=sigmas)
    expected = []
    for i, (level, to) in enumerate(zip(sigmas.tolist(), sigmas[1:].tolist())):
        expected += [(i, level, to)] + [(i, to, level), (i, level, to)] * (to > 0)
    assert seen == [pytest.approx(one) for one in expected]


@pytest.mark.parametrize("name", COMPOSING)
@pytest.mark.parametrize("own_guider", [False, True])
def test_w2sd_with_every_method(model, kind, name, own_guider):
    patched = add_guidance(model, fitted(name, model))
    run = sampled(patched, w2sd(W2SD(), guider_of(patched, 2.0) if own_guider else None), kind)
    assert run.norm() < 5 * sampled(model, w2sd(W2SD()), kind).norm()


def test_w2sd_without_steps_does_what_the_host_does(model, kind):
    one, image = torch.tensor([0.5]), torch.ones_like(latent(kind))
    assert torch.equal(*(sampled(model, solver, kind, sigmas=one, image=image) for solver in ("euler", w2sd(W2SD()))))


@pytest.mark.parametrize("own_guider", [False, True])
def test_zero_init_holds_both_sides_of_a_reflection(own_guider):
    """In the first step nothing moves, neither forth nor back."""
    model, found = MODELS["flux"](), []

    class Watch(Guidance):
        rank = 99

        def finish(self, step, x0):
            found.append((step.index, step.x, x0))
            return x0

    for method in (CFGZero(zero_steps=1), Watch()):
        model = add_guidance(model, method)
    sampled(model, w2sd(W2SD(), guider_of(model, 2.0) if own_guider else None), "flux")
    first = [(x, x0) for index, x, x0 in found if index == 0]
    assert len(first) == 3 and all(torch.equal(x, first[0][0]) and torch.equal(x, x0) for x, x0 in first)


def test_equal_sides_are_almost_euler(model, kind):
    """The rest is of second order in the steps, so it falls when they get shorter."""
    def rest(steps: int) -> float:
        sigmas = levels(model, steps)
        run = sampled(model, w2sd(W2SD(), guider_of(model, 4.0)), kind, sigmas=sigmas)
        return float((run - sampled(model, "euler", kind, sigmas=sigmas)).norm())

    assert rest(16) < 0.75 * rest(4)


def test_w2sd_with_a_plan_on_either_side(model, kind):
    plan = add_guidance(model, METHODS["AAPB"].method)
    runs = [sampled(m, w2sd(W2SD(), guider_of(weak, 2.0)), kind) for m in (model, plan) for weak in (model, plan)]
    assert all(run.isfinite().all() for run in runs) and len({run.sum().item() for run in runs}) == 4
    assert sampled(plan, w2sd(W2SD()), kind).isfinite().all()


def test_w2sd_keeps_what_a_noise_mask_keeps(model, kind):
    image, mask = torch.randn(1, CHANNELS[kind], 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1.0
    sigmas = levels(model, 6)[2:]
    for sampler in (w2sd(W2SD()), w2sd(W2SD(), guider_of(model, 1.0))):
        run = sampled(model, sampler, kind, image=image, sigmas=sigmas, noise_mask=mask)
        close(run[..., :4], image[..., :4], rtol=1e-3, atol=1e-3)


def test_the_weak_side_is_told_the_noise_mask_too(monkeypatch):
    """Inpainting checkpoints read it from their conditioning."""
    strong, weak, told = tiny_unet(), tiny_unet(), {}
    for name, model in (("strong", strong), ("weak", weak)):
        def spy(name=name, own=model.model.extra_conds, **given):
            told.setdefault(name, []).append(given.get("denoise_mask"))
            return own(**given)
        monkeypatch.setattr(model.model, "extra_conds", spy)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, ..., 4:] = mask[1, ..., :2] = 1.0
    sampled(strong, w2sd(W2SD(), guider_of(weak, 1.0)), "unet", image=torch.randn(2, 4, 8, 8), noise_mask=mask)
    for masks in told.values():
        assert all(torch.equal(m[:, :1].cpu(), mask) for m in masks)
    assert set(told) == {"strong", "weak"}


def test_w2sd_of_a_video():
    wan, image = tiny_wan(), torch.zeros(1, 16, 2, 4, 4)
    for sampler in (w2sd(W2SD()), w2sd(W2SD(), guider_of(wan, 2.0, conditioning(9)))):
        run = sampled(wan, sampler, image=image)
        assert run.shape == image.shape and run.isfinite().all()


def test_pairs_that_cannot_reflect_are_refused(model, kind):
    other = tiny_flux() if kind == "unet" else tiny_unet()
    with pytest.raises(GuidanceError, match="does not share the latents"):
        sampled(model, w2sd(W2SD(), guider_of(other)), kind)
    with pytest.raises(GuidanceError, match="weak_cfg is 4 and so is the sampler's cfg"):
        sampled(model, w2sd(W2SD(weak_cfg=4.0)), kind)
    with pytest.raises(GuidanceError, match=r"'Guidance Weight \(CFG\)'.*from its weak_cfg"):
        sampled(add_guidance(model, METHODS["CFG"].method), w2sd(W2SD()), kind)
    with pytest.raises(GuidanceError, match="none of the 4 steps is reflected"):
        sampled(model, w2sd(W2SD(start=0.999)), kind)
    guider, shapes = guider_of(model), CONDConstant([(1, 4, 8, 8), (1, 4, 5, 3)])
    guider.conds = {"positive": [{"model_conds": {"latent_shapes": shapes}}]}  # as the host says it of LTX with sound
    with pytest.raises(GuidanceError, match="holds 2 parts"):
        check_pair(guider, guider_of(model), "W2SD")
    spread, clone = model.clone(), model.clone()
    clone.is_multigpu_base_clone = True  # as the host's multi-GPU node marks the copies of other devices
    spread.set_additional_models("multigpu", [clone])
    with pytest.raises(GuidanceError, match="spread over several GPUs"):
        check_pair(guider_of(spread), guider_of(model), "W2SD")
    base = MODELS[kind]()
    bad = add_guidance(model, AutoGuidance(bad=with_lora(base, 1.0)))
    with pytest.raises(GuidanceError, match="the worse model of AutoGuidance shares its weights"):
        sampled(bad, w2sd(W2SD(), guider_of(with_lora(base, -1.5))), kind)
    with pytest.raises(GuidanceError, match="the worse model of AutoGuidance shares its weights"):
        sampled(bad, w2sd(W2SD(), guider_of(add_guidance(model, AutoGuidance(bad=base)))), kind)
    both = add_guidance(model, AutoGuidance(bad=base))
    assert sampled(both, w2sd(W2SD(), guider_of(base)), kind).isfinite().all(), "one version serves both"
    guider = guider_of(model, 4.0)
    with pytest.raises(GuidanceError, match="the sampler's own guider"):
        advanced(guider, w2sd(W2SD(), guider), kind, model)
    with pytest.raises(GuidanceError, match="needs the negative's prediction"):
        advanced(custom.BasicGuider.execute(model, POSITIVE).args[0], w2sd(W2SD(weak_cfg=2.0)), kind, model)


# ------------------------------------------------------------------------------------------------- nodes


def test_the_cfg_pp_node():
    unet = tiny_unet()
    (sampler,) = RudderCFGPP.execute(guidance_lambda=LAMBDA, solver="dpm++ 2m", eta=1.0).args
    assert torch.equal(sampled(unet, sampler), sampled(unet, ours("dpm++ 2m")))
    with pytest.raises(GuidanceError, match="guidance_lambda is 7.5"):
        RudderCFGPP.execute(guidance_lambda=7.5, solver="euler", eta=1.0)


def test_the_w2sd_node():
    unet, given = tiny_unet(), {"weak_cfg": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    (sampler,) = RudderW2SD.execute(**given).args
    assert torch.equal(sampled(unet, sampler), sampled(unet, w2sd(W2SD())))
    (sampler,) = RudderW2SD.execute(**given, weak_guider=guider_of(unet, 2.0)).args
    close(sampled(unet, sampler), sampled(unet, w2sd(W2SD(weak_cfg=2.0))), rtol=1e-4, atol=1e-4)
    with pytest.raises(GuidanceError, match="start 0.8 and end 0.2"):
        RudderW2SD.execute(weak_cfg=1.0, start_percent=0.8, end_percent=0.2)


@pytest.mark.parametrize("sampler", [ours(), w2sd(W2SD(weak_cfg=1.0), None)], ids=["CFG++", "W2SD"])
def test_our_samplers_leave_no_ring_of_references_to_the_model(kind, sampler):
    model = MODELS[kind]()
    gone, collecting = weakref.ref(model), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        sampled(model, sampler, kind)
        del model
        assert gone() is None
    finally:
        if collecting:
            gc.enable()

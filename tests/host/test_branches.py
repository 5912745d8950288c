"""What a step asks beyond its batched call: other noise levels, other models, prompts without their image."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import comfy.hooks
import comfy.model_management
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_easycache import EasyCacheNode

from rudder.guidance.answer import ANSWER, away, found
from rudder.guidance.autoguidance import AutoGuidance
from rudder.guidance.cfg import cfg
from rudder.guidance.contract import Guidance, GuidanceError, Prompt
from rudder.guidance.instruct import InstructGuidance
from rudder.guidance.r2f import R2F
from rudder.guidance.trace import QUANTITIES, Recorder, Trace
from rudder.host import add_guidance, plan_of
from rudder.host.second import told
from rudder.nodes.guidance_models import RudderANSWER, RudderAutoGuidance, RudderInstruct

from .models import (
    MODELS,
    _patcher,
    calls,
    conditioning,
    evaluate,
    having,
    latent,
    lora,
    sample,
    tiny_unet,
    tiny_wan,
)
from .registry import NEGATIVE, POSITIVE, prompt, worse
from .test_composition import FOREIGN
from .test_methods import by_guider, by_ksampler, call

STEPS, WEIGHT = 4, 4.0
CHAINS = {"one": ANSWER(chain=1), "two": ANSWER(chain=2), "anti-prompt": ANSWER(chain=3, negative_scale=1.5)}


def wired(model, *methods):
    for method in methods:
        model = add_guidance(model, method)
    return model


def one_forward_a_cond(model):
    """A clone on a machine with so little memory that every cond needs a forward of its own."""
    patched = model.clone()
    patched.get_free_memory = lambda device: 0
    return patched


# ---------------------------------------------------------------- further evaluations: Step.evaluate


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("batch", [1, 3])
def test_answer_costs_what_it_says(model, kind, chain, batch):
    """Finite, repeatable, the same from both sampler nodes, evaluated as predicted, and the base model is untouched."""
    method, reference = CHAINS[chain], by_ksampler(model, kind, batch)
    counted, seen = calls(model)
    recorder = Recorder()
    run = by_ksampler(wired(counted, method, Trace(recorder=recorder)), kind, batch)
    assert run.isfinite().all()
    assert torch.allclose(run, reference, atol=1e-4) == (method.chain == 1)
    assert torch.equal(by_guider(wired(model, method), kind, batch), run)
    assert torch.equal(by_ksampler(model, kind, batch), reference)
    each = 1 if method.negative_scale == 1.0 else 2
    looks = [min(method.chain, STEPS - index) - 1 for index in range(STEPS)]
    batching = [count for look in looks for count in [2, *[each] * look]]
    assert seen["batching"] == batching and seen["network"] == [batch * count for count in batching]
    (record,) = recorder.runs.values()
    assert [step["evaluations"] for step in record["steps"]] == [2 + each * look for look in looks]
    assert record["evaluations"] == sum(batching)
    assert {key for step in record["steps"] for key in step} <= {*QUANTITIES, "index", "sigma"}


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_answer_is_its_formula(model, kind, sampler):
    """Against guidance written by hand, with predictions that the host makes one by one."""
    levels = comfy.samplers.KSampler(model, STEPS, model.load_device, sampler, "normal").sigmas.tolist()

    class ByHand(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006
            def predict(name, y, sigma):
                at = torch.full_like(timestep, sigma)
                return comfy.samplers.calc_cond_batch(self.inner_model, [self.conds[name]], y, at, model_options)[0]

            def negative(y, sigma):
                return away(predict("positive", y, sigma), predict("negative", y, sigma), 1.5)

            now = float(timestep[0])
            ahead = [now, *(level for level in levels if level < now * (1 - 1e-5))][:4]
            return cfg(predict("positive", x, now), found(x, negative(x, now), ahead, negative), WEIGHT)

    guider, image = ByHand(model), latent(kind, 2)
    guider.set_conds(POSITIVE, NEGATIVE)
    noise = comfy.sample.prepare_noise(image, 7)
    expected = guider.sample(
        noise, image, comfy.samplers.sampler_object(sampler), torch.tensor(levels), disable_pbar=True, seed=7
    )
    method = ANSWER(chain=3, negative_scale=1.5, cap=0.0)
    run = sample(wired(model, method), kind, POSITIVE, NEGATIVE, cfg=WEIGHT, batch=2, sampler=sampler)
    assert (run - expected).abs().max() < 2e-3 * expected.abs().max()


def test_a_batch_is_so_many_single_runs(model, kind):
    noise = comfy.sample.prepare_noise(latent(kind, 2), 7)
    patched = wired(model, CHAINS["anti-prompt"])
    batch = sample(patched, kind, POSITIVE, NEGATIVE, batch=2, noise=noise)
    for i in range(2):
        single = sample(patched, kind, POSITIVE, NEGATIVE, noise=noise[i : i + 1])
        assert (batch[i : i + 1] - single).abs().max() < 1e-3 * single.abs().max()


def test_little_memory_changes_nothing(model, kind):
    patched = wired(model, CHAINS["anti-prompt"])
    run = sample(patched, kind, POSITIVE, NEGATIVE, batch=3)
    split = sample(one_forward_a_cond(patched), kind, POSITIVE, NEGATIVE, batch=3)
    assert (split - run).abs().max() < 1e-3 * run.abs().max()


def test_video():
    model, image = tiny_wan(), torch.zeros(1, 16, 2, 4, 4)
    run = sample(wired(model, ANSWER()), "wan", POSITIVE, NEGATIVE, image=image, steps=3)
    assert run.shape == image.shape and run.isfinite().all()
    assert not torch.equal(run, sample(model, "wan", POSITIVE, NEGATIVE, image=image, steps=3))


def test_prompts_of_several_parts(model, kind):
    """Areas and masks count further on too: a positive of two parts that say the same is that positive."""
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1.0
    halves = having(POSITIVE, mask=mask, mask_strength=1.0) + having(POSITIVE, mask=1 - mask, mask_strength=1.0)
    patched = wired(model, CHAINS["anti-prompt"])
    whole = sample(patched, kind, POSITIVE, NEGATIVE)
    assert (sample(patched, kind, halves, NEGATIVE) - whole).abs().max() < 1e-3 * whole.abs().max()


def test_a_scheduled_positive_is_that_of_the_step(model, kind):
    """R2F's frequent prompt plays the positive along the whole chain of its step."""
    expected = sample(wired(model, ANSWER(chain=2, negative_scale=1.5)), kind, conditioning(4), NEGATIVE, steps=2)
    methods = (R2F(frequent=prompt(4, "frequent"), stop=1.0, mode="alternate"), ANSWER(chain=2, negative_scale=1.5))
    first = []

    class Watch(Guidance):
        def finish(self, step, x0):
            first.append(x0)
            return x0

    sample(wired(model, *methods, Watch()), kind, POSITIVE, NEGATIVE, steps=2)
    sample(wired(model, methods[1], Watch()), kind, conditioning(4), NEGATIVE, steps=2)
    assert expected.isfinite().all() and torch.equal(first[0], first[2]) and not torch.equal(first[1], first[3])


def test_looking_ahead_does_not_move_hook_schedules_on():
    """A LoRA whose strength changes at half of the run changes there, and the chain sees the strength of its step."""
    model, strengths = tiny_unet(), {}

    for chain in (1, 3):
        hooks, keyframes = comfy.hooks.create_hook_lora(lora(model, 1), 1.0, 1.0), comfy.hooks.HookKeyframeGroup()
        keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        keyframes.add(comfy.hooks.HookKeyframe(strength=0.0, start_percent=0.5))
        hooks.set_keyframes_on_hooks(keyframes)

        class Watch(Guidance):
            def finish(self, step, x0, hook=hooks.hooks[0], chain=chain):
                strengths.setdefault(chain, []).append(hook.strength)
                return x0

        methods = (ANSWER(chain=chain, negative_scale=2.0), Watch())
        sample(wired(model, *methods), "unet", having(POSITIVE, hooks=hooks), NEGATIVE, steps=6)
    assert strengths[1] == strengths[3] and set(strengths[1]) == {0.0, 1.0}


def test_step_caches_do_not_take_a_look_ahead_for_a_step(model, kind):
    """EasyCache keeps what it saw of the steps; one that never skips leaves the run as it is."""
    method = ANSWER(chain=3)
    never = EasyCacheNode.execute(wired(model, method), 0.0, 0.0, 1.0, False).args[0]
    assert torch.equal(sample(never, kind, POSITIVE, NEGATIVE), sample(wired(model, method), kind, POSITIVE, NEGATIVE))


@pytest.mark.parametrize("name", ["calc_cond_batch_function", "model_function_wrapper", "APG", "Mahiro"])
def test_answer_with_nodes_of_others(model, kind, name):
    foreign, method = FOREIGN[name], ANSWER(chain=2)
    run = sample(foreign(wired(model, method)), kind, POSITIVE, NEGATIVE)
    assert run.isfinite().all() and torch.equal(run, sample(wired(foreign(model), method), kind, POSITIVE, NEGATIVE))


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_sde", "uni_pc"])
def test_solvers_with_noise_and_memory(model, kind, solver):
    run, again = (sample(wired(model, ANSWER()), kind, POSITIVE, NEGATIVE, sampler=solver) for _ in range(2))
    assert run.isfinite().all() and torch.equal(run, again)


def test_asking_for_a_missing_negative_is_explained(model, kind):
    class Asks(Guidance):
        def finish(self, step, x0):
            return step.evaluate(step.x, step.level, "uncond")[0]

    guider = comfy.samplers.CFGGuider(wired(model, Asks()))
    guider.inner_set_conds({"positive": POSITIVE})
    noise = comfy.sample.prepare_noise(latent(kind), 7)
    with pytest.raises(GuidanceError, match="no conditioning for 'uncond'"):
        guider.sample(noise, latent(kind), comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]))


def test_a_method_may_ask_for_the_negative_where_guidance_is_off(model, kind):
    counted, seen = calls(model)
    looks = []

    class Asks(Guidance):
        def finish(self, step, x0):
            looks.extend(step.evaluate(step.x, step.level, "uncond", "cond"))
            return x0

    sample(wired(counted, Asks()), kind, POSITIVE, NEGATIVE, cfg=1.0, steps=1)
    assert seen["batching"] == [1, 2] and not torch.equal(*looks)


def test_answer_without_guidance_says_so(model, kind):
    with pytest.raises(GuidanceError, match=r"ANSWER.*Set cfg above 1"):
        sample(wired(model, ANSWER()), kind, POSITIVE, NEGATIVE, cfg=1.0)


# ---------------------------------------------------------------- another model: AutoGuidance


@pytest.fixture(scope="module")
def bad(model):
    return worse(model)


@pytest.mark.parametrize("weight", [WEIGHT, 1.0])
def test_autoguidance_is_its_formula(model, kind, bad, weight):
    good, worse = (evaluate(m, kind, POSITIVE, NEGATIVE, cfg=WEIGHT, batch=2) for m in (model, bad))
    ours = evaluate(wired(model, AutoGuidance(bad=bad, weight=20.0)), kind, POSITIVE, NEGATIVE, cfg=weight, batch=2)
    c, u, b = good["cond_denoised"], good["uncond_denoised"], worse["cond_denoised"]
    assert (19 * (b - c)).abs().max() > 0.1
    torch.testing.assert_close(ours["denoised"], cfg(c, u, weight) + 19 * (c - b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("weight", [WEIGHT, 1.0])
def test_autoguidance_costs_one_evaluation_of_the_other_model(model, kind, bad, batch, weight, monkeypatch):
    """Both are loaded in one call of the host, the base models are untouched, and nothing of the run is left."""
    (good, seen), (counted_bad, seen_bad) = calls(model), calls(bad)
    loads, load = [], comfy.model_management.load_models_gpu
    watch = lambda models, *args, **kwargs: (loads.append(models), load(models, *args, **kwargs))  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watch)
    reference = [sample(m, kind, POSITIVE, NEGATIVE, cfg=weight, batch=batch) for m in (model, bad)]
    loads.clear()
    recorder = Recorder()
    patched = wired(good, AutoGuidance(bad=counted_bad), Trace(recorder=recorder))
    run = sample(patched, kind, POSITIVE, NEGATIVE, cfg=weight, batch=batch)
    own = 2 if weight != 1.0 else 1
    assert run.isfinite().all() and not torch.equal(run, reference[0])
    assert seen["network"] == [own * batch] * STEPS and seen_bad["network"] == [batch] * STEPS
    (together,) = loads
    assert {m.model for m in together} == {model.model, bad.model}
    (record,) = recorder.runs.values()
    assert [step["evaluations"] for step in record["steps"]] == [own + 1] * STEPS
    assert {key for step in record["steps"] for key in step} <= {*QUANTITIES, "index", "sigma"}
    assert bad.model.current_patcher is None
    assert torch.equal(sample(patched, kind, POSITIVE, NEGATIVE, cfg=weight, batch=batch), run)
    for m, expected in zip((model, bad), reference):
        assert torch.equal(sample(m, kind, POSITIVE, NEGATIVE, cfg=weight, batch=batch), expected)


def test_a_bad_model_that_is_as_good_changes_nothing(model, kind):
    run = sample(wired(model, AutoGuidance(bad=MODELS[kind](), weight=3.0)), kind, POSITIVE, NEGATIVE)
    torch.testing.assert_close(run, sample(model, kind, POSITIVE, NEGATIVE), rtol=1e-4, atol=1e-4)


def test_the_other_model_sees_the_prompt_of_the_step(model, kind, bad):
    """While R2F's frequent prompt plays the positive, it does so for both models."""
    seen = []

    class Watch(Guidance):
        def finish(self, step, x0):
            seen.append(x0)
            return x0

    methods = (AutoGuidance(bad=bad), Watch())
    sample(wired(model, R2F(frequent=prompt(4, "frequent"), stop=1.0), *methods), kind, POSITIVE, NEGATIVE, steps=2)
    sample(wired(model, *methods), kind, conditioning(4), NEGATIVE, steps=2)
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-5, atol=1e-5)


def test_hooks_areas_and_images_with_another_model(model, kind, bad):
    """LoRA hooks act on the sampler's model alone; areas, a start image and a noise mask on both."""
    patched = wired(model, AutoGuidance(bad=bad))
    plain = sample(patched, kind, POSITIVE, NEGATIVE)
    hooks = comfy.hooks.create_hook_lora(lora(model, 1), 1.0, 1.0)
    assert not torch.equal(sample(patched, kind, having(POSITIVE, hooks=hooks), NEGATIVE), plain)
    assert torch.equal(sample(patched, kind, POSITIVE, NEGATIVE), plain)
    hooked = [having(part, hooks=comfy.hooks.create_hook_lora(lora(model, 1), 1.0, 1.0)) for part in
              (POSITIVE, NEGATIVE)]
    sample(patched, kind, *hooked)  # to its end with the LoRA in the weights
    assert torch.equal(sample(patched, kind, POSITIVE, NEGATIVE), plain)
    parts = POSITIVE + having(conditioning(4), area=(4, 8, 0, 0), strength=1.0)
    image, mask = torch.randn(latent(kind).shape), torch.ones(1, 64, 64)
    run = sample(patched, kind, parts, NEGATIVE, image=image, denoise=0.7, noise_mask=mask)
    assert run.isfinite().all()


def test_the_other_model_is_told_the_positive_alone(model, kind, bad, monkeypatch):
    """Also where the host copies an area of the negative to it."""
    told, own = [], bad.model.extra_conds

    def spy(**given):
        told.append((given["cross_attn"], given.get("area")))
        return own(**given)

    monkeypatch.setattr(bad.model, "extra_conds", spy)
    parts = NEGATIVE + having(conditioning(4), area=(4, 4, 0, 0), strength=1.0)
    sample(wired(model, AutoGuidance(bad=bad)), kind, POSITIVE, parts, steps=1)
    assert [area for _, area in told] == [None, (4, 4, 0, 0)]
    assert all(torch.equal(text, POSITIVE[0][0]) for text, _ in told)


def test_what_a_copied_area_says_and_where_it_acts():
    """It says what one of these conds does, and acts where the other's area does: not in the mask of the one."""
    features = {"c_crossattn": object()}
    mine = {"cross_attn": "mine", "mask": "of mine", "model_conds": features, "uuid": 1}
    copied = {"cross_attn": "other", "area": (4, 4, 0, 0), "model_conds": {**features}, "uuid": 2}
    assert told(mine, [mine, copied]) == mine
    assert told(copied, [mine, copied]) == {**copied, "cross_attn": "mine"}


def test_an_interrupted_run_leaves_no_trace(model, kind, bad):
    class Stops(Guidance):
        def finish(self, step, x0):
            raise KeyboardInterrupt

    patched = wired(model, AutoGuidance(bad=bad))
    run = sample(patched, kind, POSITIVE, NEGATIVE)
    with pytest.raises(KeyboardInterrupt):
        sample(wired(patched, Stops()), kind, POSITIVE, NEGATIVE)
    assert bad.model.current_patcher is None and torch.equal(sample(patched, kind, POSITIVE, NEGATIVE), run)


def test_models_that_do_not_fit_are_refused(model, kind):
    other = MODELS["flux" if kind == "unet" else "unet"]()
    for unfit, words in ((other, "latents of the kind"), (model, "the same as the model"),
                         (model.clone(), "the same as the model")):
        with pytest.raises(GuidanceError, match=words):
            call(RudderAutoGuidance, model=model, bad_model=unfit)
    with pytest.raises(GuidanceError, match="carries guidance nodes of Rudder"):
        call(RudderAutoGuidance, model=model, bad_model=wired(MODELS[kind](), ANSWER()))
    with pytest.raises(GuidanceError, match="shares its weights"):
        sample(wired(model, AutoGuidance(bad=model.clone())), kind, POSITIVE, NEGATIVE)
    shifted = model.clone()
    shifted.add_object_patch("model_sampling", copy.deepcopy(model.get_model_object("model_sampling")))
    around = {"RescaleCFG", "PerturbedAttentionGuidance", "CFGOverride", "EasyCache"} & {*FOREIGN}
    for one, two in [(model, FOREIGN[name](model)) for name in around] + [
        (shifted, model), (model, windowed(model, 1)), (windowed(model, 1), model)
    ]:
        with pytest.raises(GuidanceError, match=r"the same as the model.*do not count"):
            call(RudderAutoGuidance, model=one, bad_model=two)
    with pytest.raises(GuidanceError, match="the same as the model"):
        call(RudderAutoGuidance, model=wired(model, ANSWER()), bad_model=model)
    patched = comfy.sd.load_lora_for_models(model, None, lora(model, 9), 0.3, 0.0)[0]
    patched.cached_patcher_init = None
    with pytest.raises(GuidanceError, match="no way to load them a second time"):
        call(RudderAutoGuidance, model=model, bad_model=patched)


def test_a_copy_that_differs_in_the_network_is_taken(model, kind):
    """By another pack's function around the network, a wrapper under one key, or a module that a load puts in."""
    def wrapping(factor: float):
        out = model.clone()
        out.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "x",
                                 lambda executor, *args, **kwargs: executor(*args, **kwargs) * factor)
        return out

    name, module = next((n, m) for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear))
    replaced = model.clone()
    replaced.add_object_patch(name, copy.deepcopy(module))
    for one, two in ((model, FOREIGN["model_function_wrapper"](model)), (model, replaced),
                     (wrapping(1.0), wrapping(0.5))):
        [method] = plan_of(call(RudderAutoGuidance, model=one, bad_model=two)[0].model_options)
        assert method.bad.model is not model.model
        assert sample(wired(one, method), kind, POSITIVE, NEGATIVE, steps=2).isfinite().all()


def test_a_step_cache_on_the_bad_model_rests_and_that_is_said(model, kind, bad, caplog):
    """It prepares itself when sampling starts, and the second model is asked inside the first's sampling."""
    cached = EasyCacheNode.execute(bad, 3.0, 0.0, 1.0, False).args[0]
    plain = sample(wired(model, AutoGuidance(bad=bad)), kind, POSITIVE, NEGATIVE, steps=8)
    with caplog.at_level(logging.WARNING, "rudder"):
        run = sample(wired(model, AutoGuidance(bad=cached)), kind, POSITIVE, NEGATIVE, steps=8)
    assert torch.equal(run, plain)
    assert [record.getMessage()[:44] for record in caplog.records] == ["Rudder: 'easycache' on the worse model does "]
    holder = cached.model_options["transformer_options"]["easycache"]
    assert holder.x_prev_subsampled is None and not holder.uuid_cache_diffs


def windowed(model, dim: int, length: int = 5):
    windows = {"context_length": length, "context_overlap": 2, "context_schedule": "standard_static",
               "context_stride": 1, "closed_loop": False, "fuse_method": "pyramid", "dim": dim, "freenoise": False}
    return ContextWindowsManualNode.execute(model, **windows).args[0]


VIDEO = torch.zeros(1, 16, 9, 4, 4)


def test_the_second_model_looks_through_the_same_context_windows(caplog):
    """As good a model, asked of the whole video where the first sees windows, would push."""
    model = windowed(tiny_wan(), 2)
    counted, seen = calls(windowed(tiny_wan(), 2, length=3))
    with caplog.at_level(logging.WARNING, "rudder"):
        run = sample(wired(model, AutoGuidance(bad=counted, weight=3.0)), "wan", POSITIVE, NEGATIVE, image=VIDEO)
    torch.testing.assert_close(run, sample(model, "wan", POSITIVE, NEGATIVE, image=VIDEO), rtol=1e-4, atol=1e-4)
    assert len(seen["network"]) > STEPS, "windows"
    assert "'context windows' on the worse model does not act" in caplog.text


def test_context_windows_do_not_hold_the_second_model():
    """The host's handler remembers which model it was asked for last."""
    model, bad = windowed(tiny_wan(), 2), tiny_wan()
    network = weakref.ref(bad.model)
    patched = wired(model, AutoGuidance(bad=bad, weight=3.0))
    sample(patched, "wan", POSITIVE, NEGATIVE, image=VIDEO, steps=1)
    del bad, patched
    comfy.model_management.unload_all_models()
    gc.collect()
    assert network() is None


# ---------------------------------------------------------------- without the image: InstructPix2Pix


def editor(disable_dynamic: bool = False):
    """InstructPix2Pix in small: a UNet that takes the latent of an image beside its own."""

    class Tiny(comfy.supported_models.SD15_instructpix2pix):
        unet_extra_config = {"num_heads": 2, "num_head_channels": -1}

    unet = {**tiny_unet().model.model_config.unet_config, "in_channels": 8}
    unet.pop("num_heads", None), unet.pop("num_head_channels", None)
    return _patcher(Tiny(unet), editor)


def shown(conditioned: list) -> list:
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return having(conditioned, concat_latent_image=image)


def test_two_strengths_are_the_papers_equation():
    model, image = editor(), 1.7
    run = evaluate(model, "unet", shown(POSITIVE), shown(NEGATIVE), NEGATIVE, cfg=WEIGHT, batch=2)
    both, only_image, neither = run["cond_denoised"], run["uncond_denoised"], run["third"]
    assert not torch.allclose(only_image, neither, rtol=1e-2, atol=1e-2)
    expected = neither + image * (only_image - neither) + WEIGHT * (both - only_image)
    patched = wired(model, InstructGuidance(weight=image))
    ours = evaluate(patched, "unet", shown(POSITIVE), shown(NEGATIVE), cfg=WEIGHT, batch=2)
    torch.testing.assert_close(ours["denoised"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "weight", "cost"), [(1.5, WEIGHT, 3), (1.0, WEIGHT, 2), (1.5, 1.0, 3), (1.0, 1.0, 1)]
)
def test_what_two_strengths_cost(image, weight, cost):
    model, seen = calls(editor())
    run = sample(wired(model, InstructGuidance(weight=image)), "unet", shown(POSITIVE), shown(NEGATIVE), cfg=weight)
    assert seen["network"] == [cost] * STEPS and run.isfinite().all()
    if image == 1.0:
        assert torch.equal(run, sample(editor(), "unet", shown(POSITIVE), shown(NEGATIVE), cfg=weight))


def test_two_conditions_of_ones_own(model, kind):
    """On any model: from a base to a first prompt to both, each step with its own weight."""
    run = evaluate(model, kind, POSITIVE, NEGATIVE, conditioning(6), cfg=WEIGHT)
    both, first, base = run["cond_denoised"], run["uncond_denoised"], run["third"]
    patched = wired(model, InstructGuidance(weight=2.0, base=prompt(6, "base")))
    ours = evaluate(patched, kind, POSITIVE, NEGATIVE, cfg=WEIGHT)["denoised"]
    torch.testing.assert_close(ours, base + 2 * (first - base) + WEIGHT * (both - first), rtol=1e-4, atol=1e-4)


def test_without_an_image_it_says_so(model, kind):
    patched = wired(model, InstructGuidance())
    with pytest.raises(GuidanceError, match="shows the model no image.*InstructPixToPixConditioning"):
        sample(patched, kind, POSITIVE, NEGATIVE)
    with pytest.raises(GuidanceError, match="this model takes no image"):
        sample(patched, kind, shown(POSITIVE), shown(NEGATIVE))


# ---------------------------------------------------------------- nodes

NODES = {
    "ANSWER": (RudderANSWER, {}, ANSWER(end=0.8)),
    "image and text": (RudderInstruct, {"image_scale": 1.2}, InstructGuidance(weight=1.2)),
    "base": (RudderInstruct, {"base": POSITIVE}, InstructGuidance(base=Prompt(POSITIVE, "base"))),
    "ANSWER, all": (RudderANSWER, {"chain": 3, "negative_scale": 2.0, "norm_cap": 0.0, "end_percent": 1.0},
                    ANSWER(chain=3, negative_scale=2.0, cap=0.0)),
}


@pytest.mark.parametrize(("node", "inputs", "expected"), NODES.values(), ids=NODES)
def test_a_node_adds_its_method_to_a_clone(model, node, inputs, expected):
    (patched,) = call(node, model=model, **inputs)
    assert plan_of(patched.model_options) == (expected,) and plan_of(model.model_options) == ()


def test_autoguidance_gets_weights_of_its_own_where_the_models_share_them(model, kind):
    patched = comfy.sd.load_lora_for_models(model, None, lora(model, 9), 0.3, 0.0)[0]
    (given,) = plan_of(call(RudderAutoGuidance, model=model, bad_model=patched, weight=3.0)[0].model_options)
    assert given.weight == 3.0 and given.bad.model is not model.model
    assert given.bad.patches.keys() == patched.patches.keys()
    other = MODELS[kind]()
    (given,) = plan_of(call(RudderAutoGuidance, model=model, bad_model=other)[0].model_options)
    assert given == AutoGuidance(bad=other)

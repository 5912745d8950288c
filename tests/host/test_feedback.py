"""Methods that look at a run's own predictions or are fitted to a model, and the nodes that fit them."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management as management
import comfy.sd
import comfy.sd1_clip
import folder_paths
import numpy as np
import pytest
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.nested_tensor import NestedTensor
from comfy.supported_models_base import ClipTarget
from PIL import Image

import nodes as host_nodes
from rudder.demo import draw, judge, world
from rudder.demo.scorer import JudgeScorer
from rudder.guidance.adaptive import AdaptiveGuidance
from rudder.guidance.contract import GuidanceError
from rudder.guidance.linear_ag import LinearAG
from rudder.guidance.temporal import TemporalTAG
from rudder.guidance.temporal_fit import fresh
from rudder.guidance.trace import Recorder, Trace
from rudder.host import add_guidance, plan_of
from rudder.host.collect import predictions
from rudder.host.demo import MODELS, load_demo
from rudder.host.score import ClipScorer, decoder, preview
from rudder.nodes import guidance_feedback, store
from rudder.nodes.guidance_feedback import (
    RudderCLIPScorer,
    RudderDynamicCFG,
    RudderFitLinearAG,
    RudderJudgeScorer,
    RudderLoadTimePredictor,
    RudderTemporalTAG,
    RudderTrainTimePredictor,
    opened,
    pictures_in,
)
from rudder.nodes.guidance_more import RudderAdaptiveGuidance

from .models import CHANNELS, calls, latent, sample, tiny_wan
from .registry import NEGATIVE, POSITIVE
from .test_methods import call

STEPS = 6


@pytest.fixture
def models_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    return tmp_path / "rudder"


def traced(model, kind: str, steps: int = STEPS, **options) -> tuple[torch.Tensor, list[dict]]:
    recorder = Recorder()
    run = sample(add_guidance(model, Trace(recorder=recorder)), kind, POSITIVE, NEGATIVE, steps=steps, **options)
    return run, recorder.runs[""]["steps"]


# ---------------------------------------------------------------- LinearAG


def fitted(model, kind: str, **inputs):
    image = inputs.pop("latent_image", None) or {"samples": latent(kind)}
    given = {"model": model, "positive": POSITIVE, "negative": NEGATIVE, "latent_image": image}
    return call(RudderFitLinearAG, **{**given, "steps": STEPS, "cfg": 4.0, "runs": 2, "seed": 7, **inputs})[0]


def test_evaluations_are_really_left_out(model, kind):
    counted, seen = calls(model)
    _, steps = traced(add_guidance(counted, LinearAG(every=3)), kind, batch=2)
    assert seen["batching"] == [2, 1, 1, 2, 1, 1] and seen["network"] == [4, 2, 2, 4, 2, 2]
    assert [step["evaluations"] for step in steps] == seen["batching"]
    assert [step["predicted"] for step in steps] == [0, 1, 1, 0, 1, 1]
    assert all(step["weight"] == 4.0 for step in steps)


def test_collected_predictions_are_those_of_the_run(model, kind):
    run = (model, POSITIVE, NEGATIVE, {"samples": latent(kind, 2)}, 7, STEPS, 4.0, "euler", "normal")
    levels, cond, uncond = predictions(*run)
    assert len(levels) == STEPS and cond.shape == uncond.shape == (STEPS, *latent(kind, 2).shape)
    _, steps = traced(model, kind, batch=2)
    assert levels.tolist() == [step["sigma"] for step in steps]
    norms = torch.linalg.vector_norm((levels[0] * (cond - uncond))[0].flatten(1), dim=1)
    torch.testing.assert_close(norms, torch.tensor(steps[0]["guidance_norm"]), rtol=1e-4, atol=1e-4)


def test_an_empty_latent_is_collected_in_the_cells_of_the_model(model, kind):
    given = {"samples": torch.zeros(1, 4, 4, 4), "downscale_ratio_spacial": 16}  # these models have cells of 8 pixels
    _, conds, _ = predictions(model, POSITIVE, NEGATIVE, given, 7, 2, 4.0, "euler", "normal")
    assert conds.shape[1:] == (1, CHANNELS[kind], 8, 8)


def test_fitted_coefficients_come_nearer_to_plain_guidance_than_a_held_push(model, kind):
    plain = sample(model, kind, POSITIVE, NEGATIVE, steps=STEPS)
    coefficients = fitted(model, kind)
    away = {}
    for name, method in {"held": LinearAG(), "fitted": LinearAG(coefficients=coefficients)}.items():
        run, steps = traced(add_guidance(model, method), kind)
        assert [step["evaluations"] for step in steps] == [2, 1] * 3
        away[name] = float((run - plain).norm())
    unguided = float((sample(model, kind, POSITIVE, NEGATIVE, cfg=1.0, steps=STEPS) - plain).norm())
    assert away["fitted"] < away["held"] < unguided


def test_a_fit_is_kept_and_never_overwritten_unasked(model, kind, models_folder):
    counted, seen = calls(model)
    first = fitted(counted, kind, name="mine")
    file = models_folder / "linear_ag" / "mine.safetensors"
    assert file.is_file() and sum(seen["batching"]) == 2 * 2 * STEPS
    assert torch.equal(fitted(counted, kind, name="mine", seed=1).cond, first.cond)
    assert sum(seen["batching"]) == 2 * 2 * STEPS, "the file was there"
    written = file.read_bytes()
    assert not torch.equal(fitted(counted, kind, name="mine.safetensors", seed=1, overwrite=True).cond, first.cond)
    assert file.read_bytes() != written and [f.name for f in file.parent.iterdir()] == ["mine.safetensors"]
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"mine.safetensors.*cannot be read as safetensors"):
        fitted(counted, kind, name="mine")


def test_a_fit_that_cannot_be_right_is_refused(model, kind, models_folder):
    for name in ("a/b", "..", "../up"):
        with pytest.raises(ValueError, match="is no file name"):
            fitted(model, kind, name=name)
    with pytest.raises(ValueError, match="Fit on the MODEL before them"):
        fitted(add_guidance(model, LinearAG()), kind)
    for sampler in ("heun", "dpm_2", "dpmpp_sde"):
        with pytest.raises(ValueError, match=f"'{sampler}' evaluates the model more than once"):
            fitted(model, kind, sampler_name=sampler)
    with pytest.raises(ValueError, match="'dpm_adaptive' (chooses its own steps|evaluates the model more than once)"):
        fitted(model, kind, sampler_name="dpm_adaptive", runs=3)
    with pytest.raises(GuidanceError, match="fitted for 6 steps at other noise levels"):
        sample(add_guidance(model, LinearAG(coefficients=fitted(model, kind))), kind, POSITIVE, NEGATIVE, steps=9)


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "euler_cfg_pp"])
def test_linear_ag_with_other_samplers(model, kind, sampler):
    run, steps = traced(add_guidance(model, LinearAG()), kind, sampler=sampler)
    assert run.isfinite().all()
    saved = sum(step["evaluations"] == 1 for step in steps)
    assert saved == (0 if sampler == "euler_cfg_pp" else len(steps) // 2)  # cfg++ samplers ask for the real negative


def test_linear_ag_on_video():
    image = torch.zeros(1, 16, 2, 4, 4)
    model = tiny_wan()
    coefficients = fitted(model, "wan", latent_image={"samples": image})
    run, steps = traced(add_guidance(model, LinearAG(coefficients=coefficients)), "wan", image=image)
    assert run.isfinite().all() and [step["evaluations"] for step in steps] == [2, 1] * 3


def test_the_node_wires_one_or_both(model, kind):
    def wired(**inputs):
        return call(RudderAdaptiveGuidance, model=model, **inputs)[0]

    def methods(**inputs):
        return [type(method) for method in plan_of(wired(**inputs).model_options)]

    assert methods(mode="linear") == [LinearAG] and methods() == [AdaptiveGuidance]
    assert methods(mode="both", linear_until=0.4) == [LinearAG, AdaptiveGuidance]
    with pytest.raises(ValueError, match="'coefficients' are wired but nothing uses them"):
        methods(coefficients=fitted(model, kind))
    with pytest.raises(ValueError, match="'linear_until' is 0, so no step's negative is predicted"):
        methods(mode="both", linear_until=0.0)
    both, steps = traced(wired(mode="both", threshold=-1.0, start_percent=0.6), kind)
    assert both.isfinite().all() and steps[-1]["evaluations"] == 1 and steps[1]["predicted"] == 1


# ---------------------------------------------------------------- dynamic CFG


def vision(width: int = 32) -> ClipVisionModel:
    """A very small CLIP vision model of the host's class with random weights."""
    config = {
        "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "num_channels": 3,
        "patch_size": 8, "image_size": 32, "hidden_act": "quick_gelu", "projection_dim": width,
        "model_type": "clip_vision_model",
    }
    with torch.inference_mode(False), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"  # the floor reads a file
        file.write_text(json.dumps(config))
        model = ClipVisionModel(str(file))
        for parameter in model.model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.2
    return model


def text(projected: bool = True):
    """A very small CLIP text encoder of the host's class, 64 features wide."""
    config = {
        "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2,
        "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407, "layer_norm_eps": 1e-5,
    }
    target = ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    with torch.inference_mode(False):
        clip = comfy.sd.CLIP(target, model_options={"clip_l_model_config": config, "dtype": torch.float32})
        for name, parameter in clip.cond_stage_model.named_parameters():
            kept = projected or "text_projection" not in name
            parameter.data = torch.randn_like(parameter) * 0.2 if kept else torch.zeros_like(parameter)
    return clip


def test_weights_are_chosen_per_picture_and_cost_nothing(model, kind):
    counted, seen = calls(model)
    (patched,) = call(RudderDynamicCFG, model=counted, weights="1 10, 100,1000", limit=1.05)
    run, steps = traced(patched, kind, batch=3)
    assert run.isfinite().all() and seen["network"] == [6] * STEPS
    chosen = {weight for step in steps for weight in step["chosen_weight"]}
    assert chosen <= {1.0, 10.0, 100.0, 1000.0} and len(chosen) > 1


def test_clip_scores_candidates(model, kind):
    (scorer,) = call(RudderCLIPScorer, model=model, clip=text(), clip_vision=vision(64), text="a red circle")
    assert isinstance(scorer, ClipScorer) and scorer.text.shape == (1, 64)
    vae = SimpleNamespace(patcher=model)
    assert replace(scorer, vae=vae).models() == [scorer.vision.patcher, model]  # else the host may unload the sampled
    with_preview = scorer.decode(latent(kind, 2) + 0.1)
    assert with_preview.shape == (2, 8, 8, 3) and 0 <= with_preview.min() and with_preview.max() <= 1
    counted, seen = calls(model)
    (patched,) = call(RudderDynamicCFG, model=counted, scorer=scorer)
    assert patched.get_additional_models() and not model.get_additional_models()
    run, steps = traced(patched, kind, batch=2, steps=3)
    assert run.isfinite().all() and seen["network"] == [4] * 3
    again, _ = traced(patched, kind, batch=2, steps=3)
    assert torch.equal(run, again)
    single, _ = traced(call(RudderDynamicCFG, model=model, scorer=scorer, weights="4")[0], kind, batch=2, steps=3)
    plain = sample(model, kind, POSITIVE, NEGATIVE, batch=2, steps=3)
    torch.testing.assert_close(single, plain, rtol=1e-4, atol=1e-4)


def test_a_clip_that_cannot_score_is_explained(model):
    given = {"model": model, "text": "a red circle"}
    with pytest.raises(GuidanceError, match="gives 32 features a picture and the text encoders of 'clip' 64"):
        call(RudderCLIPScorer, clip=text(), clip_vision=vision(32), **given)
    with pytest.raises(GuidanceError, match="without its text projection"):
        call(RudderCLIPScorer, clip=text(projected=False), clip_vision=vision(64), **given)
    with pytest.raises(ValueError, match="'text' is empty"):
        call(RudderCLIPScorer, clip=text(), clip_vision=vision(64), model=model, text=" ")
    with pytest.raises(ValueError, match="'weights': '7,5;' is no number|'weights': '5;' is no number"):
        call(RudderDynamicCFG, model=model, weights="3, 7,5;")


def test_a_model_without_a_preview_needs_a_vae():
    class Unknown:
        latent_rgb_factors = None

    with pytest.raises(GuidanceError, match="no quick preview.*Wire a 'vae'"):
        preview(Unknown())


def test_the_preview_of_a_video_is_its_middle_frame(kind, model):
    decode = preview(model.get_model_object("latent_format"))
    video = torch.randn(2, latent(kind).shape[1], 3, 4, 4)
    torch.testing.assert_close(decode(video), decode(video[:, :, 1]))


def test_dynamic_cfg_on_video():
    image = torch.zeros(1, 16, 2, 4, 4)
    run, steps = traced(call(RudderDynamicCFG, model=tiny_wan())[0], "wan", image=image, steps=3)
    assert run.shape == image.shape and run.isfinite().all() and "chosen_weight" in steps[0]


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-flux"])
def test_the_judge_of_the_world_as_scorer(name):
    demo, clip, vae = load_demo(MODELS / f"{name}.safetensors")
    decode = decoder(vae, demo.get_model_object("latent_format"))
    captions = ("a red circle", "a blue star")
    scorer = JudgeScorer(judge.load(), decode, captions)
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (*captions, "")]
    features, settings = zip(*(prompt[0] for prompt in prompts[:2]))
    both = [[torch.cat(features), {"pooled_output": torch.cat([s["pooled_output"] for s in settings])}]]
    recorder = Recorder()
    (patched,) = call(RudderDynamicCFG, model=demo, weights="1, 3, 7.5", scorer=scorer)
    image = {"samples": torch.zeros(2, 16, 16, 16)}
    patched = add_guidance(patched, Trace(recorder=recorder))
    out = host_nodes.KSampler().sample(patched, 3, 4, 5.0, "euler", "normal", both, prompts[2], image)[0]["samples"]
    steps = recorder.runs[""]["steps"]
    assert out.isfinite().all() and all(step["evaluations"] == 2 for step in steps)
    assert all(weight in (1.0, 3.0, 7.5) for step in steps for weight in step["chosen_weight"])
    assert scorer(demo.get_model_object("latent_format").process_in(out), None).shape == (2,)


@pytest.fixture(scope="module")
def demo_parts():
    return load_demo(MODELS / "shapes-unet.safetensors")


def drawn(color: str, shape: str) -> torch.Tensor:
    """A true picture ``[64, 64, 3]`` of a plain thing on white."""
    scenes = world.sample(np.random.default_rng(0), 20_000, pairs=0.0)
    wanted = {"shape": world.NOUNS.index(shape), "color": list(world.COLORS).index(color), "attribute": 0, "texture": 0}
    fits = np.logical_and.reduce([getattr(scenes, name)[:, 0] == value for name, value in wanted.items()])
    at = np.flatnonzero(fits & (scenes.background == 0))[:1]
    return torch.from_numpy(draw.render(scenes[at])[0]).float()[0] / 255


def test_the_node_of_the_judge(demo_parts):
    demo, clip, vae = demo_parts
    (scorer,) = call(RudderJudgeScorer, model=demo, vae=vae, text="a red circle on a white background")
    shown = torch.stack([drawn("red", "circle"), drawn("red", "star"), drawn("blue", "star")])
    right, half, wrong = scorer(demo.get_model_object("latent_format").process_in(vae.encode(shown)), None).tolist()
    assert right > half + 1 > wrong + 1
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a red circle", ""))
    (patched,) = call(RudderDynamicCFG, model=demo, scorer=scorer)
    image = {"samples": torch.zeros(2, 16, 16, 16)}
    for _ in range(2):  # the scorer remembers nothing
        out = host_nodes.KSampler().sample(patched, 3, 2, 5.0, "euler", "normal", positive, negative, image)[0]
        assert scorer(demo.get_model_object("latent_format").process_in(out["samples"]), None).shape == (2,)


def test_what_the_judge_cannot_read_is_named(demo_parts, model):
    demo, _, vae = demo_parts
    for text in ("", "photo of a cat", "red circle", "a red circle left of a blue star above a red star"):
        with pytest.raises(GuidanceError, match="'text': cannot read.*such as 'a spiky red heart"):
            call(RudderJudgeScorer, model=demo, vae=vae, text=text)
    for text in ("a red circle left of a blue star left of a green heart",
                 "a red circle on a navy background on a beige background"):
        with pytest.raises(GuidanceError, match="'text': more than two objects, or more than one background"):
            call(RudderJudgeScorer, model=demo, vae=vae, text=text)
    with pytest.raises(GuidanceError, match="only pictures of the demo models.*Use CLIP Scorer"):
        call(RudderJudgeScorer, model=model, vae=vae, text="a red circle")
    (scorer,) = call(RudderJudgeScorer, model=demo, vae=vae, text="a red circle")
    with pytest.raises(GuidanceError, match="64x64 pixels and these have 96x64"):
        scorer(torch.zeros(1, 16, 16, 24), None)


# ---------------------------------------------------------------- temporal TAG


@pytest.fixture
def saved(models_folder):
    """A predictor of four channels in the models folder."""
    file = models_folder / "time" / "mine.safetensors"
    store.save(file, fresh(4, torch.Generator().manual_seed(0)), {})
    return file


def trained(model, **inputs):
    return call(RudderTrainTimePredictor, model=model, **{"name": "mine", "steps": 3, **inputs})[0]


def test_a_predictor_is_trained_kept_and_never_overwritten_unasked(model, kind, models_folder):
    samples = {"samples": sample(model, kind, POSITIVE, NEGATIVE, batch=2, steps=2).repeat(8, 1, 1, 1)}
    first = trained(model, latents=samples)
    file = models_folder / "time" / "mine.safetensors"
    written = file.read_bytes()
    again = trained(model, latents=samples, seed=1, steps=100000)  # at once: the file is there
    assert all(torch.equal(again.weights[name], weight) for name, weight in first.weights.items())
    trained(model, latents=samples, seed=1, overwrite=True)
    assert file.read_bytes() != written and store.names("time") == ["mine.safetensors"]
    run, steps = traced(call(RudderTemporalTAG, model=model, predictor=first, strength=50.0)[0], kind, batch=2)
    assert run.isfinite().all() and all(step["evaluations"] == 2 for step in steps)
    assert all(0 <= shift <= 0.0201 for step in steps for shift in step["shift"])
    assert not torch.equal(run, sample(model, kind, POSITIVE, NEGATIVE, batch=2, steps=STEPS))


def test_the_bundled_predictor_reads_noise_levels_of_both_demo_models():
    """And a run that is off its noise level comes back to it."""
    (predictor,) = call(RudderLoadTimePredictor)
    file = MODELS / "shapes-time.safetensors"
    assert file.stat().st_size <= 0.5e6
    for name in ("shapes-unet", "shapes-flux"):
        demo, clip, _ = load_demo(MODELS / f"{name}.safetensors")
        prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a red circle", "")]
        gaps = {}
        for strength in (0.0, 20.0):
            recorder = Recorder()
            (patched,) = call(RudderTemporalTAG, model=demo, predictor=predictor, strength=strength)
            sample(add_guidance(patched, Trace(recorder=recorder)), "demo", *prompts, cfg=7.0, steps=8,
                   image=torch.zeros(2, 16, 16, 16))
            steps = recorder.runs[""]["steps"]
            gaps[strength] = sum(abs(gap) for step in steps for gap in step["time_gap"]) / (2 * len(steps))
        assert gaps[20.0] <= gaps[0.0] < 0.2, (name, gaps)


def test_training_on_a_folder_of_pictures(monkeypatch, tmp_path, models_folder):
    demo, _, vae = load_demo(MODELS / "shapes-unet.safetensors")
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    (tmp_path / "shapes").mkdir()
    for i in range(14):
        Image.new("RGB", (70 + i, 64), (10 * i, 200, 90)).save(tmp_path / "shapes" / f"{i}.png")
    predictor = trained(demo, vae=vae, folder="shapes", size=64, images=torch.rand(2, 64, 64, 3))
    assert predictor.channels == 16
    for inputs, says in (
        ({}, "Nothing to train on"), ({"folder": "shapes"}, "need a 'vae'"),
        ({"folder": "nowhere", "vae": vae}, "no folder 'nowhere'"), ({"folder": "..", "vae": vae}, "no folder '..'"),
        ({"folder": "shapes", "size": 64, "vae": vae, "images": torch.rand(1, 32, 32, 3)}, "several sizes"),
    ):
        with pytest.raises(ValueError, match=says):
            trained(demo, name="other", **inputs)
    with pytest.raises(ValueError, match="is no file name"):
        trained(demo, name="")
    asked, is_dir = [], Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda self: asked.append(self) or is_dir(self))
    for outside in ("/net/evil/share", "../..", "shapes/../../other"):
        with pytest.raises(ValueError, match="no folder"):
            trained(demo, name="other", vae=vae, folder=outside)
    assert not [place for place in asked if "evil" in str(place) or place in (*tmp_path.parents, tmp_path.parent)]


def test_what_cannot_be_trained_on_is_named(model, kind, models_folder):
    good = latent(kind, 16)
    broken = good.clone()
    broken[3, 0, 1, 1] = torch.nan
    for given, says in (
        (good[:15], "15 latents are too few"), (torch.zeros(0, *good.shape[1:]), "0 latents are too few"),
        (good[:, :, 0], "'latents': latents of shape .* are no pictures or video"),
        (good[:, :1], f"'latents': latents of 1 channels, and those of 'model' have {CHANNELS[kind]}"),
        (broken, "'latents': some latents are not finite.*--fp32-vae"),
        (NestedTensor((good, good)), "'latents': latents of several parts"),
    ):
        with pytest.raises(ValueError, match=says):
            trained(model, latents={"samples": given})
    assert not models_folder.exists()
    assert trained(tiny_wan(), latents={"samples": torch.randn(2, 16, 8, 4, 4)}).channels == 16, "frames count"


def test_pictures_are_encoded_as_they_are_read(monkeypatch, tmp_path, models_folder):
    """Never a whole folder in memory; and what is missing is said before it is read."""
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    for i in range(16):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{i}.png")
    happened = []

    class Encoder:
        def encode(self, pictures):
            happened.append("encoded")
            return torch.zeros(len(pictures), 16, 8, 8)

    def reading(*args):
        for picture in pictures_in(*args):
            happened.append("read")
            yield picture

    monkeypatch.setattr("rudder.nodes.guidance_feedback.pictures_in", reading)
    demo, _, _ = load_demo(MODELS / "shapes-unet.safetensors")
    with pytest.raises(ValueError, match="need a 'vae'"):
        trained(demo, folder=".", size=64)
    assert not happened
    trained(demo, folder=".", size=64, vae=Encoder())
    assert happened == ["read", "encoded"] * 16


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells of mapped files on Linux")
def test_what_is_read_is_in_one_order(saved):
    """Tables know a predictor by how it prints, and bytes of a safetensors file come in any order."""
    names = [f"conv{i}.weight" for i in range(12)]
    store.save(saved, {name: torch.zeros(1) for name in reversed(names)}, {})
    for _ in range(3):
        assert [*store.load(saved)] == sorted(names)


def test_what_cannot_be_saved_is_said_before_the_work(model, kind, models_folder, monkeypatch):
    models_folder.write_text("a file where the folder should be")
    monkeypatch.setattr(guidance_feedback, "train", lambda *given, **more: pytest.fail("trained for nothing"))
    monkeypatch.setattr(guidance_feedback, "predictions", lambda *given: pytest.fail("sampled for nothing"))
    with pytest.raises(ValueError, match="'name': .*mine.safetensors could not be written"):
        trained(model, latents={"samples": latent(kind, 16)})
    with pytest.raises(ValueError, match="'name': .*mine.safetensors could not be written"):
        fitted(model, kind, name="mine")


def test_a_file_that_is_in_use_can_be_replaced_on_windows_too(saved):
    """There a mapped file cannot."""
    weights = store.load(saved)
    assert weights and str(saved) not in Path("/proc/self/maps").read_text()


def test_a_predictor_that_was_trained_again_is_read_again(saved):
    before = RudderLoadTimePredictor.fingerprint_inputs(predictor_name="mine.safetensors")
    assert before == RudderLoadTimePredictor.fingerprint_inputs(predictor_name="mine.safetensors")
    store.save(saved, fresh(4, torch.Generator().manual_seed(1)), {"steps": "1"})
    assert RudderLoadTimePredictor.fingerprint_inputs(predictor_name="mine.safetensors") != before
    assert RudderLoadTimePredictor.fingerprint_inputs(predictor_name="none.safetensors") == []


def test_seeds_stay_as_they_are_between_queues_and_reach_to_the_end(model, kind):
    """The frontend would draw a new 'seed' for each queue by itself, and the work would be done again."""
    for node in (RudderFitLinearAG, RudderTrainTimePredictor):
        assert node.INPUT_TYPES()["required"]["seed"][1]["control_after_generate"] is False
    assert fitted(model, kind, seed=2**64 - 1).cond.isfinite().all()


def test_a_model_that_predicts_no_numbers_is_not_fitted(model, kind, models_folder):
    broken = [[features * torch.nan, options] for features, options in POSITIVE]
    with pytest.raises(ValueError, match="predictions of 'model' are not finite"):
        fitted(model, kind, positive=broken, name="mine")
    assert not models_folder.exists()


def test_an_interrupted_training_leaves_no_file(model, kind, models_folder):
    management.interrupt_current_processing(True)
    try:
        with pytest.raises(management.InterruptProcessingException):
            trained(model, latents={"samples": latent(kind, 16)})
    finally:
        management.interrupt_current_processing(False)
    assert not models_folder.exists()


def test_a_predictor_of_other_latents_is_refused(model, kind, saved):
    given = RudderLoadTimePredictor.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(
        predictor_name="mine.safetensors").args[0]
    if kind == "unet":
        assert len(plan_of(call(RudderTemporalTAG, model=model, predictor=given)[0].model_options)) == 1
        return
    with pytest.raises(ValueError, match="reads latents of 4 channels and the latents of 'model' have 16"):
        call(RudderTemporalTAG, model=model, predictor=given)
    with pytest.raises(GuidanceError, match="with 4 channels, and this model's are 16x8x8"):
        sample(add_guidance(model, TemporalTAG(predictor=given)), kind, POSITIVE, NEGATIVE)
    spoilt = {**fresh(4, torch.Generator().manual_seed(0)), "out.bias": torch.full((64,), torch.nan)}
    store.save(saved, spoilt, {})
    with pytest.raises(ValueError, match="mine.safetensors: its weights are not finite"):
        opened(saved)
    store.save(saved, {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="mine.safetensors: This is no time predictor: it holds a"):
        opened(saved)

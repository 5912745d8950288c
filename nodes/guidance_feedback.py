"""Nodes that let a run look at its own predictions, and nodes that fit what such methods need to a model."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image, ImageOps

from ..guidance.contract import GuidanceError
from ..guidance.dynamic import DynamicCFG
from ..guidance.linear_fit import Coefficients, errors, fit, gram
from ..guidance.scorers import Overshoot
from ..guidance.temporal import TemporalTAG
from ..guidance.temporal_fit import LEAST, train
from ..guidance.temporal_net import TimePredictor
from ..host import plan_of
from ..host.collect import predictions
from ..host.demo import MODELS
from ..host.score import clip_scorer, judge_scorer
from . import store
from .guidance import CATEGORY, model_input, model_output, patched, window_inputs
from .guidance_more import CoefficientsType

ScorerType = io.Custom("RUDDER_SCORER")
PredictorType = io.Custom("RUDDER_TIME_PREDICTOR")
BUNDLED = "shapes (bundled)"
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
LOADERS = "model/loaders/rudder"
SEEDS = 2**64
log = logging.getLogger("rudder")


def file_inputs(what: str, folder: str, unnamed: str) -> list:
    return [
        io.String.Input(
            "name", default="",
            tooltip=f"File name for the {what} in ComfyUI's models/rudder/{folder} folder. If the file is there it is "
            f"used as it is, without any work. {unnamed}",
        ),
        io.Boolean.Input(
            "overwrite", default=False,
            tooltip="Make it anew even if the file is there, and replace the file.",
        ),
    ]


class RudderFitLinearAG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderFitLinearAG",
            display_name="Fit Faster Guidance (LinearAG)",
            category=LOADERS,
            description="Runs the sampler a few times with plain guidance and finds the coefficients with which Faster "
            "Guidance predicts the negative on this model: once for a model, sampler setting and number of steps. "
            "LinearAG (AAAI 2025, arXiv 2312.12487). 2 model evaluations a step and run, none when the file is there.",
            search_aliases=["linear ag", "adaptive guidance fit", "regression", "faster cfg"],
            inputs=[
                io.Model.Input("model", tooltip="The model to fit, before any Rudder node, Guidance Trace too."),
                io.Conditioning.Input("positive", tooltip="A typical prompt; a list of several areas is fine too."),
                io.Conditioning.Input("negative", tooltip="The negative that you sample with."),
                io.Latent.Input("latent_image", tooltip="An empty latent of your size. Its batch counts: 4 pictures "
                                "in 2 runs are 8 samples to fit."),
                *file_inputs("coefficients", "linear_ag", "Empty: they are not kept, and overwrite has no meaning."),
                io.Int.Input("runs", default=4, min=1, max=64,
                             tooltip="How many times to sample, 1 to 64. 4 to 8 samples in all are enough."),
                io.Int.Input("steps", default=20, min=2, max=1000, tooltip="As in the sampler that uses the result."),
                io.Float.Input("cfg", default=7.0, min=1.1, max=100.0, step=0.1, round=False,
                               tooltip="As in the sampler. Paper: 7.5."),
                io.Combo.Input("sampler_name", options=list(comfy.samplers.KSampler.SAMPLERS), default="euler",
                               tooltip="As in the sampler; one of a single evaluation a step, such as euler, ddim, "
                               "dpmpp_2m."),
                io.Combo.Input("scheduler", options=list(comfy.samplers.KSampler.SCHEDULERS), default="normal",
                               tooltip="As in the sampler: the coefficients belong to its noise levels."),
                io.Int.Input("every", default=2, min=2, max=10,
                             tooltip="As in Faster Guidance: every how many steps the negative is evaluated; paper 2."),
                io.Int.Input("seed", default=0, min=0, max=SEEDS - 1, control_after_generate=False,
                             tooltip="Of the first run; every further run takes the next one."),
            ],
            outputs=[CoefficientsType.Output(display_name="COEFFICIENTS", tooltip="For Faster Guidance (Adaptive).")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, latent_image, name, overwrite, runs, steps, cfg, sampler_name, scheduler, every,
        seed,
    ) -> io.NodeOutput:
        file = store.target("linear_ag", name) if name.strip() else None
        if file and file.is_file() and not overwrite:
            try:
                return io.NodeOutput(Coefficients.read(store.load(file)))
            except ValueError as error:
                raise ValueError(f"{file}: {error}. Choose another 'name', or set 'overwrite'.") from error
        if plan_of(model.model_options):
            raise ValueError("'model' carries Rudder methods. Fit on the MODEL before them: with plain guidance.")
        if file:
            store.prepare(file)
        first, products, progress = None, 0.0, comfy.utils.ProgressBar(runs)
        for run in range(runs):
            comfy.model_management.throw_exception_if_processing_interrupted()
            levels, cond, uncond = predictions(
                model, positive, negative, latent_image, (seed + run) % SEEDS, steps, cfg, sampler_name, scheduler
            )
            if run and not torch.equal(levels, first):
                raise ValueError(f"The sampler '{sampler_name}' chooses its own steps, other ones in each run, so "
                                 "there is nothing to fit. Choose one with fixed steps, such as euler or dpmpp_2m.")
            first = levels
            products = products + gram(torch.cat((cond, uncond)).flatten(1))
            progress.update_absolute(run + 1, runs)
        if not bool(products.isfinite().all()):
            raise ValueError("The predictions of 'model' are not finite here (NaN or infinity), so there is nothing to "
                             "fit: see whether plain sampling works with these settings.")
        found = fit(products, levels, every)
        ours, held = errors(products, found)
        log.info("Rudder: LinearAG misses %.1f %% of the push, holding the last one %.1f %%.", 100 * ours, 100 * held)
        if file:
            about = {"steps": str(steps), "sampler": sampler_name, "scheduler": scheduler, "cfg": str(cfg)}
            store.save(file, found.tensors(), {**about, "runs": str(runs), "error": f"{ours:.4f}"})
        return io.NodeOutput(found)


def read_weights(text: str) -> tuple[float, ...]:
    """Numbers separated by commas or spaces.

    Raises:
        ValueError: names what is no number.
    """
    out = []
    for part in text.replace(",", " ").split():
        try:
            out.append(float(part))
        except ValueError:
            raise ValueError(f"'weights': '{part}' is no number. Write them as 1, 3, 7.5, 11, 15.") from None
    return tuple(out)


class RudderDynamicCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderDynamicCFG",
            display_name="Self-tuning CFG (dynamic)",
            category=CATEGORY,
            description="Finds the guidance weight by itself: at every step each picture tries several weights on the "
            "two predictions it has and takes the one that scores best. Dynamic CFG (ICLR 2026, arXiv 2509.16131), "
            "with a scorer of your choice. 2 model evaluations a step, as CFG. Needs cfg above 1 in the sampler.",
            search_aliases=["dynamic cfg", "cfg feedback", "adaptive cfg", "automatic cfg", "cfg search"],
            inputs=[
                model_input(),
                io.String.Input(
                    "weights", default="1, 3, 7.5, 11, 15",
                    tooltip="The guidance weights to choose from, 1 is no guidance. Paper: 1, 3, 7.5, 11, 15. They "
                    "take the place of the sampler's cfg, which only has to be above 1 and breaks ties.",
                ),
                io.Float.Input(
                    "limit", default=1.1, min=0.5, max=5.0, step=0.01, round=False,
                    tooltip="Without a scorer: the strongest weight that keeps the contrast of the picture, as a "
                    "factor of the unguided one, below this. 1.1 allows ten percent more. Our choice, not a paper's.",
                ),
                ScorerType.Input(
                    "scorer", optional=True,
                    tooltip="Judges the candidates: CLIP Scorer, or Shapes Judge Scorer for the demo models. None: the "
                    "contrast limit above.",
                ),
                *window_inputs(outside="Outside, the sampler's own cfg counts."),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, weights, limit, start_percent, end_percent, scorer=None) -> io.NodeOutput:
        if scorer is not None and hasattr(scorer, "models"):
            model = model.clone()  # the scorer's models are loaded with it, so that nothing is evicted in mid-run
            model.set_additional_models("rudder_scorer", scorer.models())
        scorer = Overshoot(limit) if scorer is None else scorer
        window = {"start": start_percent, "end": end_percent}
        return patched(model, DynamicCFG(weights=read_weights(weights), scorer=scorer, **window))


class RudderCLIPScorer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderCLIPScorer",
            display_name="CLIP Scorer",
            category=CATEGORY,
            description="Scores predicted pictures by how well they show a text, with a CLIP vision model: for "
            "Self-tuning CFG. The picture comes from a quick linear preview, or from a VAE. No model evaluations.",
            search_aliases=["clip score", "scorer", "reward", "text alignment"],
            inputs=[
                io.Model.Input("model", tooltip="The model that is sampled: only the kind of its latents is read."),
                io.Clip.Input("clip", tooltip="A CLIP text encoder with its projection, of the same CLIP as the vision "
                              "model: clip_l.safetensors from Load CLIP, or SDXL's for a ViT-bigG."),
                io.ClipVision.Input("clip_vision", tooltip="CLIP ViT-L (768 features) for clip_l, ViT-bigG (1280) for "
                                    "SDXL's clip_g."),
                io.String.Input("text", default="", multiline=True,
                                tooltip="What the picture should show, up to 75 tokens: usually your positive prompt."),
                io.Vae.Input("vae", optional=True,
                             tooltip="Decode with this instead of the linear preview of one colour a latent cell, once "
                             "for each weight and step: best a tiny one (taesd)."),
            ],
            outputs=[ScorerType.Output(display_name="SCORER", tooltip="For Self-tuning CFG.")],
        )

    @classmethod
    def execute(cls, model, clip, clip_vision, text, vae=None) -> io.NodeOutput:
        if not text.strip():
            raise ValueError("'text' is empty: every picture would fit it alike. Write what the picture should show.")
        return io.NodeOutput(clip_scorer(clip, clip_vision, text, model.get_model_object("latent_format"), vae))


class RudderJudgeScorer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderJudgeScorer",
            display_name="Shapes Judge Scorer",
            category=CATEGORY,
            description="Scores predicted pictures of the demo models by how well they show a caption, with the small "
            "judge of the shapes world: for Self-tuning CFG, where CLIP would read pictures of a large model. "
            "No model evaluations.",
            search_aliases=["judge", "scorer", "reward", "shapes", "demo scorer"],
            inputs=[
                io.Model.Input("model", tooltip="The demo model that is sampled; only its latents' kind is read."),
                io.Vae.Input("vae", tooltip="The demo model's VAE; the judge reads decoded pictures of 64x64 pixels."),
                io.String.Input("text", default="", multiline=True,
                                tooltip="What the picture should show, in the words of the demo world, such as 'a "
                                "spiky red heart': usually your positive prompt. One text for the whole batch."),
            ],
            outputs=[ScorerType.Output(display_name="SCORER", tooltip="For Self-tuning CFG.")],
        )

    @classmethod
    def execute(cls, model, vae, text) -> io.NodeOutput:
        return io.NodeOutput(judge_scorer(text, model.get_model_object("latent_format"), vae))


# ---------------------------------------------------------------- temporal TAG


class RudderTemporalTAG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderTemporalTAG",
            display_name="Noise Level Alignment (TAG)",
            category=CATEGORY,
            description="Keeps a run on its noise level: a tiny net reads how noisy the latent is and pulls it to "
            "what the sampler believes, before each step. Meant for runs that guidance or editing pushes off. Temporal "
            "alignment guidance (arXiv 2510.11057). No extra model evaluations; works at any cfg.",
            search_aliases=["temporal alignment guidance", "tag", "time predictor", "noise level correction"],
            inputs=[
                model_input(),
                PredictorType.Input("predictor", tooltip="From Load or Train Time Predictor, for these latents."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=1000.0, step=0.1, round=False,
                    tooltip="How hard it pulls (omega 0); 0 changes nothing. The paper searches it for each task, from "
                    "0.2 to 200, and gives none for text to image: raise it while the trace's time_gap shrinks.",
                ),
                io.Float.Input(
                    "limit", default=0.02, min=0.0, max=1.0, step=0.005, round=False, advanced=True,
                    tooltip="The longest pull of a step, as a share of the length of the latent. 0.02 is two percent. "
                    "Our safety, not the paper's.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, predictor, strength, limit, start_percent, end_percent) -> io.NodeOutput:
        channels = model.get_model_object("latent_format").latent_channels
        if channels != predictor.channels:
            raise ValueError(f"'predictor' reads latents of {predictor.channels} channels and the latents of 'model' "
                             f"have {channels}: it is for another model. Train one with Train Time Predictor.")
        window = {"start": start_percent, "end": end_percent}
        return patched(model, TemporalTAG(predictor=predictor, strength=strength, limit=limit, **window))


def opened(file: Path) -> TimePredictor:
    """Outside of inference mode: the predictor is differentiated."""
    with torch.inference_mode(False):
        try:
            predictor = TimePredictor({name: weight.float() for name, weight in store.load(file).items()})
        except GuidanceError as error:
            raise ValueError(f"{file}: {error}") from error
    if not all(bool(weight.isfinite().all()) for weight in predictor.weights.values()):
        raise ValueError(f"{file}: its weights are not finite (NaN or infinity), and so would every picture be. Train "
                         "it again, with 'overwrite'.")
    return predictor


class RudderLoadTimePredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderLoadTimePredictor",
            display_name="Load Time Predictor",
            category=LOADERS,
            description="Loads the small net that reads the noise level of a latent, for Noise Level Alignment. One "
            "comes with Rudder for its demo models; Train Time Predictor makes them for others.",
            search_aliases=["noise level predictor", "tag predictor"],
            inputs=[
                io.Combo.Input(
                    "predictor_name", options=[BUNDLED, *store.names("time")], default=BUNDLED,
                    tooltip="A file of models/rudder/time. A predictor belongs to one latent space: SD1.5's, SDXL's, "
                    "Flux's. The bundled one is for the demo models.",
                ),
            ],
            outputs=[PredictorType.Output(display_name="PREDICTOR", tooltip="For Noise Level Alignment.")],
        )

    @classmethod
    def execute(cls, predictor_name) -> io.NodeOutput:
        if predictor_name == BUNDLED:
            return io.NodeOutput(opened(MODELS / "shapes-time.safetensors"))
        store.folder("time")
        return io.NodeOutput(opened(Path(folder_paths.get_full_path_or_raise("rudder_time", predictor_name))))

    @classmethod
    def fingerprint_inputs(cls, predictor_name) -> list[int]:
        """So that one trained again under its name is read again."""
        store.folder("time")
        if predictor_name == BUNDLED or not (path := folder_paths.get_full_path("rudder_time", predictor_name)):
            return []
        state = Path(path).stat()
        return [state.st_mtime_ns, state.st_size]


class RudderTrainTimePredictor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderTrainTimePredictor",
            display_name="Train Time Predictor",
            category=LOADERS,
            description="Trains the small net of Noise Level Alignment for your model's latents: on a folder of "
            "pictures, on IMAGEs, or on LATENTs that the model made. Minutes on a CPU, once for each kind of latents. "
            "No model evaluations; nothing is computed when the file is there.",
            search_aliases=["train tag", "noise level predictor", "time predictor"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="Only the kind of its latents is read."),
                *file_inputs("predictor", "time", "It has to have a name."),
                io.Latent.Input("latents", optional=True, tooltip="Clean latents to train on, 16 or more: what "
                                "samplers give, or VAE Encode."),
                io.Image.Input("images", optional=True, tooltip="Pictures to train on, 16 or more; needs 'vae'."),
                io.String.Input("folder", default="", tooltip="A folder of pictures inside ComfyUI's input folder; "
                                "needs 'vae'. Empty: none."),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE, to encode pictures."),
                io.Int.Input("steps", default=2000, min=1, max=100000,
                             tooltip="Steps of training with 64 noisy crops each. 2000 take a few minutes."),
                io.Int.Input("size", default=512, min=64, max=4096, step=8,
                             tooltip="Pictures of the folder are cut to a square of this many pixels."),
                io.Int.Input("seed", default=0, min=0, max=SEEDS - 1, control_after_generate=False,
                             tooltip="The same seed, the same net."),
            ],
            outputs=[PredictorType.Output(display_name="PREDICTOR", tooltip="For Noise Level Alignment.")],
        )

    @classmethod
    def execute(
        cls, model, name, overwrite, folder, steps, size, seed, latents=None, images=None, vae=None
    ) -> io.NodeOutput:
        file = store.target("time", name)
        if file.is_file() and not overwrite:
            return io.NodeOutput(opened(file))
        store.prepare(file)
        latent_format = model.get_model_object("latent_format")
        clean = clean_latents(latent_format.latent_channels, latents, images, folder, size, vae)
        data = latent_format.process_in(clean)
        progress = comfy.utils.ProgressBar(steps)

        def each(step: int, loss: float) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update_absolute(step, steps)

        predictor, error = train(data, steps, seed, each=each)
        if not math.isfinite(error):
            raise ValueError("The training came to nothing: its error is not finite. Try another 'seed'.")
        log.info("Rudder: the time predictor is off by %.3f of a quarter turn on average (0.25 is chance).", error)
        store.save(file, dict(predictor.weights), {"error": f"{error:.4f}", "steps": str(steps), "seed": str(seed)})
        return io.NodeOutput(predictor)


def clean_latents(
    channels: int, latents: dict | None, images: torch.Tensor | None, folder: str, size: int, vae: Any
) -> torch.Tensor:
    """All that there is to train on, ``[N, C, (T,) H, W]`` as nodes hand latents on; pictures are encoded one by one.

    Raises:
        ValueError: there are fewer than 16, or they are of another model, of several sizes or not finite; names the
            input.
    """
    if vae is None and (images is not None or folder.strip()):
        raise ValueError("Pictures need a 'vae': wire the model's, or give 'latents'.")
    given = [("latents", latents["samples"])] if latents is not None else []
    batches = itertools.chain(() if images is None else [("images", images)],
                              (("folder", one) for one in pictures_in(folder, size)) if folder.strip() else ())
    given += [(name, vae.encode(batch[..., :3])) for name, batch in batches]
    if not given:
        raise ValueError("Nothing to train on: wire 'latents', or 'images' with a 'vae', or name a 'folder'.")
    for name, some in given:
        source = f"'{name}'" if name == "latents" else f"'{name}' through 'vae'"
        if getattr(some, "is_nested", False):
            raise ValueError(f"{source}: latents of several parts (video with sound) are not supported. Take them "
                             "apart and give the picture's alone.")
        if some.ndim not in (4, 5):
            raise ValueError(f"{source}: latents of shape {'x'.join(map(str, some.shape[1:]))} are no pictures or "
                             "video, and the predictor reads nothing else.")
        if some.shape[1] != channels:
            raise ValueError(f"{source}: latents of {some.shape[1]} channels, and those of 'model' have {channels}. "
                             "Give this model's own latents, or its VAE.")
        if not bool(some.isfinite().all()):
            raise ValueError(f"{source}: some latents are not finite (NaN or infinity). A VAE in half precision often "
                             "does that: start ComfyUI with --fp32-vae, or use a VAE that is mended for it.")
    sizes = {tuple(some.shape[2:]) for _, some in given}
    if len(sizes) > 1:
        raise ValueError(f"The latents have several sizes: {', '.join(map(str, sorted(sizes)))}. Give 'size' the "
                         "pixels of your 'images' or 'latents', or train on one kind.")
    data = torch.cat([some.float().cpu() for _, some in given])
    count = len(data) * (data.shape[2] if data.ndim == 5 else 1)
    if count < LEAST:
        raise ValueError(f"{count} latents are too few to train on: give {LEAST} or more.")
    return data


def pictures_in(folder: str, size: int) -> Iterator[torch.Tensor]:
    """The pictures of a folder of ComfyUI's input folder, each ``[1, size, size, 3]`` in 0..1.

    Raises:
        ValueError: there is no such folder, or no picture in it.
    """
    root = Path(folder_paths.get_input_directory()).resolve()
    missing = ValueError(f"'folder': there is no folder '{folder}' in {root}.")
    if "\0" in folder:
        raise missing
    place = Path(os.path.abspath(root / folder.strip()))  # a place outside is not even asked whether it is there
    if not place.is_relative_to(root) or not place.is_dir() or not place.resolve().is_relative_to(root):
        raise missing
    files = [file for file in sorted(place.iterdir()) if file.suffix.lower() in PICTURES]
    if not files:
        raise ValueError(f"'folder': {place} holds no picture ({', '.join(sorted(PICTURES))}).")
    for file in files:
        comfy.model_management.throw_exception_if_processing_interrupted()
        with Image.open(file) as picture:
            square = ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), (size, size))
        yield torch.from_numpy(np.asarray(square, dtype=np.float32) / 255)[None]


NODES = (
    RudderFitLinearAG, RudderDynamicCFG, RudderCLIPScorer, RudderJudgeScorer, RudderTemporalTAG,
    RudderLoadTimePredictor, RudderTrainTimePredictor,
)  # fmt: skip

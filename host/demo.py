"""The demo models as host objects: MODEL, CLIP and VAE built from ComfyUI's own classes.

One safetensors file holds `unet.*` or `flux.*` and `text.*` in fp16, another the autoencoder that the models share;
their metadata holds the configuration as JSON.
Everything runs in fp32: the models are tiny, and a CPU has nothing faster that is as exact.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from safetensors import safe_open

MODELS = Path(__file__).resolve().parent.parent / "demo" / "models"
DEFAULT = MODELS / "shapes-unet.safetensors"
AUTOENCODER = "shapes-vae.safetensors"
WAY_OUT = "It is bundled with the pack: reinstall the pack, or run `git checkout -- demo/models` in its folder."


KINDS = {"unet": comfy.supported_models.SD15, "flux": comfy.supported_models.FluxSchnell}

# ---------------------------------------------------------------- classes that differ from SD1.5 only in size

class Latents(comfy.latent_formats.LatentFormat):
    """4 channels, 4 px a cell, normalised to zero mean and unit deviation per channel."""
    spacial_downscale_ratio = 4  # core's EmptyLatentImage asks: 64x64 pixels are 16x16 cells

    def __init__(self, mean: list[float], std: list[float], rgb: list[list[float]] | None = None):
        self.mean, self.std = (torch.tensor(v).view(1, -1, 1, 1) for v in (mean, std))
        self.latent_channels, self.latent_rgb_factors = len(mean), rgb

    def process_in(self, latent):
        return (latent - self.mean.to(latent)) / self.std.to(latent)

    def process_out(self, latent):
        return latent * self.std.to(latent) + self.mean.to(latent)


class Tokenizer(comfy.sd1_clip.SDTokenizer):
    """CLIP's tokenizer over the small vocabulary of the world."""

    def __init__(self, embedding_directory, tokenizer_data):
        folder = MODELS / "tokenizer"
        if not (folder / "vocab.json").is_file():
            raise FileNotFoundError(f"The demo tokenizer is missing: {folder}. {WAY_OUT}")
        super().__init__(str(folder), embedding_directory=embedding_directory, tokenizer_data=tokenizer_data,
                         embedding_size=tokenizer_data["width"], max_length=tokenizer_data["length"])


class Tokens(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory, tokenizer_data):
        super().__init__(embedding_directory, tokenizer_data, tokenizer=Tokenizer)


class TextModel(comfy.clip_model.CLIPTextModel):
    """CLIP's text model with as many embeddings as the small vocabulary has words."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        self.text_model.embeddings = comfy.clip_model.CLIPEmbeddings(
            config["hidden_size"], vocab_size=config["vocab_size"], num_positions=config["max_position_embeddings"],
            dtype=dtype, device=device, operations=operations)


def text_class(config: dict) -> type:
    """The host's SD1 text encoder class, bound to a configuration of CLIP's kind."""
    end = config["eos_token_id"]

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, model_class=TextModel,
                             max_length=config["max_position_embeddings"],
                             textmodel_json_config=dict(config), return_projected_pooled=False,
                             special_tokens={"start": config["bos_token_id"], "end": end, "pad": end})

    class TextEncoder(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=Encoder)

    return TextEncoder


def kind_of(config: dict) -> str:
    """'unet' or 'flux'."""
    return next(kind for kind in KINDS if kind in config)


def model_class(config: dict) -> type:
    """The host's own class of the kind, with our sizes and latent format: SD1.5 (epsilon prediction, its noise
    schedule) or Flux without distilled guidance (rectified flow, no shift)."""

    class Demo(KINDS[kind_of(config)]):
        unet_config: dict = {}
        unet_extra_config: dict = {}
        memory_usage_factor = 0.5

        def inpaint_model(self):
            return False  # SD1.5 takes more than 4 channels for a sign of one

        def latent_format(self):
            return Latents(**config["latent"])

    return Demo


# ---------------------------------------------------------------- from configuration to host objects

def base_model(config: dict, state: dict | None = None):
    """The host's BaseModel around the UNet or the transformer, in fp32."""
    spec = model_class(config)(config[kind_of(config)])
    spec.set_inference_dtype(torch.float32, None)
    return spec.get_model(state or {}, "", device=None)


def _model(config: dict, state: dict, disable_dynamic: bool):
    model = base_model(config, state)
    kinds = comfy.model_patcher
    # Looked up late: the host rebinds CoreModelPatcher at start-up when it streams weights.
    kind = kinds.ModelPatcher if disable_dynamic else getattr(kinds, "CoreModelPatcher", kinds.ModelPatcher)
    management = comfy.model_management
    patcher = kind(model, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())
    assign = getattr(patcher, "is_dynamic", lambda: False)()
    model.load_model_weights(state, "", **({"assign": True} if assign else {}))
    return patcher


def _clip(config: dict, state: dict, disable_dynamic: bool):
    text = config["text"]
    target = comfy.supported_models_base.ClipTarget(Tokens, text_class(text))
    sizes = {"width": text["hidden_size"], "length": text["max_position_embeddings"]}
    clip = comfy.sd.CLIP(target, tokenizer_data=sizes,
                         model_options={"dtype": torch.float32}, disable_dynamic=disable_dynamic)
    missing, _ = clip.load_sd(state, full_model=True)
    if missing:
        raise ValueError(f"The demo file lacks text encoder weights: {missing[:3]} ...")
    return clip


def _vae(config: dict, state: dict):
    vae = comfy.sd.VAE(sd=state, config={"params": config["vae"]}, dtype=torch.float32)
    vae.downscale_ratio = vae.upscale_ratio = Latents.spacial_downscale_ratio
    vae.latent_channels = config["vae"]["embed_dim"]
    return vae


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[dict, Any]]:
    """The configuration of a file, and the file open for reading."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The demo model is missing: {path}. {WAY_OUT}")
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if "rudder" not in metadata:
            raise ValueError(f"{path} is not a Rudder demo model (its metadata holds no 'rudder' entry). {WAY_OUT}")
        yield json.loads(metadata["rudder"]), file


def about(path: str | Path) -> dict:
    """The configuration of a file, without its weights."""
    with _opened(path) as (config, _):
        return config


def read(path: str | Path, part: str = "") -> tuple[dict, dict]:
    """Configuration of a file, and the weights of one part in fp32: 'unet', 'flux' or 'text', '' for all."""
    prefix = part and part + "."
    with _opened(path) as (config, file):
        return config, {k.removeprefix(prefix): file.get_tensor(k).float() for k in file.keys() if k.startswith(prefix)}


def load_model(path, disable_dynamic: bool = False):
    """The MODEL alone; the host calls it again when it needs a private copy of the weights."""
    patcher = _model(*read(path, kind_of(about(path))), disable_dynamic)
    patcher.cached_patcher_init = (load_model, (str(path),))
    return patcher


def load_text(path, disable_dynamic: bool = False):
    """The text encoder's patcher alone, for the same reason."""
    return _load_clip(path, disable_dynamic).patcher


def _load_clip(path, disable_dynamic: bool = False):
    clip = _clip(*read(path, "text"), disable_dynamic)
    clip.patcher.cached_patcher_init = (load_text, (str(path),))
    return clip


def load_demo(path: str | Path = DEFAULT):
    """(MODEL, CLIP, VAE) of a demo file and the autoencoder beside it, which the models share. FileNotFoundError names
    the file that is missing and the way out."""
    return load_model(path), _load_clip(path), _vae(*read(Path(path).with_name(AUTOENCODER)))

"""How well a predicted picture shows a text: scorers for dynamic CFG, by the host's own CLIP models and by the judge of
the demo world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from ..guidance.contract import GuidanceError, Step
from .demo import Latents

if TYPE_CHECKING:
    from ..demo.scorer import JudgeScorer

Decoder = Callable[[Tensor], Tensor]  # x0 in model space -> pictures [B, H, W, 3] in 0..1


def middle(x: Tensor) -> Tensor:
    """The middle frame of a video, ``[B, C, T, H, W]`` -> ``[B, C, H, W]``; pictures as they are."""
    return x[:, :, x.shape[2] // 2] if x.ndim == 5 else x


def preview(latent_format: Any) -> Decoder:
    """The host's linear preview: one colour a latent cell, no network.

    Raises:
        GuidanceError: the host has none for this latent space.
    """
    factors, bias = latent_format.latent_rgb_factors, getattr(latent_format, "latent_rgb_factors_bias", None)
    reshape = getattr(latent_format, "latent_rgb_factors_reshape", None)
    if factors is None:
        raise GuidanceError("ComfyUI has no quick preview for the latents of this model. Wire a 'vae' (a tiny one, "
                            "taesd, is fastest).")

    def decode(x0: Tensor) -> Tensor:
        x0 = middle(reshape(x0) if reshape else x0).movedim(1, -1).float()
        shift = None if bias is None else torch.tensor(bias).to(x0)
        return ((linear(x0, torch.tensor(factors).to(x0).T, shift) + 1) / 2).clamp(0, 1)

    return decode


def decoder(vae: Any, latent_format: Any) -> Decoder:
    def decode(x0: Tensor) -> Tensor:
        pictures = vae.decode(latent_format.process_out(x0))
        return pictures[:, pictures.shape[1] // 2] if pictures.ndim == 5 else pictures

    return decode


def text_features(clip: Any, text: str, width: int) -> Tensor:
    """The text in the space that CLIP shares between text and pictures, ``[1, width]``.

    Raises:
        GuidanceError: no text encoder of ``clip`` reaches a shared space of that width.
    """
    widths, tokens = [], clip.tokenize(text)
    clip.load_model()
    for part in ("l", "g", "h"):
        encoder = getattr(clip.cond_stage_model, f"clip_{part}", None)
        if encoder is None or part not in tokens:
            continue
        features = {}
        for projected in (True, False):
            encoder.reset_clip_options()
            encoder.set_clip_options({"execution_device": clip.patcher.load_device, "projected_pooled": projected})
            features[projected] = encoder.encode_token_weights(tokens[part])[1]
        encoder.reset_clip_options()
        widths.append(features[True].shape[-1])
        # A projection that the file lacks is zero, or whatever was in memory, or the identity.
        sound = bool(features[True].isfinite().all()) and bool(features[True].any())
        if widths[-1] == width and sound and not torch.equal(features[True], features[False]):
            return features[True].float().cpu()
    if width in widths:
        raise GuidanceError(
            "The text encoder of 'clip' comes without its text projection (SD1.5 checkpoints leave it out), so its "
            "features cannot be compared with pictures. Load the complete one (clip_l.safetensors) with Load CLIP."
        )
    raise GuidanceError(
        f"'clip_vision' gives {width} features a picture and the text encoders of 'clip' "
        f"{' and '.join(map(str, widths)) or 'none that CLIP shares with pictures'}: they are not of one CLIP. Use the "
        "vision model of the same CLIP: ViT-L (768) for clip_l, ViT-bigG (1280) for SDXL's clip_g."
    )


@dataclass(frozen=True, eq=False)
class ClipScorer:
    """Cosine of the features of picture and text."""

    vision: Any
    text: Tensor
    decode: Decoder
    vae: Any = None

    def __call__(self, x0: Tensor, step: Step) -> Tensor:
        pictures = self.vision.encode_image(self.decode(x0)).image_embeds
        return cosine_similarity(pictures.float(), self.text.to(pictures.device), dim=-1)

    def models(self) -> list:
        """What must be loaded beside the model that is sampled."""
        return [self.vision.patcher, *([] if self.vae is None else [self.vae.patcher])]


def clip_scorer(clip: Any, vision: Any, text: str, latent_format: Any, vae: Any = None) -> ClipScorer:
    """Raises GuidanceError where the parts do not fit each other."""
    blank = vision.encode_image(torch.zeros(1, 64, 64, 3))
    embeds = getattr(blank, "image_embeds", None)
    if embeds is None or embeds.ndim != 2:
        raise GuidanceError("'clip_vision' is no CLIP: it has no features that a text can be compared with (DINO and "
                            "SigLIP do not). Load a CLIP ViT-L, ViT-H or ViT-bigG vision model.")
    features = text_features(clip, text, embeds.shape[-1])
    decode = preview(latent_format) if vae is None else decoder(vae, latent_format)
    return ClipScorer(vision, features, decode, vae)


def judge_scorer(caption: str, latent_format: Any, vae: Any) -> JudgeScorer:
    """The judge of the demo world on decoded predictions.

    Raises:
        GuidanceError: another model's latents, or what is no caption of the world; on the first step, pictures of
            another size than the judge reads.
    """
    from ..demo import words, world  # not at start-up: few runs have a judge
    from ..demo.judge import load
    from ..demo.scorer import JudgeScorer

    if not isinstance(latent_format, Latents):
        raise GuidanceError("The judge knows only pictures of the demo models (Load Demo Model), and 'model' is "
                            "another. Use CLIP Scorer.")
    try:
        if caption.count(" on a ") > 1 or len(words.parse(caption)["objects"]) > 2:
            raise ValueError("more than two objects, or more than one background")
    except ValueError as error:
        raise GuidanceError(f"'text': {error}. The judge reads captions of the demo world, of one or two objects, such "
                            "as 'a spiky red heart on a navy background' (its words: demo/README.md).") from error
    decode = decoder(vae, latent_format)

    def pictures(x0: Tensor) -> Tensor:
        decoded = decode(x0)
        if decoded.shape[1:] != (world.SIZE, world.SIZE, 3):
            raise GuidanceError(f"The judge reads pictures of {world.SIZE}x{world.SIZE} pixels and these have "
                                f"{decoded.shape[2]}x{decoded.shape[1]}. Give the sampler a latent of that size.")
        return decoded.clamp(0, 1)

    return JudgeScorer(load(), pictures, (caption,))

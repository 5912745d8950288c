"""Pictures of the demo models, made by the real host: batches in which every row has its own prompt, anchor and seed.

    painter = Painter(files(["shapes-unet"])[0])
    made = painter.paint(["a spiky red crescent"], [7], ["a spiky red shape"], lambda anchor: (AAPB(anchor=anchor),))

Nothing here knows a method: what a user wires, ``add_guidance`` on the MODEL and the host's own guider, sampler and
decoder, is what runs. A picture is a function of its prompt, anchor and seed, whatever shares its batch (up to the
rounding of batched arithmetic): noise is drawn for each row from its own seed, conditionings are stacked in the batch
dimension, and the solvers used here draw nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.patcher_extension as ext
import comfy.samplers
import numpy as np
import torch
from torch import Tensor

from rudder.demo import world
from rudder.guidance.contract import Guidance, Prompt
from rudder.guidance.space import Parametrisation
from rudder.host import add_guidance
from rudder.host import demo as demo_host
from rudder.host.run import parametrisation_of

NAMES = ("shapes-unet", "shapes-flux")  # every table's models, where their files exist
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}  # None: that of the file
Methods = Callable[[Prompt], tuple[Guidance, ...]]  # from the anchor to the methods, in wiring order


@dataclass(frozen=True)
class Settings:
    """How a model is sampled, in the host's names."""

    steps: int = 25
    cfg: float = 5.0
    sampler: str = "dpmpp_2m"
    scheduler: str = "karras"


#: By what the model predicts. Rectified flow without a shift wants even steps of its time: 'simple'.
SETTINGS = {Parametrisation.EPS: Settings(), Parametrisation.FLOW: Settings(scheduler="simple")}


def files(names: Sequence[str] = ()) -> list[Path]:
    """The demo files of these names or paths; of NAMES, those that exist, when nothing is named.

    Raises:
        SystemExit: one of them does not exist, or none does.
    """
    found = [Path(n) if Path(n).is_file() else demo_host.MODELS / f"{n}.safetensors" for n in names or NAMES]
    if not names:
        found = [file for file in found if file.is_file()]
    missing = [str(file) for file in found if not file.is_file()]
    if missing or not found:
        here = ", ".join(sorted(f.stem for f in demo_host.MODELS.glob("shapes-*.safetensors"))) or "none"
        raise SystemExit(f"no such model: {', '.join(missing) or ' and '.join(NAMES)}. In {demo_host.MODELS}: {here}.")
    return found


def noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise ``[B, *shape]``, each row from its own seed."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds])


def counting(model: Any) -> tuple[Any, list[int]]:
    """A clone of the MODEL, and a list to which it appends how many rows reach the network at each call."""
    rows: list[int] = []

    def count(executor: Callable, x: Tensor, *args, **kwargs):
        rows.append(len(x))
        return executor(x, *args, **kwargs)

    model = model.clone()
    model.add_wrapper_with_key(ext.WrappersMP.APPLY_MODEL, "bench", count)
    return model, rows


@dataclass(frozen=True)
class Painted:
    """``images`` uint8 ``[B, 64, 64, 3]``; model evaluations of each picture, counted in the network; seconds of
    sampling for each picture, without encoding and decoding. ``each``: evaluations picture by picture, where they were
    painted one by one."""

    images: np.ndarray
    evaluations: float
    seconds: float
    each: tuple[float, ...] = ()


class Painter:
    """A demo model as the host loads it, and the prompts it has encoded so far. ``precision`` is that of the network's
    arithmetic, as by the host's node ModelComputeDtype; sampling and methods are in float32."""

    def __init__(self, file: Path, precision: str = "fp32"):
        self.file, self.name, self.precision = file, file.stem, precision
        self.model, self.clip, self.vae = demo_host.load_demo(file)
        if dtype := PRECISIONS[precision]:
            self.model.set_model_compute_dtype(dtype)
        self._encoded: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file and of the autoencoder beside it, 12 hex digits."""
        both = self.file.read_bytes() + self.file.with_name(demo_host.AUTOENCODER).read_bytes()
        return hashlib.sha256(both).hexdigest()[:12]

    @cached_property
    def parametrisation(self) -> Parametrisation:
        return parametrisation_of(self.model.get_model_object("model_sampling"))

    @property
    def settings(self) -> Settings:
        return SETTINGS[self.parametrisation]

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        latent = self.model.get_model_object("latent_format")
        side = world.SIZE // latent.spacial_downscale_ratio
        return latent.latent_channels, side, side

    def conditioning(self, texts: Sequence[str]) -> list:
        """A CONDITIONING whose batch dimension carries one prompt a row: features ``[B, T, C]``, pooled ``[B, C]``."""
        for text in dict.fromkeys(texts):
            if text not in self._encoded:
                [[features, more]] = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))
                self._encoded[text] = features, more["pooled_output"]
        features, pooled = (torch.cat(parts) for parts in zip(*(self._encoded[text] for text in texts)))
        return [[features, {"pooled_output": pooled}]]

    @torch.inference_mode()
    def paint(
        self, texts: Sequence[str], seeds: Sequence[int], anchors: Sequence[str] = (), methods: Methods | None = None,
        settings: Settings | None = None, sampler: Any = None, alone: bool = False,
    ) -> Painted:
        """One picture for each text and seed.

        Args:
            texts: B prompts; the negative is the empty prompt.
            seeds: B seeds, each of its row's noise alone.
            anchors: B second prompts for ``methods``; none where they need none.
            methods: what is wired on the MODEL; plain CFG when None.
            sampler: a SAMPLER in place of the one that the settings name.
            alone: one run for each picture, for methods whose cost depends on what shares the batch.

        Raises:
            GuidanceError: a method cannot act, for example at cfg 1.
        """
        settings = settings or self.settings
        if alone:
            made = [self.paint([text], [seed], anchors[i:i + 1], methods, settings, sampler)
                    for i, (text, seed) in enumerate(zip(texts, seeds))]
            each = tuple(one.evaluations for one in made)
            seconds = sum(one.seconds for one in made) / len(made)
            return Painted(np.concatenate([one.images for one in made]), sum(each) / len(made), seconds, each)
        model, rows = counting(self.model)
        anchor = Prompt(self.conditioning(anchors) if anchors else (), "anchor")
        for method in methods(anchor) if methods else ():
            model = add_guidance(model, method)
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(self.conditioning(texts), self.conditioning([""]))
        guider.set_cfg(settings.cfg)
        sigmas = comfy.samplers.calculate_sigmas(
            model.get_model_object("model_sampling"), settings.scheduler, settings.steps)
        sampler = sampler or comfy.samplers.sampler_object(settings.sampler)
        start, latent = noise(seeds, self.latent_shape), torch.zeros(len(texts), *self.latent_shape)
        begun = time.perf_counter()
        out = guider.sample(start, latent, sampler, sigmas, disable_pbar=True, seed=0)
        seconds = time.perf_counter() - begun
        images = (self.vae.decode(out).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return Painted(images, sum(rows) / len(texts), seconds / len(texts))

"""What two methods need beside the model that they guide: AutoGuidance a worse model, LinearAG coefficients.

The worse models are the demo models after less training, as the paper wants them (same kind of errors, more of them).
They are not shipped: they are earlier commits of the shipped files, read from the history of the repository.
"""

from __future__ import annotations

import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from rudder.guidance.linear_fit import Coefficients, fit, gram
from rudder.host import demo as demo_host
from rudder.host.collect import predictions

from . import ROOT, rareshapes
from .generate import Painter, Settings

#: Of each model the commit with the same latents and the least training that still paints shapes.
WORSE = {"shapes-unet": "98019fe", "shapes-flux": "7ef2fca"}
FIT = 8  # pictures to fit on, one of each prompt


def git(command: str, name: str) -> subprocess.CompletedProcess:
    """``git show`` or the like of a worse version's file."""
    where = f"{WORSE[name]}:demo/models/{name}.safetensors"
    return subprocess.run(["git", "-C", str(ROOT), *command.split(), where], capture_output=True)


def has_worse(name: str) -> bool:
    """Whether there is a worse version of that model, and this clone holds it."""
    try:
        return name in WORSE and git("cat-file -e", name).returncode == 0
    except OSError:  # no git here
        return False


@lru_cache(maxsize=2)
def worse(name: str) -> Any:
    """The MODEL of the worse version, of which :func:`has_worse` knows."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.safetensors"
        file.write_bytes(git("show", name).stdout)
        return demo_host.load_model(file)


@lru_cache(maxsize=1)
def coefficients(painter: Painter, how: Settings, every: int = 2) -> Coefficients:
    """Fitted on FIT pictures of ordinary prompts, as the node Fit Faster Guidance does."""
    prompts = rareshapes.prompts("usual texture", "dev")[:FIT]
    positive, negative = (painter.conditioning(texts) for texts in ([p.text for p in prompts], [""]))
    latent = {"samples": torch.zeros(FIT, *painter.latent_shape)}
    levels, cond, uncond = predictions(
        painter.model, positive, negative, latent, 0, how.steps, how.cfg, how.sampler, how.scheduler
    )
    return fit(gram(torch.cat((cond, uncond)).flatten(1)), levels, every)

"""The size of picture that a MODEL was trained on, as far as its family tells."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import comfy.supported_models as families

from ..guidance.contract import GuidanceError
from .demo import Latents

SIDES = {families.SD15: 512, families.SDXL: 1024, families.SDXLRefiner: 1024, families.SD3: 1024, families.Flux: 1024,
         families.Chroma: 1024}
DEMO = 64


def trained_side(model: Any) -> int | None:
    """Pixels of a side of the square pictures that the family of ``model`` was trained on; None: not known."""
    config = model.model.model_config
    if isinstance(model.get_model_object("latent_format"), Latents):
        return DEMO
    if isinstance(config, families.SD20):  # the bases are eps, the larger ones v
        return 768 if isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION) else 512
    return next((side for family, side in SIDES.items() if isinstance(config, family)), None)


def trained_cells(model: Any, width: int = 0, height: int = 0) -> tuple[float, float]:
    """(height, width) in cells of the latent, from pixels; 0 is that of the family.

    Raises:
        GuidanceError: the family does not tell.
    """
    side = trained_side(model)
    if side is None and not (width and height):
        raise GuidanceError(
            f"The size that '{type(model.model.model_config).__name__}' was trained on is not known to Rudder. Give "
            "trained_width and trained_height in pixels; its model card has them."
        )
    ratio = getattr(model.get_model_object("latent_format"), "spacial_downscale_ratio", 8)
    return (height or side) / ratio, (width or side) / ratio

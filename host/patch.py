"""Carry a plan of guidance methods on a ComfyUI MODEL.

The plan is a tuple in ``model_options``, which ``ModelPatcher.clone`` copies, so a clone never reaches its parent or
its siblings. One OUTER_SAMPLE wrapper, the same module-level function for every MODEL, starts the run; nothing else is
installed before sampling starts, and everything that a run installs lives in the guider's own copy of the options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.patcher_extension as ext

from ..guidance.contract import Guidance, extended
from .run import KEY, plan_of, sample

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

def add_guidance(model: ModelPatcher, method: Guidance) -> ModelPatcher:
    """A clone of ``model`` with ``method`` appended to its plan.

    Raises:
        GuidanceError: the method and one already on the model decide the same thing.
    """
    plan = extended(plan_of(model.model_options), method)
    patched = model.clone()
    patched.model_options[KEY] = plan
    # In the options, not in ``patched.wrappers``: the host compares the latter to decide whether two MODELs share
    # weights.
    if not ext.get_wrappers_with_key(ext.WrappersMP.OUTER_SAMPLE, KEY, patched.model_options, is_model_options=True):
        ext.add_wrapper_with_key(ext.WrappersMP.OUTER_SAMPLE, KEY, sample, patched.model_options, is_model_options=True)
    return patched

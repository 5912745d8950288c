"""A second MODEL in one run: checked and given weights of its own when wired, loaded with the first, asked each step.

The host loads it in the same call as the sampler's own MODEL, because a conditioning names it among its models.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension as ext
import comfy.samplers as samplers
import torch
from torch import Tensor

from ..guidance.contract import Guidance, GuidanceError
from .conds import same_value

log = logging.getLogger("rudder")

Conds = list[dict]
WHERE = {"area", "strength", "mask", "mask_strength", "set_area_to_bounds", "timestep_start", "timestep_end", "control",
         "uuid"}  # of an entry: where and when it acts, not what it says
DRESS = ("object_patches", "injections", "weight_wrapper_patches")  # what a load puts on beside the patches of weights
ASKED = (ext.WrappersMP.CALC_COND_BATCH, ext.WrappersMP.APPLY_MODEL, ext.WrappersMP.DIFFUSION_MODEL)
STARTS = (ext.WrappersMP.OUTER_SAMPLE, ext.WrappersMP.SAMPLER_SAMPLE, ext.WrappersMP.PREPARE_SAMPLING)
#: Beginnings of the names of options that a second model is never asked with, or with the first's.
AROUND = ("rudder", "sampler_", "disable_cfg1_optimization", "denoise_mask_function", "context_handler")
WIDTHS = {"context_dim": "text features", "context_in_dim": "text features", "adm_in_channels": "pooled features",
          "vec_in_dim": "pooled features"}


def companion(model: Any, other: Any, name: str) -> Any:
    """``other``, ready to be evaluated in the runs of ``model``; as a copy if the two share their weights.

    A LoRA or a merge is a patch on weights that all clones of a MODEL share, and the host keeps one version loaded at a
    time: it would load the other again at every step. A copy is read from the file as the loader node did.

    Raises:
        GuidanceError: the two do not speak of the same latents, noise levels or prompts, or cannot be told apart.
    """
    check_pair(model, other, name)
    if other.model is not model.model:
        return other
    if alike(model, other):
        raise GuidanceError(
            f"The {name} is the same as the model, so there is no difference to guide by. Wire in a worse one: an "
            "earlier or smaller checkpoint, or this one with a patch that weakens it (UNetSelfAttentionMultiply). It "
            "is asked for its bare prediction: guidance nodes on it (PAG, RescaleCFG, CFG Override), step caches, "
            "context windows and the shift of the schedule (ModelSamplingSD3) do not count."
        )
    if other.cached_patcher_init is None:
        raise GuidanceError(
            f"The {name} is a patched version of the model and shares its weights, and its loader node offers no way "
            "to load them a second time. Load both with a core loader node, or save the patched one as a checkpoint "
            "(ModelSave) and load that."
        )
    factory, arguments, *index = other.cached_patcher_init
    fresh = factory(*arguments)
    own = other.clone(model_override=(fresh[index[0]] if index else fresh).get_clone_model_override())
    own.hook_backup = {}  # clones share it: the copy would put back the model's weights into its own, and forget them
    return own


def alike(model: Any, other: Any) -> bool:
    """Whether two clones of one MODEL predict the same, each being asked as a second model is."""

    def bare(patcher: Any) -> Any:
        options = {name: v for name, v in patcher.model_options.items() if not name.startswith(AROUND)}
        transformer = dict(options.get("transformer_options", {}))
        transformer["wrappers"], unprepared = acting(wrappers_of(patcher))
        options["transformer_options"] = {name: v for name, v in transformer.items() if name not in unprepared}
        patcher = patcher.clone()
        patcher.model_options, patcher.wrappers, patcher.callbacks = options, {}, {}
        patcher.object_patches.pop("model_sampling", None)  # a shift moves the steps, not what is predicted at a level
        return patcher

    a, b = bare(model), bare(other)
    return (b.clone_has_same_weights(a) and same_value(a.model_options, b.model_options)
            and not dressed_apart(a, b) and same_levels(model, other))


def wrappers_of(patcher: Any) -> dict[str, dict]:
    """All wrappers of a MODEL: kind -> key -> functions."""
    found = ext.copy_nested_dicts(patcher.model_options.get("transformer_options", {}).get("wrappers", {}))
    ext.merge_nested_dicts(found, patcher.wrappers, copy_dict1=False)
    return found


def acting(wrappers: dict[str, dict]) -> tuple[dict[str, dict], set]:
    """Those of a MODEL's wrappers that act in a second model, and the keys of those that cannot: they prepare
    themselves when sampling starts (EasyCache), which is the first model's."""
    unprepared = {key for kind in STARTS for key in wrappers.get(kind, {})} - {None}
    return {kind: {key: own for key, own in wrappers.get(kind, {}).items() if key not in unprepared}
            for kind in ASKED}, unprepared


def same_levels(model: Any, other: Any) -> bool:
    """Whether two MODELs show their network the same at a noise level, and read the same from its answer."""
    one, two = (m.get_model_object("model_sampling") for m in (model, other))
    sigmas = torch.linspace(float(one.sigma_min), float(one.sigma_max), 7)
    x = torch.ones(len(sigmas), 1, 1, 1)

    def seen(sampling: Any) -> Tensor:
        shown, read = sampling.calculate_input(sigmas, x), sampling.calculate_denoised(sigmas, x / 2, x)
        return torch.cat([made.float().flatten().cpu() for made in (sampling.timestep(sigmas), shown, read)])

    return torch.equal(seen(one), seen(two))


def seconds_of(plan: Iterable[Guidance]) -> list[Any]:
    """The second models that a plan asks."""
    branches = [branch for method in plan for branch in method.prompts()]
    return [branch.model for branch in branches if getattr(branch, "model", None) is not None]


def loaded_apart(model: Any, other: Any) -> bool:
    """Whether two clones of one MODEL cannot be loaded at once: they patch its weights, or what is beside them, in
    different ways."""
    weights = model.patches_uuid != other.patches_uuid and bool(model.patches or other.patches)
    return model.model is other.model and (weights or dressed_apart(model, other))


def dressed_apart(model: Any, other: Any) -> bool:
    """Whether loading two clones of one MODEL puts on other things beside the patches of weights."""

    def differ(a: dict, b: dict) -> bool:
        return a.keys() != b.keys() or any(
            a[key] != b[key] if isinstance(a[key], list) else a[key] is not b[key] for key in a)

    return any(differ(getattr(model, kind, {}), getattr(other, kind, {})) for kind in DRESS)


def check_pair(model: Any, other: Any, name: str) -> None:
    """Refuse a pair whose predictions cannot be compared."""

    def both(what: str, ours: Any, theirs: Any, way_out: str) -> None:
        if ours != theirs:
            raise GuidanceError(f"The {name} has {what} {theirs} and the model {ours}. {way_out}")

    formats = [type(m.model.latent_format).__name__ for m in (model, other)]
    both("latents of the kind", *formats, "Use two models of one family, which share a VAE.")
    flows = [isinstance(m.get_model_object("model_sampling"), comfy.model_sampling.CONST) for m in (model, other)]
    both("noise levels of the kind", *("flow" if flow else "diffusion" for flow in flows),
         "They mean different things; use two models of one kind.")
    configs = [m.model.model_config.unet_config for m in (model, other)]
    for key, what in WIDTHS.items():
        widths = [config.get(key) for config in configs]
        if None not in widths:
            both(f"{what} of width", *widths, "They need different text encoders; use two models of one family.")


def told(entry: dict, conds: Conds) -> dict:
    """``entry``, with the prompt that it shows the model. The host copies an area of another role to these conds: such
    a copy still holds the other's prompt, and shows what one of ``conds`` does, which come before it."""
    features = {id(value) for value in entry["model_conds"].values()}
    source = next((one for one in conds if features & {id(value) for value in one["model_conds"].values()}), entry)
    return {k: v for k, v in source.items() if k not in WHERE} | {k: v for k, v in entry.items() if k in WHERE}


class SecondModel:
    """One run of a second MODEL beside one with the options ``first``. Its own patches and wrappers of the network
    count. Its functions around CFG do not, nor what belongs to the whole of sampling: what prepares itself when that
    starts (EasyCache), and context windows, which are the first model's."""

    def __init__(self, patcher: Any, first: dict) -> None:
        self.patcher = patcher
        self.options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        transformer = self.options.setdefault("transformer_options", {})
        for name, own in (("wrappers", patcher.wrappers), ("callbacks", patcher.callbacks)):
            ext.merge_nested_dicts(transformer.setdefault(name, {}), own, copy_dict1=False)
            ext.merge_nested_dicts(self.options.setdefault("to_load_options", {}).setdefault(name, {}),
                                   transformer[name], copy_dict1=False)
        wrappers = transformer["wrappers"]
        transformer["wrappers"], unprepared = acting(wrappers)
        idle = {key for kind in ASKED for key in wrappers.get(kind, {}) if key in unprepared}
        if self.options.get("context_handler") not in (None, first.get("context_handler")):
            idle.add("context windows")
        if idle := sorted(idle):
            log.warning("Rudder: '%s' on the worse model does not act: what belongs to the whole of sampling has to be "
                        "on the sampler's model.", "', '".join(idle))

    def begin(self, sigmas: Tensor) -> None:
        """After the host has loaded it."""
        samplers.cast_to_load_options(self.options, device=self.patcher.load_device, dtype=self.patcher.model_dtype())
        self.options["transformer_options"]["sample_sigmas"] = sigmas
        self.patcher.pre_run()

    def encoded(self, conds: Conds, noise: Tensor, role: str, **what) -> Conds:
        """``conds``, processed for the first model, with what this model makes of them in place of what that made."""
        bare = [{**told(entry, conds), "model_conds": {}} for entry in conds]
        for entry in bare:
            entry.pop("hooks", None)  # LoRA hooks are registered with the first model
        return samplers.encode_model_conds(
            self.patcher.model.extra_conds, bare, noise, self.patcher.load_device, role, **what
        )

    def predict(self, conds: Conds, x: Tensor, sigma: Tensor, run: dict) -> Tensor:
        """x0, in the context windows of the first model: ``run`` are the options of that."""
        windows = copy.copy(run.get("context_handler"))  # it remembers the model it was asked for
        options = {**self.options, "context_handler": windows}
        return samplers.calc_cond_batch(self.patcher.model, [conds], x, sigma, options)[0]

    def end(self) -> None:
        self.patcher.cleanup()
        samplers.cast_to_load_options(self.options, device=self.patcher.offload_device)

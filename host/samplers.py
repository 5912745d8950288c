"""Samplers of our own in the host: the solver is pure (``inversion/``), here it meets the guider.

Solvers that guide ask the guider for one prediction at a weight of *their* choice, step by step, by setting the
guider's cfg for the time of the call. So whatever else shapes guidance on the MODEL (a plan of ours, CFG functions of
other packs) does so at that weight, as it would under the same weights with any other sampler.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers as samplers
import torch
from comfy.utils import model_trange
from torch import Tensor

from ..guidance.contract import GuidanceError
from ..guidance.space import Parametrisation
from ..inversion.cfg_pp import CFGPP
from ..inversion.solver import Denoiser
from ..inversion.w2sd import W2SD
from .conds import frozen_schedules
from .run import AHEAD, parametrisation_of, plan_of
from .second import dressed_apart, loaded_apart, seconds_of

log = logging.getLogger("rudder")

NOISE_SEED = 1  # added to the run's seed: the seed itself drew the noise that the run started from


def cfg_pp(method: CFGPP) -> samplers.KSAMPLER:
    """``method`` as a SAMPLER."""
    return samplers.KSAMPLER(sample_cfg_pp, {"method": method})


@torch.no_grad()
def sample_cfg_pp(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Callable | None = None,
                  disable: bool | None = None, *, method: CFGPP) -> Tensor:  # fmt: skip
    """The host's sampler function. ``model`` is its ``KSamplerX0Inpaint`` around the guider."""
    guider = model.inner_model
    check(guider, method.title, "guidance_lambda")
    predict = AtWeight(model, extra_args, method.title)
    model_sampling = guider.model_patcher.get_model_object("model_sampling")
    levels = sigmas.tolist()
    try:
        out = method.sample(
            lambda x, sigma, weight: predict(x, sigma, beside_one(weight)), x, levels,
            parametrisation_of(model_sampling),
            noise_of(x, extra_args.get("seed"), getattr(model_sampling, "noise_scale", 1.0)),
            reporter(sigmas, callback, disable),
        )  # fmt: skip
    finally:
        predict.close()
    if predict.weights:  # a run without steps has none
        log.info(
            "Rudder: %s: lambda %g was a guidance weight of %.2f to %.2f; the sampler's cfg (%g) does not count",
            method.title, method.strength, min(predict.weights), max(predict.weights), guider.cfg,
        )
    return out


def beside_one(weight: float) -> float:
    """``weight``, but never 1, where the host leaves the negative out."""
    return 1.0 + 1e-6 if math.isclose(weight, 1.0) else weight


def check(guider: samplers.CFGGuider, title: str, setting: str, needs_negative: bool = True) -> None:
    """Refuse runs in which the weight of a step is not the solver's to set, before anything is evaluated."""
    if type(guider).predict_noise is not samplers.CFGGuider.predict_noise:
        raise GuidanceError(
            f"{title}: the guider '{type(guider).__name__}' combines predictions itself, so its guidance cannot be "
            "steered. Use CFGGuider or SamplerCustom with this sampler."
        )
    if needs_negative and guider.conds.get("negative") is None:
        raise GuidanceError(
            f"{title}: it needs the negative's prediction and this guider has no negative. Use CFGGuider or "
            "SamplerCustom with a negative (an empty prompt will do). Models with distilled guidance (Flux-dev, "
            "few-step models) run without one: use another sampler, such as euler."
        )
    for method in plan_of(guider.model_options):
        if "guidance weight" in method.claims:
            raise GuidanceError(
                f"{title}: '{method.title}' on this MODEL sets the guidance weight, and so does this sampler, from its "
                f"{setting}. Remove that node, or use another sampler, such as euler."
            )


class AtWeight:
    """The guider as a function of x, sigma and the guidance weight: the guided x0 and the negative's."""

    def __init__(self, model: Any, extra_args: dict, title: str) -> None:
        self.model, self.guider, self.title = model, model.inner_model, title
        options = extra_args["model_options"].copy()
        options = comfy.model_patcher.set_model_options_post_cfg_function(options, self.remember)
        self.arguments = {**extra_args, "model_options": options}
        self.weights: list[float] = []
        self.seen: dict | None = None

    def close(self) -> None:
        """The options lead back here: the ring would hold the MODEL after the run, a leak to the host."""
        self.arguments, self.seen = {}, None

    def remember(self, args: dict) -> Tensor:
        """Post-CFG function, the last in the row."""
        self.seen = args
        if self.guider.cfg != self.weights[-1] and not math.isclose(args["cond_scale"], 1.0):
            raise GuidanceError(
                f"{self.title}: another node on this MODEL (CFG Override?) sets the guidance weight of this step to "
                f"{args['cond_scale']:g}, and this sampler has to set it. Remove that node; all that it may set is 1, "
                "no guidance."
            )
        return args["denoised"]

    def __call__(self, x: Tensor, sigma: float, weight: float) -> tuple[Tensor, Tensor | None]:
        own, self.seen = self.guider.cfg, None
        self.weights.append(weight)
        try:
            self.guider.cfg = weight
            guided = self.model(x, x.new_full([len(x)], sigma), **self.arguments)
        finally:
            self.guider.cfg = own
        if self.seen is None:
            raise GuidanceError(
                f"{self.title}: a node on this MODEL (LazyCache?) skipped a prediction, and this sampler needs "
                "each at a guidance weight of its own. Remove that node, or use another sampler, such as euler."
            )
        if self.seen["uncond"] is None and math.isclose(self.seen["cond_scale"], 1.0):
            return guided, None  # LinearAG has no evaluation but an estimate: its weight is not 1
        return guided, self.outside_mask(x, sigma, self.seen["uncond_denoised"])

    def outside_mask(self, x: Tensor, sigma: float, x0: Tensor) -> Tensor:
        """``x0`` with the given latent where the noise mask keeps it, as the host does with the guided x0."""
        mask, options = self.arguments.get("denoise_mask"), self.arguments["model_options"]
        if mask is None:
            return x0
        if "denoise_mask_function" in options:
            given = {"model": self.guider, "sigmas": self.model.sigmas}
            mask = options["denoise_mask_function"](x.new_full([len(x)], sigma), mask, extra_options=given)
        return x0 * mask + self.model.latent_image * (1.0 - mask)


def noise_of(x: Tensor, seed: int | None, scale: float) -> Callable[[], Tensor]:
    """Draws of noise like x from a generator of this run, on the CPU so that every device draws the same."""
    generator = torch.Generator().manual_seed(((seed or 0) + NOISE_SEED) % 2**64)
    return lambda: scale * torch.randn(x.shape, generator=generator).to(x)


def reporter(sigmas: Tensor, callback: Callable | None, disable: bool | None) -> Callable[[int, Tensor, Tensor], None]:
    """The host's progress bar and previews, after each step's prediction."""
    bar = iter(model_trange(len(sigmas) - 1, disable=disable))
    next(bar, None)

    def report(i: int, x: Tensor, x0: Tensor) -> None:
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": x0})
        next(bar, None)

    return report


# ------------------------------------------------------------------------------------------------- W2SD


def w2sd(method: W2SD, weak: samplers.CFGGuider | None = None) -> samplers.KSAMPLER:
    """``method`` as a SAMPLER. ``weak`` is a guider of its own; without one the sampler's own at ``weak_cfg`` is."""
    return samplers.KSAMPLER(sample_w2sd, {"method": method, "weak": weak})


@torch.no_grad()
def sample_w2sd(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Callable | None = None,
                disable: bool | None = None, *, method: W2SD, weak: samplers.CFGGuider | None) -> Tensor:  # fmt: skip
    """The host's sampler function: plain Euler of the guider as it is wired, reflected by the weak prediction."""
    if len(sigmas) < 2:  # no steps, nothing to reflect
        return x
    guider = model.inner_model
    to_sigma = guider.model_patcher.get_model_object("model_sampling").percent_to_sigma
    low, high = to_sigma(method.end), to_sigma(method.start)
    levels = sigmas.tolist()

    def within(sigma: float) -> bool:
        return low <= sigma <= high * (1 + 1e-5)  # with room for rounding, as Step.within

    def solve(strong: Denoiser, weak: Denoiser) -> Tensor:
        out = method.sample(strong, weak, x, levels, within, reporter(sigmas, callback, disable))
        steps, reflected = len(levels) - 1, sum(method.reflects(levels, within))
        log.info("Rudder: %s: %d of %d steps reflected, so %d predictions of the strong side and %d of the weak one",
                 method.title, reflected, steps, steps + reflected, reflected)  # fmt: skip
        return out

    strong = denoiser(model, extra_args)
    if weak is not None:
        return beside(weak, model, extra_args, sigmas, method.title, x, strong, solve)
    check(guider, method.title, "weak_cfg", needs_negative=method.weak_cfg != 1.0)
    if math.isclose(guider.cfg, method.weak_cfg):
        raise GuidanceError(
            f"{method.title}: weak_cfg is {method.weak_cfg:g} and so is the sampler's cfg, so there is nothing to "
            "reflect. Lower weak_cfg (official: 1 with cfg 5.5), or wire a weak_guider."
        )
    at = AtWeight(model, looking_ahead(extra_args), method.title)
    try:
        return solve(strong, ahead(guider, lambda x, sigma: at(x, sigma, method.weak_cfg)[0]))
    finally:
        at.close()


def denoiser(model: Any, extra_args: dict) -> Denoiser:
    return lambda x, sigma: model(x, x.new_full([len(x)], sigma), **extra_args)


def looking_ahead(extra_args: dict) -> dict:
    """Arguments of predictions at the next noise level that belong to this step: what a plan does by steps (R2F's
    prompt, zero-init) is the same; what it does by noise levels (windows, schedules) is that of the level."""
    return {**extra_args, "model_options": {**extra_args["model_options"], AHEAD: True}}


def ahead(guider: samplers.CFGGuider, weak: Denoiser) -> Denoiser:
    """``weak``, which is asked at the next noise level, with scheduled hooks of the ``guider`` where this step has
    them: the host only moves them onwards, and the step that counts is still to come."""
    def on(x: Tensor, sigma: float) -> Tensor:
        with frozen_schedules(guider.conds.values(), x.new_tensor(sigma)):
            return weak(x, sigma)

    return on


def beside(other: samplers.CFGGuider, model: Any, extra_args: dict, sigmas: Tensor, title: str, x: Tensor,
           strong: Denoiser, solve: Callable[[Denoiser, Denoiser], Tensor]) -> Tensor:  # fmt: skip
    """``solve(strong, weak)`` inside a sampling of the ``other`` guider, so that the host prepares its MODEL and
    prompts as it always does, and loads both MODELs in one call. Noise mask and latent are the run's.

    Two MODELs on the same weights with other patches (a LoRA at two strengths) cannot be loaded at once: then the host
    patches the weights anew at every change.
    """
    guider = model.inner_model
    check_pair(guider, other, title)
    own, patcher = guider.model_patcher, other.model_patcher.clone()
    shared = patcher.is_clone(own)
    # The host keeps what one call loads: the strong side's ControlNets and second models must outlive this one.
    patcher.set_additional_models("rudder_sampled", [*([] if shared else [own]), *guider.loaded_models])

    def both(weak: Denoiser) -> Tensor:
        weak = ahead(guider, weak)
        return solve(resident(own, patcher, strong), resident(patcher, own, weak)) if shared else solve(strong, weak)

    mask = extra_args.get("denoise_mask")
    inner = Inner(model, mask, both)
    other = copy.copy(other)  # the user's GUIDER stays as it is
    other.model_patcher = patcher
    latent = guider.inner_model.process_latent_out(model.latent_image)
    one = None if mask is None else mask[:, :1]  # as a user wires it: the host repeats it for the channels
    other.sample(torch.zeros_like(x), latent, inner, sigmas, denoise_mask=one, disable_pbar=True,
                 seed=extra_args.get("seed"))
    return inner.result


def check_pair(guider: samplers.CFGGuider, other: samplers.CFGGuider, title: str) -> None:
    """Refuse a second guider whose predictions do not live in the same latent space."""
    if any(getattr(one, "is_multigpu_base_clone", False) for g in (guider, other)
           for one in g.model_patcher.get_additional_models()):
        raise GuidanceError(
            f"{title}: a MODEL here is spread over several GPUs, and with a weak_guider both sides would share them. "
            "Remove the multi-GPU node, or the weak_guider and set weak_cfg instead."
        )
    if other is guider:
        raise GuidanceError(
            f"{title}: weak_guider is the sampler's own guider, so there is nothing to reflect. Wire a second "
            "CFGGuider with the weaker MODEL, prompts or cfg."
        )
    models = [g.model_patcher for g in (guider, other)]
    flows = [parametrisation_of(m.get_model_object("model_sampling")) is Parametrisation.FLOW for m in models]
    channels = [m.get_model_object("latent_format").latent_channels for m in models]
    if flows[0] != flows[1] or channels[0] != channels[1]:
        kinds = [f"{'a flow model' if f else 'an eps or v model'}, {c} channels" for f, c in zip(flows, channels)]
        raise GuidanceError(
            f"{title}: the weak_guider's MODEL ({kinds[1]}) does not share the latents of the sampler's ({kinds[0]}). "
            "Use two models of one family, such as SD1.5 and a fine-tune of it."
        )
    seconds = seconds_of([*plan_of(guider.model_options), *plan_of(other.model_options)])
    for second in seconds:
        if any(loaded_apart(second, one) for one in [*models, *seconds]):
            raise GuidanceError(
                f"{title}: the worse model of AutoGuidance shares its weights with another MODEL of this run and "
                "patches them differently, and only one version can be loaded at a time. Load it with a loader node of "
                "its own."
            )
    shapes = [c["model_conds"]["latent_shapes"].cond for c in guider.conds["positive"]
              if "latent_shapes" in c.get("model_conds", {})]
    if shapes and len(shapes[0]) > 1:
        raise GuidanceError(
            f"{title}: this latent holds {len(shapes[0])} parts (video and audio), and a second guider can be asked "
            "about one only. Remove the weak_guider and set weak_cfg instead."
        )


def resident(patcher: Any, other: Any, predict: Denoiser) -> Denoiser:
    """``predict`` with the weights and patches that ``patcher`` wants, where ``other`` on the same model may have put
    its own."""
    dressed = dressed_apart(patcher, other)

    def on(x: Tensor, sigma: float) -> Tensor:
        model = patcher.model
        if model.current_weight_patches_uuid != patcher.patches_uuid or dressed and model.current_patcher is other:
            needed = patcher.memory_required([2 * len(x), *x.shape[1:]])
            comfy.model_management.load_models_gpu([patcher], memory_required=needed)
        patcher.model.current_patcher = patcher
        return predict(x, sigma)

    return on


class Inner(samplers.Sampler):
    """What the other guider's sampling runs: the solver, which gets that guider's denoiser."""

    def __init__(self, model: Any, mask: Tensor | None, solve: Callable[[Denoiser], Tensor]) -> None:
        self.model, self.mask, self.solve = model, mask, solve
        self.result: Tensor | None = None  # the sampler's tensor; what sampling returns is scaled for a LATENT

    def sample(self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None,
               disable_pbar=False) -> Tensor:  # fmt: skip
        there = samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        there.latent_image, there.noise = self.model.latent_image, self.model.noise
        self.result = self.solve(denoiser(there, looking_ahead({**extra_args, "denoise_mask": self.mask})))
        return self.result

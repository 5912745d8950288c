"""Run a plan: one :class:`Run` per sampling, from the OUTER_SAMPLE wrapper to the last step.

The run owns all state. It sits in the guider's copy of ``model_options`` for as long as the host samples, so it is born
when sampling starts and gone when it ends, is cancelled or raises.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_sampling
import comfy.patcher_extension as ext
import comfy.samplers as samplers
import torch
from torch import Tensor

from ..guidance.contract import (
    Branch,
    Guidance,
    GuidanceError,
    Plan,
    Predictions,
    Prompt,
    Setup,
    Step,
    Variant,
    overrides,
)
from ..guidance.space import Parametrisation, cosine, expand, norm, residual
from ..guidance.trace import Recorder, Trace, plain
from . import conds
from .attention import Attention, check_edit
from .second import SecondModel
from .sites import sites_of

log = logging.getLogger("rudder")

ROLES = ("cond", "uncond")
KEY = "rudder"  # of the plan in a MODEL's options, and of the wrappers that a run installs
AHEAD = "rudder_ahead"  # in the options of a call: it belongs to the step before the one of its noise level


def plan_of(model_options: dict) -> Plan:
    """The plan that a MODEL's options carry; empty when no Rudder node has touched it."""
    return model_options.get(KEY, ())


def recorders(plan: Plan) -> list[Recorder]:
    return [method.recorder for method in plan if isinstance(method, Trace)]


def sample(executor: Callable, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args, **kwargs):
    """OUTER_SAMPLE wrapper: check, bring in the extra conditionings, sample, clean up. Signature of the host's."""
    guider: samplers.CFGGuider = executor.class_obj
    plan = plan_of(guider.model_options)
    if len(sigmas) < 2:  # no steps: what a second sampler gets where the first takes all
        for recorder in recorders(plan):
            recorder.drop(*executing_node())
    if not plan or len(sigmas) < 2:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    check_inputs(guider, noise, latent_image)
    seed = args[3] if len(args) > 3 else kwargs.get("seed")
    own_conds, own_patcher = guider.conds, guider.model_patcher
    try:
        run = Run(guider, plan, sigmas, seed, kwargs.get("latent_shapes"))
        # Appended last, so they run innermost: wrappers of others (cfg overrides, step caches) see them as the guider.
        for kind, wrapper in (
            (ext.WrappersMP.PREPARE_SAMPLING, run.reserve_memory),
            (ext.WrappersMP.SAMPLER_SAMPLE, run.isolate),
            (ext.WrappersMP.PREDICT_NOISE, run.predict_noise),
            *([(ext.WrappersMP.APPLY_MODEL, run.attention.apply_model)] if run.has_edits else []),
        ):
            ext.add_wrapper_with_key(kind, KEY, wrapper, guider.model_options, is_model_options=True)
        out = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    except BaseException:
        guider.conds = own_conds  # the host drops conds only after success
        raise
    finally:
        guider.model_patcher = own_patcher  # hooks of a branch may have moved this run to a delegate
    run.finish()
    return out


def check_inputs(guider: samplers.CFGGuider, noise: Tensor, latent_image: Tensor) -> None:
    """Refuse what would fail late or silently: other guiders, NaN."""
    if type(guider).predict_noise is not samplers.CFGGuider.predict_noise:
        raise GuidanceError(
            f"The guider '{type(guider).__name__}' combines predictions itself, so Rudder's guidance nodes on this "
            "MODEL could not act. Use CFGGuider (or KSampler), or remove the Rudder nodes from this MODEL."
        )
    for name, tensor in (("latent_image", latent_image), ("noise", noise)):
        if not bool(torch.isfinite(tensor).all()):
            raise GuidanceError(
                f"The sampler's {name} holds NaN or infinite values, so every prediction would too. Look at the node "
                "that made it: a VAE Encode that overflows in half precision (start ComfyUI with --fp32-vae), or a "
                "broken file."
            )


def parametrisation_of(model_sampling: Any) -> Parametrisation:
    """What sigma means for this model. V_PREDICTION derives from EPS in the host, so it is asked first."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return Parametrisation.FLOW
    if isinstance(model_sampling, comfy.model_sampling.V_PREDICTION):
        return Parametrisation.V
    return Parametrisation.EPS


def step_index(sigmas: Tensor, sigma: float, ahead: bool = False) -> int:
    """The step that a noise level belongs to: ``sigmas[i] >= sigma > sigmas[i + 1]``, with room for rounding; in a run
    towards noise (FlipSigmas) the other way round. ``ahead``: the step that ends there, in a run towards the picture.
    """
    if ahead:
        begun = sigmas > sigma * (1 + 1e-5)
    else:
        begun = sigmas >= sigma * (1 - 1e-5) if sigmas[0] >= sigmas[-1] else sigmas <= sigma * (1 + 1e-5)
    reached = int(begun[:-1].sum())
    return max(reached - 1, 0)


def silent(pred: Tensor) -> Tensor:
    """``[B, 1, ...]``, True where its areas, masks or ranges leave nothing: the host puts zeros there."""
    return (pred == 0).all(dim=1, keepdim=True)


def asked_for(plan: Plan) -> list[Branch]:
    """Every branch that a run may need: also what a variant of the positive is while another prompt plays it."""
    branches = [branch for method in plan for branch in method.prompts()]
    players = [branch for method in plan if overrides(method, "sources") for branch in method.prompts()]
    variants = [branch for branch in branches if isinstance(branch, Variant) and branch.of == "cond"]
    return branches + [dataclasses.replace(variant, of=player) for variant in variants for player in players]


def as_played(branch: Branch, sources: Mapping[str, Branch]) -> Branch:
    """``branch``; a variant of the positive as that of the prompt which plays it at this step."""
    played = isinstance(branch, Variant) and branch.of == "cond" and "cond" in sources
    return dataclasses.replace(branch, of=sources["cond"]) if played else branch


def lineage(branch: Branch) -> tuple[Branch | str, ...]:
    """``branch`` and what it is a variant of: edits of "cond" also act on its variants."""
    if not isinstance(branch, Variant):
        return (branch,)
    return (branch, branch.of) if isinstance(branch.of, str) else (branch, *lineage(branch.of))


def keeps_uncond(plan: Plan, options: dict) -> bool:
    """Whether the negative is evaluated in every step, also at weight 1: a method or a sampler uses it."""
    return options.get("disable_cfg1_optimization", False) or any(method.needs_uncond for method in plan)


def describe(function: Callable) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


class Run:
    """The state of one sampling. Everything a method remembers lives in ``self.states``."""

    def __init__(
        self, guider: samplers.CFGGuider, plan: Plan, sigmas: Tensor, seed: int | None, latent_shapes: list | None
    ) -> None:
        self.plan = tuple(sorted(plan, key=lambda method: method.rank))  # stable: wiring order inside a rank
        self.sigmas = sigmas.detach().float().cpu()
        self.generator = torch.Generator().manual_seed(seed or 0)
        self.inputs = {"seed": seed, "latent_shapes": latent_shapes}
        self.states: dict[int, dict] = {}
        self.shape: torch.Size | None = None  # of the sampler's tensor
        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        self.parametrisation = parametrisation_of(model_sampling)
        self.percent_to_sigma = functools.cache(model_sampling.percent_to_sigma)  # reads the device at every call
        self.recorders = recorders(plan)
        self.records: list[dict[str, Any]] = []
        self.evaluations = self.calls = 0
        self.hopeful: list[str] = []  # what needs guidance that another node may yet set
        self.guided = False
        self.attention = Attention()
        self.cfg = float(guider.cfg)
        self.sites = sites_of(guider.model_patcher.model.diffusion_model)

        asked = asked_for(plan)
        self.full = {b for b in asked if isinstance(b, Prompt) and not b.bare}  # should show the model what the rest do
        branches = conds.convert_branches(asked, {
            "cond": guider.conds["positive"], "uncond": guider.conds.get("negative") or [],
        })  # fmt: skip
        self.partial = {b for b, entries in branches.items() if isinstance(b, Prompt) and conds.is_partial(entries)}
        self.keys: dict[Branch, str] = {branch: f"rudder_{i}" for i, branch in enumerate(branches)}
        self.owners = {entry["uuid"]: self.keys[branch] for branch, entries in branches.items() for entry in entries}
        others = dict.fromkeys(b.model for b in branches if isinstance(b, Variant) and b.model is not None)
        self.seconds = {id(model): SecondModel(model, guider.model_options) for model in others}
        if any(second.patcher.model is guider.model_patcher.model for second in self.seconds.values()):
            raise GuidanceError(f"{self.titles()}: the other model shares its weights with the sampler's model, and "
                                "only one version can be loaded at a time. Load it with a loader node of its own.")
        self.check(guider, conds.likeness(guider.original_conds))
        conds.join(guider, {self.keys[branch]: entries for branch, entries in branches.items()})

    def check(self, guider: samplers.CFGGuider, likeness: Callable) -> None:
        """Let every method say whether it can act in this run, before anything is loaded or evaluated."""
        steps = [self.step(torch.empty(0), sigma.reshape(1), {}) for sigma in self.sigmas[:-1]]
        weights = [self.weight(step, self.active(step), self.cfg) for step in steps]
        edits = {id(edit): (method.title, edit) for step in steps for method in self.active(step)
                 for edit, _ in method.edits(step)}
        edits |= {id(edit): (method.title, edit) for method in self.plan for branch in method.prompts()
                  if isinstance(branch, Variant) for edit in branch.edits}
        self.has_edits = bool(edits)
        network, positive = guider.model_patcher.model.diffusion_model, guider.conds["positive"]
        setup = Setup(
            cfg=self.cfg,
            weights=weights,
            has_negative=guider.conds.get("negative") is not None,
            parametrisation=self.parametrisation,
            likeness=likeness,
            limits=lambda prompt: conds.limits(conds.converted(prompt)),
            sites=self.sites,
            steps=steps,
            features=[c["cross_attn"] for c in positive if c.get("cross_attn") is not None],
            parts=1 if len(positive) == 1 else max(
                conds.together(positive, step.percent_of(step.level)) for step in steps),
        )
        for title, edit in edits.values():
            check_edit(title, edit, setup.sites, network)
        for method in self.plan:
            if not any(step.within(method.start, method.end) for step in steps):
                raise GuidanceError(
                    f"{method.title}: none of the {len(steps)} steps lies between start {method.start:g} and end "
                    f"{method.end:g}, so it could not act. Widen the window or use more steps."
                )
            self.ask(method, setup, guider)
        foreign = guider.model_options.get("sampler_cfg_function")
        if foreign is None:
            return
        for method in self.plan:
            if overrides(method, "direction"):
                raise GuidanceError(
                    f"'{method.title}' and the CFG function {describe(foreign)} of another node both replace the CFG "
                    "formula; only one can. Remove one of the two nodes from this MODEL."
                )
        log.warning(
            "Rudder: another node's CFG function (%s) replaces the CFG formula on this MODEL; Rudder's methods (%s) "
            "hand it their predictions and weight.", describe(foreign), self.titles(),
        )

    def ask(self, method: Guidance, setup: Setup, guider: samplers.CFGGuider) -> None:
        """``method.check``; a node that wraps predictions (CFG Override) may yet raise the weight of a step."""
        try:
            method.check(setup)
        except GuidanceError:
            wrappers = guider.model_options.get("transformer_options", {}).get("wrappers", {})
            if not wrappers.get(ext.WrappersMP.PREDICT_NOISE, {}).keys() - {"lazycache"}:
                raise
            method.check(dataclasses.replace(setup, overridden=True))
            self.hopeful.append(method.title)

    def compare(self, prompt: Prompt, guider: samplers.CFGGuider) -> None:
        """Say what a prompt lacks beside its words: then the difference of the two is that, more than the words."""
        role = "negative" if prompt.negative and guider.conds.get("negative") else "positive"
        network = guider.model_patcher.model.diffusion_model
        if missing := conds.lacking(guider.conds[self.keys[prompt]], guider.conds[role], network):
            log.warning(
                "Rudder: the %s conditioning lacks what the sampler's %s shows the model beside its text: %s. So their "
                "predictions differ by that too, often more than by the words. Send both through the same nodes.",
                prompt.name, role, ", ".join(missing),
            )

    def titles(self) -> str:
        return " + ".join(method.title for method in self.plan)

    def step(self, x: Tensor, sigma: Tensor, states: dict[int, dict], ahead: bool = False) -> Step:
        level = float(sigma.max())
        return Step(
            x=x,
            sigma=sigma,
            level=level,
            sigmas=self.sigmas,
            index=step_index(self.sigmas, level, ahead),
            parametrisation=self.parametrisation,
            ahead=ahead,
            generator=self.generator,
            percent_to_sigma=self.percent_to_sigma,
            states=states,
            record={} if self.recorders else None,
            sites=self.sites,
        )

    def active(self, step: Step) -> Plan:
        return tuple(method for method in self.plan if step.within(method.start, method.end))

    def weight(self, step: Step, plan: Plan, weight: float) -> float:
        for method in plan:
            weight = method.scale(step, weight)
        return weight

    def reserve_memory(self, executor: Callable, model: Any, noise_shape: Any, *args, **kwargs):
        """PREPARE_SAMPLING wrapper: the host plans memory for two branches; plan for ours too, so that they fit."""
        beside = {branch for method in self.plan if not overrides(method, "sources") for branch in method.prompts()
                  if getattr(branch, "model", None) is None}  # the others take the positive's place or run elsewhere
        batch = math.ceil(noise_shape[0] * (2 + len(beside)) / 2)
        return executor(model, [batch, *noise_shape[1:]], *args, **kwargs)

    def isolate(self, executor: Callable, guider: samplers.CFGGuider, *args, **kwargs):
        """SAMPLER_SAMPLE wrapper: a branch must not change what the other conds predict, or it acts outside its window.

        The host copies the area of every cond to all others, so that they are compared over the same crop. Our branches
        take part in that as takers only: their own areas are removed again from the rest.
        """
        guider.conds = conds.told_apart({
            name: [entry for entry in entries if self.owners.get(entry["uuid"], name) == name]
            for name, entries in guider.conds.items()
        })
        noise, latent_image, denoise_mask = args[3:6]
        what = {"latent_image": latent_image, "denoise_mask": denoise_mask, **self.inputs}
        for branch, key in self.keys.items():
            self.prepare(branch, key, guider, noise, what)
        for prompt in self.keys:
            if prompt in self.full:
                self.compare(prompt, guider)
        try:
            for second in self.seconds.values():
                second.begin(args[0])
            return executor(guider, *args, **kwargs)
        finally:
            self.attention.step = None  # it leads back here: the ring would hold the MODEL, a leak to the host
            for second in self.seconds.values():
                second.end()

    def prepare(self, branch: Branch, key: str, guider: samplers.CFGGuider, noise: Tensor, what: dict) -> None:
        """What the host does not do for a variant: encode it by its own model, find out whether the image is seen."""
        if not isinstance(branch, Variant):
            return
        if branch.model is not None:
            role = {"cond": "positive", "uncond": "negative"}.get(branch.of, key)
            second = self.seconds[id(branch.model)]
            guider.conds[key] = second.encoded(guider.conds[key], noise, role, **what)
        elif not branch.image and branch.of == "uncond":
            if conds.same_to_the_model(guider.conds[key], guider.conds["negative"]):
                raise GuidanceError(
                    f"{self.titles()}: this model takes no image, it does not see what the negative conditioning shows "
                    "it. Use a model for editing (InstructPix2Pix, CosXL edit), or remove the node."
                )

    def predict_noise(
        self,
        executor: Callable,
        x: Tensor,
        timestep: Tensor,
        model_options: dict | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """PREDICT_NOISE wrapper: the plan in place of ``CFGGuider.predict_noise``. Returns the guided x0."""
        guider, options = executor.class_obj, model_options or {}
        if self.shape not in (None, x.shape):
            self.states.clear()  # a sampler that enlarges on the way: what methods remember is of another size
        self.shape = x.shape
        step = self.step(x, timestep, self.states, options.get(AHEAD, False))
        plan = self.active(step)
        step.weight = self.weight(step, plan, float(guider.cfg))
        self.guided |= guider.cfg != 1.0 and not math.isclose(step.weight, 1.0)
        leaving = [rows for method in plan if (rows := method.left(step)) is not None]
        step.left = torch.stack(leaving).any(0) if leaving else None
        for method in plan:
            step.x = method.latent(step, step.x)
        before = self.evaluations
        plain_preds, roles = self.evaluate(guider, step, plan, options)
        step.plain = preds = plain_preds
        for method in plan:
            preds = method.refine(step, preds)
        step.preds = preds
        x0 = self.combine(guider, step, plan, preds, roles, options)
        self.calls += 1
        step.log(evaluations=self.evaluations - before)
        self.record(step, plain_preds, preds)
        return x0

    def evaluate(
        self, guider: samplers.CFGGuider, step: Step, plan: Plan, options: dict
    ) -> tuple[Predictions, list[list[dict] | None]]:
        """All branches of the step in one call of the host's batching, then other packs' pre-CFG functions.

        Returns the predictions and the conds behind cond and uncond, in the host's order.
        """
        sources: dict[str, Branch] = {}
        for method in plan:
            sources.update(method.sources(step))
        step.player = sources.get("cond")
        wanted = [(method.title, b) for method in plan for b in method.branches(step) if b != sources.get("cond")]
        extra = list(dict.fromkeys(branch for _, branch in wanted))
        own = (guider.conds["positive"], guider.conds.get("negative"))
        roles = [guider.conds[self.keys[sources[r]]] if r in sources else entries for r, entries in zip(ROLES, own)]
        fill = [entries if sources.get(r) in self.partial else None for r, entries in zip(ROLES, own)]
        self.attention.step = step
        self.attention.texts = {"cond": roles[0]} | {b: guider.conds[key] for b, key in self.keys.items()}
        own_edits = [(method.title, edit, on) for method in plan for edit, on in method.edits(step)]
        of_branches = [(title, edit, (b,)) for title, b in wanted if isinstance(b, Variant) for edit in b.edits]
        self.attention.titles = {id(edit): title for title, edit, _ in (*own_edits, *of_branches)}
        self.attention.acting = [
            *((edit, on) for _, edit, on in own_edits),
            *((edit, (branch,)) for branch in extra if isinstance(branch, Variant) for edit in branch.edits),
        ]
        asked_elsewhere = dict(zip(ROLES, zip(roles, fill)))
        step.evaluate = functools.partial(self.look_elsewhere, guider, options, asked_elsewhere, extra)
        unguided = math.isclose(step.weight, 1.0)
        if not unguided and roles[1] is None:
            raise GuidanceError(
                f"The guidance weight is {step.weight:g} but the guider has no negative conditioning. Use CFGGuider or "
                "KSampler with a negative (an empty prompt will do), or keep the weight at 1."
            )
        predicted = [method.predicts_uncond(step) for method in plan]
        if (unguided or any(predicted)) and not keeps_uncond(plan, options):
            roles[1] = None
        asked = {branch: as_played(branch, sources) for branch in extra}
        here = [branch for branch in extra if getattr(branch, "model", None) is None]
        more = {branch: guider.conds[self.keys[asked[branch]]] for branch in here}
        out, others = self.call_model(guider, options, step.x, step.sigma, roles, fill, more)
        others = dict(zip(here, others))
        for branch in extra:
            if branch not in others:
                others[branch] = self.call_second(guider.conds[self.keys[asked[branch]]], branch, step, options)

        step.plain = Predictions(out[0], out[1])  # what others ask from here on is not the step's own
        for function in options.get("sampler_pre_cfg_function", []):
            out = function(
                {"conds": roles, "conds_out": out, "cond_scale": step.weight, "timestep": step.sigma, "input": step.x,
                 "sigma": step.sigma, "model": guider.inner_model, "model_options": options}
            )
        cond = out[0]
        # A variant of a prompt that plays the positive is as partial as that prompt.
        quiet = {b: silent(pred) for b, pred in others.items() if not self.partial.isdisjoint(lineage(asked[b]))}
        predictions = {b: torch.where(quiet[b], cond, pred) if b in quiet else pred for b, pred in others.items()}
        if "cond" in sources:
            predictions[sources["cond"]] = cond
        return Predictions(cond, out[1] if roles[1] is not None else None, predictions, quiet), roles

    def call_model(
        self, guider: samplers.CFGGuider, options: dict, x: Tensor, sigma: Tensor, roles: Sequence, fill: Sequence,
        extra: Mapping[Branch, list[dict]] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Evaluate the conds of cond and uncond (None is left out) and ``extra`` in the host, and count.

        ``fill``: conds that stand in where a role leaves parts of the picture or of the run uncovered, None for none.
        A foreign batch function expects exactly cond and uncond, so it gets just those.
        """
        model = guider.inner_model
        extra = extra or {}
        gaps = [i for i in range(len(ROLES)) if roles[i] and fill[i]]
        more = [*extra.values(), *(fill[i] for i in gaps)]
        named = [(ROLES[i], entries) for part in (fill, roles) for i, entries in enumerate(part) if entries]
        self.attention.who = {entry["uuid"]: (role,) for role, entries in named for entry in entries} | {
            entry["uuid"]: lineage(branch) for branch, entries in extra.items() for entry in entries
        }
        self.attention.entries = {entry["uuid"]: entry for entries in [*roles, *more] if entries for entry in entries}
        foreign = options.get("sampler_calc_cond_batch_function")
        if foreign is None:
            out = samplers.calc_cond_batch(model, [*roles, *more], x, sigma, options)
            out, others = list(out[:2]), list(out[2:])
        else:
            others = samplers.calc_cond_batch(model, more, x, sigma, options) if more else []
            out = foreign({"conds": roles, "input": x, "sigma": sigma, "model": model, "model_options": options})
        for i, fallback in zip(gaps, others[len(extra):]):
            out[i] = torch.where(silent(out[i]), fallback, out[i])
        level = float(sigma.max())
        self.evaluations += sum(conds.acts(entries, level) for entries in [*roles, *more] if entries)
        return out, others[:len(extra)]

    def call_second(self, entries: list[dict], branch: Variant, step: Step, options: dict) -> Tensor:
        self.evaluations += conds.acts(entries, step.level)
        return self.seconds[id(branch.model)].predict(entries, step.x, step.sigma, options)

    def look_elsewhere(
        self, guider: samplers.CFGGuider, options: dict, wired: dict[str, tuple], extra: Sequence[Branch], x: Tensor,
        sigma: float, *roles: str,
    ) -> list[Tensor]:
        """``Step.evaluate``. Other packs' pre-CFG functions are about the step itself, so they are not called."""
        asked, fill = zip(*(map(conds.apart, wired[role]) if role in roles else (None, None) for role in ROLES))
        if missing := [role for role, entry in zip(ROLES, asked) if role in roles and entry is None]:
            raise GuidanceError(f"{self.titles()}: the guider has no conditioning for '{missing[0]}'. Use KSampler or "
                                "CFGGuider with a positive and a negative (an empty prompt will do).")
        company = {  # branches that an edit of these roles needs beside them
            branch: conds.apart(guider.conds[self.keys[branch]]) for _, on in self.attention.acting
            if not {*roles}.isdisjoint(on) for branch in extra if branch in on
        }
        sigmas = torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)
        who, entries = self.attention.who, self.attention.entries
        with conds.frozen_schedules([*asked, *fill, *company.values()], sigmas[0]):
            out, _ = self.call_model(guider, options, x, sigmas, asked, fill, company)
        self.attention.who, self.attention.entries = who, entries  # other packs ask the model again in this step
        return [out[ROLES.index(role)] for role in roles]

    def combine(
        self, guider: samplers.CFGGuider, step: Step, plan: Plan, preds: Predictions, roles: list, options: dict
    ) -> Tensor:
        """The guided x0 from refined predictions, then other packs' post-CFG functions, as the host runs them."""
        model, cond = guider.inner_model, preds.cond
        uncond = torch.zeros_like(cond) if preds.uncond is None else preds.uncond  # what the host hands out then
        delta = plain_delta = cond - uncond
        if preds.uncond is not None:
            for method in plan:
                delta = method.direction(step, delta)
        if delta is not plain_delta:
            x0 = cond + (step.weight - 1) * delta
        else:
            bare = {**options, "sampler_post_cfg_function": []}
            x0 = samplers.cfg_function(
                model, cond, uncond, step.weight, step.x, step.sigma, model_options=bare, cond=roles[0], uncond=roles[1]
            )
        if step.left is not None:
            x0 = torch.where(expand(step.left, x0) > 0, cond, x0)
        for method in plan:
            added = method.term(step, preds)
            x0 = x0 if added is None else x0 + added
        for method in plan:
            x0 = method.finish(step, x0)
        if step.left is not None:  # the negative of such a picture, for solvers that use it: as in a run of its own
            alone = step.plain.uncond if keeps_uncond(plan, options) else x0
            uncond = torch.where(expand(step.left, x0) > 0, alone, uncond)
        for function in options.get("sampler_post_cfg_function", []):
            x0 = function(
                {"denoised": x0, "cond": roles[0], "uncond": roles[1], "cond_scale": step.weight, "model": model,
                 "uncond_denoised": uncond, "cond_denoised": cond, "sigma": step.sigma, "model_options": options,
                 "input": step.x}
            )
        return x0

    def record(self, step: Step, plain_preds: Predictions, preds: Predictions) -> None:
        if step.record is None:
            return
        step.log(index=step.index, sigma=step.level, weight=step.weight)
        if plain_preds.uncond is not None:
            e_cond, e_uncond = residual(step.x, plain_preds.cond), residual(step.x, plain_preds.uncond)
            step.log(
                cosine=cosine(e_cond, e_uncond),
                guidance_norm=norm(plain_preds.cond - plain_preds.uncond),
                cond_norm=norm(plain_preds.cond),
            )
        if preds.cond is not plain_preds.cond:
            step.log(change_norm=norm(preds.cond - plain_preds.cond))
        self.records.append({name: plain(value) for name, value in step.record.items()})

    def finish(self) -> None:
        """Report the cost, and hand the records to the trace nodes."""
        count, calls = self.evaluations, self.calls
        each = count / max(calls, 1)
        if self.hopeful and not self.guided:
            log.warning(
                "Rudder: %s: cfg was 1 at every step of this run, so there was no guidance to shape. Raise it in the "
                "sampler, or in the node that sets it.", " + ".join(self.hopeful),
            )
        log.info("Rudder: %s: %d model evaluations in %d calls (%.2f each)", self.titles(), count, calls, each)
        run = {
            "methods": [method.title for method in self.plan if not isinstance(method, Trace)],
            "cfg": self.cfg,
            "parametrisation": self.parametrisation.value,
            "evaluations": self.evaluations,
            "steps": self.records,
        }
        for recorder in self.recorders:
            recorder.keep(run, *executing_node())


def executing_node() -> tuple[str, int]:
    """The id of the sampler node that is running, so that its next run replaces its last one, and the place in the list
    of its inputs."""
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    return (context.node_id, context.list_index or 0) if context else ("", 0)

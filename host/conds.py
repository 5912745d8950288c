"""Bring a method's own conditionings into the guider's run, as if the user had wired them to the sampler.

They join ``guider.conds`` before the host loads models and processes conditionings, so areas, masks, ControlNets,
timestep ranges and hooks of an anchor are handled by the host's own code.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator

import comfy.hooks
import comfy.sampler_helpers as helpers
import comfy.samplers as samplers
import torch

from ..guidance.contract import Branch, GuidanceError, Mix, Prompt, Variant

Conds = list[dict]
TENSORS = {"cross_attn": "text features", "pooled_output": "pooled features"}
IMAGES = {"concat_latent_image", "concat_mask", "concat_image", "reference_latents"}  # what shows a model an image
SHOWN = dict.fromkeys(sorted(IMAGES), "an image") | {  # to the model, beside the text
    "clip_vision_output": "an image (CLIP vision)", "unclip_conditioning": "an image (unCLIP)",
    "control": "a ControlNet", "control_video": "a control video", "vace_frames": "frames (VACE)",
    "pose_video_latent": "a pose video", "face_video_pixels": "a face video", "reference_motion": "a reference motion",
    "time_dim_concat": "frames", "keyframe_idxs": "keyframes", "context_latents": "latents of a context",
    "audio_embed": "audio", "guidance": "distilled guidance (FluxGuidance)",
}
TEXT = {"c_crossattn", "attention_mask", "num_tokens"}  # what a model is given of it; "y" too, but for unCLIP
PARTIAL = {"strength", "area", "mask", "start_percent", "end_percent", "clip_start_percent", "default"}


def converted(prompt: Prompt) -> Conds:
    """A node's CONDITIONING in the form that guiders keep, with fresh uuids (cache packs key on them). A negative is
    told to be one: the SDXL refiner scores it otherwise."""
    if not prompt.conditioning:
        raise GuidanceError(f"The {prompt.name} conditioning is an empty list; connect a text encode node's output.")
    conds = helpers.convert_cond(prompt.conditioning)
    return told_negative(conds) if prompt.negative else conds


def told_negative(conds: Conds) -> Conds:
    return [{"prompt_type": "negative", **entry} for entry in conds]


def check_encoder(name: str, conds: Conds, positive: Conds) -> None:
    """Refuse conditionings of another text encoder than the positive's, by the width of their features."""
    for key, what in TENSORS.items():
        expected = {c[key].shape[-1] for c in positive if c.get(key) is not None}
        for width in {c[key].shape[-1] for c in conds if c.get(key) is not None}:
            if expected and width not in expected:
                raise GuidanceError(
                    f"The {name} conditioning has {width} {what} and the positive has {', '.join(map(str, expected))}: "
                    "they come from different text encoders. Encode both with the CLIP of the checkpoint you sample."
                )
        if expected and not any(c.get(key) is not None for c in conds):
            raise GuidanceError(
                f"The {name} conditioning has no {what} but the positive has. Encode both with the same text encode "
                "node."
            )


def same_prompt(a: Conds, b: Conds) -> bool:
    """Whether two conditionings hold equal tensors and equal settings (area, mask, range, control, hooks)."""
    return len(a) == len(b) and all(map(_same_entry, a, b))


def _same_entry(a: dict, b: dict) -> bool:
    keys = (set(a) | set(b)) - {"model_conds", "uuid", "prompt_type"}
    return all(same_value(a.get(key), b.get(key)) for key in keys)


def same_value(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_value(a[key], b[key]) for key in a)
    if isinstance(a, (bool, int, float, str, tuple)) and isinstance(b, (bool, int, float, str, tuple)):
        return a == b
    return a is b


def is_empty(conds: Conds) -> bool:
    """All features are zero: what ConditioningZeroOut gives."""
    tensors = [c[key] for c in conds for key in TENSORS if c.get(key) is not None]
    return bool(tensors) and not any(bool(t.any()) for t in tensors)


def mixed(mix: Mix, positive: Conds) -> Conds:
    """The positive with its features moved towards the prompt's; areas, controls and hooks stay the positive's."""
    other, *more = converted(mix.prompt)
    if more:
        raise GuidanceError(f"The {mix.prompt.name} conditioning has {len(more) + 1} entries (combined or scheduled "
                            "prompts), and only one can be mixed in. Give it one prompt, or use the alternate mode.")
    out = []
    for entry in positive:
        entry = {**entry, "uuid": uuid.uuid4(), "model_conds": {}}
        more = {key: "text features" for key, value in entry.items()  # HiDream's and Hunyuan's; tokens are no features
                if key.startswith("conditioning_") and isinstance(value, torch.Tensor) and value.is_floating_point()}
        for key, what in (TENSORS | more).items():
            a, b = entry.get(key), other.get(key)
            if a is None or b is None:
                continue
            if a.shape[1:] != b.shape[1:]:
                raise GuidanceError(
                    f"The {mix.prompt.name} conditioning has {what} of shape {tuple(b.shape)} and the positive "
                    f"{tuple(a.shape)}, so they cannot be mixed. Make both prompts about the same length (one block of "
                    "77 tokens for CLIP), or use the alternate mode."
                )
            entry[key] = torch.lerp(a, b.to(a), mix.amount)
        out.append(entry)
    return out


def convert_branches(branches: Iterable[Branch], own: dict[str, Conds]) -> dict[Branch, Conds]:
    """Every branch of a plan as the guider's conds; duplicates fall together. ``own``: the guider's, by role."""
    out: dict[Branch, Conds] = {}
    for branch in branches:
        if branch in out:
            continue
        if isinstance(branch, Variant):
            of = branch.of
            out[branch] = varied(branch, own[of] if isinstance(of, str) else convert_branches([of], own)[of])
            continue
        prompt = branch.prompt if isinstance(branch, Mix) else branch
        check_encoder(prompt.name, converted(prompt), own["cond"])
        out[branch] = mixed(branch, own["cond"]) if isinstance(branch, Mix) else converted(branch)
        check_spread(branch.name, out[branch], own["cond"])
    return out


def is_whole(entry: dict) -> bool:
    """Whether an unprocessed entry speaks of the whole picture, if weighted by a mask."""
    return entry.get("area") is None and not (entry.get("set_area_to_bounds") and entry.get("mask") is not None)


def check_spread(name: str, conds: Conds, positive: Conds) -> None:
    """Refuse what the host would divide by zero over: it puts the positive's ControlNet and boxes on one of the entries
    without area of every other conditioning."""
    spread = [c for c in positive if is_whole(c) and (
        c.get("gligen") is not None or c.get("control") is not None and c.get("control_apply_to_uncond"))]
    if spread and not any(map(is_whole, conds)):
        raise GuidanceError(
            f"Every entry of the {name} conditioning has an area, and the positive's ControlNet or boxes (GLIGEN) need "
            "one without. Combine it with a prompt for the whole picture, or use 'Apply ControlNet' (not OLD) on both "
            "prompts."
        )


def lacking(conds: Conds, other: Conds, network: torch.nn.Module) -> list[str]:
    """What entries of ``other`` show the model beside the text, and no entry of ``conds`` does. Processed conds: what
    the model does not take makes no difference, and a ControlNet for all prompts is on all of them."""
    distilled = getattr(getattr(network, "params", None), "guidance_embed", True)
    unread = set() if distilled else {"guidance"}  # the host hands it over all the same

    def counts(entry: dict, key: str) -> bool:
        beside = TEXT | unread if key == "unclip_conditioning" else TEXT | unread | {"y"}
        return key == "control" or key not in unread and any(differ_in_model(entry, one, beside) for one in conds)

    return sorted({said for key, said in SHOWN.items() if all(entry.get(key) is None for entry in conds)
                   and any(entry.get(key) is not None and counts(entry, key) for entry in other)})


def differ_in_model(a: dict, b: dict, beside: Collection[str]) -> bool:
    """Whether the model is given different things of two processed entries, ``beside`` what."""
    x, y = ({key: part.cond for key, part in entry["model_conds"].items() if key not in beside} for entry in (a, b))
    return not same_value(x, y)


def varied(variant: Variant, conds: Conds) -> Conds:
    """Copies without their image, or with the other model among those that the host loads for them."""
    out = [{**entry, "uuid": uuid.uuid4(), "model_conds": {}} for entry in conds]
    if not out:
        raise GuidanceError(f"The guider has no {variant.name}: use CFGGuider or KSampler with a positive and a "
                            "negative (an empty prompt will do).")
    if variant.of == "uncond":
        out = told_negative(out)
    if not variant.image:
        if not any(IMAGES & set(entry) for entry in out):
            raise GuidanceError(
                f"The {Variant(variant.of).name} conditioning shows the model no image, so there is no {variant.name}. "
                "Send both prompts through InstructPixToPixConditioning (or the image conditioning node of your "
                "model), or give the base conditioning yourself."
            )
        out = [{key: value for key, value in entry.items() if key not in IMAGES} for entry in out]
    if variant.model is not None:
        for entry in out:
            entry.pop("hooks", None)  # they are registered with the sampler's model
        out[0]["additional_models"] = [*out[0].get("additional_models", []), variant.model]
    return out


def same_to_the_model(a: Conds, b: Conds) -> bool:
    """Whether the model makes the same of two processed conds, entry by entry."""
    return len(a) == len(b) and not any(differ_in_model(x, y, ()) for x, y in zip(a, b))


def likeness(own: dict[str, Conds]) -> Callable[[Prompt], str | None]:
    """See ``Setup.likeness``; ``own`` are the guider's conds as the user wired them."""

    def of(prompt: Prompt) -> str | None:
        conds = converted(prompt)
        for role, entries in own.items():
            if same_prompt(conds, entries):
                return role
        return "empty" if is_empty(conds) else None

    return of


def is_partial(conds: Conds) -> bool:
    """Whether some of the picture or of the run may be covered by no entry."""
    return not any(PARTIAL.isdisjoint(c) for c in conds)


def range_of(entry: dict) -> tuple[float, float]:
    """From when to when an unprocessed entry acts, in percent of the model's timesteps."""
    return (max(entry.get("start_percent", 0.0), entry.get("clip_start_percent", 0.0)),
            min(entry.get("end_percent", 1.0), entry.get("clip_end_percent", 1.0)))


LIMITS: dict[str, Callable[[dict], bool]] = {
    "an area": lambda entry: entry.get("area") is not None,
    "a mask": lambda entry: entry.get("mask") is not None,
    "a strength": lambda entry: entry.get("strength", 1.0) != 1.0,
    "a timestep range": lambda entry: range_of(entry) != (0.0, 1.0),
}


def limits(conds: Conds) -> list[str]:
    """What of ``LIMITS`` holds unprocessed entries to parts of the picture or of the run."""
    return [what for what, holds in LIMITS.items() if any(map(holds, conds))]


def lies_in(cond: dict, percent: float) -> bool:
    """Whether an unprocessed entry's range holds a share of the model's timesteps."""
    start, end = range_of(cond)
    return start <= percent < end or percent >= end >= 1.0


def together(conds: Conds, percent: float) -> int:
    """How many unprocessed entries the host may put into one forward pass there: they act on areas of one size."""
    areas = [entry.get("area") or (() if is_whole(entry) else (id(entry),))  # the bounds of a mask are its own
             for entry in conds if lies_in(entry, percent)]
    sizes = [tuple(area[: (len(area) + 1) // 2]) for area in areas]  # then come the offsets
    return max(map(sizes.count, sizes), default=0)


def acts(conds: Conds, sigma: float) -> bool:
    """Whether the host evaluates any of these processed conds at this noise level."""
    return any(c.get("timestep_end", 0.0) <= sigma <= c.get("timestep_start", math.inf) for c in conds)


def told_apart(conds: dict[str, Conds]) -> dict[str, Conds]:
    """The same conds with uuids that belong to one of them: the host copies an area to the other conds together with
    its uuid."""
    taken: set[uuid.UUID] = set()

    def own(entry: dict, name: str) -> dict:
        mine = {**entry, "uuid": uuid.uuid5(entry["uuid"], name)} if entry["uuid"] in taken else entry
        taken.add(mine["uuid"])
        return mine

    return {name: [own(entry, name) for entry in entries] for name, entries in conds.items()}


def text_length(cond: dict) -> int | None:
    """How many text tokens a processed cond shows the model."""
    features = cond.get("model_conds", {}).get("c_crossattn")
    return None if features is None else features.cond.shape[1]


def apart(conds: Conds | None) -> Conds | None:
    """The same conds under other, stable uuids: cache packs (EasyCache) key on them, and must not take a look at
    another noise level for the next step."""
    return conds and [{**entry, "uuid": uuid.uuid5(entry["uuid"], "elsewhere")} for entry in conds]


@contextlib.contextmanager
def frozen_schedules(conds: Iterable[Conds | None], sigma: torch.Tensor) -> Iterator[None]:
    """Let scheduled hooks keep the strength of the step during a call at ``sigma``: the host only moves them onwards.

    A schedule does nothing when it believes that it has been asked at this noise level already.
    """
    hooks = [hook for entries in conds if entries for c in entries if c.get("hooks") for hook in c["hooks"].hooks]
    schedules = {id(hook.hook_keyframe): hook.hook_keyframe for hook in hooks}.values()
    before = [(schedule, schedule._curr_t) for schedule in schedules]
    try:
        for schedule in schedules:
            schedule._curr_t = sigma
        yield
    finally:
        for schedule, level in before:
            schedule._curr_t = level


def join(guider: samplers.CFGGuider, conds: dict[str, Conds]) -> None:
    """Add ``conds`` to the guider's own for this run, and register their hooks with the host.

    ``CFGGuider.sample`` registers hooks before any wrapper runs, so the steps it took for its own conds are repeated
    here for the new ones.
    """
    samplers.preprocess_conds_hooks(conds)
    everyone = {**guider.conds, **conds}
    hooks, all_hooks = comfy.hooks.HookGroup(), comfy.hooks.HookGroup()
    for name, entries in everyone.items():
        helpers.get_hooks_from_cond(entries, all_hooks)
        if name in conds:
            helpers.get_hooks_from_cond(entries, hooks)
    if len(hooks):
        _register(guider, hooks, all_hooks)
    samplers.filter_registered_hooks_on_conds(conds, guider.model_options)
    if samplers.get_total_hook_groups_in_conds(everyone) > 1:
        guider.model_patcher.hook_mode = comfy.hooks.EnumHookMode.MaxSpeed  # the host chose before it knew our hooks
    guider.conds = everyone


def _register(guider: samplers.CFGGuider, hooks: comfy.hooks.HookGroup, all_hooks: comfy.hooks.HookGroup) -> None:
    if guider.model_patcher.is_dynamic():  # as CFGGuider.inner_set_conds: dynamic weights cannot take hooks
        guider.model_patcher = guider.model_patcher.get_non_dynamic_delegate()
    patcher, options = guider.model_patcher, guider.model_options
    registered = options.setdefault("registered_hooks", comfy.hooks.HookGroup())
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    for kind in (comfy.hooks.EnumHookType.TransformerOptions, comfy.hooks.EnumHookType.AdditionalModels):
        for hook in hooks.get_type(kind):
            if hook not in registered.hooks:
                hook.add_hook_patches(patcher, options, target, registered)
    patcher.register_all_hook_patches(all_hooks, target, options, registered)

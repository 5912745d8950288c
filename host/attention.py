"""Run attention edits inside the host's forward passes, for one sampling.

Forward hooks on the modules that attend, registered for one call of the model and removed with it, tell which site is
running and where its tokens are; the host's ``optimized_attention_override``, put into a copy of the call's options,
sees q, k and v. Overrides of other packs stay: they are called with what the edits leave.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention.contract import AttentionEdit, Call, Residual, overrides
from ..attention.sites import Site
from ..guidance.contract import Edits, GuidanceError, Step
from .conds import text_length
from .sites import Layout, Tap, family, taps_of

log = logging.getLogger("rudder")

OVERRIDE = "optimized_attention_override"
NAMES = ("c_concat", "c_crossattn", "control", "transformer_options")  # of what a model is called with after x and t


def check_edit(title: str, edit: AttentionEdit, sites: Sequence[Site], model: torch.nn.Module) -> None:
    """Refuse an edit that would meet no site of the model. ``title``: of the method that brings it."""
    if not sites:
        raise GuidanceError(
            f"{title}: the attention of '{type(model).__name__}' is not known to Rudder. It works on SD1.5, SD2 "
            "and SDXL UNets, Flux, Chroma, SD3, Qwen-Image, Lumina 2, Z-Image and Wan. Remove the node for this model."
        )
    try:
        found = any(edit.acts_at(site) for site in sites)
    except ValueError as error:
        raise GuidanceError(f"{title}: {error}") from None
    if not found:
        names = dict.fromkeys(site.name for site in sites if site.kind in edit.kinds)
        kinds = " and ".join(sorted(edit.kinds))
        lacking = f"is called '{edit.blocks}'" if edit.blocks else "is where it acts unless 'blocks' names another"
        raise GuidanceError(
            f"{title}: no {kinds} attention of this model {lacking}. It has: {', '.join(names)}."
            if names else f"{title}: this model has no {kinds} attention. Its kinds are: "
            f"{', '.join(sorted({site.kind for site in sites}))}. Remove the node for this model, or what asks for it "
            "in the node (words, for instance)."
        )


@dataclasses.dataclass
class Pass:
    """One call of the model: the token layout, the sites that run next, and who is in the batch."""

    layout: Layout
    roles: list[tuple[Any, ...]]  # of each chunk
    acting: Edits
    named: Callable[[AttentionEdit], str]  # title of the method that brings an edit
    step: Step
    latent: tuple[int, ...]
    samples: int  # of each chunk
    lengths: list[int | None]  # text tokens of each chunk, before the host repeats them to the length of others
    texts: Mapping[Any, list[dict]]  # processed conds of the prompt branches
    tap: Tap | None = None  # whose attention is pending
    pending: list[Site] = dataclasses.field(default_factory=list)
    met: Counter = dataclasses.field(default_factory=Counter)

    def names(self, chunks: Sequence[int]) -> tuple[Any, ...]:
        """Who the chunks are; None for what another pack added to the batch."""
        return tuple(self.roles[chunk][0] if self.roles[chunk] else None for chunk in chunks)


class Attention:
    """The edits of one run. All but ``taps`` and ``told`` is set by the run before each call of the model."""

    def __init__(self) -> None:
        self.taps: dict[int, list[Tap]] = {}
        self.who: Mapping[Any, tuple[Any, ...]] = {}  # uuid of a cond -> its roles, the most telling first
        self.entries: Mapping[Any, dict] = {}  # uuid of a cond -> the processed cond
        self.acting: Edits = ()
        self.titles: Mapping[int, str] = {}  # id of an edit -> title of the method that brings it
        self.step: Step | None = None
        self.texts: Mapping[Any, list[dict]] = {}  # processed conds of the positive and of every branch of the run
        self.told = False
        self.acted: set[tuple[type, str]] = set()  # kinds of edits, and their blocks, that have met a site in this run

    def apply_model(self, executor: Callable, x: Tensor, t: Tensor, *args, **kwargs) -> Tensor:
        """APPLY_MODEL wrapper. What comes after x and t comes by place (``NAMES``) or by name."""
        if not self.acting:
            return executor(x, t, *args, **kwargs)
        given = dict(zip(NAMES, args)) | kwargs
        options = given.get("transformer_options", {})
        roles = [self.who.get(uuid, ()) for uuid in options.get("uuids", ())]
        acting = [(edit, on) for edit, on in self.acting if any(concerns(on, role) for role in roles)]
        acting = [(edit, on) for edit, on in acting if not self.alone(edit, on, roles)]
        if not acting:
            return executor(x, t, *args, **kwargs)
        model, rows = executor.class_obj.diffusion_model, len(x)
        if family(model) is None:
            raise GuidanceError(
                f"{self.named(acting[0][0])}: a node on this MODEL (Torch Compile Model?) puts another network "
                f"({type(model).__name__}) in the place of its own while it runs, and Rudder cannot reach the "
                "attention in it. Remove that node."
            )
        if id(model) not in self.taps:
            self.taps[id(model)] = taps_of(model)
        samples = len(x) // len(roles)
        if samples != len(self.step.x):
            raise GuidanceError(
                f"{self.named(acting[0][0])}: another node on this MODEL hands the model {len(x)} rows where the "
                f"sampler has {len(roles)} times {len(self.step.x)}, so Rudder cannot tell whose they are. Remove that "
                "node (a model wrapper that splits or extends the batch)."
            )
        for who in dict.fromkeys(who for edit, _ in acting for who in edit.company):
            if not any(role and role[0] == who for role in roles) and (more := self.beside(who, x, t, given, samples)):
                (x, t, given), roles = more, [*roles, (who,)]
        options = given.get("transformer_options", {})
        lengths = [text_length(self.entries.get(uuid, {})) for uuid in options.get("uuids", ())]
        now = Pass(family(model).start(model, x), roles, acting, self.named, self.step, tuple(x.shape[2:]), samples,
                   lengths, self.texts)
        given["transformer_options"] = {**options, OVERRIDE: override(now, options.get(OVERRIDE))}
        args = [*(given.pop(name) for name in NAMES[:len(args)]), *args[len(NAMES):]]
        handles = [handle for tap in self.taps[id(model)] for handle in tapped(tap, now)]
        try:
            out = executor(x, t, *args, **given)[:rows]
        finally:
            for handle in handles:
                handle.remove()
        for edit, _ in acting:
            self.check_met(edit, now, [site for tap in self.taps[id(model)] for site in tap.sites])
        return out

    @staticmethod
    def alone(edit: AttentionEdit, on: tuple[Any, ...], roles: Sequence[tuple[Any, ...]]) -> bool:
        """Whether an edit acts on nothing in a pass but its company: a branch whose own prediction nobody reads."""
        guests = [who for who in edit.company if who != "cond"]
        return bool(guests) and all(role and role[0] in guests for role in roles if concerns(on, role))

    def beside(
        self, who: Any, x: Tensor, t: Tensor, given: dict[str, Any], samples: int
    ) -> tuple[Tensor, Tensor, dict[str, Any]] | None:
        """What the model is called with, and one chunk more; None where the host would not put it into the same pass:
        areas, ControlNets, hooks, texts of lengths that do not go together. ``given``: by name."""
        here = [self.entries.get(uuid, {}) for uuid in given["transformer_options"]["uuids"]]
        entry = self.texts[who][0] if len(self.texts[who]) == 1 else {}
        apart = ("control", "area", "hooks")
        if not entry or any(one.get(key) is not None for one in (entry, *here) for key in apart):
            return None
        parts = {name: here_too(part.process_cond(batch_size=samples, area=None), x.device)
                 for name, part in entry["model_conds"].items()}
        mine = {name: value for name, value in given.items() if name not in ("control", "transformer_options")}
        if {name for name, value in mine.items() if value is not None} != set(parts):
            return None
        out, options = dict(given), given["transformer_options"]
        for name, part in parts.items():
            if not type(part)(each(lambda rows: rows[:samples], mine[name])).can_concat(part):
                return None
            out[name] = type(part)(mine[name]).concat([part])
        out["transformer_options"] = {
            **options, "uuids": [*options["uuids"], entry["uuid"]],
            "cond_or_uncond": [*options.get("cond_or_uncond", ()), len(options["uuids"])],
        }  # fmt: skip
        return torch.cat([x, x[:samples]]), torch.cat([t, t[:samples]]), out

    def named(self, edit: AttentionEdit) -> str:
        return self.titles.get(id(edit), edit.title)

    def check_met(self, edit: AttentionEdit, now: Pass, sites: Sequence[Site]) -> None:
        """An edit that has never met a site in this run is an error; some that it missed are told once a run."""
        wanted = [site for site in sites if edit.acts_at(site)]
        missed = [site.name for site in wanted if not now.met[id(edit), site.name, site.kind]]
        kind = type(edit), edit.blocks
        if len(missed) == len(wanted) and kind in self.acted:
            return  # a step cache (EasyCache) answered for the network: what it remembers was edited
        if len(missed) == len(wanted):
            raise GuidanceError(
                f"{self.named(edit)}: the attention of '{edit.blocks or 'all blocks'}' did not run through the host, "
                "so it could not act. Another node on this MODEL replaces it (an attention replacement, a skipped "
                "layer): remove that node or choose other blocks. Or the model is run bit by bit with a memory of its "
                "own (autoregressive video): use another sampler."
            )
        self.acted.add(kind)
        if missed and not self.told:
            self.told = True
            log.warning("Rudder: %s: another node on this MODEL replaces or skips %s, where it could not act.",
                        self.named(edit), ", ".join(missed))


def each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A tensor, or each of a list, changed; what is no tensor stays."""
    return [change(one) for one in value] if isinstance(value, list) else (
        change(value) if isinstance(value, Tensor) else value)


def here_too(part: Any, device: torch.device) -> Any:
    """A processed cond on the device of the pass: the host's own is on the first of several GPUs."""
    return type(part)(each(lambda rows: rows.to(device), part.cond))


def concerns(on: tuple[Any, ...], roles: tuple[Any, ...]) -> bool:
    return not on or any(role in roles for role in on)


def tapped(tap: Tap, now: Pass) -> list:
    """Hooks on the tap's module, if an edit acts there or needs what it reads."""
    def before(_, args: tuple, kwargs: dict) -> None:
        if tap.read is not None:
            tap.read(now.layout, args, kwargs)
        now.pending, now.tap = list(tap.sites), tap

    def after(*_) -> None:
        now.pending = []

    wanted = any(edit.acts_at(site) for edit, _ in now.acting for site in tap.sites)
    if wanted and tap.sites[0].kind == "residual":
        return [tap.module.register_forward_hook(lambda _, args, h: residual(now, tap.sites[0], h))]
    if not wanted and tap.read is None:
        return []
    hooks = [tap.module.register_forward_pre_hook(before, with_kwargs=True)]
    return [*hooks, tap.module.register_forward_hook(after, always_call=True)] if wanted else hooks


def override(now: Pass, previous: Callable | None) -> Callable:
    """The host's attention override: the edits of the pending site, over whatever override was there before."""

    def attend(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
        def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            more = (mask, *args[1:]) if args else args
            named = {**kwargs, "mask": mask} if not args and (mask is not None or "mask" in kwargs) else kwargs
            if mask is not None and given is None:  # the mask of an edit: SageAttention of older hosts drops it
                named = {**named, "low_precision_attention": False}
            return (func if previous is None else functools.partial(previous, func))(q, k, v, heads, *more, **named)

        mask = given = args[0] if args else kwargs.get("mask")
        site = now.pending.pop(0) if now.pending else None
        acting = [(edit, on) for edit, on in now.acting if site is not None and edit.acts_at(site)]
        if not acting:
            return kernel(q, k, v, mask)
        heads_apart = kwargs.get("skip_reshape", False)
        return edited(now, site, acting, Kernel(kernel, heads, heads_apart, kwargs.get("skip_output_reshape", False)),
                      q, k, v, mask)

    return attend


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The host's attention function and the shapes that it takes and gives."""

    call: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    heads: int
    heads_apart: bool  # q, k, v are [B, heads, tokens, D], not [B, tokens, heads * D]
    output_apart: bool

    def split(self, tokens: Tensor) -> Tensor:
        """From what the host hands over; without ``heads_apart`` the heads of SD3's v have an axis of their own."""
        return tokens if self.heads_apart else tokens.flatten(2).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join(self, tokens: Tensor) -> Tensor:
        return tokens if self.heads_apart else tokens.transpose(1, 2).flatten(2)

    def split_output(self, out: Tensor) -> Tensor:
        return out if self.output_apart else out.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join_output(self, out: Tensor) -> Tensor:
        return out if self.output_apart else out.transpose(1, 2).flatten(2)


def edited(
    now: Pass, site: Site, acting: Edits, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> Tensor:
    """The attention of one site. Chunks on which the same edits act go through them together, the others through the
    kernel."""
    samples = now.samples
    if not len(q) == len(k) == len(v) == samples * len(now.roles):
        raise off_grid(now.named(acting[0][0]), site)
    full = with_layout(site, now.layout, q, k, kernel)
    parts: dict[int, Tensor] = {}
    for edits, chunks in grouped(now, acting, site):
        rows = [rows_of(t, chunks, samples, len(now.roles)) for t in (q, k, v)]
        part_mask, rope = (rows_of(t, chunks, samples, len(now.roles)) if batched(t, q) else t
                           for t in (mask, now.layout.rope))
        if not edits:
            out = kernel.call(*rows, part_mask)
        else:
            who = now.names(chunks), samples, now.step
            to_text = to_other_text(now, kernel) if site.kind == "cross" else None
            call = Call(*map(kernel.split, rows), full, *who, part_mask, rope, now.latent, to_text=to_text)
            if mapped(edits) and site.kind == "cross":
                call = shortened(call, now.lengths[chunks[0]])
            if call.site.grid is None and (needs := [edit for edit in edits if edit.needs_grid]):
                raise off_grid(now.named(needs[0]), call.site)
            out = kernel.join_output(through(edits, call, kernel))
        parts.update(zip(chunks, out.split(samples)))
    for edit, on in acting:
        if overrides(edit, "across"):
            chunks = [chunk for chunk, roles in enumerate(now.roles) if concerns(on, roles)]
            outs = edit.across(full, now.names(chunks), [kernel.split_output(parts[chunk]) for chunk in chunks])
            parts.update(zip(chunks, map(kernel.join_output, outs)))
    return parts[0] if len(parts) == 1 else torch.cat([parts[i] for i in range(len(parts))])


def to_other_text(now: Pass, kernel: Kernel) -> Callable[[Tensor, Any], Tensor]:
    """``Call.to_text``: keys and values by the site's own projections."""

    def attend(q: Tensor, branch: Any) -> Tensor:
        entries = now.texts[branch]
        texts = {id(cond): cond for cond in (entry["model_conds"]["c_crossattn"] for entry in entries)}
        if len(texts) != 1:  # the host gives copies of a prompt the areas of others
            raise GuidanceError(
                f"The {branch.name} conditioning has {len(texts)} texts (several prompts combined), and only one can "
                "be read here. Give one plain prompt."
            )
        [text] = texts.values()
        text = text.process_cond(batch_size=now.samples, area=None).cond.to(q)
        rows = [tokens.repeat(len(q) // now.samples, 1, 1) for tokens in now.tap.text(text)]
        return kernel.split_output(kernel.call(kernel.join(q), *rows, None))

    return attend


def grouped(now: Pass, acting: Edits, site: Site) -> list[tuple[list[AttentionEdit], list[int]]]:
    """The chunks of the batch by the edits that act on them; apart also by their text, where an edit sees its map."""
    groups: dict[tuple[tuple[int, ...], int | None], list[int]] = {}  # positions in acting, length -> chunks
    for chunk, roles in enumerate(now.roles):
        group = tuple(i for i, (_, on) in enumerate(acting) if concerns(on, roles))
        apart = site.kind == "cross" and mapped([acting[i][0] for i in group])
        groups.setdefault((group, now.lengths[chunk] if apart else None), []).append(chunk)
    for i in {i for group, _ in groups for i in group}:
        now.met[id(acting[i][0]), site.name, site.kind] += 1
    return [([acting[i][0] for i in group], chunks) for (group, _), chunks in groups.items()]


def mapped(edits: Sequence[AttentionEdit]) -> bool:
    return any(overrides(edit, "map") for edit in edits)


def shortened(call: Call, length: int | None) -> Call:
    """A cross-attention without the copies of its text: the host repeats a text to the length of its neighbours in the
    batch, which changes no result, but would spread a token's probability over several columns."""
    if length is None or length >= call.k.shape[2]:
        return call
    mask = call.mask if call.mask is None or call.mask.shape[-1] == 1 else call.mask[..., :length]
    site = dataclasses.replace(call.site, text=slice(0, length))
    return dataclasses.replace(call, k=call.k[:, :, :length], v=call.v[:, :, :length], mask=mask, site=site)


def off_grid(title: str, site: Site) -> GuidanceError:
    return GuidanceError(
        f"{title}: the image tokens of '{site.name}' are not on a grid: another node merges or tiles them (Token "
        "Merging, HyperTile). Remove that node, or choose blocks that it leaves alone."
    )


def residual(now: Pass, site: Site, h: Tensor) -> Tensor:
    """What a residual block adds, after the edits of its site."""
    acting = [(edit, on) for edit, on in now.acting if edit.acts_at(site)]
    samples, parts = now.samples, {}
    for edits, chunks in grouped(now, acting, site):
        rows = rows_of(h, chunks, samples, len(now.roles))
        for edit in edits:
            rows = edit.residual(Residual(rows, site, now.names(chunks), samples, now.step))
        parts.update(zip(chunks, rows.split(samples)))
    return torch.cat([parts[i] for i in range(len(parts))])


def through(edits: Sequence[AttentionEdit], call: Call, kernel: Kernel) -> Tensor:
    """``[R, heads, tokens, D]`` after all stages of the contract."""
    for edit in edits:
        call = edit.inputs(call)
    maps = [edit for edit in edits if overrides(edit, "map")]

    def attend(other: Call | None = None) -> Tensor:
        now = call if other is None else other
        if not maps:
            return kernel.split_output(kernel.call(*map(kernel.join, (now.q, now.k, now.v)), now.mask))
        probabilities = now.probabilities()
        for edit in maps:
            probabilities = edit.map(now, probabilities)
        return (probabilities @ now.v.float()).to(now.v.dtype)

    for edit in edits:
        if overrides(edit, "output"):
            attend = after(edit, call, attend)
    return attend()


def after(edit: AttentionEdit, call: Call, before: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``attend`` of the edit that follows: what it asks for another call, this edit too asks for that call."""

    def attend(other: Call | None = None) -> Tensor:
        now = call if other is None else other
        return edit.output(now, lambda another=None: before(now if another is None else another))

    return attend


def batched(tensor: Tensor | None, q: Tensor) -> bool:
    return tensor is not None and len(tensor) == len(q) > 1


def rows_of(tensor: Tensor, chunks: list[int], samples: int, count: int) -> Tensor:
    """The rows of ``chunks``: a view where they lie side by side."""
    if len(chunks) == count:
        return tensor
    if chunks == list(range(chunks[0], chunks[-1] + 1)):
        return tensor[chunks[0] * samples : (chunks[-1] + 1) * samples]
    return torch.cat([tensor[chunk * samples : (chunk + 1) * samples] for chunk in chunks])


def with_layout(site: Site, layout: Layout, q: Tensor, k: Tensor, kernel: Kernel) -> Site:
    """``site`` with the tokens of this pass."""
    queries, keys = (t.shape[2 if kernel.heads_apart else 1] for t in (q, k))
    size = math.prod(layout.grid) if layout.grid else 0
    first = layout.image if layout.image is not None else layout.text if site.kind == "joint" else 0
    alone = layout.image is None and site.kind != "joint"
    fits = first is not None and (size == queries if alone else first + size <= queries)
    grid = layout.grid if size and fits else None
    image = slice(first or 0, first + size if grid else queries)
    text = {"cross": slice(0, keys), "joint": slice(0, layout.text or 0)}.get(site.kind, slice(0))
    return dataclasses.replace(site, grid=grid, image=image, text=text)

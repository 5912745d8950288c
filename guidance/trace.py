"""The trace: what a run did, step by step, for plots and files.

A :class:`Trace` in the plan asks the executor to record. The record lives in a :class:`Recorder`, the one object that
outlives a run: it is the output of a trace node, and each run of a sampler node replaces what that node wrote before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch import Tensor

from .contract import Guidance

QUANTITIES = {
    "gamma": "weight of the anchor (AAPB, blend)",
    "frequent": "share of the frequent prompt (R2F)",
    "weight": "guidance weight",
    "cosine": "cosine of cond and uncond x - x0",
    "guidance_norm": "norm of cond - uncond",
    "parallel": "cosine of the push and the conditional prediction (APG)",
    "clipped": "factor of the norm threshold, 1 where it does not act (APG)",
    "negative_scale": "scale of the negative's velocity (CFG-Zero*)",
    "removed": "share of the negative's residual that is removed (TCFG)",
    "switched": "share of the pictures that guidance has left (Adaptive Guidance)",
    "predicted": "1 where the negative was predicted, not evaluated (LinearAG)",
    "overlap": "cosine of the push from a negative and the push to the positive (Perp-Neg, extra negative)",
    "found_push": "norm of the push from the found negative, 1 is CFG's, before the cap (ANSWER)",
    "found_cosine": "cosine of the push from the found negative and that of CFG (ANSWER)",
    "bad_norm": "norm of good - bad (AutoGuidance)",
    "bad_cosine": "cosine of good - bad and cond - uncond (AutoGuidance)",
    "pag_norm": "norm of the push from the perturbed prediction, before its strength (PAG)",
    "pag_cosine": "cosine of that push and cond - uncond (PAG)",
    "seg_norm": "norm of the push from the blurred prediction, before its strength (SEG)",
    "seg_cosine": "cosine of that push and cond - uncond (SEG)",
    "sag_norm": "norm of the push from what is said of the blurred picture, before its strength (SAG)",
    "salient": "share of the picture that is salient (SAG)",
    "image_cosine": "cosine of what the image changes and what the text changes (InstructPix2Pix)",
    "eps_norm": "norm of cond - uncond as eps in a 4x64x64 latent (beta-CFG)",
    "tangential": "share of the tangential part (TAG)",
    "chosen_weight": "guidance weight that scored best (dynamic CFG)",
    "time_gap": "noise level that the predictor sees less the sampler's, as shares of a quarter turn (temporal TAG)",
    "changed_area": "share of the picture that may change (Local Blend)",
    "shift": "length of the shift over that of x (temporal TAG)",
    "change_norm": "norm of what the methods changed in the conditional prediction",
    "cond_norm": "norm of the conditional prediction",
    "evaluations": "model evaluations of the step",
}


@dataclass(eq=False)
class Recorder:
    """Runs by the sampler node that made them: ``{"methods", "cfg", "evaluations", "steps": [{...}, ...], ...}``.
    A node that samples a list of inputs makes a run of each: the first is by its id, the others by ``id#1``, ``id#2``.

    A step holds ``index``, ``sigma`` and the :data:`QUANTITIES` that applied, one number or one for each sample.
    ``name`` is what the user calls these runs, ``node`` the trace node.
    """

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    name: str = ""
    node: str = ""

    def keep(self, run: dict[str, Any], node: str, place: int) -> None:
        """A run in the place of the node's last; ``place`` is that of its inputs in the list of them."""
        self.drop(node, place)
        self.runs[run_key(node, place)] = run

    def drop(self, node: str, place: int) -> None:
        """Forget that run, and at the beginning of a list all of the node."""
        self.runs = {key: run for key, run in self.runs.items()
                     if key != run_key(node, place) and (place or maker(key) != node)}


def run_key(node: str, place: int) -> str:
    return f"{node}#{place}" if place else node


def maker(key: str) -> str:
    """The node of a run's key."""
    return key.split("#")[0]


@dataclass(frozen=True, kw_only=True)
class Trace(Guidance):
    """Record every step into ``recorder``; changes nothing. No evaluations of its own."""

    recorder: Recorder

    title = "Guidance Trace"


def plain(value: Any) -> Any:
    """A logged value as JSON can hold it: tensors become numbers or lists, one number a sample."""
    if isinstance(value, Tensor):
        return value.detach().float().cpu().tolist()
    return value


def label(run: dict[str, Any]) -> str:
    """What a run did: its methods, or "CFG 7" for none."""
    return " + ".join(run["methods"]) or f"CFG {run['cfg']:g}"


def labelled(runs: Iterable[dict[str, Any]], names: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Runs under readable, distinct names: those given, or what they did where none is; later twins get a number."""
    out: dict[str, dict[str, Any]] = {}
    for run, name in zip_longest(runs, names, fillvalue=""):
        unique = base = name or label(run)
        twin = 1
        while unique in out:
            twin += 1
            unique = f"{base} #{twin}"
        out[unique] = run
    return out


def series(run: dict[str, Any], name: str) -> list[tuple[int, float]]:
    """(step index, batch mean) of a recorded quantity; steps that did not record it are left out."""
    points = []
    for step in run["steps"]:
        if name in step:
            value = step[name]
            points.append((step["index"], sum(value) / len(value) if isinstance(value, list) else float(value)))
    return points

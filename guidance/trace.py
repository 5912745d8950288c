"""The trace: what a run did, step by step, for plots and files.

A :class:`Trace` in the plan asks the executor to record. The record lives in a :class:`Recorder`, the one object that
outlives a run: it is the output of a trace node, and each run of a sampler node replaces what that node wrote before.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
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
    "overlap": "cosine of the push from a negative and the push to the positive (Perp-Neg, extra negative)",
    "eps_norm": "norm of cond - uncond as eps in a 4x64x64 latent (beta-CFG)",
    "tangential": "share of the tangential part (TAG)",
    "change_norm": "norm of what the methods changed in the conditional prediction",
    "cond_norm": "norm of the conditional prediction",
    "evaluations": "model evaluations of the step",
}


@dataclass(eq=False)
class Recorder:
    """Runs by the sampler node that made them: ``{"methods", "cfg", "evaluations", "steps": [{...}, ...], ...}``.

    A step holds ``index``, ``sigma`` and the :data:`QUANTITIES` that applied, one number or one for each sample.
    """

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)


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


def labelled(runs: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Runs under readable, distinct names: their methods, or "CFG 7" for none; later twins get a number."""
    out: dict[str, dict[str, Any]] = {}
    for run in runs:
        label = base = " + ".join(run["methods"]) or f"CFG {run['cfg']:g}"
        twin = 1
        while label in out:
            twin += 1
            label = f"{base} #{twin}"
        out[label] = run
    return out


def series(run: dict[str, Any], name: str) -> list[tuple[int, float]]:
    """(step index, batch mean) of a recorded quantity; steps that did not record it are left out."""
    points = []
    for step in run["steps"]:
        if name in step:
            value = step[name]
            points.append((step["index"], sum(value) / len(value) if isinstance(value, list) else float(value)))
    return points

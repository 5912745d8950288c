"""The table `exact`: every guidance method in every world, at seven weights, against the true law of the prompt.

All methods of a world start from the same noise and are measured against the same true samples, in batches of ``size``;
the intervals are of the batches' mean. The rows "true samples" measure a second, independent draw of the truth
in the same way: no method can be expected to do better.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import numpy as np
import torch
from torch import Tensor

from rudder.guidance.aapb import AAPB
from rudder.guidance.blend import FixedBlend
from rudder.guidance.contract import Guidance, Prompt
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.r2f import R2F
from rudder.guidance.space import Parametrisation
from rudder.host import add_guidance

from .. import Options, Table
from ..generate import counting
from ..stats import mean_interval
from . import pictures
from .distances import Ruler
from .model import conditioning, model_of
from .worlds import WORLDS, World

KINDS = (Parametrisation.EPS, Parametrisation.FLOW)
WEIGHTS = (1.0, 2.0, 3.0, 5.0, 7.5, 9.0, 12.0)
INTERVAL = (0.28, 5.42)  # Kynkaanniemi et al. 2404.07724, SDXL
FLOOR = "true samples"
LEAST = 16  # samples of a batch: of fewer a transport distance says little
MEASURES = {
    "w2": ("W2", ".2f"), "sliced": ("sliced W2", ".2f"), "coverage": ("modes off by (TV)", ".2f"),
    "right": ("right concept", ".2f"), "inside": ("inside a right mode", ".2f"), "spread": ("spread / true", ".2f"),
}  # fmt: skip


def window(kind: Parametrisation) -> tuple[float, float]:
    """The paper's window of noise-to-signal ratios in the sigma of a parametrisation."""
    low, high = INTERVAL
    return (low / (1 + low), high / (1 + high)) if kind is Parametrisation.FLOW else INTERVAL


@dataclass(frozen=True)
class Method:
    """A row: what goes on the MODEL, and how many evaluations the step at a noise level and weight must take.

    ``least`` is the smallest weight of ``WEIGHTS`` at which the method is defined.
    """

    name: str
    make: Callable[[Prompt, Parametrisation], tuple[Guidance, ...]]
    evaluations: Callable[[float, float, Parametrisation], int]
    least: float = 1.0


def cfg_cost(sigma: float, weight: float, kind: Parametrisation) -> int:
    return 2 if weight != 1 else 1


def interval_cost(sigma: float, weight: float, kind: Parametrisation) -> int:
    low, high = window(kind)
    return 2 if low < sigma <= high else 1


def blend_cost(sigma: float, weight: float, kind: Parametrisation) -> int:
    return 1 + cfg_cost(sigma, weight, kind)


def limited(anchor: Prompt, kind: Parametrisation) -> tuple[Guidance, ...]:
    low, high = window(kind)
    return (LimitedInterval(sigma_low=low, sigma_high=high),)


METHODS = (
    Method("CFG", lambda a, kind: (), cfg_cost),
    Method("Guidance Interval", limited, interval_cost, least=2.0),
    *(Method(f"Prompt Blend {gamma:g}", lambda a, kind, gamma=gamma: (FixedBlend(anchor=a, gamma=gamma),), blend_cost)
      for gamma in (0.3, 0.5, 0.7)),
    *(Method(f"R2F until {stop:g}", lambda a, kind, stop=stop: (R2F(frequent=a, stop=stop),), cfg_cost)
      for stop in (0.4, 0.8)),
    Method("AAPB", lambda a, kind: (AAPB(anchor=a),), blend_cost, least=2.0),
    Method("AAPB, no clamp", lambda a, kind: (AAPB(anchor=a, clamp=False),), blend_cost, least=2.0),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The size of a run: ``batches`` of ``size`` samples each in ``steps`` steps of euler, at ``weights``.

    ``shown`` is the weight whose samples are pictured, ``truths`` the true samples that mode frequencies come from.
    """

    batches: int = 12
    size: int = 256
    steps: int = 50
    weights: tuple[float, ...] = WEIGHTS
    shown: float = 7.5
    truths: int = 50_000

    @property
    def count(self) -> int:
        return self.batches * self.size

    def of(self, count: int) -> Plan:
        """At least ``count`` samples, in as many batches or more, which intervals are made of."""
        size = min(self.size, max(-(-count // self.batches), LEAST))
        return replace(self, size=size, batches=max(self.batches, -(-count // size)))


QUICK = Plan(batches=3, size=96, steps=12, weights=(1.0, 12.0), shown=12.0, truths=5_000)


def sample(model: Any, world: World, weight: float, count: int, steps: int, seed: int = 1) -> tuple[Tensor, list[int]]:
    """What KSampler with euler gives for the world's target, ``[count, C, H, W]``, and the evaluations of every step,
    counted by the rows that reach the network."""
    model, rows = counting(model)
    seen: list[int] = []

    def each_step(index: int, denoised: Tensor, x: Tensor, total: int) -> None:
        seen.append(sum(rows) // count)
        rows.clear()

    latent = torch.zeros(count, *world.shape)
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(latent, seed)
        out = comfy.sample.sample(
            model, noise, steps, weight, "euler", "normal", conditioning(world, world.target), conditioning(world, ""),
            latent, disable_pbar=True, callback=each_step, seed=seed,
        )  # fmt: skip
    return out, seen


def measured(ruler: Ruler, samples: Tensor, truth: Tensor, plan: Plan) -> dict[str, Any]:
    """Every distance as an interval over the batches; one that no batch has is left out."""
    batches = [ruler.measure(a, b) for a, b in zip(samples.split(plan.size), truth.split(plan.size))]
    rng = np.random.default_rng(0)
    out = {}
    for key in MEASURES:
        values = [batch[key] for batch in batches]
        if not all(map(math.isnan, values)):
            out[key] = mean_interval(values, range(len(values)), rng)
    return out


def rows_of(world: World, plan: Plan) -> tuple[list[dict[str, Any]], pictures.Shown]:
    """The rows of one world, and some samples to look at."""
    generator = torch.Generator().manual_seed(3)
    ruler = Ruler.of(world, generator, plan.truths)
    truth, second = (world.true_samples(plan.count, generator) for _ in range(2))
    rows = [{"model": "", "method": FLOOR, **measured(ruler, second, truth, plan)}]
    shown = {("", FLOOR, 0.0): second}
    anchor = Prompt(conditioning(world, world.anchor), "anchor")
    for kind in KINDS:
        base = model_of(world, kind)
        levels = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), "normal", plan.steps)[:-1]
        for method in METHODS:
            model = base
            for guidance in method.make(anchor, kind):
                model = add_guidance(model, guidance)
            for weight in (w for w in plan.weights if w >= method.least):
                samples, seen = sample(model, world, weight, plan.count, plan.steps)
                print(f"{world.name}, {kind.value}: {method.name} at cfg {weight:g}", flush=True)
                rows.append({
                    "model": kind.value, "method": method.name, "cfg": weight, **measured(ruler, samples, truth, plan),
                    "evaluations": sum(seen) / len(seen),
                    "as_predicted": seen == [method.evaluations(float(s), weight, kind) for s in levels],
                })  # fmt: skip
                shown[kind.value, method.name, weight] = samples
    return rows, {key: samples[:256] for key, samples in shown.items()}


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every model and method the row with the smallest W2."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"]), []).append(row)
    return [min(group, key=lambda row: row["w2"].value) for group in groups.values()]


def save_samples(world: World, shown: pictures.Shown, weight: float, path: Path) -> None:
    pictures.samples(world, shown, weight).savefig(path)


def save_distances(world: World, rows: list[dict[str, Any]], path: Path) -> None:
    pictures.distances(world, rows, MEASURES).savefig(path)


def main(options: Options) -> Table:
    plan = QUICK if options.quick else Plan()
    if options.n:
        plan = plan.of(options.n)
    columns = {"model": ("model", ""), "method": ("method", ""), "cfg": ("cfg", "g"), **MEASURES,
               "evaluations": ("evaluations a step", ".2f")}  # fmt: skip
    worlds = [make() for make in WORLDS.values()]
    parts, summary = [], []
    for world in worlds:
        rows, shown = rows_of(world, plan)
        plots = {
            "samples": partial(save_samples, world, shown, plan.shown),
            "distances": partial(save_distances, world, rows),
        }
        about = f"Asked for: '{world.target}'; the anchor of Prompt Blend, R2F and AAPB: '{world.anchor}'."
        parts.append(Table(f"exact-{world.name}", f"World '{world.name}'", columns, rows, [about], plots=plots))
        summary += [{"world": world.name, **row} for row in best(rows)]
    missed = {row["method"] for part in parts for row in part.rows if not row.get("as_predicted", True)}
    wrong = ", ".join(sorted(missed))
    low, high = window(Parametrisation.FLOW)
    return Table(
        "exact",
        "Distance to the true law, in worlds that are known exactly",
        {"world": ("world", ""), **columns},
        summary,
        [
            "This table: every method at the cfg that brings it nearest to the truth by W2, chosen on these very "
            "samples. All weights are in the tables of the worlds below.",
            f"Samples: KSampler, euler, normal schedule, {plan.steps} steps; {plan.batches} batches of {plan.size} a "
            "row, the same noise and the same true samples for every row of a world.",
            "In brackets: 95 % interval of the mean over the batches (Student's t).",
            f"'{FLOOR}': as many more samples of the truth itself, the floor of every column.",
            "eps: epsilon prediction on SD's noise schedule; flow: rectified flow with SD3's shift of 3.",
            f"Guidance Interval: the paper's SDXL window ({INTERVAL[0]:g}, {INTERVAL[1]:g}] in eps, the same "
            f"noise-to-signal ratios ({low:.3f}, {high:.3f}] in flow.",
            "R2F until 0.4 and 0.8: SD3's stop steps for visual detail levels 3 and 5. Worlds without pictures have no "
            "level, so both are here.",
            "Guidance Interval and AAPB need guidance to act on: no row at cfg 1.",
            f"Evaluations, counted in the network: {'NOT as predicted: ' + wrong if wrong else 'as predicted'}.",
        ],
        parts=parts,
    )

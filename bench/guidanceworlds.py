"""The exact worlds in the table `guidance`: the same rows, against a truth that is a formula.

What stands for what: *right concept* for accuracy, *inside a right mode* for not being burnt, *W2* for the Frechet
distance, *modes off by* for diversity (spread is large where samples stray). See bench/exact.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import numpy as np
import torch
from torch import Tensor

from rudder.guidance.contract import Prompt
from rudder.guidance.space import Parametrisation
from rudder.host import add_guidance

from . import ROOT, Options, Table, cells, commit, seen
from .exact.distances import Ruler
from .exact.model import conditioning, model_of
from .exact.table import FLOOR, KINDS, MEASURES, Plan
from .exact.worlds import WORLDS, World
from .generate import counting
from .guidance import CFGS, PLAIN, QUICK_CFGS, ROWS, SATURATION, Given, Row
from .kept import Kept, restored, rounded, whole
from .stats import Interval, mean_interval

NEGATIVE = {"rare": "plain frog", "overlap": "b", "image": "plain disc"}  # what 'harmful' is here
SAMPLER = "euler"
NOWHERE = 0.01  # inside a right mode: not more is no picture of anything
QUICK = Plan(batches=3, size=64, steps=12, truths=5_000)


@dataclass(frozen=True)
class Measured:
    """A row: every measure of each batch, evaluations of a step, seconds of a sample."""

    measures: dict[str, list[float]]
    evaluations: float = float("nan")
    seconds: float = float("nan")

    def interval(self, key: str) -> Interval | None:
        values = self.measures[key]
        return None if np.isnan(values).all() else mean_interval(values, range(len(values)), seen.generator())

    def above(self, other: Measured, key: str) -> Interval | None:
        """How far above another's; batches start from the same noise."""
        gap = np.subtract(self.measures[key], other.measures[key])
        return None if np.isnan(gap).all() else mean_interval(gap, range(len(gap)), seen.generator())


def sample(
    base: Any, world: World, row: Row, kind: Parametrisation, cfg: float, plan: Plan
) -> tuple[Tensor, float, float]:
    """Samples ``[count, C, H, W]`` of the world's target, evaluations of a step, and seconds of a sample."""
    text = NEGATIVE[world.name] if row.anchor == "harmful" else world.anchor
    given = Given(Prompt(conditioning(world, text), "anchor"), kind, cfg, SAMPLER, base)
    model, rows = counting(base)
    for method in row.make(given):
        model = add_guidance(model, method)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conditioning(world, world.target), conditioning(world, ""))
    guider.set_cfg(cfg)
    sampler = row.sampler(given) if row.sampler else comfy.samplers.sampler_object(SAMPLER)
    sigmas = comfy.samplers.calculate_sigmas(base.get_model_object("model_sampling"), "normal", plan.steps)
    latent = torch.zeros(plan.count, *world.shape)
    with torch.inference_mode():
        noise, begun = comfy.sample.prepare_noise(latent, 1), time.perf_counter()
        out = guider.sample(noise, latent, sampler, sigmas, disable_pbar=True, seed=1)
    return out, sum(rows) / plan.count / plan.steps, (time.perf_counter() - begun) / plan.count


def measure(ruler: Ruler, samples: Tensor, truth: Tensor, plan: Plan) -> dict[str, list[float]]:
    batches = [ruler.measure(a, b) for a, b in zip(samples.split(plan.size), truth.split(plan.size))]
    return {key: [batch[key] for batch in batches] for key in MEASURES}


def state(world: World, plan: Plan) -> dict[str, Any]:
    """What decides the rows of a world beside their methods and the host's side."""
    files = [ROOT / "bench" / "exact" / f"{name}.py" for name in ("distances", "mixture", "model", "worlds")]
    code = [file.read_text(encoding="utf-8") for file in files] + [inspect.getsource(f) for f in (sample, measure)]
    digest = hashlib.sha256("\n".join(code).encode()).hexdigest()[:12]
    return {"batches": plan.batches, "size": plan.size, "steps": plan.steps, "truths": plan.truths, "sampler": SAMPLER,
            "negative": NEGATIVE[world.name], "code": digest}


def place(work: Path, world: World, plan: Plan) -> Path:
    """Where processes that share the work leave a world's rows."""
    about = json.dumps([state(world, plan), cells.code_digest()])
    return work / f"exact-{world.name}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"


def ledger(options: Options, work: Path, world: World, plan: Plan) -> Kept:
    """The committed rows of a world."""
    folder = options.kept or place(work, world, plan)
    return Kept(folder / f"guidance-exact-{world.name}.json", state(world, plan), options.shard[1] == 1)


def remembered(file: Path, make: Callable[[], Measured]) -> Measured:
    if not file.is_file():
        with whole(file) as half:
            half.write_text(json.dumps(asdict(make())) + "\n", encoding="utf-8")
    return Measured(**json.loads(file.read_text(encoding="utf-8")))


FIELDS = [field.name for field in fields(Measured)]
Name = tuple[str, str, float]  # kind, key of the row, cfg


def measured(
    world: World, plan: Plan, folder: Path, kept: Kept, cfgs: Sequence[float], options: Options
) -> tuple[dict, int]:
    """Every row that is there, after doing this shard's share of what is not while there is time; and how many are
    missing."""
    generator = torch.Generator().manual_seed(3)
    ruler = Ruler.of(world, generator, plan.truths)
    truth, second = (world.true_samples(plan.count, generator) for _ in range(2))
    names = [(kind, key, cfg) for cfg in cfgs for key, row in ROWS.items() for kind in KINDS
             if row.worlds and cfg in row.at(cfgs)]
    models = {kind: model_of(world, kind) for kind in KINDS}
    out: dict[Name, Measured] = {("", FLOOR, 0.0): Measured(measure(ruler, second, truth, plan))}
    by = {"code": cells.code_digest()[:12], "commit": commit()}

    def run(kind: Parametrisation, key: str, cfg: float) -> Measured:
        samples, *cost = sample(models[kind], world, ROWS[key], kind, cfg, plan)
        return Measured(measure(ruler, samples, truth, plan), *cost)

    for i, (kind, key, cfg) in enumerate(names):
        code = cells.code_of(ROWS[key].parts(Given(Prompt((), "anchor"), kind, cfg, SAMPLER)))
        name = f"{kind.value}_{key}_cfg{cfg:g}_{code}"
        file = folder / f"{name}.json"
        mine = i % options.shard[1] == options.shard[0] and time.monotonic() < options.until
        stale = options.check and kept.rows.get(name, by)["code"] != by["code"]  # stays until it is measured again
        if (stale or name not in kept.rows) and (mine or file.is_file()):
            row = asdict(remembered(file, partial(run, kind, key, cfg)))
            kept.put(name, rounded(row) | by)
        if name in kept.rows:
            out[kind.value, key, cfg] = Measured(**restored({k: kept.rows[name][k] for k in FIELDS}))
    return out, len(names) + 1 - len(out)


COLUMNS = {"model": ("model", ""), "method": ("method", ""), "cfg": ("cfg", "g"), **MEASURES,
           "more right": ("right, above CFG", "+.2f"), "more inside": ("inside, above CFG", "+.2f"),
           "evaluations": ("evaluations a step", ".2f"), "ms": ("ms a sample", ".2f")}  # fmt: skip


def row_of(found: dict[Name, Measured], name: Name) -> dict[str, Any]:
    (kind, key, cfg), mine, plain = name, found[name], found.get((name[0], PLAIN, name[2]))
    row = {"model": kind, "method": ROWS[key].name if kind else key} | ({"cfg": cfg} if kind else {})
    row |= {measure: mine.interval(measure) for measure in MEASURES}
    if plain and plain is not mine:
        row |= {"more right": mine.above(plain, "right"), "more inside": mine.above(plain, "inside")}
    row |= {"evaluations": mine.evaluations, "ms": 1000 * mine.seconds}
    return {k: v for k, v in row.items() if v is not None and v == v}


def notes(found: dict[Name, Measured], world: World) -> list[str]:
    """The fronts of the world, and what is expected of saturation: more samples inside, as many right."""
    out = [f"Asked for: '{world.target}'; superclass: '{world.anchor}'; as a negative: '{NEGATIVE[world.name]}'."]
    for kind in dict.fromkeys(k for k, _, _ in found if k):
        of = {(ROWS[key].name, cfg): m for (k, key, cfg), m in found.items() if k == kind}
        points = {name: (float(np.mean(m.measures["inside"])), -float(np.mean(m.measures["coverage"])))
                  for name, m in of.items() if np.mean(m.measures["inside"]) > NOWHERE}

        def better(a, b, of=of) -> bool:
            return of[a].above(of[b], "inside").low >= 0 >= of[a].above(of[b], "coverage").high

        where = seen.told(seen.standings(points, better))
        out.append(f"Samples inside a right mode against modes kept (rows with more than {NOWHERE:.0%} inside: the "
                   f"others' samples lie in no mode that they could keep), {kind}: {where}")
        for key in SATURATION:
            said = []
            for cfg in (c for c in seen.HIGH if (kind, key, c) in found and (kind, PLAIN, c) in found):
                mine, plain = found[kind, key, cfg], found[kind, PLAIN, cfg]
                effect, right = mine.above(plain, "inside") * 100, mine.above(plain, "right") * 100
                said.append(f"cfg {cfg:g}: {effect:+.1f} points inside, {right:+.1f} right: "
                            f"{seen.verdict(effect, 0, right)}")
            if said:
                out.append(f"Expected: {ROWS[key].name} is less burnt than CFG at high cfg and equal accuracy; {kind}, "
                           f"{'; '.join(said)}.")
    return out


def parts(options: Options, work: Path) -> tuple[list[Table], int]:
    """A table for each world, from what is there when time is up, and how many rows are missing."""
    from . import guidanceplots

    plan = QUICK if options.quick else Plan()
    order, out, missing = {key: i for i, key in enumerate([FLOOR, *ROWS])}, [], 0
    for make in WORLDS.values():
        world = make()
        kept = ledger(options, work, world, plan)
        cfgs = QUICK_CFGS if options.quick else CFGS
        found, absent = measured(world, plan, place(work, world, plan), kept, cfgs, options)
        missing += absent
        names = sorted(found, key=lambda name: (name[0], order[name[1]], name[2]))
        about = [f"{plan.batches} batches of {plan.size} samples, euler, {plan.steps} steps; the columns are explained "
                 "with the table exact.", *kept.older("This world", cells.code_digest()[:12]), *notes(found, world)]
        table = Table(f"guidance-exact-{world.name}", f"World '{world.name}'", COLUMNS,
                      [row_of(found, name) for name in names], about)
        table.plots = guidanceplots.world_plots(found, world.name)
        out.append(table)
    return out, missing

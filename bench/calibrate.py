"""How well the demo models draw what is common, ordinary, rare and never shown: plain classifier-free guidance alone.

The world's frequencies are set with this tool, so it must not and cannot run a method: a world that is tuned while a
method is watched proves nothing about the method. It uses the prompts of the half 'dev'; see rareshapes.py.
"""

from __future__ import annotations

import numpy as np

from . import Options, Table, cells
from .generate import files
from .stats import share_interval

CFG = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0)
#: Category of the prompt list -> the tier that it shows, the most important first; OTHERS at the model's own cfg only.
ATTRIBUTES = {"frequent": "common", "property": "rare", "never": "never", "ordinary": "ordinary"}
OTHERS = {"usual texture": "usual texture", "texture": "rare texture", "usual relation": "usual relation",
          "relation": "rare relation"}
CONTROL = {"ordinary": "frequent", "property": "frequent", "never": "frequent", "texture": "usual texture",
           "relation": "usual relation"}
WANTED = {"common": (90, 100), "rare": (20, 65)}  # %, of a finished demo model
COLUMNS = {"model": ("model", ""), "tier": ("tier", ""), "cfg": ("cfg", "g"), "n": ("pictures", "d"),
           "accuracy": ("right, %", ".1f"), "drop": ("below its control, points", ".1f"),
           "shape": ("shape right, %", ".1f"), "what": ("attribute, texture or relation right, %", ".1f"),
           "color": ("colour right, %", ".1f"), "saturation": ("saturation", ".3f"),
           "diversity": ("diversity", ".3f"), "seconds": ("s a picture", ".2f")}


def row(model: str, cell: cells.Cell, scores: cells.Scores) -> dict:
    what = next(k for k in ("attribute", "texture", "relation") if k in scores.parts)
    mean = {k: 100 * float(np.nanmean(scores.parts[k])) for k in ("shape", "color", what)}
    more = {"diversity": scores.diversity} if scores.diversity is not None else {}
    return {"model": model, "tier": (ATTRIBUTES | OTHERS)[cell.category], "category": cell.category, "cfg": cell.cfg,
            "n": cell.n, "accuracy": share_interval(scores.right, scores.prompts, np.random.default_rng(0)) * 100,
            "shape": mean["shape"], "what": mean[what], "color": mean["color"],
            "saturation": float(np.mean(scores.saturation)), "seconds": scores.seconds, **more}


def main(options: Options) -> Table:
    from rudder.demo.judge import load

    judge, tag, rows, missing, notes = load(), cells.tag_of_scores(), [], 0, []
    n = options.n or (8 if options.quick else 128)
    with cells.workplace(options) as work:
        for file in files(options.models):
            store = cells.open_store(work, file, options, "calibrate")
            own = store.settings.cfg
            plan = [(c, cfg) for c in ATTRIBUTES for cfg in CFG] + [(c, own) for c in OTHERS]
            if options.quick:
                plan = [("frequent", own), ("property", own), ("property", 1.0)]
            mine = [cells.Cell(category, "dev", "cfg", cfg=cfg, n=n) for category, cfg in plan]
            todo = [cells.Todo.of(store, cell, cells.jobs(cell), judge, tag) for cell in mine]
            ready = cells.done(todo, options)
            rows += [row(store.painter.name, done.what, store.scores(done.what, judge, tag)) for done in ready]
            missing += len(todo) - len(ready)
            notes += [f"{store.painter.name} ({store.painter.digest}): {store.about}.", *store.older]
    at = {(r["model"], r["category"], r["cfg"]): r["accuracy"].value for r in rows}
    for r in rows:
        control = at.get((r["model"], CONTROL.get(r["category"]), r["cfg"]))
        if control is not None:
            r["drop"] = control - r["accuracy"].value
    return Table("calibrate", "What the demo models draw with plain CFG", COLUMNS, rows, [
        f"Prompts like 'a spiky red crescent' of the half 'dev', {n} pictures a row. Right: shape and attribute "
        "(texture, relation) as the judge reads them. Intervals: 95 % bootstrap, clustered by prompt.",
        *([] if options.quick else verdict(rows)), *notes, *cells.unpainted(missing),
    ])


def verdict(rows: list[dict]) -> list[str]:
    """Whether a model is what the proving ground wants, at the cfg that is best for common combinations."""
    out = []
    for model in dict.fromkeys(r["model"] for r in rows):
        of = {(r["tier"], r["cfg"]): r["accuracy"] for r in rows if r["model"] == model}
        common = {cfg: found.value for (tier, cfg), found in of.items() if tier == "common"}
        best = max(common, key=common.get, default=None)
        for tier, (low, high) in WANTED.items():
            if (tier, best) in of:
                met = low <= of[tier, best].value <= high
                out.append(f"{model}, cfg {best:g}, {tier}: {of[tier, best]:.1f} %; wanted {low} to {high}: "
                           f"{'met' if met else 'NOT MET'}.")
    return out

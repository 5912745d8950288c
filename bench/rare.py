"""RareShapes: how often rare combinations come out right, by method, model, category and anchor.

The structure follows the AAPB paper (arXiv 2603.19158): its RareBench table by category, its ablation of a constant
gamma, and its choice of anchors. Every method runs at its paper's defaults; nothing here is tuned on what it measures.

    python3 dev.py bench rare --split final --threads 1                 # the published table; again to go on
    python3 dev.py bench rare --split final --threads 1 --shard 0/2     # and 1/2 beside it; then once without

A table is made of whatever cells are painted; what is missing is named below it. The most important are painted first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rudder.guidance.aapb import AAPB
from rudder.guidance.blend import FixedBlend
from rudder.guidance.contract import Guidance, Prompt
from rudder.guidance.r2f import R2F, stop_fraction
from rudder.guidance.space import Parametrisation

from . import Options, Table, cells, rareshapes
from .cells import Cell, Scores, Store
from .generate import Methods, files
from .stats import Interval, difference, share_interval

AIM = 8.0  # points of AAPB above R2F, averaged over the rare categories
RARE = ("property", "never", "texture", "relation", "two-object")
GAMMAS = tuple(round(0.1 * k, 1) for k in range(1, 10))
GAMMAS_ELSEWHERE = (0.2, 0.4, 0.6)  # where no sweep runs

#: R2F's visual detail level, by its rubric: 3 is parts such as horns, which the world's attributes are; 4 is texture; 2
#: is action, the nearest to a relation. Of the family's table: SDXL's suits epsilon prediction, SD3's rectified flow.
LEVEL = {"texture": 4, "relation": 2}
FAMILY = {Parametrisation.EPS: "SDXL", Parametrisation.FLOW: "SD3"}


@dataclass(frozen=True)
class Row:
    """A method of the table. ``methods``: what is wired on the MODEL, from the anchor, the category and what the model
    predicts; None for nothing."""

    name: str
    methods: Callable[[Prompt, str, Parametrisation], tuple[Guidance, ...]] | None = None

    def on(self, category: str, kind: Parametrisation) -> Methods | None:
        return (lambda anchor: self.methods(anchor, category, kind)) if self.methods else None


def _r2f(level: int | None = None) -> Callable:
    def methods(anchor: Prompt, category: str, kind: Parametrisation) -> tuple[Guidance, ...]:
        stop = stop_fraction(level or LEVEL.get(category, 3), family=FAMILY.get(kind, "SD3"))
        return (R2F(frequent=anchor, stop=stop),)

    return methods


#: Every row of the table by its key. A new method is one more line, and its key in `plan`.
ROWS: dict[str, Row] = {
    "cfg": Row("CFG"),
    **{f"blend-{g}": Row(f"fixed blend {g}", lambda a, *_, g=g: (FixedBlend(anchor=a, gamma=g),)) for g in GAMMAS},
    **{f"r2f-{level}": Row(f"R2F, level {level}", _r2f(level)) for level in range(1, 6)},
    "r2f": Row("R2F", _r2f()),
    "aapb": Row("AAPB", lambda a, *_: (AAPB(anchor=a),)),
    "aapb-unclamped": Row("AAPB, unclamped", lambda a, *_: (AAPB(anchor=a, clamp=False),)),
}
COMPARED = ("r2f", "aapb", "aapb-unclamped")


def blends(gammas: Iterable[float]) -> tuple[str, ...]:
    return tuple(f"blend-{g}" for g in gammas)


def plan(quick: bool) -> list[tuple[str, str, str]]:
    """(category, method, anchor) of every cell, the most important first."""
    if quick:
        wanted = [("property", ("cfg",), ""), ("property", (*COMPARED, *blends((0.2, 0.8))), "superclass"),
                  ("frequent", ("cfg",), ""), ("frequent", ("r2f", "aapb"), "superclass"),
                  ("property", ("aapb",), "harmful")]
    else:
        wanted = [(category, methods, anchor) for category in rareshapes.CATEGORIES
                  for methods, anchor in ((("cfg",), ""), (("r2f", "aapb"), "superclass"))]
        wanted.append(("property", blends(GAMMAS), "superclass"))
        wanted += [(c, blends(GAMMAS_ELSEWHERE), "superclass") for c in rareshapes.CATEGORIES if c != "property"]
        wanted += [(c, ("aapb-unclamped",), "superclass") for c in rareshapes.CATEGORIES]
        wanted += [(c, COMPARED, anchor) for anchor in ("noun", "harmful", "random") for c in ("property", "never")]
        wanted.append(("property", blends(GAMMAS), "noun"))
        wanted.append(("property", tuple(f"r2f-{level}" for level in (1, 2, 4, 5)), "superclass"))
    return [(category, method, anchor) for category, methods, anchor in wanted for method in methods]


# ---------------------------------------------------------------- what was found

@dataclass(frozen=True)
class Found:
    """The scores of every painted cell, by (model, category, method, anchor)."""

    scores: dict[tuple[str, str, str, str], Scores]

    def get(self, model: str, category: str, method: str, anchor: str = "superclass") -> Scores | None:
        return self.scores.get((model, category, method, anchor if method != "cfg" else ""))

    def best_blend(self, model: str, category: str, anchor: str = "superclass") -> str | None:
        """The key of the constant gamma that is most often right on these very pictures, which flatters it."""
        tried = {m: np.mean(s.right) for (k, c, m, a), s in self.scores.items()
                 if (k, c, a) == (model, category, anchor) and m.startswith("blend-")}
        return max(tried, key=tried.get, default=None)

    def other(self, model: str, category: str, key: str, anchor: str) -> Scores | None:
        """What a method is compared with: 'cfg', 'r2f', or 'blend' for the best constant gamma."""
        method = self.best_blend(model, category, anchor) if key == "blend" else key
        return self.get(model, category, method, anchor) if method else None


def points(values: Sequence[float], clusters: Sequence[str]) -> Interval:
    """Mean with its interval in percent; the generator is fixed so that a table can be made again."""
    return share_interval(values, clusters, np.random.default_rng(0)) * 100


def above(pairs: Sequence[tuple[Scores, Scores]], cluster: Callable[[str], str] = str) -> Interval:
    """How much more often the first is right than the second, in points, over the same pictures of all categories.
    ``cluster`` of a prompt's text: the prompt itself, or more."""
    a, b = ([x for pair in pairs for x in pair[i].right] for i in (0, 1))
    labels = [f"{k}: {cluster(text)}" for k, pair in enumerate(pairs) for text in pair[0].prompts]
    return difference(a, b, labels, np.random.default_rng(0)) * 100


def versus(found: Found, model: str, method: str, key: str) -> list[tuple[Scores, Scores]]:
    """A method and what it is compared with (``Found.other``) in every rare category that CFG is painted in; none where
    one of them is missing."""
    every = [c for c in RARE if found.get(model, c, "cfg")]
    pairs = [(found.get(model, c, method), found.other(model, c, key, "superclass")) for c in every]
    return [] if key == method or not all(a and b for a, b in pairs) else pairs


OTHERS = {"cfg": "above CFG", "r2f": "above R2F", "blend": "above the best fixed blend"}


def summary_row(found: Found, model: str, method: str) -> dict | None:
    """A method with the superclass anchor: every category, and their average where all rare ones are painted."""
    of = {c: s for c in rareshapes.CATEGORIES if (s := found.get(model, c, method))}
    if not of:
        return None
    row = {"model": model, "method": ROWS[method].name}
    row |= {c: points(s.right, s.prompts) for c, s in of.items()}
    rare = {c: of[c] for c in RARE if c in of}
    every = [c for c in RARE if found.get(model, c, "cfg")]
    if rare and list(rare) == every:
        row["average"] = points([x for s in rare.values() for x in s.right],
                                [f"{c}: {t}" for c, s in rare.items() for t in s.prompts])
        for key in OTHERS:
            pairs = versus(found, model, method, key)
            if pairs and not (key == "blend" and method.startswith("blend-")):
                row[f"above {key}"] = above(pairs)
    row |= {key: float(np.mean([getattr(s, key) for s in of.values()])) for key in ("evaluations", "seconds")}
    return row


SUMMARY = {"model": ("model", ""), "method": ("method", ""), "average": ("average of rare", ".1f"),
           **{f"above {key}": (heading, "+.1f") for key, heading in OTHERS.items()},
           **{c: (c, ".1f") for c in rareshapes.CATEGORIES},
           "evaluations": ("evaluations a picture", ".0f"), "seconds": ("s a picture", ".2f")}


def cell_row(found: Found, key: tuple[str, str, str, str]) -> dict:
    model, category, method, anchor = key
    scores = found.scores[key]
    row = {"model": model, "category": category, "method": ROWS[method].name, "anchor": anchor or "none",
           "n": len(scores.right), "accuracy": points(scores.right, scores.prompts)}
    row |= {part: 100 * float(np.nanmean(scores.parts[part])) for part in PARTS
            if part in scores.parts and not np.isnan(scores.parts[part]).all()}
    for other in OTHERS:
        against = found.other(model, category, other, anchor or "superclass")
        if against and against is not scores and method != "cfg":
            row[f"above {other}"] = above([(scores, against)])
    row |= {"saturation": float(np.mean(scores.saturation)), "evaluations": scores.evaluations,
            "seconds": scores.seconds}
    return row | ({"diversity": scores.diversity} if scores.diversity is not None else {})


PARTS = ("shape", "attribute", "texture", "relation", "color", "count")
CELLS = {"model": ("model", ""), "category": ("category", ""), "method": ("method", ""), "anchor": ("anchor", ""),
         "n": ("pictures", "d"), "accuracy": ("right, %", ".1f"), **{p: (f"{p}, %", ".1f") for p in PARTS},
         **{f"above {key}": (heading, "+.1f") for key, heading in OTHERS.items()},
         "saturation": ("saturation", ".3f"), "diversity": ("diversity", ".3f"),
         "evaluations": ("evaluations a picture", ".0f"), "seconds": ("s a picture", ".2f")}


PAIRS = {"model": ("model", ""), "category": ("category", ""), "pair": ("pair", ""), "n": ("pictures", "d"),
         **{key: (ROWS[key].name, ".0f") for key in ("cfg", *COMPARED)}, "blend": ("best fixed blend", ".0f")}


def pair_of(split: str) -> dict[str, str]:
    """Text of a prompt -> its category and pair: the same pair is another matter with two objects."""
    return {p.text: f"{p.category}: {p.pair}" for c in rareshapes.CATEGORIES for p in rareshapes.prompts(c, split)}


def pair_rows(found: Found, model: str, split: str) -> list[dict]:
    """What is right of each pair of the list: how far its mean speaks for others."""
    out = []
    for category in rareshapes.CATEGORIES:
        pairs = {p.text: p.pair for p in rareshapes.prompts(category, split)}
        keys = {key: key for key in ("cfg", *COMPARED)} | {"blend": found.best_blend(model, category)}
        cells_of = {key: s for key, method in keys.items() if method and (s := found.get(model, category, method))}
        for pair in dict.fromkeys(pairs.values()):
            of = {key: [x for x, text in zip(s.right, s.prompts) if pairs[text] == pair]
                  for key, s in cells_of.items()}
            if any(of.values()):
                out.append({"model": model, "category": category, "pair": pair, "n": max(map(len, of.values()))}
                           | {key: 100 * float(np.mean(marks)) for key, marks in of.items() if marks})
    return out


BY_PAIR = {"model": ("model", ""), "method": ("method", ""), "anchor": ("anchor", ""), "above": ("above", ""),
           "average": ("average of rare", "+.1f"), **{c: (c, "+.1f") for c in rareshapes.CATEGORIES}}


def by_pair_rows(found: Found, model: str, split: str) -> list[dict]:
    """How far methods lie above CFG and R2F, in points, with intervals that speak of other pairs too."""
    out, pair = [], pair_of(split).get
    for anchor in ("superclass", "noun"):
        for method in (*COMPARED, *blends(GAMMAS_ELSEWHERE)):
            for key in ("cfg", "r2f"):
                pairs = {c: (a, b) for c in rareshapes.CATEGORIES if key != method and
                         (a := found.get(model, c, method, anchor)) and (b := found.other(model, c, key, anchor))}
                row = {c: above([both], pair) for c, both in pairs.items()}
                if set(RARE) <= set(pairs):
                    row["average"] = above([pairs[c] for c in RARE], pair)
                if row:
                    out.append({"model": model, "method": ROWS[method].name, "anchor": anchor,
                                "above": ROWS[key].name} | row)
    return out


# ---------------------------------------------------------------- the table

def main(options: Options) -> Table:
    from rudder.demo import judge

    reader, tag = judge.load(), cells.tag_of_scores()
    n = options.n or (8 if options.quick else 512)
    with cells.workplace(options) as work:
        name = "rare" if options.split == "final" else "rare-dev"
        stores = [cells.open_store(work, file, options, name) for file in files(options.models)]
        todo = [todo_of(store, cell_of(store, *parts, options.split, n), reader, tag)
                for parts in plan(options.quick) for store in stores]
        ready = [(row.store, row.what) for row in cells.done(todo, options)]
        found = Found({(s.painter.name, c.category, c.method, c.anchor): s.scores(c, reader, tag) for s, c in ready})
        sheets = {s.painter.name: cells.sheet(s, shown(s, [c for o, c in ready if o is s]), options.until)
                  for s in stores}
    return table(found, options, n, stores, len(todo), sheets)


def cell_of(store: Store, category: str, method: str, anchor: str, split: str, n: int) -> Cell:
    methods = ROWS[method].methods
    made = methods(Prompt((), "anchor"), category, store.painter.parametrisation) if methods else ()
    return Cell(category, split, method, anchor, store.settings.cfg, n, cells.code_of(made))


def todo_of(store: Store, cell: Cell, reader: Callable, tag: str) -> cells.Todo:
    return cells.Todo.of(store, cell, jobs_of(store, cell), reader, tag)


def jobs_of(store: Store, cell: Cell) -> list[cells.Job]:
    return cells.jobs(cell, ROWS[cell.method].on(cell.category, store.painter.parametrisation))


def table(found: Found, options: Options, n: int, stores: Sequence[Store], wanted: int, sheets: dict) -> Table:
    from . import rareplots

    models = [store.painter.name for store in stores]
    rows = [row for model in models for key in ROWS if (row := summary_row(found, model, key))]
    out = Table("rare" if options.split == "final" else "rare-dev", "RareShapes: rare combinations that come out right",
                SUMMARY, rows, notes(found, rows, options, n, stores, wanted))
    out.parts = [Table(f"{out.name}-cells", "Every cell", CELLS, [cell_row(found, key) for key in found.scores]),
                 Table(f"{out.name}-by-pair", "Differences with pairs as clusters", BY_PAIR,
                       [row for model in models for row in by_pair_rows(found, model, options.split)],
                       ["In points, on the same pictures. These intervals speak of other pairs too; those of 4 or 8 "
                        "pairs are Student's t of what the pairs are on average."]),
                 Table(f"{out.name}-pairs", "Pair by pair, superclass anchor, right in %", PAIRS,
                       [row for model in models for row in pair_rows(found, model, options.split)])]
    out.plots = rareplots.all_plots(found, models, sheets)
    return out


def shown(store: Store, ready: Sequence[Cell]) -> dict[str, cells.Job]:
    """Of the contact sheet: the first batches of the property cells with the superclass anchor."""
    mine = {c.method: c for c in ready if c.category == "property" and c.anchor in ("", "superclass")}
    wanted = ("cfg", "blend-0.2", "blend-0.4", "blend-0.8", *COMPARED)
    return {ROWS[m].name: jobs_of(store, mine[m])[0] for m in wanted if m in mine}


def notes(found: Found, rows: list[dict], options: Options, n: int, stores: Sequence[Store], wanted: int) -> list[str]:
    out = [
        f"{n} pictures a cell, the same prompts and seeds in every cell of a category, the half '{options.split}' of "
        f"the list {rareshapes.digest()}. Right: what the category asks for (rareshapes.py), as the judge reads it, in "
        "%. Intervals: 95 % bootstrap, clustered by prompt; differences are of the same pictures, in points. They are "
        "about the pairs of this list (8 in property, two-object and frequent, 4 in the others) in other colours and "
        "with other seeds; other pairs may come out otherwise, as these do from one another: see pair by pair.",
        *(f"{s.painter.name} ({s.painter.digest}): {s.about}, cfg {s.settings.cfg:g}; R2F alternates by the "
          f"{FAMILY.get(s.painter.parametrisation, 'SD3')} table."
          for s in stores),
        "Above: the summary is with the superclass anchor; the average is over " + ", ".join(RARE) + ", where they are "
        "painted. R2F's level is 3, in texture 4, in relation 2. The best fixed blend is chosen on these very pictures "
        f"among all gammas in property, and among {', '.join(map(str, GAMMAS_ELSEWHERE))} elsewhere: that favours it.",
    ]
    for row in rows:
        if row["method"] == ROWS["aapb"].name and set(RARE) <= set(row) and not options.quick:
            for key, aim in (("r2f", AIM), ("blend", 0.0)):
                if f"above {key}" in row:
                    gain = row[f"above {key}"]
                    wider = above(versus(found, row["model"], "aapb", key), pair_of(options.split).get)
                    out.append(f"Aim: AAPB {OTHERS[key]} by at least {aim:g} points; {row['model']}: {gain:+.1f}, with "
                               f"pairs as clusters {wider.low:+.1f} .. {wider.high:+.1f}: "
                               f"{'met' if gain.value >= aim else 'NOT MET'}.")
    out += [line for store in stores for line in store.older]
    hours = sum(s.seconds * len(s.right) for s in found.scores.values()) / 3600
    out.append(f"Sampling took {hours:.2f} hours in all, on one process; the wall time below is this run's alone.")
    if wanted > len(found.scores):
        out.append(f"{wanted - len(found.scores)} of {wanted} cells are not painted yet: run the command again.")
    return out

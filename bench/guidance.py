"""Every guidance method of the pack on ordinary prompts, over weights of 1 to 15: what it is worth and what it costs.

The prompts are a fixed mixture, half `frequent` and half `ordinary` of RareShapes: here a model knows what is asked of
it, and guidance has to make pictures right without burning them or making them all alike. (What is rare is the table
`rare`.) Every method runs at its paper's defaults with the same prompts and seeds, in both demo models and in the exact
worlds; nothing is tuned on what is measured.

    python3 dev.py bench guidance --threads 1                 # again to go on
    python3 dev.py bench guidance --threads 1 --shard 0/2     # and 1/2 beside it; then once without

A table is made of whatever is painted; what is missing is named below it. The most important is painted first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from rudder.guidance.aapb import AAPB
from rudder.guidance.adaptive import AdaptiveGuidance
from rudder.guidance.answer import ANSWER
from rudder.guidance.apg import APG
from rudder.guidance.autoguidance import AutoGuidance
from rudder.guidance.beta_cfg import BetaCFG
from rudder.guidance.blend import FixedBlend
from rudder.guidance.cfg_zero import CFGZero
from rudder.guidance.contract import Guidance, Prompt
from rudder.guidance.contrast import PerturbedAttention, SmoothedEnergy
from rudder.guidance.dynamic import DynamicCFG
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.linear_ag import LinearAG
from rudder.guidance.nag import NAG
from rudder.guidance.negative import ExtraNegative
from rudder.guidance.perpneg import PerpNeg
from rudder.guidance.sag import SelfAttentionGuidance
from rudder.guidance.schedule import Schedule
from rudder.guidance.scorers import Overshoot
from rudder.guidance.space import Parametrisation
from rudder.guidance.tag import CTAG, TAG
from rudder.guidance.tcfg import TCFG
from rudder.guidance.temporal import TemporalTAG
from rudder.guidance.temporal_net import TimePredictor
from rudder.host.demo import MODELS
from rudder.host.samplers import cfg_pp, w2sd
from rudder.host.second import told
from rudder.inversion.cfg_pp import CFGPP
from rudder.inversion.w2sd import W2SD
from rudder.nodes.guidance_feedback import opened

from . import Options, Table, cells, companions, rare, rareshapes, seen
from .cells import Cell, Store, Unprompted
from .exact.table import window
from .generate import SETTINGS, files
from .negative import AsUncond
from .seen import HIGH, MARGIN, Seen
from .stats import difference

CATEGORIES = ("frequent", "ordinary")  # the mixture, half and half
SPLIT = "dev"
CFGS = (7.5, 15.0, 5.0, 10.0, 3.0, 1.0, 2.0)  # in the order in which they are painted
QUICK_CFGS = (1.0, 15.0)
LAMBDA = 0.6 / 7.5  # CFG++: the paper's lambda of 0.6 matches a weight of about 7.5
SOLVERS = {"dpmpp_2m": "dpm++ 2m", "euler": "euler"}  # CFG++ of what the other rows are sampled with
PLAIN = "cfg"  # the key of the row that the others are compared with
NOTHING = "nothing"  # the same for pictures without a prompt


@dataclass(frozen=True)
class Given:
    """What a row may use: the second prompt (by the row's ``anchor``), what the model predicts, the table's weight, the
    host's name of the sampler, the MODEL without any method, and whose pictures they are (nobody's in exact worlds).
    """

    anchor: Prompt
    kind: Parametrisation
    cfg: float
    sampler: str = "dpmpp_2m"
    model: Any = None
    store: Store | None = None


@dataclass(frozen=True)
class Row:
    """A method at its paper's defaults.

    Attributes:
        make: what is wired on the MODEL, in wiring order.
        anchor: which of a prompt's anchors is the second prompt: 'superclass', or 'harmful' ("a mosaic red heart" for
            "a spiky red heart") for methods that take a negative; '' for none.
        least, most: the weights at which the method is defined; at 1 there is no guidance to shape.
        alone: paint picture by picture, because the cost of one depends on what shares its batch.
        sampler: the SAMPLER instead of the model's own; must draw no noise.
        worlds: whether it can run in the exact worlds.
        prompted: whether the model is told the prompt. Pictures from nothing have no accuracy.
        helper: what brings a part of the method while it is painted (``companions``), where there is one.
        second: evaluations of another model a step, which the counter of the first does not see.
        host: functions of the host's side that serve this row alone, whose files ``cells.CODE`` does not hold.
    """

    name: str
    make: Callable[[Given], tuple[Guidance, ...]] = lambda given: ()
    anchor: str = ""
    least: float = 2.0
    most: float = 15.0
    alone: bool = False
    sampler: Callable[[Given], Any] | None = None
    worlds: bool = True
    prompted: bool = True
    helper: Callable | None = None
    second: int = 0
    host: tuple[Callable, ...] = ()

    def at(self, cfgs: Sequence[float]) -> list[float]:
        return [cfg for cfg in cfgs if self.least <= cfg <= self.most]

    def parts(self, given: Given) -> list[Any]:
        """What decides the pictures beside the weight: methods, and the sampler's function and solver."""
        sampler = self.sampler(given) if self.sampler else None
        solver = [v for v in sampler.extra_options.values() if is_dataclass(v)] if sampler else []
        functions = [f for f in (sampler and sampler.sampler_function, self.helper, *self.host) if f]
        return [*self.make(given), *functions, *solver]


def limited(given: Given) -> tuple[Guidance, ...]:
    low, high = window(given.kind)
    return (LimitedInterval(sigma_low=low, sigma_high=high),)


def from_nothing(name: str, *methods: Guidance) -> Row:
    return Row(name, lambda g: methods, least=1.0, most=1.0, worlds=False, prompted=False)


def fitted(given: Given) -> tuple[Guidance, ...]:
    how = given.store and replace(given.store.settings, cfg=given.cfg)
    found = companions.coefficients(given.store.painter, how) if how else None
    return (LinearAG(end=0.5, coefficients=found),)


def auto(given: Given) -> tuple[Guidance, ...]:
    return (AutoGuidance(bad=companions.worse(given.store.painter.name) if given.store else None),)


@lru_cache(maxsize=1)
def time_predictor() -> TimePredictor:
    """The shipped one, of the latents that both demo models share."""
    return opened(MODELS / "shapes-time.safetensors")


#: Every row by its key, the most important first. A new method is one more line.
ROWS: dict[str, Row] = {
    PLAIN: Row("CFG", least=1.0),
    "apg": Row("APG", lambda g: (APG(),)),
    "cfg-zero": Row("CFG-Zero*", lambda g: (CFGZero(),)),
    "tcfg": Row("TCFG", lambda g: (TCFG(),)),
    "interval": Row("limited interval", limited),
    "adaptive": Row("Adaptive Guidance", lambda g: (AdaptiveGuidance(),), alone=True),
    "adaptive-late": Row("Adaptive Guidance, from 0.3 on", lambda g: (AdaptiveGuidance(start=0.3),), alone=True),
    "beta-cfg": Row("beta-CFG", lambda g: (BetaCFG(),)),
    "triangle": Row("weak-strong-weak", lambda g: (Schedule(shape="triangle"),)),
    "tag": Row("TAG", lambda g: (TAG(),), least=1.0),
    "c-tag": Row("C-TAG", lambda g: (CTAG(),)),
    "cfg++": Row("CFG++", most=0.999 / LAMBDA,
                 sampler=lambda g: cfg_pp(CFGPP(strength=g.cfg * LAMBDA, solver=SOLVERS[g.sampler]))),
    "w2sd": Row("W2SD, weak cfg 1", sampler=lambda g: w2sd(W2SD())),
    "temporal-tag": Row("TAG, temporal", lambda g: (TemporalTAG(predictor=time_predictor()),), worlds=False),
    "linear-ag": Row("LinearAG, held", lambda g: (LinearAG(end=0.5),)),
    "linear-ag-fit": Row("LinearAG, fitted", fitted, worlds=False, helper=companions.coefficients),
    "autoguidance": Row("AutoGuidance", auto, least=1.0, worlds=False, helper=companions.worse, second=1,
                        host=(told,)),
    "dynamic": Row("dynamic CFG, no judge", lambda g: (DynamicCFG(scorer=Overshoot()),), least=7.5, most=7.5),
    "answer": Row("ANSWER", lambda g: (ANSWER(end=0.8),)),
    "uncond-negative": Row("negative as uncond", lambda g: (AsUncond(negative=g.anchor),), "harmful"),
    "extra-negative": Row("extra negative", lambda g: (ExtraNegative(negative=g.anchor),), "harmful"),
    "perp-neg": Row("Perp-Neg", lambda g: (PerpNeg(negatives=(g.anchor,)),), "harmful"),
    "pag": Row("PAG", lambda g: (PerturbedAttention(),), least=1.0, worlds=False),
    "seg": Row("SEG", lambda g: (SmoothedEnergy(),), least=1.0, worlds=False),
    "sag": Row("SAG", lambda g: (SelfAttentionGuidance(),), least=1.0, worlds=False),
    "nag": Row("NAG", lambda g: (NAG(negative=g.anchor),), "harmful", least=1.0, worlds=False),
    "aapb": Row("AAPB", lambda g: (AAPB(anchor=g.anchor),), "superclass"),
    "r2f": Row("R2F", lambda g: rare.ROWS["r2f-3"].methods(g.anchor, "frequent", g.kind), "superclass"),
    "blend": Row("fixed blend", lambda g: (FixedBlend(anchor=g.anchor),), "superclass"),
    # As their papers show them first: what guides without a prompt and without cfg.
    NOTHING: from_nothing("no prompt"),
    "pag-nothing": from_nothing("PAG, no prompt", PerturbedAttention()),
    "seg-nothing": from_nothing("SEG, no prompt", SmoothedEnergy()),
    "sag-nothing": from_nothing("SAG, no prompt", SelfAttentionGuidance()),
}  # fmt: skip
#: Methods of the pack without a row, and why.
ELSEWHERE = {
    "CFG": "the sampler's own cfg is the row CFG", "Trace": "it changes nothing",
    "InstructGuidance": "it needs a model that takes an image",
    "AttentionEntropy": "it is for pictures of another size than the model was trained on: `bench sizes`",
    **dict.fromkeys(("PromptToPrompt", "LocalBlend", "MasaCtrl", "PlugAndPlay"), "it edits: `bench edit`"),
    "RIVAL": "it varies a picture of the same batch: `bench variations`",
}  # fmt: skip
SATURATION = ("apg", "cfg-zero", "tcfg")  # expected nearer the data than CFG at high cfg
SAVING = ("adaptive", "adaptive-late")  # the paper's setting, and the node's own: see RudderAdaptiveGuidance.md
EXPECTED = (PLAIN, *SATURATION, "interval", *SAVING)  # what the expectations speak of
SAVES = 25.0  # percent of the evaluations that Adaptive Guidance is expected to save


def urgent(key: str, cfg: float) -> bool:
    """Whether a row belongs to what must not be missing: everything at one weight, and what the expectations speak of
    at a high one."""
    return cfg == CFGS[0] or (cfg == CFGS[1] and key in EXPECTED) or not ROWS[key].prompted


def plan(quick: bool) -> list[tuple[str, float]]:
    """(method, cfg), the most important first."""
    order = QUICK_CFGS if quick else CFGS
    keys = [*EXPECTED, *(key for key in ROWS if key not in EXPECTED)]
    every = [(key, cfg) for cfg in order for key in keys if cfg in ROWS[key].at(order)]
    return sorted(every, key=lambda name: not urgent(*name))


def halves(n: int) -> list[tuple[str, int]]:
    """How many of n pictures are of which category."""
    return list(zip(CATEGORIES, (n - n // 2, n // 2)))


def cells_of(
    key: str, cfg: float, n: int, kind: Parametrisation = Parametrisation.EPS, made: type[Cell] = Cell
) -> list[Cell]:
    """The two halves of the mixture, together n pictures."""
    row = ROWS[key]
    code = cells.code_of(row.parts(Given(Prompt((), "anchor"), kind, cfg, SETTINGS[kind].sampler)))
    made = made if row.prompted else Unprompted
    return [made(c, SPLIT, key, row.anchor, cfg, count, code) for c, count in halves(n)]


def jobs_of(store: Store, cell: Cell) -> list[cells.Job]:
    row, painter = ROWS[cell.method], store.painter

    def given(anchor: Prompt) -> Given:
        return Given(anchor, painter.parametrisation, cell.cfg, store.settings.sampler, painter.model, store)

    more = {"alone": True} if row.alone else {}
    more |= {"sampler": row.sampler(given(Prompt((), "anchor")))} if row.sampler else {}
    methods = None if cell.method in (PLAIN, NOTHING) else lambda anchor: row.make(given(anchor))
    return cells.jobs(cell, methods, **more)


def digest(n: int) -> str:
    """SHA-256 of the prompts, anchors and seeds of n pictures, 16 hex digits: pinned by a test."""
    rows = [[p.text, p.anchors["superclass"], p.anchors["harmful"], cell.seed(i)]
            for cell in cells_of(PLAIN, 1.0, n) for i, p in enumerate(cell.prompts)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- what was found

@dataclass(frozen=True)
class Found:
    """What was seen of every painted (model, method, cfg), and of true renders: their mean saturation by prompt, and
    rows of their own by name."""

    seen: dict[tuple[str, str, float], Seen]
    true: dict[str, float]
    floors: dict[str, Seen]

    def of(self, model: str) -> dict[tuple[str, float], Seen]:
        """What was seen of pictures with a prompt."""
        return {(key, cfg): s for (m, key, cfg), s in self.seen.items() if m == model and ROWS[key].prompted}

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(model for model, _, _ in self.seen))

    @property
    def data(self) -> float:
        """Mean saturation of true renders."""
        return float(np.mean(list(self.true.values())))


COLUMNS = {"model": ("model", ""), "method": ("method", ""), "cfg": ("cfg", "g"), "n": ("pictures", "d"),
           "accuracy": ("right, %", ".1f"), "more right": ("above CFG, points", "+.1f"),
           "saturation": ("saturation", ".3f"), "nearer": ("nearer the data than CFG", "+.3f"),
           "frechet": ("Frechet distance", ".1f"), "farther": ("above CFG's", "+.1f"),
           "evaluations": ("evaluations a picture", ".1f"), "seconds": ("s a picture", ".2f")}


def row_of(model: str, method: str, s: Seen, plain: Seen | None = None, found: Found | None = None,
           prompted: bool = True, **more) -> dict:
    """One row; ``plain`` is CFG at the same weight, or what the model paints without a prompt."""
    row = {"model": model, "method": method, **more, "n": len(s.right), "accuracy": seen.accuracy(s),
           "saturation": seen.saturation(s), "frechet": seen.frechet(s), "diversity": seen.diversity(s)}
    if plain is not None and plain is not s:
        row |= {"more right": seen.more_right(s, plain), "nearer": seen.nearer(s, plain, found.true),
                "farther": seen.frechet(s, plain), "more diverse": seen.more_diverse(s, plain)}
    row |= {"evaluations": s.evaluations, "seconds": s.seconds}
    told = row if prompted else {k: v for k, v in row.items() if k not in ("accuracy", "more right")}
    return {k: v for k, v in told.items() if v is not None and not (isinstance(v, float) and np.isnan(v))}


def rows_of(found: Found) -> list[dict]:
    order = {key: i for i, key in enumerate(ROWS)}
    out = [row_of("", name, s) for name, s in found.floors.items()]
    for name in sorted(found.seen, key=lambda name: (name[0], order[name[1]], name[2])):
        (model, key, cfg), s = name, found.seen[name]
        row = ROWS[key]
        plain = found.seen.get((model, PLAIN if row.prompted else NOTHING, cfg))
        out.append(row_of(model, row.name, s, plain, found, row.prompted, cfg=cfg))
    return out


def nearest(rows: list[dict]) -> list[dict]:
    """Of every model and method the row with the smallest Frechet distance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["method"]), []).append(row)
    return [min(group, key=lambda row: row["frechet"].value) for group in groups.values()]


# ---------------------------------------------------------------- what it says

def fronts(found: Found) -> list[str]:
    """Which methods are on the front of accuracy against evaluations, for each model."""
    out = []
    for model in found.models:
        of = {(ROWS[key].name, cfg): s for (key, cfg), s in found.of(model).items()}

        def cheaper(a, b, of=of) -> bool:
            return of[a].evaluations <= of[b].evaluations and seen.more_right(of[a], of[b]).low > 0

        where = seen.standings({name: (s.accuracy, -s.evaluations) for name, s in of.items()}, cheaper)
        out.append(f"Accuracy against evaluations, {model}: {seen.told(where)}")
    return out


def not_by_pair(found: Found) -> list[str]:
    """Which differences in what is right are told by other colours and seeds of these pairs, and not by the pairs."""
    pair = {p.text: p.pair for category in CATEGORIES for p in rareshapes.prompts(category, SPLIT)}
    out = []
    for model in found.models:
        said, of = [], found.of(model)
        for (key, cfg), s in of.items():
            plain = of.get((PLAIN, cfg))
            if plain is None or plain is s or not seen.more_right(s, plain).apart():
                continue
            wide = difference(s.right, plain.right, [pair[text] for text in s.prompts], seen.generator()) * 100
            if not wide.apart():
                said.append(f"{ROWS[key].name} at {cfg:g} ({wide.low:+.0f} .. {wide.high:+.0f})")
        if said:
            out.append(f"Above or below CFG in what is right, but not when the pairs are the clusters (Student's t), "
                       f"{model}: {', '.join(said)}.")
    return out


def expectations(found: Found) -> list[str]:
    """What was expected of saturation and of evaluations before the first run (of diversity: ``variety``), each
    confirmed, refuted or undecided."""
    out = []
    for model in found.models:
        of = found.of(model)
        plain = {cfg: s for (key, cfg), s in of.items() if key == PLAIN}
        for key in SATURATION:
            said = []
            for cfg in (c for c in HIGH if c in plain and (key, c) in of):
                a, b = of[key, cfg], plain[cfg]
                effect, right = seen.nearer(a, b, found.true), seen.more_right(a, b)
                said.append(f"cfg {cfg:g}: nearer by {effect:.3f}, accuracy {right:+.1f} points: "
                            f"{seen.verdict(effect, 0, right)}")
            if said:
                out.append(f"Expected: {ROWS[key].name} keeps saturation nearer the data than CFG at high cfg and "
                           f"equal accuracy; {model}, {'; '.join(said)}.")
        out += expected_saving(model, of, plain)
    return out


def expected_saving(model: str, of: dict, plain: dict[float, Seen]) -> list[str]:
    out = []
    for key in SAVING:
        said = []
        for cfg in sorted(c for c in plain if (key, c) in of):
            effect, right = seen.saved(of[key, cfg], plain[cfg]), seen.more_right(of[key, cfg], plain[cfg])
            said.append(f"cfg {cfg:g}: {effect:.1f} % saved, accuracy {right:+.1f} points: "
                        f"{seen.verdict(effect, SAVES, right)}")
        out += [f"Expected: {ROWS[key].name} saves at least {SAVES:g} % of the evaluations at equal accuracy; {model}, "
                f"{'; '.join(said)}."] * bool(said)
    return out


def notes(found: Found, options: Options, n: int, stores: Sequence[Store], missing: int) -> list[str]:
    pairs = {p.pair for cell in cells_of(PLAIN, 1.0, n) for p in cell.prompts}
    out = [
        f"Prompts: half {CATEGORIES[0]}, half {CATEGORIES[1]} of RareShapes, the half '{SPLIT}' of the list, {n} "
        f"pictures a row ({digest(n)}), the same prompts and seeds in every row. Right: shape and attribute, as the "
        "judge reads them. Every method at its paper's defaults.",
        *(f"{s.painter.name} ({s.painter.digest}): {s.about}." for s in stores),
        "This table: every method at the cfg that brings it nearest to true renders by the Frechet distance on the "
        "judge's features, chosen on these very pictures; all weights are in the next. 'True renders' are as many of "
        f"the same prompts, the floor of the column; the saturation of all that distances are measured from is "
        f"{found.data:.3f}.",
        f"Intervals: 95 %, bootstrap clustered by prompt, so they are about these {len(pairs)} pairs of shape and "
        "attribute in other colours and with other seeds; of Frechet distances jackknife over groups of prompts, in "
        "the exact worlds Student's t over the batches. "
        "Differences are to CFG at the same cfg on the same pictures. 'Nearer the data': by how much the mean "
        "saturation lies nearer to that of true renders.",
        "Negatives (as uncond, extra, Perp-Neg) say another attribute of the same shape; AAPB, R2F and the blend have "
        "the superclass anchor: on these prompts nothing drifts, so they show their price here, not their use.",
        "Rows without a prompt are compared with each other, at cfg 1, and have no accuracy.",
        "AutoGuidance (w 2, added to CFG above cfg 1) has the same model after less training as the worse one "
        f"({', '.join(f'{name} at {commit}' for name, commit in companions.WORSE.items())} of this repository). Its "
        "own text encoder was another: told the prompts by today's, as the node does, it is worse by that too. "
        "LinearAG's coefficients are fitted at each cfg on 8 other prompts.",
        "Dynamic CFG chooses the weight itself (its row is at 7.5), by the scorer that knows no judge: scored by the "
        "judge that measures it, it would prove nothing.",
        f"CFG++ is a sampler, here {' or '.join(SOLVERS.values())} as in the other rows; its lambda is the cfg times "
        f"{LAMBDA:g}, so that the paper's 0.6 stands at 7.5.",
        "Adaptive Guidance is painted picture by picture, because a batch is cheaper only when all of it has switched; "
        "so its seconds cannot be compared with those of other rows (batches of 32), its evaluations can. In the exact "
        "worlds it runs in one large batch, so its evaluations there are an upper bound.",
        f"Equal accuracy: the interval of the difference ends no lower than {-MARGIN:g} points. Confirmed or refuted "
        "where intervals decide, else undecided.",
        *fronts(found), *([] if options.quick else not_by_pair(found) + expectations(found)),
    ]
    out += [f"{s.painter.name} has no row of AutoGuidance but kept ones: its worse version is in the history of the "
            "repository, which this clone lacks." for s in stores if not possible(s, "autoguidance")]
    out += [line for store in stores for line in store.older]
    if missing:
        out.append(f"{missing} rows of pictures or worlds are not there yet: run the command again.")
    return out


# ---------------------------------------------------------------- the table

def todo_of(store: Store, pair: list[Cell], jobs: list[cells.Job], what: Any, true: Any, reader: Any, tag: str
            ) -> cells.Todo:
    """A row: its cells as one set of pictures, against the ``truth.Truth``."""
    return cells.Todo(store, true.key(pair, tag), jobs, cells.sight_of(jobs, reader), what)


def todos(wanted: Sequence[tuple[str, float]], stores: Sequence[Store], n: int, made: type[Cell], *how: Any
          ) -> list[cells.Todo]:
    """Every wanted (method, cfg) of each model that this clone can paint; ``how`` as the end of :func:`todo_of`."""
    out = []
    for key, cfg in wanted:
        for store in stores:
            pair = cells_of(key, cfg, n, store.painter.parametrisation, made)
            jobs = [job for cell in pair for job in jobs_of(store, cell)]
            row = todo_of(store, pair, jobs, (store, key, cfg, pair), *how)
            out.append(replace(row, paintable=possible(store, key)))
    return [row for row in out if row.kept or row.paintable]


def found_of(ready: Sequence[cells.Todo], stores: Sequence[Store], true: Any, reader: Any, tag: str) -> Found:
    """What is seen of the finished rows of :func:`todos`."""
    out = {}
    for store, key, cfg, pair in (row.what for row in ready):
        s = true.see_cells(store, pair, reader, tag)
        more = ROWS[key].second * store.settings.steps
        out[store.painter.name, key, cfg] = replace(s, evaluations=s.evaluations + more)
    return Found(out, true.saturation, true.floors(stores[0].painter, reader))


def possible(store: Store, key: str) -> bool:
    """Whether this clone has what the row needs."""
    return ROWS[key].helper is not companions.worse or companions.has_worse(store.painter.name)


def main(options: Options) -> Table:
    from rudder.demo import judge

    from . import guidanceplots, guidanceworlds, truth, variety

    reader = judge.load()
    tag = truth.tag()
    n = options.n or (8 if options.quick else 128)
    if n < 4:
        raise SystemExit("bench guidance: --n must be at least 4, or no distance of distributions can be measured.")
    with cells.workplace(options) as work:
        stores = [cells.open_store(work, file, options, "guidance") for file in files(options.models)]
        prompts = [p for cell in cells_of(PLAIN, 1.0, n) for p in cell.prompts]
        true = truth.Truth.of(prompts, reader, 4 if options.quick else truth.EACH)
        todo = todos(plan(options.quick), stores, n, Cell, true, reader, tag)
        ready = cells.done([row for row in todo if urgent(*row.what[1:3])], options)
        varied, waiting = variety.part(stores, options, n, reader, tag)
        ready += cells.done([row for row in todo if not urgent(*row.what[1:3])], options)
        parts, absent = guidanceworlds.parts(options, work)
        found = found_of(ready, stores, true, reader, tag)
        sheets = {s.painter.name: cells.sheet(s, shown(s, [row.what[3][0] for row in ready if row.store is s]),
                                              options.until) for s in stores}
    rows = rows_of(found)
    missing = len(todo) - len(ready) + waiting + absent
    out = Table("guidance", "Guidance methods: accuracy, saturation, distance and cost", COLUMNS, nearest(rows),
                notes(found, options, n, stores, missing))
    out.parts = [Table("guidance-cells", "Every weight", COLUMNS, rows), varied, *parts]
    out.plots = guidanceplots.all_plots(found, sheets)
    return out


def shown(store: Store, ready: Sequence[Cell]) -> dict[str, cells.Job]:
    """Of the contact sheet: the first batch of every method at the highest weight."""
    ready = [cell for cell in ready if possible(store, cell.method)]
    highest = max((cell.cfg for cell in ready), default=0)
    mine = sorted((cell for cell in ready if cell.cfg == highest), key=lambda cell: list(ROWS).index(cell.method))
    return {f"{ROWS[cell.method].name}, cfg {highest:g}": jobs_of(store, cell)[0] for cell in mine}

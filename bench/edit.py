"""Editing by attention: is the edit made, and does the rest stay?

Pictures come in families: a source prompt and its edits (`edits.py`) in one batch, from the same noise, so that a
method may take from the source's row. Families whose source is not what its prompt says are left out: there is nothing
to keep. Every method runs at its paper's defaults; the first row is the edited prompt at the same seed, without help.

    python3 dev.py bench edit --threads 1                 # again to go on
    python3 dev.py bench edit --threads 1 --shard 0/2     # and 1/2 beside it; then once without
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.patcher_extension as ext
import numpy as np
import torch

from rudder.attention.edit_prompts import EditPrompts
from rudder.guidance.aapb import AAPB
from rudder.guidance.contract import Guidance, Prompt
from rudder.guidance.features import PlugAndPlay
from rudder.guidance.local_blend import LocalBlend
from rudder.guidance.mutual import MasaCtrl
from rudder.guidance.prompt_to_prompt import PromptToPrompt
from rudder.guidance.space import Parametrisation
from rudder.host.words import encoded

from . import Options, Table, cells, editplots, edits, measures
from .cells import Job, Store
from .edits import Edit, Source
from .generate import Methods, files
from .memory import Peak
from .stats import Interval, difference, mean_interval, share_interval

PLAIN = "plain"


@dataclass(frozen=True)
class Given:
    """What a row may use: the prompts of the family as the host's encoder made them, the CONDITIONING of the source for
    every row, and what the model predicts."""

    prompts: EditPrompts
    source: Prompt
    kind: Parametrisation


@dataclass(frozen=True)
class Row:
    """A method of the table. ``make``: what is wired on the MODEL for a family, in wiring order."""

    name: str
    make: Callable[[Given], tuple[Guidance, ...]] = lambda given: ()


def p2p(given: Given, **options: Any) -> PromptToPrompt:
    """The layout until 0.4 of the run as in the paper, on transformers until 0.2 (arXiv 2508.07519)."""
    flow = given.kind is Parametrisation.FLOW
    return PromptToPrompt(edit=given.prompts, **({"self_end": 0.2 if flow else 0.4} | options))


def blend(given: Given, **options: Any) -> LocalBlend:
    return LocalBlend(edit=given.prompts, **options)


#: Every row by its key, the most important first. A new method is one more line.
ROWS: dict[str, Row] = {
    PLAIN: Row("edited prompt, same seed"),
    "p2p": Row("Prompt-to-Prompt", lambda g: (p2p(g),)),
    "masactrl": Row("MasaCtrl", lambda g: (MasaCtrl(),)),
    "pnp": Row("Plug-and-Play", lambda g: (PlugAndPlay(),)),
    "p2p-blend": Row("Prompt-to-Prompt + local blend", lambda g: (p2p(g), blend(g))),
    "pnp-blend": Row("Plug-and-Play + local blend", lambda g: (PlugAndPlay(), blend(g))),
    "p2p-masactrl": Row("Prompt-to-Prompt + MasaCtrl", lambda g: (p2p(g), MasaCtrl())),
    "aapb-p2p": Row("AAPB (anchor: source) + Prompt-to-Prompt", lambda g: (AAPB(anchor=g.source), p2p(g))),
    # Not the official 0.3, at which the wide maps of so small a model let nearly every place change.
    "p2p-blend-0.7": Row("Prompt-to-Prompt + local blend at 0.7", lambda g: (p2p(g), blend(g, threshold=0.7))),
    "p2p-blend-found": Row("Prompt-to-Prompt + local blend, found blocks", lambda g: (
        p2p(g), blend(g, blocks="double.0, single.0" if g.kind is Parametrisation.FLOW else "input.3, output.2"))),
}  # the blocks that find an object by its noun and by its colour: `bench blocks`, not this table, chose them
MEMORY_STEPS = 8  # of the run in which memory is measured: every method's window has some of them


# ---------------------------------------------------------------- pictures

@dataclass(frozen=True)
class Family:
    """The pictures of one source and its edits by one method, source first."""

    number: int
    method: str
    cfg: float
    code: str

    @property
    def source(self) -> Source:
        every = edits.sources()
        return every[self.number % len(every)]

    @property
    def texts(self) -> list[str]:
        return [self.source.text, *(edit.text for edit in self.source.edits)]

    @property
    def key(self) -> str:
        return f"edit-{edits.digest()}_cfg{self.cfg:g}_{self.method}_{self.code}"

    anchor = ""

    def text(self, i: int) -> str:
        return self.texts[i - self.first]

    def seed(self, i: int) -> int:
        """The same for source and edits: they start from the same noise."""
        return zlib.crc32(f"{self.source.text}, {self.number}".encode())

    @property
    def first(self) -> int:
        """Families have at most ten pictures; the number names the file."""
        return 10 * self.number

    @property
    def n(self) -> int:
        return self.first + len(self.texts)

    def job(self, methods: Methods | None = None) -> Job:
        return Job(self, methods, self.first, self.n)


def code_of(made: Sequence[Guidance]) -> str:
    """What methods add to what a store's folder stands for: their files, and their settings without the prompts, 8 hex
    digits."""
    settings = [{k: v for k, v in vars(method).items() if isinstance(v, str | int | float)} for method in made]
    parts = [cells.code_of([type(method) for method in made]), repr(settings)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def families(store: Store, key: str, n: int) -> list[tuple[Family, Methods | None]]:
    """The first n families of a row, with what is wired for each."""
    def methods(family: Family, anchor: Prompt | None = None) -> tuple[Guidance, ...]:
        _, prompts = encoded(store.painter.clip, family.texts)
        source = Prompt(store.painter.conditioning([family.source.text] * len(family.texts)), "source")
        return ROWS[key].make(Given(prompts, source, store.painter.parametrisation))

    plain = [Family(number, key, store.settings.cfg, "") for number in range(n)]
    made = methods(plain[0])
    mark = code_of(made) if made else ""
    return [(replace(family, code=mark), partial(methods, family)) for family in plain]


def memory(store: Store, key: str) -> float:
    """The most that lives at once while the first family is sampled, MB a picture: every tensor, weights not counted.
    The second of two runs: the first also fills what the host keeps."""
    (family, methods), = families(store, key, 1)
    peaks = []

    def sample(executor: Callable, *args, **kwargs):
        with Peak() as seen:
            out = executor(*args, **kwargs)
        peaks.append(seen.peak)
        return out

    painter = copy(store.painter)
    painter.model = painter.model.clone()
    painter.model.add_wrapper_with_key(ext.WrappersMP.SAMPLER_SAMPLE, "bench", sample)  # inside of loading
    seeds = [family.seed(i) for i in range(family.first, family.n)]
    for _ in range(2):
        painter.paint(family.texts, seeds, (), methods, replace(store.settings, steps=MEMORY_STEPS))
    return peaks[-1] / len(seeds) / 1e6


# ---------------------------------------------------------------- what became of it

@dataclass(frozen=True)
class Made:
    """One edit of one family."""

    edit: Edit
    source: str
    success: float  # all that the edited prompt says is seen
    changed: float  # what the edit asks for is seen
    psnr: float  # dB, outside what may change; nan where nothing is left
    structure: float
    seconds: float
    evaluations: float
    job: Job
    place: int  # among the pictures of its family, whose source is the first


NUMBERS = ("changed", "psnr", "structure", "seconds", "evaluations")


def judged(strip: np.ndarray, about: dict, source: Source, judge: Any) -> list[tuple[int, dict[str, float]]]:
    """The numbers of a family's edits, by their place in it, from its pictures uint8 ``[N, 64, 64, 3]`` and what the
    file says of them; nothing where the source itself is wrong."""
    pictures, out = torch.from_numpy(strip).movedim(3, 1).float() / 255, []
    truths = [source.truth, *(edit.truth for edit in source.edits)]
    parts = judge(pictures).score(truths)
    if not parts["all"][0]:
        return []
    maps = judge.maps(pictures)
    for i, edit in enumerate(source.edits, start=1):
        where = edits.kept(pictures[0], source.truth, edit)[None]
        psnr = float(measures.psnr(pictures[:1], pictures[i:i + 1], where).clamp(max=60)) if where.sum() > 0 else np.nan
        out.append((i, {
            "success": float(parts["all"][i]), "changed": float(all(parts[f][i] == 1 for f in edit.asked)),
            "psnr": psnr, "structure": float(measures.structure([m[:1] for m in maps], [m[i:i + 1] for m in maps])),
            "seconds": about.get("seconds", np.nan), "evaluations": about.get("evaluations", np.nan)}))
    return out


def todo_of(store: Store, method: str, n: int, judge: Any, tag: str) -> cells.Todo:
    """A row of one model."""
    some = families(store, method, n)

    def seen(number: int, images: np.ndarray) -> dict[str, list[float]]:
        made = [numbers for _, numbers in judged(images, {}, some[number][0].source, judge)]
        return {"right": [one["success"] for one in made], "psnr": [one["psnr"] for one in made]}

    return cells.Todo(store, f"{some[0][0].key} {n} {tag}", [family.job(methods) for family, methods in some], seen,
                      [family for family, _ in some])


def made_of(todo: cells.Todo, judge: Any) -> list[Made]:
    """Every edit of a finished row; what the judge saw is remembered."""
    store, some = todo.store, todo.what

    def seen() -> dict[str, list]:
        every = [(k, i, made) for k, family in enumerate(some)
                 for i, made in judged(*store.batch(family.job()), family.source, judge)]
        return {"right": [made["success"] for *_, made in every], "family": [k for k, *_ in every],
                "place": [i for _, i, _ in every]} | {name: [made[name] for *_, made in every] for name in NUMBERS}

    row, out = store.row(todo.key, seen), []
    for k, i, success, *numbers in zip(row["family"], row["place"], row["right"], *(row[name] for name in NUMBERS)):
        source = some[k].source
        out.append(Made(source.edits[i - 1], source.text, success, *numbers, todo.jobs[k], i))
    return out


def pictures(store: Store, made: Made, until: float) -> np.ndarray | None:
    """Source and edit, uint8 ``[2, 64, 64, 3]``, painted again where they are gone and there is time, else None."""
    return store.batch(made.job)[0][[0, made.place]] if store.there(made.job, until) else None


# ---------------------------------------------------------------- the table

def interval(made: Sequence[Made], what: str, factor: float = 1.0) -> Interval | None:
    known = [(value, one.source) for one in made if (value := getattr(one, what)) == value]
    measure = share_interval if what in ("success", "changed") else mean_interval
    return measure(*zip(*known), np.random.default_rng(0)) * factor if known else None


def above(made: Sequence[Made], plain: Sequence[Made], what: str, factor: float = 1.0) -> Interval | None:
    """The difference to the plain row on the same families."""
    others = {(one.source, one.edit.kind): getattr(one, what) for one in plain}
    pairs = [(getattr(one, what), other, one.source) for one in made
             if (other := others.get((one.source, one.edit.kind))) is not None]
    pairs = [pair for pair in pairs if pair[0] == pair[0] and pair[1] == pair[1]]
    return difference(*zip(*pairs), np.random.default_rng(0)) * factor if pairs else None


COLUMNS = {"model": ("model", ""), "kind": ("edit", ""), "method": ("method", ""), "n": ("pictures", "d"),
           "success": ("success, %", ".1f"), "gain": ("above plain", "+.1f"), "changed": ("asked is seen, %", ".1f"),
           "psnr": ("PSNR of what must stay, dB", ".1f"), "kept": ("above plain", "+.1f"),
           "structure": ("structure distance x 1000", ".1f"), "evaluations": ("evaluations a picture", ".0f"),
           "seconds": ("s a picture", ".2f"), "memory": ("MB a picture", ".1f")}


def row(model: str, kind: str, key: str, made: Sequence[Made], plain: Sequence[Made], memory: float) -> dict:
    out = {"model": model, "kind": kind, "method": ROWS[key].name, "n": len(made)}
    out |= {"success": interval(made, "success", 100), "changed": interval(made, "changed", 100),
            "psnr": interval(made, "psnr"), "structure": interval(made, "structure", 1000),
            "evaluations": made[0].evaluations, "seconds": float(np.median([one.seconds for one in made]))}
    out |= {"memory": memory}
    if key != PLAIN:
        out |= {"gain": above(made, plain, "success", 100), "kept": above(made, plain, "psnr")}
    return {name: value for name, value in out.items() if value is not None}


def main(options: Options) -> Table:
    from rudder.demo import judge

    reader = judge.load()
    n = options.n or (2 if options.quick else 64)
    if n > len(edits.sources()):
        raise SystemExit(f"bench edit: there are {len(edits.sources())} sources, --n cannot be more.")
    rows, sheets, left_out, missing = [], {}, {}, 0
    with cells.workplace(options) as work:
        stores = [cells.open_store(work, file, options, "edit") for file in files(options.models)]
        tag = cells.tag_of(measures, edits, judged)
        todo = {(store, key): todo_of(store, key, n, reader, tag) for store in stores for key in ROWS}
        ready = cells.done(list(todo.values()), options)
        for store in stores:
            found = {key: made_of(one, reader) for key in ROWS if (one := todo[store, key]) in ready}
            peaks = {key: memory(store, key) for key in found}
            missing += len(ROWS) - len(found)
            name = store.painter.name
            if PLAIN in found:
                left_out[name] = n - len({one.source for one in found[PLAIN]})
            for kind in ("all", *edits.KINDS):
                for key, made in found.items():
                    of = [one for one in made if kind in ("all", one.edit.kind)]
                    plain = [one for one in found.get(PLAIN, ()) if kind in ("all", one.edit.kind)]
                    rows += [row(name, kind, key, of, plain, peaks[key])] if of else []
            sheets |= {f"{name}-{which}": editplots.cases(found, which, partial(pictures, store, until=options.until))
                       for which in ("median", "worst")}
        older = [line for store in stores for line in store.older]
    return table(rows, sheets, options, n, left_out, missing, older)


def table(rows: list[dict], sheets: dict[str, Any], options: Options, n: int, left_out: dict[str, int], missing: int,
          older: Sequence[str] = ()) -> Table:
    notes = [
        f"{n} sources of the list {edits.digest()} and their edits, the same seeds for every method. Success: all that "
        "the edited prompt says, as the judge reads it, in %. PSNR: outside the object (recolour, retexture; reshape "
        f"with a rim of {edits.RIM['rim']} px), inside it (restyle, add), outside the second (delete), against the "
        "source's picture, at most 60 dB. Intervals: 95 % bootstrap, clustered by source; differences are of the same "
        "pictures.",
        "MB a picture: the most that lives at once in a run of the first family, every tensor but the weights.",
        "A low structure distance may mean that nothing was done: read it with success.",
        *(f"{model}: {count} of {n} families left out because the source's picture is not what it says."
          for model, count in left_out.items()),
        *older,
    ]
    notes += cells.unpainted(missing)
    out = Table("edit", "Editing by attention", COLUMNS, rows, notes)
    out.plots = editplots.all_plots(sheets, rows)
    return out

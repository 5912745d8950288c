"""Variations of a picture: do they share its look, are they what the prompt says, and are they still different?

A prompt says shape and attribute ("a spiky heart") and leaves colour, texture and background open. A batch is a source
and others of the same prompt from other noise; alone, their looks agree as often as chance has it. RIVAL should make
them agree with the source's, and leave place, size and form to the noise.

    python3 dev.py bench variations --threads 1           # again to go on
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from rudder.demo import words
from rudder.guidance.contract import Guidance
from rudder.guidance.rival import RIVAL

from . import Options, Table, cells, measures
from .cells import Job, Store
from .generate import files
from .stats import Interval, difference, mean_interval, share_interval

COPIES = 3  # variations of a source
LOOK = ("color", "texture", "background")
PLAIN = "plain"
#: Every row by its key: its name and what is wired. A new method is one more line.
ROWS: dict[str, tuple[str, tuple[Guidance, ...]]] = {
    PLAIN: ("same prompt, other noise", ()),
    "rival": ("RIVAL", (RIVAL(),)),
    "rival-attention": ("RIVAL, attention alone", (RIVAL(early_until=0.0),)),
}
COLUMNS = {"model": ("model", ""), "method": ("method", ""), "n": ("variations", "d"),
           **{field: (f"same {field} as the source, %", ".1f") for field in LOOK},
           "look": ("all three, %", ".1f"), "gain": ("above plain", "+.1f"), "right": ("right, %", ".1f"),
           "lost": ("above plain", "+.1f"), "apart": ("distance to the source", ".3f"),
           "nearer": ("above plain", "+.3f"), "evaluations": ("evaluations a picture", ".0f"),
           "seconds": ("s a picture", ".2f")}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """A source, first, and its variations by one method: a ``cells.Cell`` of a kind of its own."""

    number: int
    method: str
    cfg: float
    code: str
    anchor = ""

    @property
    def said(self) -> words.Prompt:
        """Every common pair once, then again; neighbours differ in their shape."""
        every = words.prompts("common")
        return every[self.number * 5 % len(every)]

    @property
    def key(self) -> str:
        return f"variations_cfg{self.cfg:g}_{self.method}_{self.code}"

    def text(self, i: int) -> str:
        return self.said.text

    def seed(self, i: int) -> int:
        return zlib.crc32(f"{self.said.text}, {i}".encode())

    @property
    def first(self) -> int:
        return (1 + COPIES) * self.number

    @property
    def n(self) -> int:
        return self.first + 1 + COPIES

    @property
    def job(self) -> Job:
        made = ROWS[self.method][1]
        return Job(self, (lambda anchor: made) if made else None, self.first, self.n)


def judged(strip: np.ndarray, batch: Batch, judge: Callable) -> list[dict[str, float]]:
    """What each variation of a batch, pictures uint8 ``[N, 64, 64, 3]``, has of its source and of its prompt."""
    reading = judge(torch.from_numpy(strip).movedim(3, 1).float() / 255)
    seen = {name: reading.probabilities[name].argmax(-1) for name in LOOK}
    seen = {name: best if best.ndim == 1 else best[:, 0] for name, best in seen.items()}  # of the first object
    parts = reading.score([words.parse(batch.said.text)] * len(strip))
    out = []
    for i in range(1, len(strip)):
        same = {name: float(best[i] == best[0]) for name, best in seen.items()}
        right = all(parts[name][i] == 1 for name in ("count", "shape", "attribute"))
        out.append(same | {"look": min(same.values()), "right": float(right),
                           "apart": float(measures.diversity(reading.features[[0, i]]))})
    return out


def todo_of(store: Store, method: str, n: int, judge: Callable, tag: str) -> cells.Todo:
    code = cells.code_of(ROWS[method][1])
    batches = [Batch(number, method, store.settings.cfg, code) for number in range(n)]

    def seen(number: int, images: np.ndarray) -> dict[str, list[float]]:
        made = judged(images, batches[number], judge)
        return {"right": [one["look"] for one in made], "apart": [one["apart"] for one in made]}

    return cells.Todo(store, f"{batches[0].key} {n} {tag}", [batch.job for batch in batches], seen, batches)


def seen_of(todo: cells.Todo, judge: Callable) -> dict[str, Any]:
    """Lists of what was judged of all variations, ``right`` being the look (``kept`` compares by it); remembered."""
    def seen() -> dict[str, Any]:
        strips = [todo.store.batch(batch.job) for batch in todo.what]
        every = [one for (strip, _), batch in zip(strips, todo.what) for one in judged(strip, batch, judge)]
        lists = {name: [one[name] for one in every] for name in every[0]}
        cost = {name: float(np.median([about[name] for _, about in strips])) for name in ("evaluations", "seconds")}
        return lists | cost | {"right": lists["look"], "as said": lists["right"]}

    return todo.store.row(todo.key, seen)


def row(model: str, method: str, seen: dict[str, Any], plain: dict[str, Any] | None, texts: Sequence[str]) -> dict:
    rng = partial(np.random.default_rng, 0)

    def share(name: str) -> Interval:
        return share_interval(seen[name], texts, rng()) * 100

    def above(name: str) -> Interval:
        return difference(seen[name], plain[name], texts, rng())

    out = {"model": model, "method": ROWS[method][0], "n": len(texts), **{name: share(name) for name in LOOK},
           "look": share("look"), "right": share("as said"), "apart": mean_interval(seen["apart"], texts, rng()),
           "evaluations": seen["evaluations"], "seconds": seen["seconds"]}
    if method != PLAIN and plain:
        out |= {"gain": above("look") * 100, "lost": above("as said") * 100, "nearer": above("apart")}
    return out


def main(options: Options) -> Table:
    from rudder.demo import judge

    reader, tag = judge.load(), cells.tag_of(measures, judged)
    n = options.n or (2 if options.quick else 48)
    rows, missing, older = [], 0, []
    with cells.workplace(options) as work:
        for store in [cells.open_store(work, file, options, "variations") for file in files(options.models)]:
            todo = {method: todo_of(store, method, n, reader, tag) for method in ROWS}
            ready = cells.done(list(todo.values()), options)
            found = {method: seen_of(one, reader) for method, one in todo.items() if one in ready}
            missing, older = missing + len(todo) - len(found), older + store.older
            texts = [batch.said.text for batch in todo[PLAIN].what for _ in range(COPIES)]
            rows += [row(store.painter.name, method, seen, found.get(PLAIN), texts) for method, seen in found.items()]
    notes = [f"{n} sources, {COPIES} variations each, of prompts that say shape and attribute alone. Right: both and "
             "one object, as the judge reads them. Distance to the source: of the judge's features, place and size "
             "included; a copy has 0. Intervals: 95 % bootstrap, clustered by prompt.", *older]
    notes += cells.unpainted(missing)
    return Table("variations", "Variations of a picture", COLUMNS, rows, notes)

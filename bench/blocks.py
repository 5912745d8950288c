"""Which attention block does what in the demo models: the sweep behind the presets of nodes that take 'blocks'.

Two questions, block by block. Where a word is: how well what image tokens pay to it tells the pixels of what it names
from the others, which Local Blend and word masks live on. What guidance away from a degraded block does: PAG and SEG at
cfg 5 on the prompts of the table `guidance`.

    python3 dev.py bench blocks --threads 1               # again to go on
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch.nn import functional as F

from rudder.attention.edit_prompts import EditPrompts
from rudder.attention.local_blend import WordMaps
from rudder.guidance.contract import Edits, Guidance, Step
from rudder.guidance.contrast import PerturbedAttention, SmoothedEnergy
from rudder.host.sites import sites_of
from rudder.host.words import encoded

from . import Options, Table, cells, edits, guidance, seen, truth
from .cells import Cell, Store
from .generate import Painter, files
from .guidance import PLAIN, SPLIT, halves
from .stats import Interval, mean_interval

CFG = 5.0
PICTURES = 32  # in which words are looked for: sources of the table `edit` with one object
SIZE = 64
METHODS = {"pag1": ("PAG, 1", PerturbedAttention, 1.0), "pag3": ("PAG, 3", PerturbedAttention, 3.0),
           "seg3": ("SEG, 3", SmoothedEnergy, 3.0)}  # fmt: skip
WORDS = ("noun", "colour", "background")
UNNAMED = "none named"  # what is read then: the sum over all cross sites that are small, or over a transformer's


# ---------------------------------------------------------------- where words are

@dataclass(frozen=True, kw_only=True, eq=False)
class Reading(Guidance):
    """Sums up in ``maps``, by block and kind of word, where each picture of a batch looks at that word of its own."""

    prompts_of: EditPrompts
    said: dict[str, list[list[int]]]  # kind of word -> tokens, by row
    blocks: Sequence[str]
    maps: dict[tuple[str, str], dict] = field(default_factory=dict)

    title = "reading"

    def edits(self, step: Step) -> Edits:
        lengths = [self.prompts_of.length(row) for row in range(self.prompts_of.rows)]
        return [(WordMaps(blocks=block, columns=[(tokens[0], own) for own in tokens[1:]], lengths=lengths,
                          maps=self.maps.setdefault((block, word), {})), ("cond",))
                for block in self.blocks for word, tokens in self.said.items()]


def told_apart(score: np.ndarray, there: np.ndarray) -> float:
    """The chance that a pixel of ``there`` has a higher score than another pixel (the area under the ROC curve): 0.5 is
    chance, 1 perfect; nan where one of them is missing."""
    n, m = int(there.sum()), int((~there).sum())
    ranks = scipy.stats.rankdata(score)[there.flatten()]
    return float((ranks.sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def words_of(painter: Painter, blocks: Sequence[str], count: int = PICTURES) -> dict[tuple[str, str], Interval]:
    """By block and kind of word, how well its maps tell what it names from the rest of the picture."""
    sources = [source for source in edits.sources() if len(source.truth["objects"]) == 1][:count]
    _, prompts = encoded(painter.clip, [source.text for source in sources])
    phrases = [(one["shape"], one["color"], source.truth["background"]) for source in sources
               for one in source.truth["objects"]]
    said = {word: [prompts.positions(row, phrase[k]) for row, phrase in enumerate(phrases)]
            for k, word in enumerate(WORDS)}
    reading = Reading(prompts_of=prompts, said=said, blocks=blocks)
    made = painter.paint(prompts.texts, range(count), (), lambda anchor: (reading,))
    pictures = torch.from_numpy(made.images).movedim(3, 1).float() / 255
    out = {}
    for (block, word), maps in reading.maps.items():
        grid, both = max(maps.items(), key=lambda item: math.prod(item[0]))  # as Local Blend: the finest counts
        mine = torch.cat([both[0, :1], both[1]]).unflatten(-1, grid)  # the first row is the "source"
        mine = F.interpolate(mine, (SIZE, SIZE), mode="bilinear").flatten(1).numpy()
        scores = []
        for row, source in enumerate(sources):
            [there] = edits.objects(pictures[row], source.truth)
            scores.append(told_apart(mine[row], ~there if word == "background" else there))
        if known := [(score, row) for row, score in enumerate(scores) if score == score]:
            out[block, word] = mean_interval(*zip(*known), np.random.default_rng(0))
    return out


# ---------------------------------------------------------------- guidance away from a block

def pair(key: str, n: int, methods: Sequence[Guidance]) -> list[Cell]:
    """The two halves of the prompts of the table `guidance`."""
    return [Cell(category, SPLIT, key, "", CFG, count, cells.code_of(methods)) for category, count in halves(n)]


def todo_of(store: Store, key: str, n: int, methods: Sequence[Guidance], true: truth.Truth, reader: Any, tag: str
            ) -> cells.Todo:
    both = pair(key, n, methods)
    jobs = [job for cell in both for job in cells.jobs(cell, (lambda anchor: tuple(methods)) if methods else None)]
    return guidance.todo_of(store, both, jobs, both, true, reader, tag)


def attention_of(painter: Painter) -> dict[str, list[str]]:
    """Block of the model -> the kinds of its attention."""
    out: dict[str, list[str]] = {}
    for site in sites_of(painter.model.model.diffusion_model):
        if site.kind in ("self", "cross", "joint"):
            out.setdefault(site.name, []).append(site.kind)
    return out


COLUMNS = {
    "model": ("model", ""), "block": ("block", ""), "kinds": ("attention", ""),
    **{word: (f"{word} is found (AUC)", ".2f") for word in WORDS},
    **{f"{key} {what}": (f"{name}: {heading}", how) for key, (name, *_) in METHODS.items()
       for what, heading, how in (("right", "right, above CFG", "+.1f"), ("frechet", "Frechet distance", "+.1f"))},
}  # fmt: skip


def main(options: Options) -> Table:
    from rudder.demo import judge

    reader, n = judge.load(), options.n or (8 if options.quick else 64)
    pictures = 8 if options.quick else PICTURES
    tag = truth.tag()
    true = truth.Truth.of([p for cell in pair(PLAIN, n, ()) for p in cell.prompts], reader,
                          4 if options.quick else truth.EACH)
    if n < 4:
        raise SystemExit("bench blocks: --n must be at least 4, or no distance of distributions can be measured.")
    rows, plain, missing, older = [], {}, 0, []
    with cells.workplace(options) as work:
        for store in [cells.open_store(work, file, options, "blocks") for file in files(options.models)]:
            blocks = attention_of(store.painter)
            wired = {(PLAIN, ""): ()} | {
                (key, name): (make(strength=strength, blocks=name),) for key, (_, make, strength) in METHODS.items()
                for name, kinds in blocks.items() if kinds != ["cross"]}
            todo = {(key, name): todo_of(store, "-".join(filter(None, (key, name))), n, methods, true, reader, tag)
                    for (key, name), methods in wired.items()}
            ready = cells.done(list(todo.values()), options)
            found = {which: true.see_cells(store, one.what, reader, tag) for which, one in todo.items() if one in ready}
            missing, older = missing + len(todo) - len(found), older + store.older
            reading = [name for name, kinds in blocks.items() if kinds != ["self"]]
            where = words_of(store.painter, [*reading, ""], pictures)
            plain[store.painter.name] = found.get((PLAIN, ""))
            for name, kinds in blocks.items():
                row = {"model": store.painter.name, "block": name, "kinds": ", ".join(kinds)}
                row |= {word: where[name, word] for word in WORDS if (name, word) in where}
                for key in METHODS if (PLAIN, "") in found else ():
                    if mine := found.get((key, name)):
                        row |= {f"{key} right": seen.more_right(mine, found[PLAIN, ""]),
                                f"{key} frechet": seen.frechet(mine, found[PLAIN, ""])}
                rows.append(row)
            rows.append({"model": store.painter.name, "block": UNNAMED}
                        | {word: where["", word] for word in WORDS if ("", word) in where})
    notes = [
        f"A word is found: the chance that a pixel of what the word names (the object; for 'background' the rest) gets "
        f"more of its image token's attention than another pixel, mean over heads and the whole run; 0.5 is chance. "
        f"{pictures} sources of the table `edit`, 95 % bootstrap intervals.",
        f"PAG and SEG in this block alone at cfg {CFG:g}, {n} pictures a row, the prompts of the table `guidance`: "
        "points of accuracy and Frechet distance, both above CFG's own on the same pictures. Below 0 is nearer to the "
        "data.",
        *(f"{model}: CFG has {p.accuracy:.1f} % right and a Frechet distance of {p.frechet[0]:.1f}."
          for model, p in plain.items() if p),
    ]
    notes += [*older, *cells.unpainted(missing)]
    return Table("blocks", "Attention blocks: where words are, and what guidance away from a block does", COLUMNS, rows,
                 notes)

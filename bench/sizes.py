"""Pictures of another size than a model was trained on: how often they are right, with attention scaled and without.

The demo models know 64x64 pixels. The judge reads 64x64 too, so pictures are brought to that size for it: what is
asked is whether there is one object, of the right shape and attribute, wherever and however large it is.

    python3 dev.py bench sizes --threads 1                # again to go on
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from rudder.demo import world
from rudder.guidance.contract import Guidance
from rudder.guidance.entropy import AttentionEntropy

from . import Options, Table, cells
from .cells import Cell, Store
from .generate import files
from .stats import difference, share_interval

SIZES = (64, 48, 96, 128)  # pixels; the first is what the models know
CFG = 5.0
COLUMNS = {"model": ("model", ""), "size": ("pixels", "d"), "method": ("method", ""), "n": ("pictures", "d"),
           "right": ("right, %", ".1f"), "gain": ("above CFG", "+.1f"), "one": ("one object, %", ".1f"),
           "ones": ("above CFG", "+.1f"), "seconds": ("s a picture", ".2f")}  # fmt: skip


def rows_of(store: Store) -> list[tuple[int, str, tuple[Guidance, ...]]]:
    """(size, name, what is wired)."""
    trained = store.painter.latent_shape[1:]
    return [(size, name, made) for size in SIZES
            for name, made in (("CFG", ()), ("attention entropy", (AttentionEntropy(trained=trained),)))
            if size != SIZES[0] or not made]


def at(store: Store, size: int) -> Store:
    """The store, painting pictures of ``size`` pixels."""
    other = copy(store)
    other.painter = copy(store.painter)
    channels, side, _ = store.painter.latent_shape
    side = side * size // world.SIZE
    vars(other.painter)["latent_shape"] = channels, side, side
    return other


def shrunk(images: np.ndarray) -> torch.Tensor:
    """Pictures uint8 ``[N, H, W, 3]`` as the judge reads them, ``[N, 3, 64, 64]``."""
    pictures = torch.from_numpy(images).movedim(3, 1).float() / 255
    return F.interpolate(pictures, (world.SIZE, world.SIZE), mode="bicubic", antialias=True).clamp(0, 1)


def judged(images: np.ndarray, cell: Cell, judge: Callable, first: int = 0) -> dict[str, list[float]]:
    parts = judge(shrunk(images)).score([p.truth for p in cell.prompts[first:first + len(images)]])
    right = [float(all(parts[name][i] == 1 for name in ("count", "shape", "attribute"))) for i in range(len(images))]
    return {"right": right, "one": parts["count"].tolist()}


def todo_of(store: Store, size: int, name: str, made: tuple[Guidance, ...], n: int, judge: Callable, tag: str
            ) -> cells.Todo:
    key = f"{size}px {name}"
    cell = Cell("frequent", "dev", key, "", CFG, n, cells.code_of(made))
    jobs = cells.jobs(cell, (lambda anchor: made) if made else None)
    return cells.Todo(at(store, size), f"{cell.key} {n} {tag}", jobs,
                      lambda number, images: judged(images, cell, judge, number * cells.BATCH), cell)


def seen_of(todo: cells.Todo, judge: Callable) -> dict[str, Any]:
    def seen() -> dict[str, Any]:
        images, about = todo.store.read(todo.what)
        return judged(images, todo.what, judge) | {"seconds": float(np.median([batch["seconds"] for batch in about]))}

    return todo.store.row(todo.key, seen)


def main(options: Options) -> Table:
    from rudder.demo import judge

    reader, tag = judge.load(), cells.tag_of(shrunk, judged)
    n = options.n or (2 if options.quick else 48)
    rows, missing, older = [], 0, []
    with cells.workplace(options) as work:
        for store in [cells.open_store(work, file, options, "sizes") for file in files(options.models)]:
            todo = [((size, name), todo_of(store, size, name, made, n, reader, tag))
                    for size, name, made in rows_of(store)]
            ready = cells.done([one for _, one in todo], options)
            found = {which: (one.what, seen_of(one, reader)) for which, one in todo if one in ready}
            missing, older = missing + len(todo) - len(found), older + store.older
            for (size, name), (cell, seen) in found.items():
                texts = [p.text for p in cell.prompts]
                row = {"model": store.painter.name, "size": size, "method": name, "n": n, "seconds": seen["seconds"]}
                row |= {what: share_interval(seen[what], texts, np.random.default_rng(0)) * 100
                        for what in ("right", "one")}
                if name != "CFG" and (size, "CFG") in found:
                    plain = found[size, "CFG"][1]
                    row |= {column: difference(seen[what], plain[what], texts, np.random.default_rng(0)) * 100
                            for column, what in (("gain", "right"), ("ones", "one"))}
                rows.append(row)
    notes = [f"Frequent combinations of RareShapes, {n} pictures a row at cfg {CFG:g}, the same prompts in every row; "
             "pictures of one size start from the same noise. Right: one object, shape and attribute, read by the "
             "judge in the picture brought to 64x64 pixels. Intervals: 95 % bootstrap, clustered by prompt.", *older]
    notes += cells.unpainted(missing)
    return Table("sizes", "Pictures of another size than the model was trained on", COLUMNS, rows, notes)

"""The pictures of the table `edit`: what each method trades, and its median and worst edits."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from . import edits
from .rareplots import whisker

if TYPE_CHECKING:
    from .edit import Made


def trade(rows: list[dict]) -> Figure | None:
    """Success against what stays, over all kinds; a panel a model. Up and right is better."""
    whole = [row for row in rows if row["kind"] == "all" and "psnr" in row]
    models = list(dict.fromkeys(row["model"] for row in whole))
    if not models:
        return None
    figure = Figure(figsize=(max(5.5 * len(models), 8), 4.8), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False, sharex=True, sharey=True)[0]
    names = list(dict.fromkeys(row["method"] for row in whole))
    for axis, model in zip(axes, models):
        axis.set(title=model, xlabel="PSNR of what must stay, dB")
        axis.grid(alpha=0.3)
        for row in whole:
            if row["model"] == model:
                x, y = row["psnr"], row["success"]
                axis.errorbar(x.value, y.value, whisker(y), whisker(x), "o", capsize=2, label=row["method"],
                              color=colormaps["tab10"](names.index(row["method"]) % 10))
    axes[0].set_ylabel("success, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def case(made: list[Made], which: str) -> Made | None:
    """The edit with the median or the lowest PSNR."""
    order = sorted((one for one in made if one.psnr == one.psnr), key=lambda one: one.psnr)
    return order[len(order) // 2 if which == "median" else 0] if order else None


def cases(found: dict[str, list[Made]], which: str, pictures: Callable[[Made], np.ndarray | None]) -> Figure | None:
    """Rows are methods, columns kinds; each cell is a source and its edit. None when a picture is missing: the sheet of
    an earlier run is better than a part of one."""
    from .edit import ROWS

    cells = {key: [case([one for one in made if one.edit.kind == kind], which) for kind in edits.KINDS]
             for key, made in found.items()}
    shown = {id(one): pictures(one) for row in cells.values() for one in row if one}
    if not shown or any(picture is None for picture in shown.values()):
        return None
    figure = Figure(figsize=(2.6 * len(edits.KINDS), 2.1 * len(cells) + 0.4), layout="constrained")
    axes = figure.subplots(len(cells), len(edits.KINDS), squeeze=False)
    for (key, row), line in zip(cells.items(), axes):
        for kind, one, axis in zip(edits.KINDS, row, line):
            axis.set(xticks=[], yticks=[])
            if one is None:
                axis.axis("off")
                continue
            axis.imshow(np.concatenate(list(shown[id(one)]), axis=1), interpolation="nearest")
            axis.set_title("\n".join([kind, *textwrap.wrap(one.edit.text, 36)]), fontsize=7)
            axis.set_xlabel(f"{one.psnr:.1f} dB, {'right' if one.success else 'WRONG'}", fontsize=7)
        line[0].set_ylabel("\n".join(textwrap.wrap(ROWS[key].name, 22)), fontsize=8)
    return figure


def all_plots(sheets: dict[str, Figure | None], rows: list[dict]) -> dict[str, Callable | None]:
    """``Table.plots``."""
    figures = {"trade": trade(rows)} | sheets
    return {name: figure and partial(figure.savefig, dpi=110) for name, figure in figures.items()}

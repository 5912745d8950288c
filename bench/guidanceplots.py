"""The plots of the table `guidance`: accuracy against diversity and evaluations, what the weight does, and sheets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from . import seen
from .guidance import PLAIN, ROWS
from .rareplots import saved_sheets, whisker

if TYPE_CHECKING:
    from .guidance import Found

MARKERS = "osv^D<>Pp*hX"


def style(key: str) -> dict[str, Any]:
    """Of a row's line: black for CFG, the others go round the colours and, more slowly, the markers."""
    if key == PLAIN:
        return {"color": "black", "marker": "o", "linewidth": 2}
    i = list(ROWS).index(key) - 1
    return {"color": colormaps["tab10"](i % 10), "marker": MARKERS[1 + i // 2 % (len(MARKERS) - 1)], "linewidth": 1}


def panels(names: list[str], rows: int = 1) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(6 * len(names), 1.2 + 3.8 * rows), layout="constrained")
    axes = figure.subplots(rows, len(names), squeeze=False, sharey="row")
    for axis, name in zip(axes[0], names):
        axis.set_title(name)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    return figure, axes


def legend(figure: Figure, axis: Any) -> Figure:
    handles, labels = axis.get_legend_handles_labels()
    columns = int(figure.get_figwidth() / 1.9)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure


def lines(found: Found, model: str) -> dict[str, dict[float, seen.Seen]]:
    """Key of a row -> cfg -> what was seen, in rising order."""
    out: dict[str, dict[float, seen.Seen]] = {}
    for (key, cfg), s in sorted(found.of(model).items(), key=lambda item: item[0][1]):
        out.setdefault(key, {})[cfg] = s
    return {key: out[key] for key in ROWS if key in out}


def by_diversity(found: Found) -> Figure:
    """A line a method through its weights; the highest is named. Up and to the right is better."""
    figure, [axes] = panels(found.models)
    for axis, model in zip(axes, found.models):
        for key, mine in lines(found, model).items():
            right, spread = [seen.accuracy(s) for s in mine.values()], [seen.diversity(s) for s in mine.values()]
            x, y = [p.value for p in spread], [p.value for p in right]
            errors = {"xerr": np.hstack([whisker(p) for p in spread]), "yerr": np.hstack([whisker(p) for p in right])}
            axis.errorbar(x, y, **errors, fmt="none", ecolor=style(key)["color"], alpha=0.15)
            axis.plot(x, y, markersize=4, label=ROWS[key].name, **style(key))
            axis.annotate(f"{list(mine)[-1]:g}", (x[-1], y[-1]), fontsize=6)
        for name, s in found.floors.items():
            axis.plot(s.variety, s.accuracy, marker="+" if "auto" in name else "x", markersize=10, color="0.4",
                      linestyle="none", label=name)
        axis.set_xlabel("diversity; the number is the highest cfg")
    axes[0].set_ylabel("right, %")
    return legend(figure, axes[0])


def by_evaluations(found: Found) -> Figure:
    """Every method at each weight, small, and where it is most often right, large and with its interval. Methods of one
    cost are set beside one another."""
    figure, [axes] = panels(found.models)
    for axis, model in zip(axes, found.models):
        of = lines(found, model)
        gap = 0.007 * max(s.evaluations for mine in of.values() for s in mine.values())
        for k, (key, mine) in enumerate(of.items()):
            aside = (k - (len(of) - 1) / 2) * gap
            best = max(mine.values(), key=lambda s: s.accuracy)
            axis.plot([s.evaluations + aside for s in mine.values()], [s.accuracy for s in mine.values()],
                      **style(key) | {"linewidth": 0.5}, markersize=2, alpha=0.5)
            p = seen.accuracy(best)
            axis.errorbar(best.evaluations + aside, p.value, whisker(p), capsize=2, markersize=6, label=ROWS[key].name,
                          **style(key))
        axis.set_xlabel("evaluations a picture")
    axes[0].set_ylabel("right, %")
    return legend(figure, axes[0])


def by_weight(found: Found) -> Figure:
    """What the weight does: accuracy, saturation, Frechet distance; dashed: true renders."""
    rows: dict[str, Callable] = {"right, %": seen.accuracy, "saturation": seen.saturation,
                                 "Frechet distance": seen.frechet}
    figure, axes = panels(found.models, len(rows))
    for column, model in zip(axes.T, found.models):
        for axis, interval in zip(column, rows.values()):
            for key, mine in lines(found, model).items():
                points = [interval(s) for s in mine.values()]
                axis.plot(list(mine), [p.value for p in points], markersize=4, label=ROWS[key].name, **style(key))
                if key == PLAIN:
                    axis.fill_between(list(mine), [p.low for p in points], [p.high for p in points], color="0.6",
                                      alpha=0.3, linewidth=0)
            for s in found.floors.values():
                axis.axhline(interval(s).value, color="0.4", linestyle="--", linewidth=1)
        column[-1].set_xlabel("cfg")
    for axis, name in zip(axes[:, 0], rows):
        axis.set_ylabel(name)
    return legend(figure, axes[0, 0])


def saver(figures: dict[str, Figure]) -> dict[str, Callable]:
    """Name -> what saves the picture under a path."""
    return {name: partial(figure.savefig, dpi=110) for name, figure in figures.items()}


def all_plots(found: Found, sheets: dict[str, dict]) -> dict[str, Callable | None]:
    """``Table.plots``."""
    figures = {}
    if found.seen:
        figures = {"evaluations": by_evaluations(found), "weight": by_weight(found)}
    return saver(figures) | saved_sheets(sheets)


def world_plots(found: dict, world: str) -> dict[str, Callable]:
    """Distance to the truth by weight, and samples inside a right mode against modes kept."""
    kinds = list(dict.fromkeys(kind for kind, _, _ in found if kind))
    if not kinds:
        return {}
    figure, axes = panels([f"{world}, {kind}" for kind in kinds], 2)
    for column, kind in zip(axes.T, kinds):
        for key in ROWS:
            mine = {cfg: m for (k, name, cfg), m in sorted(found.items()) if (k, name) == (kind, key)}
            if mine:
                inside, off, w2 = ([float(np.mean(m.measures[name])) for m in mine.values()]
                                   for name in ("inside", "coverage", "w2"))
                column[0].plot(list(mine), w2, markersize=4, label=ROWS[key].name, **style(key))
                column[1].plot([1 - x for x in off], inside, markersize=4, **style(key))
        floor = next(m for (k, _, _), m in found.items() if not k)
        column[0].axhline(float(np.mean(floor.measures["w2"])), color="0.4", linestyle="--", linewidth=1)
        column[0].set(xlabel="cfg", yscale="log")  # a negative of the wrong text goes far
        column[1].set_xlabel("1 - modes off by (TV)")
    axes[0, 0].set_ylabel("W2 to the truth")
    axes[1, 0].set_ylabel("inside a right mode")
    return saver({"exact": legend(figure, axes[0, 0])})

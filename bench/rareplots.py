"""The pictures of the rare table: accuracy by gamma, by category and by anchor, and contact sheets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from . import rareshapes

if TYPE_CHECKING:
    from .rare import Found
    from .stats import Interval

COLOR = {"cfg": "#8a8a8a", "blend": "#e0a030", "r2f": "#3a78c8", "aapb": "#c83a50", "aapb-unclamped": "#7a4ab0"}
LABEL = {"cfg": "CFG", "blend": "best fixed blend", "r2f": "R2F", "aapb": "AAPB", "aapb-unclamped": "AAPB, unclamped"}


def whisker(found: Interval) -> list[list[float]]:
    """Distances down and up, as matplotlib wants errors."""
    return [[found.value - found.low], [found.high - found.value]]


def panels(models: Sequence[str], width: float, height: float) -> tuple[Figure, list]:
    figure = Figure(figsize=(width * len(models), height), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axis, model in zip(axes, models):
        axis.set_title(model)
        axis.set_ylim(0, 100)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("right, %")
    return figure, list(axes)


def by_gamma(found: Found, models: Sequence[str]) -> Figure | None:
    """Property: a line of constant gammas for each anchor, and what needs no gamma as bands."""
    from .rare import GAMMAS, points

    def at(model: str, method: str, anchor: str = "superclass") -> Interval | None:
        scores = found.get(model, "property", method, anchor)
        return points(scores.right, scores.prompts) if scores else None

    figure, axes = panels(models, 5, 4)
    drawn = False
    for axis, model in zip(axes, models):
        for anchor, style in (("superclass", "o-"), ("noun", "s--")):
            line = {g: p for g in GAMMAS if (p := at(model, f"blend-{g}", anchor))}
            drawn |= bool(line)
            for g, p in line.items():
                axis.errorbar(g, p.value, whisker(p), color=COLOR["blend"], capsize=2)
            axis.plot(list(line), [p.value for p in line.values()], style, color=COLOR["blend"],
                      label=f"fixed blend, {anchor}" if line else None)
        for method in ("cfg", "r2f", "aapb", "aapb-unclamped"):
            if p := at(model, method):
                axis.axhline(p.value, color=COLOR[method], label=LABEL[method])
                axis.axhspan(p.low, p.high, color=COLOR[method], alpha=0.12, linewidth=0)
        axis.set_xlabel("gamma: share of the anchor")
        axis.legend(fontsize=8)
    return figure if drawn else None


def bars(axis, groups: Sequence[str], series: dict[str, dict[str, Interval]]) -> None:
    """One group of bars for each name in ``groups``, one bar for each key of ``series``, with intervals."""
    width = 0.8 / max(len(series), 1)
    for k, (key, values) in enumerate(series.items()):
        for i, group in enumerate(groups):
            if group in values:
                p = values[group]
                axis.bar(i + (k - (len(series) - 1) / 2) * width, p.value, width, yerr=whisker(p), capsize=2,
                         color=COLOR[key])
        axis.bar(0, 0, color=COLOR[key], label=LABEL[key])
    axis.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axis.legend(fontsize=8)


def by_category(found: Found, models: Sequence[str]) -> Figure:
    from .rare import points

    figure, axes = panels(models, 7, 4)
    for axis, model in zip(axes, models):
        series: dict[str, dict[str, Interval]] = {key: {} for key in LABEL}
        for key, category in ((k, c) for k in LABEL for c in rareshapes.CATEGORIES):
            if scores := found.other(model, category, key, "superclass"):
                series[key][category] = points(scores.right, scores.prompts)
        shown = [c for c in rareshapes.CATEGORIES if any(c in values for values in series.values())]
        bars(axis, shown, {key: values for key, values in series.items() if values})
    return figure


def by_anchor(found: Found, models: Sequence[str]) -> Figure:
    from .rare import points

    figure, axes = panels(models, 7, 4)
    for axis, model in zip(axes, models):
        series: dict[str, dict[str, Interval]] = {}
        for category in ("property", "never"):
            for key, anchor in ((k, a) for k in ("r2f", "aapb", "aapb-unclamped") for a in rareshapes.STRATEGIES):
                if scores := found.get(model, category, key, anchor):
                    name = f"{category}\n{anchor}"
                    series.setdefault(key, {})[name] = points(scores.right, scores.prompts)
        shown = [f"{c}\n{a}" for c in ("property", "never") for a in rareshapes.STRATEGIES]
        shown = [name for name in shown if any(name in values for values in series.values())]
        bars(axis, shown, series)
        for category, style in (("property", "-"), ("never", ":")):
            if scores := found.get(model, category, "cfg"):
                axis.axhline(points(scores.right, scores.prompts).value, color=COLOR["cfg"], linestyle=style,
                             label=f"CFG, {category}")
        axis.legend(fontsize=8)
    return figure


def contact_sheet(shown: dict) -> Figure:
    """Rows are methods, columns prompts, all of the same seeds. ``shown``: see ``cells.sheet``."""
    prompts = shown["prompts"]
    rows = {name: images for name, images in shown.items() if name != "prompts"}
    side = next(iter(rows.values())).shape[1]
    mosaic = np.concatenate([np.concatenate(list(images), axis=1) for images in rows.values()])
    figure = Figure(figsize=(1.5 + len(prompts), 1.3 + len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.imshow(mosaic, interpolation="nearest")
    axis.set_yticks([side * (i + 0.5) for i in range(len(rows))], list(rows))
    axis.set_xticks([side * (i + 0.5) for i in range(len(prompts))], prompts, rotation=30, ha="left", fontsize=8)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return figure


def saved_sheets(sheets: dict[str, dict]) -> dict[str, Callable | None]:
    """``Table.plots`` of contact sheets, by the model; None where there is none to draw."""
    return {f"sheet-{model}": partial(contact_sheet(shown).savefig, dpi=110) if shown else None
            for model, shown in sheets.items()}


def all_plots(found: Found, models: Sequence[str], sheets: dict[str, dict]) -> dict[str, Callable | None]:
    """``Table.plots``."""
    figures = {"gamma": by_gamma(found, models), "categories": by_category(found, models),
               "anchors": by_anchor(found, models)}
    drawn = {name: partial(figure.savefig, dpi=110) for name, figure in figures.items() if figure}
    return drawn | saved_sheets(sheets)

"""The plots of the table `exact`: what the samples look like, and every distance against the weight."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from torch import Tensor

from .distances import assigned
from .worlds import World

Shown = dict[tuple[str, str, float], Tensor]  # (model, method, cfg) -> samples

STYLES = {  # colour and marker of a method
    "CFG": ("black", "o"), "Guidance Interval": ("0.55", "s"),
    "Prompt Blend 0.3": ("#9ecae1", "v"), "Prompt Blend 0.5": ("#4292c6", "v"), "Prompt Blend 0.7": ("#08519c", "v"),
    "R2F until 0.4": ("#a1d99b", "D"), "R2F until 0.8": ("#238b45", "D"),
    "AAPB": ("#d7301f", "^"), "AAPB, no clamp": ("#fc8d59", "^"),
}  # fmt: skip
MODELS = {"eps": "eps (SD's schedule)", "flow": "flow (SD3's schedule)"}
PICTURED = ("CFG", "Guidance Interval", "Prompt Blend 0.5", "R2F until 0.8", "AAPB", "AAPB, no clamp")
RIGHT, WRONG = "#2171b5", "#cb181d"
LIMITS = {"spread": (0, 2), "coverage": (-0.03, 1.03), "right": (-0.03, 1.03), "inside": (-0.03, 1.03)}
TILES = 6  # pictures along a side of a sheet
DARK, LIGHT = -2.5, 3.5  # of a picture
MARGIN = 0.8  # of a plane around its modes


def distances(world: World, rows: list[dict[str, Any]], measures: dict[str, tuple[str, str]]) -> Figure:
    """A row of axes a model, a column a measure; a line a method, its band the interval, dashed the floor."""
    shown = [key for key in measures if key != "sliced" or len(world.modes.means[0]) > 2]  # in the plane W2 says it all
    figure = Figure(figsize=(3.1 * len(shown), 6.4), layout="constrained")
    axes = figure.subplots(len(MODELS), len(shown), sharex=True, sharey="col", squeeze=False)
    floor = next(row for row in rows if not row["model"])
    for line, (model, title) in zip(axes, MODELS.items()):
        for ax, key in zip(line, shown):
            ax.axhline(floor[key].value, color="0.4", linestyle="--", linewidth=1, label="true samples")
            for method, (color, marker) in STYLES.items():
                mine = [r for r in rows if r["model"] == model and r["method"] == method and key in r]
                weights, low, high = ([r["cfg"] for r in mine], [r[key].low for r in mine], [r[key].high for r in mine])
                ax.plot(weights, [r[key].value for r in mine], color=color, marker=marker, markersize=4, label=method)
                ax.fill_between(weights, low, high, color=color, alpha=0.2, linewidth=0)
            ax.grid(alpha=0.25)
        line[0].set_ylabel(title)
    for ax, key in zip(axes[0], shown):
        ax.set_title(measures[key][0])
        ax.set_ylim(LIMITS.get(key, (0, None)))  # shared by the column
    for ax in axes[-1]:
        ax.set_xlabel("cfg")
        ax.set_xticks(sorted({row["cfg"] for row in rows if "cfg" in row}), labels=None)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.tick_params("x", labelsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(f"World '{world.name}': samples of '{world.target}' against the truth")
    return figure


def samples(world: World, shown: Shown, weight: float) -> Figure:
    """The world and the truth on the left; then plain conditional sampling and some methods, a row a model."""
    panels = [("CFG", 1.0), *((method, weight) for method in PICTURED)]
    figure = Figure(figsize=(2.3 * (len(panels) + 1), 5.6), layout="constrained")
    axes = figure.subplots(len(MODELS), len(panels) + 1, sharex=True, sharey=True)
    draw, everything = (cloud, overview) if world.shape[1:] == (1, 1) else (sheet, templates)
    everything(axes[0, 0], world)
    axes[0, 0].set_title("the world", fontsize=9)
    draw(axes[1, 0], world, next(s for (model, _, _), s in shown.items() if not model))
    axes[1, 0].set_title(f"the truth of '{world.target}'", fontsize=9)
    for line, model in zip(axes, MODELS):
        for ax, (method, cfg) in zip(line[1:], panels):
            draw(ax, world, shown[model, method, cfg])
            ax.set_title(f"{method}, cfg {cfg:g}\n{model}", fontsize=9)
    if draw is cloud:
        low, high = world.modes.means.min(0).values, world.modes.means.max(0).values
        (x, y), half = ((low + high) / 2).tolist(), float((high - low).max()) / 2 + MARGIN
        axes[0, 0].set(xlim=(x - half, x + half), ylim=(y - half, y + half))
    for ax in axes.flat:
        ax.set_aspect("equal")
        ax.set_xticks([])
        ax.set_yticks([])
    figure.suptitle(f"World '{world.name}': blue is '{world.target}' by its likeliest mode, red is something else")
    return figure


def overview(ax: Axes, world: World) -> None:
    """Draws of the overall mixture, and the names of the concepts."""
    points = world.modes.sample(world.prompts[""], 500, torch.Generator().manual_seed(0)).numpy()
    ax.scatter(*points.T, s=2, color="0.7")
    ellipses(ax, world)
    gap = 0.1 + 2 * float((world.modes.floor + world.modes.variances.sum(1)).max().sqrt())
    for concept in dict.fromkeys(world.concepts):
        mine = world.modes.means[torch.tensor([c == concept for c in world.concepts])]
        above = bool(mine[:, 1].mean() > 0)
        y = float(mine[:, 1].max()) + gap if above else float(mine[:, 1].min()) - gap
        name = concept.replace(" ", "\n")
        ax.text(float(mine[:, 0].mean()), y, name, ha="center", va="bottom" if above else "top", fontsize=7)


def ellipses(ax: Axes, world: World) -> None:
    """The right modes at two standard deviations."""
    for k in torch.nonzero(world.right).flatten().tolist():
        values, vectors = torch.linalg.eigh(world.modes.covariances()[k])
        angle = float(torch.rad2deg(torch.atan2(vectors[1, 1], vectors[0, 1])))
        width, height = (4 * values.flip(0).sqrt()).tolist()
        centre = world.modes.means[k].tolist()
        ax.add_patch(Ellipse(centre, width, height, angle=angle, fill=False, color=RIGHT, linewidth=0.8))


def cloud(ax: Axes, world: World, points: Tensor) -> None:
    """Points in the plane over the world's own."""
    behind = world.modes.sample(world.prompts[""], 500, torch.Generator().manual_seed(0)).numpy()
    ax.scatter(*behind.T, s=1, color="0.88")
    right = world.right[assigned(world, points)[0]].numpy()
    flat = points.flatten(1).numpy()
    ax.scatter(*flat.T, s=3, c=np.where(right, RIGHT, WRONG))
    ellipses(ax, world)


def sheet(ax: Axes, world: World, pictures: Tensor) -> None:
    """The first pictures, framed by whether they are right."""
    few = pictures[: TILES**2]
    _tiled(ax, few, np.where(world.right[assigned(world, few)[0]].numpy(), RIGHT, WRONG), TILES, TILES)


def templates(ax: Axes, world: World) -> None:
    """The means of all modes, a row a concept."""
    concepts = list(dict.fromkeys(world.concepts))
    means, rows = world.modes.means.reshape(-1, *world.shape), len(concepts)
    poses = len(means) // rows
    _tiled(ax, means, np.where(world.right.numpy(), RIGHT, "white"), rows, poses)
    for i, concept in enumerate(concepts):
        ax.text((poses + 0.2) / rows, 1 - (i + 0.5) / rows, concept, va="center", fontsize=7)


def _tiled(ax: Axes, pictures: Tensor, colors: np.ndarray, rows: int, columns: int) -> None:
    """Pictures ``[N, 1, H, W]`` as a sheet of ``rows`` that fills the height of a unit square, each in a frame of its
    colour. One image: a hundred axes images take matplotlib half a minute."""
    _, _, height, width = pictures.shape
    canvas = np.ones((rows * (height + 2), columns * (width + 2), 3))
    tiles = ((pictures[:, 0].numpy() - DARK) / (LIGHT - DARK)).clip(0, 1)
    for i, (tile, color) in enumerate(zip(tiles, colors)):
        top, left = (i // columns) * (height + 2), (i % columns) * (width + 2)
        canvas[top : top + height + 2, left : left + width + 2] = to_rgb(color)
        canvas[top + 1 : top + 1 + height, left + 1 : left + 1 + width] = tile[..., None]
    ax.imshow(canvas, extent=(0, columns / rows, 0, 1), interpolation="nearest")
    ax.set(xlim=(0, 1), ylim=(0, 1))

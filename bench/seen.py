"""What the judge sees in the pictures of one method at one weight, and what follows from several of them.

Everything here is numbers: differences on the same pictures with their intervals, fronts, and whether an expectation is
confirmed. No host and no method is in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import measures
from .stats import Interval, difference, jackknife, mean_interval, of_means, share_interval

GROUPS = 8  # of prompts, for the intervals of Frechet distances
MARGIN = 3.0  # points of accuracy: "equal accuracy" is not more than this below, with its interval
HIGH = (7.5, 10.0, 15.0)  # what "high cfg" means


def generator() -> np.random.Generator:
    """Of every interval, so that a table can be made again."""
    return np.random.default_rng(0)


@dataclass(frozen=True)
class Seen:
    """N pictures. Those of all methods and weights have the same prompts and seeds in the same order.

    Attributes:
        prompts: N texts; right: ``[N]`` 0 or 1; saturation: ``[N]``.
        diversity: ``[P]`` of each distinct prompt, in the order of their first pictures; nan where it has one picture.
        frechet: ``[1 + GROUPS]``, the distance to true renders of all pictures, and without each group of prompts.
        evaluations, seconds: for each picture; ``each``: evaluations picture by picture, or empty.
    """

    prompts: Sequence[str]
    right: np.ndarray
    saturation: np.ndarray
    diversity: np.ndarray
    frechet: np.ndarray
    evaluations: float = float("nan")
    seconds: float = float("nan")
    each: Sequence[float] | np.ndarray = ()

    @property
    def accuracy(self) -> float:
        """In percent."""
        return 100 * float(self.right.mean())

    @property
    def variety(self) -> float:
        """Mean diversity; nan when no prompt has two pictures."""
        return float(np.nanmean(self.diversity)) if not np.isnan(self.diversity).all() else float("nan")


def diversities(features: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """``Seen.diversity`` from the judge's features ``[N, F]``."""
    texts, every = np.asarray(prompts), torch.from_numpy(features)
    groups = [np.flatnonzero(texts == text) for text in dict.fromkeys(prompts)]
    return np.array([measures.diversity(every[g]) if len(g) > 1 else np.nan for g in groups])


def frechets(features: np.ndarray, prompts: Sequence[str], true: np.ndarray, true_prompts: Sequence[str]) -> np.ndarray:
    """The Frechet distance of two sets of features, and without each of GROUPS groups of prompts: ``[1 + GROUPS]``.

    A group leaves both sets, so that they still hold the same prompts equally often.
    """
    of = {text: k % GROUPS for k, text in enumerate(sorted(set(prompts)))}
    mine, theirs = (np.array([of[text] for text in texts]) for texts in (prompts, true_prompts))
    sets = [(features, true)]
    sets += [(features[mine != k], true[theirs != k]) for k in range(min(GROUPS, len(of)))]
    return np.array([measures.frechet(torch.from_numpy(a), torch.from_numpy(b)) for a, b in sets])


# ---------------------------------------------------------------- one, and one against another

def accuracy(seen: Seen) -> Interval:
    return share_interval(seen.right, seen.prompts, generator()) * 100


def saturation(seen: Seen) -> Interval:
    return mean_interval(seen.saturation, seen.prompts, generator())


def diversity(seen: Seen) -> Interval | None:
    """None when no prompt has two pictures."""
    values = seen.diversity
    return None if np.isnan(values).all() else mean_interval(values, range(len(values)), generator())


def frechet(seen: Seen, other: Seen | None = None) -> Interval:
    """The distance to true renders, or how far it lies above another's."""
    values = seen.frechet - other.frechet if other else seen.frechet
    return jackknife(float(values[0]), values[1:])


def more_right(a: Seen, b: Seen) -> Interval:
    """How much more often a is right, in points."""
    return difference(a.right, b.right, a.prompts, generator()) * 100


def more_diverse(a: Seen, b: Seen) -> Interval | None:
    gap = a.diversity - b.diversity
    return None if np.isnan(gap).all() else mean_interval(gap, range(len(gap)), generator())


def nearer(a: Seen, b: Seen, true: Mapping[str, float]) -> Interval:
    """How much nearer a's mean saturation lies to that of true renders of its prompts than b's does."""
    target = np.array([true[text] for text in a.prompts])
    off = np.stack([a.saturation - target, b.saturation - target], 1)
    return of_means(off, a.prompts, generator(), lambda m: np.abs(m[..., 1]) - np.abs(m[..., 0]))


def saved(a: Seen, b: Seen) -> Interval:
    """The share of b's evaluations that a leaves out, in percent."""
    each = np.asarray(a.each) if len(a.each) else np.full(len(a.right), a.evaluations)
    return mean_interval(100 * (1 - each / b.evaluations), a.prompts, generator())


# ---------------------------------------------------------------- verdicts and fronts

def verdict(effect: Interval, least: float, against: Interval) -> str:
    """Whether an effect is at least ``least`` (above it, if that is 0) at equal accuracy; ``against`` is the difference
    in accuracy, in points."""
    if (effect.low > 0 if least == 0 else effect.low >= least) and against.low >= -MARGIN:
        return "confirmed"
    if (effect.high <= 0 if least == 0 else effect.high < least) or against.high < -MARGIN:
        return "REFUTED"
    return "undecided"


Name = tuple[str, float]  # method, cfg
Better = Callable[[Name, Name], bool]  # whether the first beats the second beyond doubt


def front(points: Mapping[Name, tuple[float, float]]) -> list[Name]:
    """Which points no other is above in both coordinates (or above in one and equal in the other)."""
    def beaten(p: tuple[float, float]) -> bool:
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points.values())

    return [name for name, p in points.items() if not beaten(p)]


def standings(points: Mapping[Name, tuple[float, float]], better: Better) -> dict[str, str]:
    """Every method -> where it stands: its weights on the front, 'near' when one of its points is not surely beaten by
    a point of the front, else 'behind'."""
    best = front(points)
    out: dict[str, str] = {}
    for method in dict.fromkeys(m for m, _ in points):
        mine = [name for name in points if name[0] == method]
        at = [f"{cfg:g}" for m, cfg in best if m == method]
        if at:
            out[method] = ", ".join(at)
        else:
            out[method] = "behind" if all(any(better(b, name) for b in best) for name in mine) else "near"
    return out


def told(where: dict[str, str]) -> str:
    """The standings as sentences."""
    on = [f"{method} (cfg {at})" for method, at in where.items() if at not in ("near", "behind")]
    near, behind = ([m for m, at in where.items() if at == kind] for kind in ("near", "behind"))
    said = f"on the front: {'; '.join(on)}."
    said += f" Not told apart from it: {', '.join(near)}." if near else ""
    return said + (f" Surely behind it: {', '.join(behind)}." if behind else "")

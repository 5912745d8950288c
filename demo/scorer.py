"""The judge as a scorer for dynamic CFG: how probable it finds what a caption says, on the decoded prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import words
from .judge import OBJECT, Judge, Reading, classes_of
from .world import RELATIONS


def log_probability(reading: Reading, i: int, truth: dict) -> Tensor:
    """Of all that a truth (of ``words.parse``) says of picture i, a number. Of two objects the relation tells which is
    looked for where; without one they are taken as they fit best."""
    seen, said = reading.probabilities, truth["objects"]

    def log_of(name: str, at: tuple[int, ...], classes: range | list[int]) -> Tensor:
        return seen[name][at][list(classes)].sum().clamp_min(1e-9).log() if classes else torch.zeros(())

    scene, orders = log_of("count", (i,), [len(said) - 1]), [(0,)] if len(said) == 1 else [(0, 1), (1, 0)]
    if "background" in truth:
        scene = scene + log_of("background", (i,), classes_of("background", truth["background"]))
    if "relation" in truth:
        axis, turned = divmod(RELATIONS.index(truth["relation"]), 2)
        scene, orders = scene + log_of("axis", (i,), [axis]), [orders[turned]]
    objects = [
        sum(log_of(name, (i, slot), classes_of(name, o[name])) for o, slot in zip(said, order)
            for name in OBJECT if name in o)
        for order in orders
    ]  # fmt: skip
    return scene + torch.stack([torch.as_tensor(total) for total in objects]).max()


@dataclass(frozen=True, eq=False)
class JudgeScorer:
    """Log probability of ``captions``, one for each picture of the batch or one for all.

    ``decode``: x0 in model space -> pictures [B, 64, 64, 3] in 0..1, as ``host.score`` makes them.
    """

    judge: Judge
    decode: Callable[[Tensor], Tensor]
    captions: tuple[str, ...]

    @cached_property
    def truths(self) -> list[dict]:
        return [words.parse(caption) for caption in self.captions]

    def __call__(self, x0: Tensor, step: object) -> Tensor:
        reading, truths = self.judge(self.decode(x0)), self.truths
        return torch.stack([log_probability(reading, i, truths[i % len(truths)]) for i in range(len(reading))])

"""The judge as a scorer for dynamic CFG: how probable it finds what a caption says, on the decoded prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rudder.demo import words

from .judge import OBJECT, Judge, _wanted


@dataclass(frozen=True, eq=False)
class JudgeScorer:
    """Log probability of ``captions``, one for each picture of the batch, each of a single object.

    ``decode``: x0 in model space -> pictures [B, 64, 64, 3] in 0..1, as ``host.score`` makes them.
    """

    judge: Judge
    decode: Callable[[Tensor], Tensor]
    captions: tuple[str, ...]

    def __call__(self, x0: Tensor, step: object) -> Tensor:
        seen = self.judge(self.decode(x0)).probabilities
        out = []
        for i, caption in enumerate(self.captions):
            (said,) = words.parse(caption)["objects"]
            wanted = {name: list(_wanted(name, said[name])) for name in OBJECT if name in said}
            shares = [seen[name][i, 0, classes].sum() for name, classes in wanted.items() if classes]
            out.append(torch.stack(shares).clamp_min(1e-9).log().sum())
        return torch.stack(out)

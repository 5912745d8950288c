"""RIVAL: variations of a picture that stay in its look.

Zhang et al., NeurIPS 2023, arXiv 2305.18729, and the official code. While t > t_align the generated row of the batch
attends to the keys and values of the source row alone, afterwards to [source; own], at every self-attention. While
t > t_early the guided eps is given the source's statistics, per channel:

    eps <- std(eps_source) (eps - mean(eps)) / std(eps) + mean(eps_source)          (variances with + 1e-5)

t_align = t_early = 600 of 1000, so both end at 0.4 of the run. The paper's source row is an inverted picture without
guidance, and the generated row starts from its shuffled noise; here row 0 is generated from its own prompt, guided as
the others, and every row starts from the noise that the latent gives it (derived). On flow models eps is the velocity
(derived). No further evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.mutual import Mutual
from .contract import Edits, Guidance, Step
from .editing import check_share, require_source
from .space import expand, residual

VARIANCE = 1e-5


def statistics(a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel of ``[B, C, ...]``, ``[B, C, 1, ...]``."""
    dims = tuple(range(2, a.ndim))
    return a.mean(dims, keepdim=True), (a.var(dims, unbiased=False, keepdim=True) + VARIANCE).sqrt()


def adain(eps: Tensor, source: Tensor) -> Tensor:
    """``eps`` ``[B, C, ...]`` with the mean and spread of ``source`` ``[1 or B, C, ...]`` in each channel."""
    (mean, std), (new_mean, new_std) = statistics(eps), statistics(source)
    return (eps - mean) / std * new_std + new_mean


@dataclass(frozen=True, kw_only=True)
class RIVAL(Guidance):
    """Align attention and statistics with the source row.

    Args:
        align_until: percent of the timesteps until which the source alone is attended to; 0: always with the own.
        early_until: percent of the timesteps until which statistics are the source's; 0 is never.
        blocks: at which sites, "" for all.
    """

    align_until: float = 0.4
    early_until: float = 0.4
    blocks: str = ""

    title = "Variations of a Picture (RIVAL)"
    claims = frozenset({"keys and values of the edited pictures"})
    rank = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.title, align_percent=self.align_until, early_percent=self.early_until)

    def edits(self, step: Step) -> Edits:
        require_source(self.title, step)
        return [(Mutual(blocks=self.blocks, union=not step.before(self.align_until)), ())]

    def finish(self, step: Step, x0: Tensor) -> Tensor:
        if not step.before(self.early_until):
            return x0
        sigma = expand(step.sigma, x0)
        eps = residual(step.x, x0) / sigma
        return torch.cat([x0[:1], (step.x - sigma * adain(eps, eps[:1]))[1:]])

"""RIVAL in the real host: the statistics of a run, its node. What the reference row methods share is in test_mutual.py.
"""

from __future__ import annotations

import torch

from rudder.guidance.contract import Guidance
from rudder.guidance.rival import RIVAL, statistics
from rudder.guidance.space import expand, residual
from rudder.host import add_guidance, plan_of
from rudder.nodes.reference import RudderRIVAL

from .models import CHANNELS, sample
from .registry import NEGATIVE
from .test_mutual import edit, rows
from .test_nodes import call


class Watch(Guidance):
    """Writes down the spread of each row's eps after every method."""

    rank = 100
    seen: list = []  # noqa: RUF012 (cleared by the test)

    def finish(self, step, x0):
        self.seen.append(statistics(residual(step.x, x0) / expand(step.sigma, x0))[1].flatten(1))
        return x0


def test_statistics_are_the_sources_while_early(model, kind):
    Watch.seen.clear()
    edit(model, kind, RIVAL(early_until=0.5, align_until=0.0), Watch(), seeds=(1, 3, 4), steps=6)
    apart = [float((spread[1:] / spread[:1] - 1).abs().max()) for spread in Watch.seen]
    assert max(apart[:3]) < min(apart[3:]), apart  # the tiny models say little, so 1e-5 in the variance counts


def test_rows_may_start_from_noise_of_their_own(model, kind):
    image = torch.zeros(3, CHANNELS[kind], 8, 8)
    plain, out = (sample(m, kind, rows(1, 1, 1), NEGATIVE, image=image) for m in (model, add_guidance(model, RIVAL())))
    assert torch.equal(out[0], plain[0]) and not torch.equal(out[1], out[2])


def test_the_node(model):
    (patched,) = call(RudderRIVAL, model=model, align_percent=0.2)
    assert plan_of(patched.model_options) == (RIVAL(align_until=0.2),)

"""Where the words of a prompt are, from cross-attention: the automatic masks of MasaCtrl (arXiv 2304.08465).

    M = (A - min A) / (max A - min A) >= 0.1,   A: the mean of the maps of the words' tokens over heads and blocks

The paper reads the blocks of 16 x 16 tokens of SD1.5 and the maps of the same step; here they are those of the steps
before, so that masks do not depend on how the host splits the batch. The first step has none. Only the step's own
evaluations of whole pictures are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .contract import TINY, AttentionEdit, Call, scores
from .foreground import Masks
from .mutual import EDITED, SOURCE
from .sites import Site

THRESHOLD = 0.1
#: The blocks that are read, as shares of the depth: those on a quarter of the latent's sides in SD1.5 and SDXL.
QUARTER = (0.25, 0.6)


@dataclass(frozen=True, kw_only=True, eq=False)
class WordMasks(AttentionEdit):
    """Reads where the words of the source and of the edits are, and changes nothing. ``tokens``: those of the words in
    each row's prompt, the source's first."""

    tokens: Sequence[Sequence[int]]

    title = "word masks"
    kinds = frozenset({"cross"})
    needs_grid = True

    def acts_at(self, site: Site) -> bool:
        if self.blocks or site.kind != "cross":
            return super().acts_at(site)
        low, high = QUARTER
        return site.count < 4 or low <= site.index / site.count < high and not site.name.startswith("middle")

    def output(self, call: Call, attend: Callable[..., Tensor]) -> Tensor:
        own = call.step.plain is None and call.of_whole_picture  # not what a method evaluates elsewhere
        if own and "cond" in call.roles:
            chunk, state = call.roles.index("cond"), self.settled(call.step)
            q, k = (call.by_sample(tokens)[chunk] for tokens in (call.q[:, :, call.site.image], call.k))
            maps = scores(q, k).softmax(-1).mean(1)  # [samples, tokens, text]
            heat = torch.stack([one[:, list(tokens)].sum(-1) for one, tokens in zip(maps, self.tokens)])
            heat = heat.unflatten(1, call.site.grid).mean(1)[:, None]
            size = state.setdefault("size", heat.shape[-2:])
            state["now"] = state.get("now", 0.0) + F.interpolate(heat, size, mode="area")[:, 0]
        return attend()

    def settled(self, step: Any) -> dict:
        """The state of the run; what was read at the noise level before is in its "past"."""
        state = step.state(self)
        if state.setdefault("level", step.level) != step.level:
            state.update(past=state.get("past", 0.0) + state.pop("now", 0.0), level=step.level)
        return state

    def masks(self, step: Any) -> Masks | None:
        past = self.settled(step).get("past")
        if not torch.is_tensor(past):
            return None
        low, high = past.amin((1, 2), keepdim=True), past.amax((1, 2), keepdim=True)
        mask = ((past - low) / (high - low).clamp_min(TINY) >= THRESHOLD).float()
        return Masks(mask[SOURCE], mask[EDITED])

"""Where the words of a prompt are, from attention: the automatic masks of MasaCtrl (arXiv 2304.08465).

    M = (A - min A) / (max A - min A) >= 0.1,   A: the mean of the maps of the words' tokens over heads and blocks

The paper reads the blocks of 16 x 16 tokens of SD1.5 and the maps of the same step; here they are those of the steps
before, so that masks do not depend on how the host splits the batch. The first step has none. Only the step's own
evaluations of whole pictures are read.

On transformers, where text and image attend together, A is what image tokens pay to the words' tokens, summed over
blocks spread over the depth (derived). On the demo Flux that sum tells the object's pixels from the others nearly as
well as the best single block does (AUC 0.93 to 0.99), because blocks that find a word pay it more; choosing blocks by
how sharp their map is does not work (0.4 to 0.7): the sharpest are often those that shun the object.
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
JOINT = 8  # blocks of a transformer that are read where none is named: each costs as much as its attention


def spread(site: Site) -> bool:
    """Whether a site is one of at most JOINT of its kind, evenly over the depth."""
    return site.index in {round(i * (site.count - 1) / (JOINT - 1)) for i in range(JOINT)}


def paid(call: Call, chunk: int, row: int) -> Tensor:
    """What the image tokens of a row pay to each text token, ``[t * h * w, text tokens]``, the mean over heads; in
    transformers one head at a time, so that no map of all is held."""
    q, k = (call.by_sample(tensor)[chunk, row] for tensor in (call.q[:, :, call.site.image], call.k))
    heads = [(q, k)] if call.site.unet else zip(q.split(1), k.split(1))
    maps = (scores(a, b).softmax(-1)[..., call.site.text] for a, b in heads)
    return sum(part.sum(0) for part in maps) / len(q)


@dataclass(frozen=True, kw_only=True, eq=False)
class WordMasks(AttentionEdit):
    """Reads where the words of the source and of the edits are, and changes nothing. ``tokens``: those of the words in
    each row's prompt, the source's first."""

    tokens: Sequence[Sequence[int]]

    title = "word masks"
    kinds = frozenset({"cross", "joint"})
    needs_grid = True

    def acts_at(self, site: Site) -> bool:
        if self.blocks or site.kind not in self.kinds:
            return super().acts_at(site)
        if site.kind == "joint":
            return spread(site)
        low, high = QUARTER
        return site.count < 4 or low <= site.index / site.count < high and not site.name.startswith("middle")

    def output(self, call: Call, attend: Callable[..., Tensor]) -> Tensor:
        own = call.step.plain is None and call.of_whole_picture  # not what a method evaluates elsewhere
        if own and "cond" in call.roles:
            chunk, state = call.roles.index("cond"), self.settled(call.step)
            heat = torch.stack([paid(call, chunk, row)[:, list(tokens)].sum(-1)
                                for row, tokens in enumerate(self.tokens)])
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

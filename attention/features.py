"""Features of the source picture in its edits: queries, keys and the residual of one block.

Plug-and-Play. Tumanyan et al., CVPR 2023, arXiv 2211.12572: in the decoder's self-attention the edits attend by the
source's map (its q and k) to their own values, which keeps the layout; and what one residual block adds, before the
skip connection, is the source's, which keeps semantics. SD1.5 in the official code: q and k in output.4 to output.11,
the residual of output.4. SDXL has no published map: the second block of the decoder (derived), as for other UNets.

On transformers (derived, after the port of Prompt-to-Prompt to them, arXiv 2508.07519) the q and k of the image tokens
of every block are the source's; there is no residual block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .contract import AttentionEdit, Call, Residual
from .mutual import EDITED, SOURCE, shared
from .sites import Site, selected

DECODER = 0.5  # of the self-attention blocks: from output.4 on in SD1.5
KNOWN = {22: 14, 17: 9}  # residual blocks of SD1.5 and SDXL -> the one that is shared: output.4, output.1
OTHERS = 0.55  # the share of the residual blocks of another UNet before that one: its decoder's second block


def decoder(site: Site) -> bool:
    """Where q and k are shared if nobody says: a UNet's decoder, all of a transformer."""
    return not site.unet or site.index >= int(DECODER * site.count)


@dataclass(frozen=True, kw_only=True)
class Features(AttentionEdit):
    """Samples after the first of a chunk get the first's q and k, and its residual of one block.

    Args:
        blocks: where q and k are shared, "" for :func:`decoder`.
        feature: the residual block, "" for the paper's or its like.
        attention_until, feature_until: percent of the timesteps; 0 is never.
    """

    feature: str = ""
    attention_until: float = 0.5
    feature_until: float = 0.8

    title = "features of the source"
    kinds = frozenset({"self", "joint", "residual"})

    def acts_at(self, site: Site) -> bool:
        if site.kind == "residual":
            return self.feature_until > 0 and self.shares_residual(site)
        attends = selected(self.blocks, site.name) if self.blocks else decoder(site)
        return self.attention_until > 0 and site.kind in self.kinds and attends

    def shares_residual(self, site: Site) -> bool:
        if self.feature:
            return selected(self.feature, site.name)
        return site.index == KNOWN.get(site.count, int(OTHERS * site.count))

    def inputs(self, call: Call) -> Call:
        if not call.step.before(self.attention_until):
            return call
        return call.replace(q=shared(call, call.q), k=shared(call, call.k))

    def residual(self, block: Residual) -> Tensor:
        if not block.step.before(self.feature_until):
            return block.h
        h = block.h.clone()
        rows = block.by_sample(h)
        rows[:, EDITED] = rows[:, SOURCE]
        return h

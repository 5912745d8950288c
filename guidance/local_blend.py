"""Local blend: an edited picture differs from its source only where chosen words are.

Hertz et al., ICLR 2023, arXiv 2208.01626, section 4, the official code: threshold 0.3, from 0.2 of the run. See
``attention/local_blend.py``. The batch is the source (row 0) and its edits. No further evaluation.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..attention.edit_prompts import EditPrompts
from ..attention.local_blend import WordMaps, blended, masks
from .contract import Edits, Guidance, GuidanceError, Setup, Step
from .editing import check_positive, check_rows, check_share, check_sizes, check_words

log = logging.getLogger("rudder")

WIDE = 0.95  # share of the picture above which a mask keeps nothing to speak of


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalBlend(Guidance):
    """Keep the source outside of the words' mask.

    Args:
        edit: the prompts of the batch.
        words: phrases of source or edits whose places may change; none for the words that an edit changes.
        threshold: of the words' map over its maximum, above which a place may change.
        blend_start: percent of the timesteps from which the source is kept.
        tokens: maps are read at cross-attention of at most so many tokens (the paper: 16 x 16).
        blocks: where they are read; none for all small ones, or for a few of a transformer's.
    """

    edit: EditPrompts
    words: Sequence[str] = ()
    threshold: float = 0.3
    blend_start: float = 0.2
    tokens: int = 256
    blocks: str = ""

    title = "Keep the Rest (Local Blend)"
    claims = frozenset({"places where the edits differ"})
    rank = 12  # the last word on an edited picture

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.title, threshold=self.threshold, start_percent=self.blend_start)
        if self.end < self.blend_start:
            raise GuidanceError(f"{self.title}: end_percent is {self.end:g} and start_percent {self.blend_start:g}, so "
                                "there is nothing between them. Set end_percent above start_percent.")
        check_words(self.title, self.edit, [*self.words, *([""] * (not self.edit.layouts[0]))], range(self.edit.rows))
        for row, (source, target) in enumerate(self.columns, 1):
            if not source and not target:
                raise GuidanceError(f"{self.title}: no word to look for in edit {row}, '{self.edit.texts[row]}'. "
                                    "Name one in words that it or the source says, or change a word of it.")

    @cached_property
    def columns(self) -> list[tuple[list[int], list[int]]]:
        """For each edit the tokens that are looked for, in the source and in itself."""
        rows = range(1, self.edit.rows)
        if not self.words:
            return [self.edit.changed(row) for row in rows]
        named = [[t for word in self.words for t in self.edit.positions(row, word)] for row in range(self.edit.rows)]
        return [(named[0], named[row]) for row in rows]

    def check(self, setup: Setup) -> None:
        check_positive(self.title, self.edit, setup)

    def edits(self, step: Step) -> Edits:
        check_rows(self.title, self.edit, step, step.state(self))
        state, lengths = step.state(self), [self.edit.length(row) for row in range(self.edit.rows)]
        return [(WordMaps(blocks=self.blocks, columns=self.columns, lengths=lengths, tokens=self.tokens,
                          maps=state.setdefault("maps", {}), seen=state.setdefault("seen", {})), ("cond",))]

    def finish(self, step: Step, x0: Tensor) -> Tensor:
        state = step.state(self)
        check_sizes(self.title, "tokens", self.tokens, step, state.get("seen"))
        if step.before(self.blend_start):
            return x0
        if not state["maps"]:
            raise GuidanceError(f"{self.title}: no map of the words was read: the positive has areas. Remove them.")
        mask = masks(state["maps"], self.threshold, x0.shape[2:]).to(x0.device)
        share = mask.flatten(1).mean(1)
        step.log(changed_area=share)
        if step.index == step.steps - 1 and bool((share > WIDE).any()):
            log.warning("Rudder: %s: nearly the whole picture may change (%s of it), so the source is hardly kept. "
                        "Raise the threshold, or name words with a place of their own.", self.title,
                        ", ".join(f"{value:.0%}" for value in share.tolist()))
        return blended(x0, mask)

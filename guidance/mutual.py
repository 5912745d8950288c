"""MasaCtrl: edits that change pose and action while the source picture's content stays.

Cao et al., ICCV 2023, arXiv 2304.08465. From a step and a block on the edited rows of the batch attend to the keys and
values of the source row, see ``attention/mutual.py``; row 0 is the source. No further evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..attention.edit_prompts import EditPrompts
from ..attention.foreground import Masked, Masks
from ..attention.mutual import Mutual
from ..attention.word_masks import WordMasks
from .contract import Edits, Guidance, GuidanceError, Setup, Step
from .editing import check_positive, check_rows, check_words, require_source


@dataclass(frozen=True, kw_only=True, eq=False)
class MasaCtrl(Guidance):
    """Attend to the source's keys and values. The paper starts at step 4 of 50 and at layer 10 of 16.

    Args:
        depth: the share of the blocks that are left alone, see ``attention.mutual.Mutual``.
        blocks: at which sites instead, see ``attention.sites.selected``.
        union: the edits see themselves as well.
        masks: the foreground of source and edits, or None.
        edit, words: the prompts of the batch, and what they call the foreground: masks from these words.
    """

    start: float = 0.08
    depth: float = 0.625
    blocks: str = ""
    union: bool = False
    masks: Masks | None = None
    edit: EditPrompts | None = None
    words: Sequence[str] = ()

    title = "Move and Pose (MasaCtrl)"
    claims = frozenset({"keys and values of the edited pictures"})
    rank = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.depth < 1.0:
            raise GuidanceError(f"{self.title}: start_depth is {self.depth:g}; it must be at least 0 and below 1.")
        if self.words and self.edit is None:
            raise GuidanceError(f"{self.title}: words need the prompts that say them. Connect the EDIT_PROMPTS of "
                                "'Source and Edits' (RudderEditBatch) to prompts, or leave words empty.")
        if self.words and self.masks is not None:
            raise GuidanceError(f"{self.title}: give masks or words, not both.")
        if self.words:
            self.check_named()

    def check_named(self) -> None:
        rows = range(self.edit.rows)
        check_words(self.title, self.edit, self.words, rows)
        if silent := [self.edit.texts[row] for row in rows if not self.seen.tokens[row]]:
            raise GuidanceError(f"{self.title}: '{silent[0]}' says none of the words {', '.join(self.words)}. Give "
                                "what the source and each edit call the foreground, such as 'cat, lion'.")

    @cached_property
    def seen(self) -> WordMasks | None:
        """What looks for the words."""
        if not self.words:
            return None
        rows = range(self.edit.rows)
        return WordMasks(tokens=[[t for word in self.words for t in self.edit.positions(row, word)] for row in rows])

    @cached_property
    def shared(self) -> Mutual:
        where = {"blocks": self.blocks, "depth": self.depth, "union": self.union}
        masks = self.seen.masks if self.seen else self.masks
        return Mutual(**where) if masks is None else Masked(**where, masks=masks)

    def check(self, setup: Setup) -> None:
        if self.seen:
            check_positive(self.title, self.edit, setup)

    def edits(self, step: Step) -> Edits:
        require_source(self.title, step)
        if self.seen is None:
            return [(self.shared, ())]
        check_rows(self.title, self.edit, step, step.state(self))
        return [(self.shared, ()), (self.seen, ("cond",))]

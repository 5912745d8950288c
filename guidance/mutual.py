"""MasaCtrl: edits that change pose and action while the source picture's content stays.

Cao et al., ICCV 2023, arXiv 2304.08465. From a step and a block on the edited rows of the batch attend to the keys and
values of the source row, see ``attention/mutual.py``; row 0 is the source. No further evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..attention.foreground import Masked, Masks
from ..attention.mutual import Mutual
from ..attention.word_masks import WordMasks
from .contract import Edits, Guidance, GuidanceError, Setup, Step
from .editing import require_source


@dataclass(frozen=True, kw_only=True, eq=False)
class MasaCtrl(Guidance):
    """Attend to the source's keys and values. The paper starts at step 4 of 50 and at layer 10 of 16.

    Args:
        depth: the share of the blocks that are left alone, see ``attention.mutual.Mutual``.
        blocks: at which sites instead, see ``attention.sites.selected``.
        union: the edits see themselves as well.
        masks: the foreground of source and edits, or None.
        source_tokens, edit_tokens: masks from these tokens of the prompts; none for no such masks.
    """

    start: float = 0.08
    depth: float = 0.625
    blocks: str = ""
    union: bool = False
    masks: Masks | None = None
    source_tokens: Sequence[int] = ()
    edit_tokens: Sequence[int] = ()

    title = "Move and Pose (MasaCtrl)"
    claims = frozenset({"keys and values of the edited pictures"})
    rank = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.depth < 1.0:
            raise GuidanceError(f"{self.title}: start_depth is {self.depth:g}; it must be at least 0 and below 1.")
        if bool(self.source_tokens) != bool(self.edit_tokens):
            raise GuidanceError(f"{self.title}: masks from words need both source_tokens and edit_tokens.")
        if self.source_tokens and self.masks is not None:
            raise GuidanceError(f"{self.title}: give masks or tokens, not both.")

    @cached_property
    def words(self) -> WordMasks | None:
        if not self.source_tokens:
            return None
        return WordMasks(source=tuple(self.source_tokens), edits=tuple(self.edit_tokens))

    @cached_property
    def edit(self) -> Mutual:
        where = {"blocks": self.blocks, "depth": self.depth, "union": self.union}
        masks = self.words.masks if self.words else self.masks
        return Mutual(**where) if masks is None else Masked(**where, masks=masks)

    def check(self, setup: Setup) -> None:
        if self.words and not any(self.words.acts_at(site) for site in setup.sites):
            raise GuidanceError(f"{self.title}: this model has no cross-attention to read words from. Leave the tokens "
                                "empty and connect masks, or none.")

    def edits(self, step: Step) -> Edits:
        require_source(self.title, step)
        return [(self.edit, ()), *([(self.words, ("cond",))] if self.words else [])]

"""Prompt-to-Prompt: edit a picture by changing words of its prompt. Hertz et al., ICLR 2023, arXiv 2208.01626.

The batch is the source (row 0) and its edits, from one noise. The edits take over the source's attention to the words
that they share (until ``cross_end``) and its layout (until ``self_end``); see ``attention/operations.py`` for the words
and ``attention/prompt_to_prompt.py`` for where. Only the positive's predictions are edited, as in the official code. No
further evaluation. Paper: 0.8 and 0.4 of 50 DDIM steps; on transformers 0.2 for the layout (arXiv 2508.07519, read in
notes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..attention.edit_prompts import EditPrompts
from ..attention.operations import MODES, RENORM, Operation, operation
from ..attention.prompt_to_prompt import SameLayout, TextMaps
from .contract import Edits, Guidance, GuidanceError, Setup, Step
from .editing import check_ends, check_positive, check_reached, check_rows, check_share, check_sizes, check_words

WEIGHTS = (-2.0, 2.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptToPrompt(Guidance):
    """Let edited rows keep the source's attention.

    Args:
        edit: the prompts of the batch.
        mode, alpha, renorm: what becomes of changed words, see ``attention.operations``.
        cross_end, self_end: percent of the timesteps until which words and layout are the source's; 0 is never.
        self_tokens: the layout is kept at self-attention of at most so many tokens (the paper: 16 x 16).
        words: (phrase, weight) of words that are made stronger or weaker; ends: (phrase, cross_end of its own).
    """

    edit: EditPrompts
    mode: str = "replace"
    alpha: float = 0.2
    renorm: str = "none"
    cross_end: float = 0.8
    self_end: float = 0.4
    self_tokens: int = 256
    words: Sequence[tuple[str, float]] = ()
    ends: Sequence[tuple[str, float]] = ()

    title = "Edit by Words (Prompt-to-Prompt)"
    claims = frozenset({"attention to the words of the edits", "positive prompt of a step"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.title, cross_end=self.cross_end, self_end=self.self_end, style_alpha=self.alpha,
                    **{f"word_ends, '{word}'": end for word, end in self.ends})
        check_ends(self.title, self.start, cross_end=self.words_end, self_end=self.self_end)
        for name, value, known in (("mode", self.mode, MODES), ("renorm", self.renorm, RENORM)):
            if value not in known:
                raise GuidanceError(f"{self.title}: {name} is '{value}'; it must be one of {', '.join(known)}.")
        for word, weight in self.words:
            if not WEIGHTS[0] <= weight <= WEIGHTS[1]:
                raise GuidanceError(f"{self.title}: the weight of '{word}' is {weight:g}; it must be from -2 to 2, 1 "
                                    "changes nothing.")
        if not self.words_end and self.weighed:
            raise GuidanceError(f"{self.title}: words have weights and cross_end is 0, so they would not act. Raise "
                                "cross_end (0.8 is usual): it is until when weights count, on every model.")
        check_words(self.title, self.edit, [w for w, _ in (*self.words, *self.ends)], range(1, self.edit.rows))

    @property
    def words_end(self) -> float:
        """Until when any word is edited."""
        return max([self.cross_end, *(end for _, end in self.ends)])

    @property
    def weighed(self) -> bool:
        """Whether a word is made stronger or weaker."""
        return any(weight != 1 for _, weight in self.words)

    @cached_property
    def operations(self) -> list[Operation | None]:
        """For each row what is done to it; None for the source, and for a prompt that is equal to it, also in the
        weights of its words (which are in the features)."""
        out: list[Operation | None] = [None]
        for row, layout in enumerate(self.edit.layouts[1:], 1):
            how = operation(self.edit.layouts[0], layout, self.mode, self.alpha) if layout else None
            for word, weight in self.words:
                how = how.weighted(self.edit.positions(row, word), weight)
            out.append(None if how is None or how.trivial and self.edit.repeats(row) else how)
        return out

    def inside(self, step: Step, row: int) -> Tensor:
        """Which tokens of a row are edited at this step."""
        now = torch.full((self.edit.length(row),), step.before(self.cross_end))
        for word, end in self.ends:
            now[self.edit.positions(row, word)] = step.before(end)
        return now

    def check(self, setup: Setup) -> None:
        check_positive(self.title, self.edit, setup)
        kinds = {site.kind for site in setup.sites}
        if "cross" in kinds and self.cross_end and not self.edit.layouts[0]:
            raise GuidanceError(f"{self.title}: where the words of this text encoder are is not known. It is known for "
                                "CLIP and T5; load the text encoder that belongs to the checkpoint.")
        if "joint" in kinds and self.words_end and not self.self_end and not self.weighed:
            raise GuidanceError(f"{self.title}: text and image attend together in this model, so there is no attention "
                                "to words to take over. Raise self_end (0.2 is usual), or give words a weight.")
        words = {"cross_end": self.words_end} if "cross" in kinds or self.weighed else {}
        check_reached(self.title, setup, self.start, self.end, **words, self_end=self.self_end)

    def edits(self, step: Step) -> Edits:
        check_rows(self.title, self.edit, step, step.state(self))
        out, state, device = [], step.state(self), step.x.device
        check_sizes(self.title, "self_tokens", self.self_tokens, step, state.get("layout"), " Or set self_end to 0.")
        if step.before(self.words_end):
            hows = state.setdefault("operations", [how and how.to(device) for how in self.operations])
            inside = [how and self.inside(step, row) for row, how in enumerate(hows)]
            out.append(TextMaps(
                operations=[how if how and where.any() else None for how, where in zip(hows, inside)],
                inside=[None if where is None or where.all() else where.to(device) for where in inside],
                renorm=self.renorm,
            ))  # fmt: skip
        if step.before(self.self_end):
            out.append(SameLayout(tokens=self.self_tokens, seen=state.setdefault("layout", {})))
        return [(edit, ("cond",)) for edit in out]

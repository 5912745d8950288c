"""A source prompt and its edits, as they lie in one batch of rows: row 0 is the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .words import Tokens, align, offsets, runs

Layout = tuple[Tokens, ...]  # the encoders of a prompt in the order of the features' token axis


@dataclass(frozen=True, eq=False)
class EditPrompts:
    """
    Attributes:
        texts: what was written, the source first.
        layouts: where the words are among the tokens of each text; () where the text encoder is not known.
        features: the text features that were made of them, ``[rows, tokens, D]``, one for each entry of the
            CONDITIONING. Shorter prompts are repeated to one length, so token i of row r is i modulo the length of r.
    """

    texts: tuple[str, ...]
    layouts: tuple[Layout, ...]
    features: tuple[Tensor, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.texts)

    def length(self, row: int) -> int:
        """The tokens of a row before they are repeated."""
        return sum(len(tokens.keys) for tokens in self.layouts[row])

    def positions(self, row: int, phrase: str) -> list[int]:
        """The tokens of ``phrase`` in the prompt of ``row``, in all encoders; empty if it does not say so."""
        return [start + token for start, tokens in offsets(self.layouts[row]) for word in tokens.find(phrase)
                for token in tokens.of(word)]

    def repeats(self, row: int) -> bool:
        """Whether a row is the source again, to the encoder's last bit."""
        return all(torch.equal(features[0], features[row]) for features in self.features)

    def changed(self, row: int) -> tuple[list[int], list[int]]:
        """The tokens that were dropped from the source, and those that ``row`` has added."""
        old, new = [], []
        for (a, source), (b, target) in zip(offsets(self.layouts[0]), offsets(self.layouts[row])):
            for dropped, added, _ in runs(align(source.words, target.words)):
                old += [a + token for word in dropped for token in source.of(word)]
                new += [b + token for word in added for token in target.of(word)]
        return old, new

    def report(self) -> str:
        """What was aligned, for people: kept words as they are, [old > new], [+ added], [- dropped]."""
        lines = [f"source: {self.texts[0]}"]
        for row, text in enumerate(self.texts[1:], 1):
            lines.append(f"edit {row}: {text}")
            lines += [f"  {t.encoder}: {told(s, t)}" for s, t in zip(self.layouts[0], self.layouts[row])]
        return "\n".join(lines if self.layouts[0] else [*lines, "The words of this text encoder are not known."])


def told(source: Tokens, target: Tokens) -> str:
    out = []
    for old, new, kept in runs(align(source.words, target.words)):
        before, after = said(source, old), said(target, new)
        if before and after:
            out.append(f"[{before} > {after}]")
        elif before or after:
            out.append(f"[- {before}]" if before else f"[+ {after}]")
        if kept:
            out.append(target.words[kept[1]])
    return " ".join(out)


def said(tokens: Tokens, words: Sequence[int]) -> str:
    count = sum(len(tokens.of(word)) for word in words)
    return " ".join(tokens.words[word] for word in words) + f" ({count} tokens)" * (count > len(words))

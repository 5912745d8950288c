"""Words and tokens: which tokens of a prompt spell which word, and which words two prompts share.

Prompts are aligned word by word as Prompt-to-Prompt does (Hertz et al., ICLR 2023, arXiv 2208.01626): the global
alignment of Needleman and Wunsch with match 1, mismatch -1, gap 0. Tokens of aligned words then go together, and so do
the special tokens (start, end, padding) of the same place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Pair = tuple[int | None, int | None]


@dataclass(frozen=True)
class Tokens:
    """A prompt as one text encoder sees it.

    Attributes:
        encoder: its name, for people.
        words: the words, in the encoder's spelling.
        keys: for each token the index of its word, or (chunk, side, place) of a special token.
    """

    encoder: str
    words: tuple[str, ...]
    keys: tuple[int | tuple, ...]

    def of(self, word: int) -> list[int]:
        """The tokens of a word."""
        return [i for i, key in enumerate(self.keys) if key == word]

    def find(self, phrase: str) -> list[int]:
        """The words of every occurrence of ``phrase``, whatever its case and spaces; empty if there is none."""
        wanted, out = squeezed(phrase), []
        for first in range(len(self.words)):
            said = ""
            for last in range(first, len(self.words)):
                said += squeezed(self.words[last])
                if said == wanted and wanted:
                    out += [i for i in range(first, last + 1) if i not in out]
                if len(said) >= len(wanted):
                    break
        return out


def squeezed(text: str) -> str:
    return "".join(text.split()).casefold()


def align(source: Sequence[str], target: Sequence[str]) -> list[Pair]:
    """The pairs (source word, target word) in order; None opposite a word that has no match. No pair mismatches: two
    gaps cost less."""
    best = [[0] * (len(target) + 1) for _ in range(len(source) + 1)]
    for i, word in enumerate(source):
        for j, other in enumerate(target):
            step = 1 if squeezed(word) == squeezed(other) else -1
            best[i + 1][j + 1] = max(best[i][j] + step, best[i][j + 1], best[i + 1][j])
    pairs, i, j = [], len(source), len(target)
    while i or j:
        same = i and j and squeezed(source[i - 1]) == squeezed(target[j - 1])
        if same and best[i][j] == best[i - 1][j - 1] + 1:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif j and (not i or best[i][j] == best[i][j - 1]):
            j -= 1
            pairs.append((None, j))
        else:
            i -= 1
            pairs.append((i, None))
    return pairs[::-1]


def matched(source: Sequence[str], target: Sequence[str]) -> list[Pair]:
    """As :func:`align` for reordered prompts: the n-th occurrence of a word goes with the n-th, wherever it stands."""
    free: dict[str, list[int]] = {}
    for i, word in enumerate(source):
        free.setdefault(squeezed(word), []).append(i)
    pairs = [(free[word].pop(0) if free.get(word) else None, j) for j, word in enumerate(map(squeezed, target))]
    return [*pairs, *((i, None) for rest in free.values() for i in rest)]


def runs(pairs: Sequence[Pair]) -> Iterator[tuple[list[int], list[int], Pair | None]]:
    """What stands opposite each other before each match: (old words, new words, the match), and after the last (None).
    Old alone was dropped, new alone was added, both were exchanged."""
    old, new = [], []
    for i, j in pairs:
        if i is None:
            new.append(j)
        elif j is None:
            old.append(i)
        else:
            yield old, new, (i, j)
            old, new = [], []
    yield old, new, None


def offsets(layout: Sequence[Tokens]) -> list[tuple[int, Tokens]]:
    """Where each encoder's tokens begin on the token axis."""
    lengths = [len(tokens.keys) for tokens in layout]
    return [(sum(lengths[:i]), tokens) for i, tokens in enumerate(layout)]

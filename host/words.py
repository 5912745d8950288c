"""Texts as ComfyUI's text encoders see them: which token is which word, and a batch of prompts as one CONDITIONING.

The host's word ids are per segment of one weight, not per word, so words are found by spelling out the tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..attention.edit_prompts import EditPrompts
from ..attention.words import Tokens

CLIPS = ("l", "g", "h")  # they share positions: their features lie side by side
NAMES = {"l": "CLIP", "g": "CLIP", "h": "CLIP", "t5xxl": "T5"}
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
CUT = "\ufffd"  # what a decoder puts for bytes that are a part of a letter
Chunks = list[list[tuple]]  # of (token, weight, id); id 0 is a special token


def encoded(clip: Any, texts: Sequence[str]) -> tuple[list, EditPrompts]:
    """One CONDITIONING with a row for each of ``texts``, and where their words are.

    Prompts of different length get one: padding where the encoder pads (T5), empty blocks where CLIP stands before T5
    (SD3), else CLIP's features are repeated, which changes nothing in cross-attention. Language models (Qwen-Image,
    Lumina 2, Z-Image) know no padding: there the prompts must have as many tokens as each other.

    Raises:
        ValueError: the prompts cannot be one batch.
    """
    every = [clip.tokenize(text, return_word_ids=True) for text in texts]
    conds = [clip.encode_from_tokens_scheduled(bare(tokens)) for tokens in every]
    names = axis(clip, every[0], conds[0][0][0].shape[1])
    check_lengths([entries[0][0].shape[1] for entries in conds], names)
    if level(clip, every, names):
        conds = [clip.encode_from_tokens_scheduled(bare(tokens)) for tokens in every]
    if len({len(entries) for entries in conds}) > 1:
        raise ValueError("The prompts are encoded in different numbers of parts (scheduled LoRA hooks on the CLIP): "
                         "wire a CLIP without a schedule.")
    layouts = tuple(tuple(layout(clip, tokens, name) for name in names) for tokens in every)
    batch = [stacked(entries) for entries in zip(*conds)]
    return batch, EditPrompts(tuple(texts), layouts, tuple(features for features, _ in batch))


def check_lengths(lengths: Sequence[int], names: Sequence[str]) -> None:
    """Refuse prompts of different length where neither padding nor repeating leaves them what they are."""
    if len({*lengths}) > 1 and not (names and all(name in CLIPS or "t5" in name for name in names)):
        raise ValueError(
            f"The prompts have {', '.join(map(str, lengths))} tokens, and this text encoder does not pad them, so they "
            "cannot be one batch. Write edits of as many tokens as the source: exchange a word for one of like length."
        )


def bare(tokens: dict[str, Chunks]) -> dict:
    return {name: [[entry[:2] for entry in chunk] for chunk in chunks] for name, chunks in tokens.items()}


def axis(clip: Any, tokens: dict[str, Chunks], length: int) -> tuple[str, ...]:
    """The encoders along the token axis of features of this length; () if that is not known."""
    model = getattr(clip, "cond_stage_model", None)
    loaded = [name for name in tokens if getattr(model, name, getattr(model, f"clip_{name}", None)) is not None]
    clips, others = [n for n in loaded if n in CLIPS][:1], [n for n in loaded if n not in CLIPS]
    for names in ((*clips, *others), (*others,), (*clips,)):
        if names and sum(size(tokens, name) for name in names) == length:
            return names
    return ()


def size(tokens: dict[str, Chunks], name: str) -> int:
    """Tokens of an encoder; CLIPs that lie side by side are cut to the shorter."""
    names = [n for n in tokens if n in CLIPS] if name in CLIPS else [name]
    return min(sum(map(len, tokens[n])) for n in names)


def level(clip: Any, every: Sequence[dict[str, Chunks]], names: Sequence[str]) -> bool:
    """Bring the token lists to one length, in place, where repeating the features would not be exact. Whether any has
    changed."""
    before = [[len(chunk) for chunks in tokens.values() for chunk in chunks] for tokens in every]
    for name in every[0]:
        if name in CLIPS and len(names) > 1:
            longest = max(len(tokens[name]) for tokens in every)
            for tokens in every:
                empty = clip.tokenize("", return_word_ids=True)[name]
                tokens[name].extend(empty * (longest - len(tokens[name])))
        elif name not in CLIPS and name in names:
            longest = max(len(tokens[name][0]) for tokens in every)
            for tokens in every:
                part(clip, name).pad_tokens(tokens[name][0], longest - len(tokens[name][0]))
    return before != [[len(chunk) for chunks in tokens.values() for chunk in chunks] for tokens in every]


def part(clip: Any, name: str) -> Any:
    """The tokenizer of one encoder."""
    return getattr(clip.tokenizer, name, None) or getattr(clip.tokenizer, f"clip_{name}")


def layout(clip: Any, tokens: dict[str, Chunks], name: str) -> Tokens:
    """The words of one encoder's tokens, by their spelling."""
    tokenizer, chunks = part(clip, name), tokens[name]
    spelt = {t: tokenizer.inv_vocab.get(t, "") for chunk in chunks for t, *_ in chunk if isinstance(t, int)}
    byte_pairs = any(isinstance(t, int) and s and spelt[t].endswith("</w>") for chunk in chunks for t, _, s in chunk)
    words, keys, before, within = [], [], "", None
    for number, chunk in enumerate(chunks):
        ends = 0
        for place, (token, _, segment) in enumerate(chunk):
            if segment == 0:
                at_start = place == 0 and tokenizer.start_token is not None
                keys.append((number, "start" if at_start else "end", 0 if at_start else ends))
                ends += not at_start
                continue
            piece = spelt[token] if isinstance(token, int) else ""
            text, said = read(tokenizer, [token]), read(tokenizer, words[-1]) if before else ""
            new = before.endswith("</w>") if byte_pairs else starts(piece, text, before, said)
            if segment != within or new or unspaced(text, said):
                words.append([])
                before = ""
            words[-1].append(token)
            keys.append(len(words) - 1)
            before, within = before + piece, segment
    return Tokens(NAMES.get(name, name), tuple(read(tokenizer, word) for word in words),
                  tuple(keys[: size(tokens, name)]))


def starts(piece: str, text: str, before: str, said: str) -> bool:
    """Whether a piece, which reads ``text``, begins a new word after ``before``, the pieces of the word so far, which
    read ``said``: it says so (SentencePiece's low line, the dotted G of byte-level BPE, its dotted C for a new line),
    one of them belongs to a chat template, or one is punctuation and the other not."""
    if piece.startswith(("▁", "Ġ", "Ċ")) or any(p.startswith("<|") and p.endswith("|>") for p in (piece, before)):
        return True
    return bool(said) and CUT not in text + said and text.isalnum() != said.isalnum()


def unspaced(text: str, said: str) -> bool:
    """Whether a new word begins because the letter before or after is of a script without spaces (Chinese, Japanese,
    Thai, Lao, Burmese, Khmer): there every token is a word, or else a sentence would be one."""
    return bool(said) and not said.endswith(CUT) and any(map(UNSPACED.match, (said[-1], text[:1])))


def read(tokenizer: Any, word: list) -> str:
    if all(isinstance(token, int) for token in word):
        return tokenizer.tokenizer.decode(word).strip()
    return "embedding " + " ".join(f"{float(token.float().sum()):.5g}" for token in word)


def stacked(entries: Sequence[Sequence]) -> tuple:
    """The same entry of several conditionings as one, with a row for each."""
    features, settings = [entry[0] for entry in entries], [entry[1] for entry in entries]
    if len({f.shape[-1] for f in features}) > 1 or any(len(f) != 1 for f in features):
        raise ValueError("The text encoder gave features of different widths or several rows for one prompt.")
    length = math.lcm(*(f.shape[1] for f in features))
    merged = [torch.cat([f.repeat(1, length // f.shape[1], 1) for f in features]), dict(settings[0])]
    for key, value in settings[0].items():
        if isinstance(value, torch.Tensor):
            if len({tuple(s[key].shape) for s in settings}) > 1:
                raise ValueError(f"The prompts differ in the shape of '{key}': make them about the same length.")
            merged[1][key] = torch.cat([s[key] for s in settings])
    return merged

"""Writes the tokenizer of the demo models: a CLIP byte-pair tokenizer in which every word of the world is one token.

    python -m demo.tokenizer            # from the repository root; writes demo/models/tokenizer/

Unknown words fall back to pieces and characters, as in CLIP. The order of the vocabulary is part of the trained
weights: a new word means a new model.
"""
from __future__ import annotations

import json
from pathlib import Path

from .words import VOCABULARY

FOLDER = Path(__file__).parent / "models" / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes that CLIP's and GPT-2's byte-level BPE use."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(rest))]


def pieces(word: str, rank: dict[tuple[str, str], int]) -> list[str]:
    """Apply merges to one word, best rank first."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while True:
        known = [(rank[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in rank]
        if not known:
            return parts
        i = min(known)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def merges() -> list[tuple[str, str]]:
    """The merges that turn every world word into one token. A merge added later ranks lower than all before it,
    so it never changes how an earlier word is read."""
    rank: dict[tuple[str, str], int] = {}
    for word in VOCABULARY:
        while len(parts := pieces(word, rank)) > 1:
            rank[(parts[0], parts[1])] = len(rank)
    return list(rank)


def write(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pairs = merges()
    tokens = [*byte_alphabet(), *(c + "</w>" for c in byte_alphabet()), *(a + b for a, b in pairs), START, END]
    special = {k: {"content": t, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
               for k, t in (("bos_token", START), ("eos_token", END), ("unk_token", END))} | {"pad_token": END}
    config = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 8192,
              "tokenizer_class": "CLIPTokenizer",
              "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in pairs))
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    write()

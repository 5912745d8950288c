"""What a model attends to: small pictures of the maps of some sites.

The edits of this file change nothing: they hand back the call as it came. A map is computed for the queries that are
asked for, a part at a time, and kept as the mean over the heads on the grid of the picture's tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .contract import AttentionEdit, Call
from .sites import Site

AT_ONCE = 2**24  # probabilities that exist at a time


@dataclass(frozen=True, kw_only=True, eq=False)
class TextMaps(AttentionEdit):
    """How much each image token looks at text tokens, a share of all that it looks at.

    ``tokens`` are positions in the text, one map each. Without, one map of their mean; at a cross-attention without
    the first token, because the shares of all add up to one everywhere, and the first takes what no word wants.
    ``maps`` gets ``[samples, maps, t, h, w]`` by name and kind of the site, for the first part of the
    positive.
    """

    tokens: tuple[int, ...] = ()
    maps: dict[str, Tensor] = field(default_factory=dict)

    title = "Inspect Attention"
    kinds = frozenset({"cross", "joint"})
    needs_grid = True

    def inputs(self, call: Call) -> Call:
        if label(call.site) not in self.maps:
            self.maps[label(call.site)] = text_maps(call, self.tokens)
        return call


@dataclass(frozen=True, kw_only=True, eq=False)
class SelfMaps(AttentionEdit):
    """What the image token at ``x``, ``y`` (shares of the width and the height) looks at in the picture; for a video,
    of its middle frame. ``maps`` gets ``[samples, 1, t, h, w]`` by name and kind of the site."""

    x: float = 0.5
    y: float = 0.5
    maps: dict[str, Tensor] = field(default_factory=dict)

    title = "Inspect Attention"
    kinds = frozenset({"self", "joint"})
    needs_grid = True

    def inputs(self, call: Call) -> Call:
        if label(call.site) not in self.maps:
            self.maps[label(call.site)] = self_map(call, self.x, self.y)
        return call


def label(site: Site) -> str:
    return f"{site.name} {site.kind}"


def rows(call: Call, queries: slice) -> Tensor:
    """The attention of some queries of the first chunk, mean over the heads: ``[samples, queries, keys]``."""
    first = slice(0, call.samples)
    mask = call.mask
    if mask is not None:
        mask = mask[first] if len(mask) == len(call.q) and mask.ndim > 2 else mask
        mask = mask[..., queries, :] if mask.shape[-2] > 1 else mask
    part = call.replace(q=call.q[first, :, queries], k=call.k[first], mask=mask)
    return part.probabilities().mean(1)


def text_maps(call: Call, tokens: tuple[int, ...]) -> Tensor:
    """``[samples, maps, t, h, w]``, see :class:`TextMaps`.

    Raises:
        ValueError: the text has no such token.
    """
    site, keys = call.site, call.k.shape[2]
    text = range(*site.text.indices(keys))
    if not text:
        raise ValueError(f"'{site.name}' sees no text in this model; draw the self map there.")
    if tokens and max(tokens) >= len(text):
        raise ValueError(f"tokens: {max(tokens)} is beyond the text, which has the tokens 0 to {len(text) - 1}.")
    columns = [text[token] for token in tokens] or list(text)[site.kind == "cross" and len(text) > 1:]
    image = range(*site.image.indices(call.q.shape[2]))
    stride = max(1, AT_ONCE // (call.samples * call.q.shape[1] * keys))
    parts = []
    for start in range(image.start, image.stop, stride):
        shares = rows(call, slice(start, min(start + stride, image.stop)))[..., columns]
        parts.append(shares if tokens else shares.mean(-1, keepdim=True))
    return torch.cat(parts, 1).movedim(2, 1).unflatten(2, site.grid).cpu()


def self_map(call: Call, x: float, y: float) -> Tensor:
    """``[samples, 1, t, h, w]``, see :class:`SelfMaps`."""
    site = call.site
    at = site.image.indices(call.q.shape[2])[0] + token_at(site.grid, x, y)
    return rows(call, slice(at, at + 1))[..., site.image].unflatten(2, site.grid).cpu()


def token_at(grid: tuple[int, int, int], x: float, y: float) -> int:
    """Which token of the picture lies at these shares of its width and height; of the middle frame."""
    frames, height, width = grid
    row, column = (min(int(share * size), size - 1) for share, size in ((y, height), (x, width)))
    return (frames // 2 * height + row) * width + column


def parse_tokens(text: str) -> tuple[int, ...]:
    """Positions such as "2, 4-6" as numbers, in the order in which they stand.

    Raises:
        ValueError: an entry is no position.
    """
    found: list[int] = []
    for entry in re.split(r"[,\s]+", text.strip()):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", entry)
        if entry and (ends is None or int(ends[1]) > int(ends[2] or ends[1])):
            raise ValueError(f"tokens: '{entry}' is no position. Write numbers from 0 and ranges: '2', '1, 4-6'.")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1) if entry else ()
    return tuple(dict.fromkeys(found))

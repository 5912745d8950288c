"""Attention sites: where a model attends, by names that people can type."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

ALL = slice(None)


@dataclass(frozen=True)
class Site:
    """One attention call of a backbone, with the token layout of the forward pass once that runs.

    Attributes:
        name: "input.4.0", "middle.0", "output.3.1" (UNet: block, then transformer in it), "double.4", "single.17"
            (Flux), "joint.7" (SD3, Qwen-Image, Lumina 2, Z-Image), "refiner.0" (of the latter two, before the joint
            blocks), "block.9" (Wan). A UNet and Wan have a self and a cross site of each name.
        kind: "self" (image tokens among themselves), "cross" (image to text), "joint" (text and image together),
            "image" (image to the features of a start picture), or "residual" for what a UNet's residual block adds,
            which is no attention ("output.4").
        index, count: position among the model's sites of this kind, in the order in which they run; of a self site
            beside a joint one of the same name (SD3.5 medium), that of the joint one.
        grid: (t, h, w) of the image tokens. None before a forward pass, and where another node merged tokens.
        text: which keys are text tokens; image: which queries (and keys, but at cross sites) are those of the picture
            that is being made. There may be more tokens around those: reference pictures, padding.
    """

    name: str
    kind: str
    index: int = 0
    count: int = 1
    grid: tuple[int, int, int] | None = None
    text: slice = field(default_factory=lambda: slice(0))
    image: slice = field(default_factory=lambda: ALL)

    @property
    def unet(self) -> bool:
        """Whether it is of a UNet, whose names tell its half."""
        return self.name.startswith(("input", "middle", "output"))

    @property
    def depth(self) -> float:
        """0 at the first site of the kind, 1 at the last."""
        return self.index / max(self.count - 1, 1)


def numbered(sites: Iterable[Site]) -> list[Site]:
    """``sites`` in the order in which they run, with their index and count."""
    sites = list(sites)
    kinds = [site.kind for site in sites]
    out = [Site(s.name, s.kind, kinds[:i].count(s.kind), kinds.count(s.kind)) for i, s in enumerate(sites)]
    joint = {site.name: site for site in out if site.kind == "joint"}
    return [replace(joint[s.name], kind="self") if s.kind == "self" and s.name in joint else s for s in out]


@functools.lru_cache(4096)  # asked for every site and edit at every forward pass
def selected(blocks: str, name: str) -> bool:
    """Whether a list such as "middle, output.3-5, double.0, single" names the site; "" and "all" name all.

    An entry is a name or its beginning; the last number may be a range. Entries are separated by commas or spaces.
    """
    entries = parse(blocks)
    return not entries or any(entry == ["all"] or _matches(entry, name.split(".")) for entry in entries)


def parse(blocks: str) -> list[list[str]]:
    """The entries of a list of blocks as parts.

    Raises:
        ValueError: an entry is not a name.
    """
    entries = [entry for entry in re.split(r"[,\s]+", blocks.strip()) if entry]
    for entry in entries:
        if not re.fullmatch(r"[a-z]+(\.\d+)*(\.\d+-\d+)?", entry):
            raise ValueError(
                f"blocks: '{entry}' is not a block. Write names as Inspect Attention lists them, for instance "
                "'middle', 'output.3', 'output.3-5', 'double.0-3, single', or 'all'."
            )
        if (ends := re.search(r"(\d+)-(\d+)$", entry)) and int(ends[1]) > int(ends[2]):
            raise ValueError(f"blocks: the range in '{entry}' runs backwards. Write the lower number first.")
    return [entry.split(".") for entry in entries]


def _matches(entry: list[str], parts: list[str]) -> bool:
    return len(entry) <= len(parts) and all(map(_same, entry, parts))


def _same(wanted: str, part: str) -> bool:
    if "-" in wanted:
        low, high = map(int, wanted.split("-"))
        return low <= int(part) <= high
    return wanted == part

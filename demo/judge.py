"""The judge: a small network that reads what a 64x64 picture of the shapes world shows.

    judge = load()
    reading = judge(images)
    reading.score([words.parse("a spiky red circle left of a small heart")])

Two objects are read by position, never by the order of a caption: slot 0 is the left or upper object, slot 1 the right
or lower one, and a single object is slot 0. The network finds each slot by attention over an 8x8 grid (trained with
the true masks), pools what is there and reads shape, colour, texture, attribute and size with the same small network
for both slots. Its probabilities are calibrated by one temperature a head (Guo et al., arXiv 1706.04599).

`bench/train_judge.py` trains and validates it; bench/results/judge.md says how far to trust it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from . import words, world

DEFAULT = Path(__file__).resolve().parent / "models" / "judge.safetensors"

#: What each head tells apart. `axis`: where slot 1 is, seen from slot 0.
CLASSES: dict[str, tuple] = {
    "count": (1, 2),
    "axis": ("right", "below"),
    "background": tuple(world.BACKGROUNDS),
    "shape": world.NOUNS,
    "color": tuple(world.COLORS),
    "texture": world.TEXTURES,
    "attribute": world.ATTRIBUTES,
    "size": world.SIZES,
}
SCENE, OBJECT = ("count", "axis", "background"), ("shape", "color", "texture", "attribute", "size")
FIELDS = ("count", *OBJECT, "relation", "background")  # of a score


def _conv(channels: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    padding = (kernel - stride + 1) // 2
    return nn.Sequential(nn.Conv2d(channels, out, kernel, stride, padding, bias=False), nn.BatchNorm2d(out))


class Block(nn.Module):
    """Residual block, [B, C, H, W] -> the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), nn.ReLU(), _conv(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Network(nn.Module):
    """widths: channels at 32x32, 16x16 and 8x8; blocks: residual blocks there; hidden: features of each slot."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), blocks: tuple[int, ...] = (0, 1, 2), hidden: int = 128):
        super().__init__()
        self.config = {"widths": list(widths), "blocks": list(blocks), "hidden": hidden}
        channels, stages = 3, []
        for width, count in zip(widths, blocks):
            stem = _conv(channels, width, 4 if channels == 3 else 3, 2)
            stages.append(nn.Sequential(stem, nn.ReLU(), *(Block(width) for _ in range(count))))
            channels = width
        self.stages, pooled = nn.ModuleList(stages), sum(widths)
        self.scene = nn.Sequential(nn.Linear(pooled, hidden), nn.ReLU())
        self.place = nn.Parameter(torch.zeros(1, channels, 8, 8))  # where a cell is
        self.context = nn.Linear(hidden, channels)  # what the scene is, so that slots know the axis
        self.attend = nn.Sequential(nn.Conv2d(channels, 64, 1), nn.ReLU(), nn.Conv2d(64, 2, 1))
        self.slot = nn.Sequential(nn.Linear(pooled, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, hidden), nn.ReLU())
        self.heads = nn.ModuleDict({k: nn.Linear(hidden, len(names)) for k, names in CLASSES.items()})

    def maps(self, x: Tensor) -> list[Tensor]:
        """Feature maps at 32x32, 16x16 and 8x8 of pictures [B, 3, 64, 64] in 0..1."""
        out = [x * 4 - 2]
        for stage in self.stages:
            out.append(stage(out[-1]))
        return out[1:]

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Pictures [B, 3, 64, 64] in 0..1 -> logits of every head, attention logits [B, 2, 64] over 8x8 cells,
        scene features [B, hidden] and slot features [B, 2, hidden]."""
        maps = self.maps(x)
        scene = self.scene(torch.cat([m.mean((2, 3)) for m in maps], 1))
        attention = self.attend(torch.relu(maps[-1] + self.place + self.context(scene)[..., None, None])).flatten(2)
        weight = attention.float().softmax(2)
        # Every map is averaged where the slot is; the fine ones are first averaged over each of the 8x8 cells.
        cells = torch.cat([nn.functional.adaptive_avg_pool2d(m, 8).flatten(2) for m in maps], 1)
        slots = self.slot(torch.einsum("bsp,bcp->bsc", weight.to(cells.dtype), cells))
        logits = {k: head(scene if k in SCENE else slots) for k, head in self.heads.items()}
        return logits, attention, scene, slots


# ---------------------------------------------------------------- reading


def load(path: Path = DEFAULT) -> Judge:
    """The judge in a file of train_judge.py.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was trained on another version of the world.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"No judge at {path}. The repository holds one: `git checkout -- demo/models/{DEFAULT.name}` brings it "
            "back; `python -m bench.train_judge train` makes another."
        )
    with safe_open(str(path), framework="pt") as file:
        facts = {k: json.loads(v) for k, v in file.metadata().items()}
        weights = {k: file.get_tensor(k).float() for k in file.keys()}
    if facts["world"] != world.VERSION:
        raise ValueError(
            f"{path} judges version {facts['world']} of the shapes world, this is version {world.VERSION}: "
            "train it again with `python -m bench.train_judge train`."
        )
    network = Network(**facts["config"])
    missing, unexpected = network.load_state_dict(weights, strict=False)
    if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
        raise ValueError(f"{path} does not hold the weights of this network: train it again.")
    return Judge(network.eval().requires_grad_(False), facts["temperature"], facts)


@dataclass(frozen=True)
class Judge:
    """A network, the temperature of each head, and how it was trained (`facts`)."""

    network: Network
    temperature: dict[str, float]
    facts: dict = field(repr=False)

    def pictures(self, images: Tensor) -> Tensor:
        """[B, 3, 64, 64] float32 in 0..1 on the network's device, from [B, 3, 64, 64] or [B, 64, 64, 3], float in 0..1
        or uint8.

        Raises:
            ValueError: another shape or range, or numbers that are not finite.
        """
        images, side = torch.as_tensor(images), world.SIZE
        if tuple(images.shape[1:]) == (side, side, 3):
            images = images.movedim(3, 1)
        if tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"The judge reads pictures [B, 3, {side}, {side}] or [B, {side}, {side}, 3], not {list(images.shape)}."
            )
        if images.dtype == torch.uint8:
            images = images / 255
        elif not images.is_floating_point():
            raise ValueError(f"The judge reads float pictures in 0..1 or uint8 pictures, not {images.dtype}.")
        elif len(images) and not (-0.01 <= images.min() and images.max() <= 1.01):  # also where a number is nan
            low, high = images.min().item(), images.max().item()
            raise ValueError(f"Float pictures must lie in 0..1; these reach from {low:.3g} to {high:.3g}.")
        weight = self.network.place
        return images.to(weight.device, torch.float32).clamp(0, 1).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def logits(self, images: Tensor, batch: int = 128) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Logits of every head before the temperature, scene features [B, F'] and slot features [B, 2, F']."""
        parts = [self.network(x) for x in self.pictures(images).split(batch)]
        heads, _, scene, slots = zip(*parts)
        return {k: torch.cat([h[k] for h in heads]) for k in CLASSES}, torch.cat(scene), torch.cat(slots)

    def __call__(self, images: Tensor, batch: int = 128) -> Reading:
        """What pictures show; see `pictures` for what may be given. `batch` of them are read at a time."""
        return self.read(*self.logits(images, batch))

    def read(self, logits: dict[str, Tensor], scene: Tensor, slots: Tensor) -> Reading:
        """What `logits` gives, as calibrated probabilities and features."""
        probabilities = {k: (v / self.temperature.get(k, 1.0)).softmax(-1) for k, v in logits.items()}
        second = probabilities["count"][:, 1:] * slots[:, 1]  # what is read in an empty slot means nothing
        return Reading(probabilities, torch.cat([scene, slots[:, 0], second], 1))

    @torch.no_grad()
    def maps(self, images: Tensor, batch: int = 128) -> list[Tensor]:
        """Feature maps [B, C, S, S] at S = 32, 16 and 8, for measures.perceptual."""
        parts = [self.network.maps(x) for x in self.pictures(images).split(batch)]
        return [torch.cat(level) for level in zip(*parts)]


@dataclass(frozen=True)
class Reading:
    """What B pictures show.

    probabilities: 'count' [B, 2], 'axis' [B, 2], 'background' [B, 5], 'shape' [B, 2, 44], 'color' [B, 2, 8],
        'texture' [B, 2, 3], 'attribute' [B, 2, 9], 'size' [B, 2, 2], in the order of CLASSES; the second axis of an
        object's field is the slot. 'axis' and slot 1 mean nothing where there is one object.
    features: [B, F], what the heads see, for Frechet and kernel distances.
    """

    probabilities: dict[str, Tensor]
    features: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def describe(self) -> list[str]:
        """A caption of each picture, of the most probable words; the left or upper object comes first."""
        best, out = {k: v.argmax(-1).tolist() for k, v in self.probabilities.items()}, []
        for i in range(len(self)):
            said = [{k: CLASSES[k][best[k][i][slot]] for k in OBJECT} for slot in range(1 + best["count"][i])]
            phrases = [words.phrase(**o | {"attribute": o["attribute"].replace("none", "")}) for o in said]
            relation = (" left of ", " above ")[best["axis"][i]]
            out.append(f"{relation.join(phrases)} on a {CLASSES['background'][best['background'][i]]} background")
        return out

    def score(self, truth: list[dict]) -> dict[str, Tensor]:
        """1 where a picture shows what its truth says, 0 where not, nan where the truth says nothing of it: float [B]
        for each of FIELDS that any truth names ('count' always is), and 'all': everything said is right.

        truth: for each picture what words.parse gives. The noun may be a superclass word: 'shape' and 'figure' ask for
            nothing, 'glyph' for any individual. A missing attribute asks for nothing, the attribute 'none' for none.

        One object is looked for in slot 0. Of two, the said relation tells which slot is whose, so a swapped pair has
        wrong shapes and colours; without a relation the slots are assigned as they fit best. 'shape' and the like are
        right when every object of which they are said is right, and wrong for an object that is not there. 'relation'
        is right when two objects are seen along its axis whose said colours and shapes fit its order at least as well
        as the opposite one.

        Raises:
            ValueError: a truth for each picture is needed; words of the world; one or two objects.
        """
        if len(truth) != len(self):
            raise ValueError(f"{len(self)} pictures need as many truths, not {len(truth)}.")
        seen = {k: v.argmax(-1).tolist() for k, v in self.probabilities.items()}
        rows = [self._score(i, t, {k: v[i] for k, v in seen.items()}) for i, t in enumerate(truth)]
        named = [f for f in FIELDS if any(f in row for row in rows)]
        out = {f: torch.tensor([float(row.get(f, torch.nan)) for row in rows]) for f in named}
        return out | {"all": torch.tensor([float(all(row.values())) for row in rows])}

    def _score(self, i: int, truth: dict, seen: dict) -> dict[str, bool]:
        """Every field that the truth of picture i names; seen: the most probable class of each head."""
        said = truth["objects"]
        if len(said) not in (1, 2) or ("relation" in truth and len(said) == 1):
            raise ValueError(f"A truth has one object, or two and perhaps a relation: {truth}")
        row = {"count": seen["count"] == len(said) - 1}
        if "background" in truth:
            row["background"] = seen["background"] in classes_of("background", truth["background"])
        slots = (0, 1)
        if len(said) == 2:
            relation = truth.get("relation")
            if relation not in (None, *world.RELATIONS):
                raise ValueError(f"The world has no relation {relation!r}, only {', '.join(world.RELATIONS)}.")
            ordered, swapped = self._fit(i, said, (0, 1)), self._fit(i, said, (1, 0))
            if relation in ("right of", "below") or (relation is None and swapped > ordered):
                slots, ordered, swapped = (1, 0), swapped, ordered
            if relation:
                axis = seen["axis"] == world.RELATIONS.index(relation) // 2
                row["relation"] = row["count"] and axis and ordered >= swapped
        for o, slot in zip(said, slots):
            there = slot <= seen["count"]
            for name, word in o.items():
                wanted = classes_of(name, word)
                if wanted:
                    row[name] = row.get(name, True) and there and seen[name][slot] in wanted
        return row

    def _fit(self, i: int, said: list[dict], slots: tuple[int, int]) -> float:
        """Log probability of the said colours and shapes when object k is in slots[k]."""
        total = 0.0
        for o, slot in zip(said, slots):
            for name in {"color", "shape"} & o.keys():
                wanted = classes_of(name, o[name])
                if wanted:
                    total += self.probabilities[name][i, slot, list(wanted)].sum().clamp(min=1e-9).log().item()
        return total


def classes_of(name: str, word: str) -> range:
    """The classes of a head that fit a word; empty where every class does.

    Raises:
        ValueError: not a word of the world.
    """
    if name == "shape" and word in world.SUPERCLASS:
        return range(0)
    if name == "shape" and word == words.GLYPH:
        return range(len(world.SHAPES), len(world.NOUNS))
    if name not in CLASSES or word not in CLASSES[name]:
        known = ", ".join(map(str, CLASSES.get(name, CLASSES)))
        raise ValueError(f"The judge cannot tell {name} {word!r}; it knows {known}.")
    at = CLASSES[name].index(word)
    return range(at, at + 1)

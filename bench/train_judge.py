"""Trains and validates the judge, one command each; `train` again resumes.

    COMFYUI_PATH=... python -m bench.train_judge train --minutes 15 --out /tmp/rudder-judge --vae /tmp/rudder-train
    COMFYUI_PATH=... python -m bench.train_judge validate --vae /tmp/rudder-train
"""
# ruff: noqa: E402

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import RESULTS, Table, commit, facts, prepare

if __name__ == "__main__":
    prepare()
from safetensors import safe_open
from safetensors.torch import save_file

from rudder.demo import draw, world
from rudder.demo.data import load_vae
from rudder.demo.judge import CLASSES, DEFAULT, OBJECT, Judge, Network, load
from rudder.demo.trainlib import half, rate

GLYPH = 0.15  # part of the objects that is an individual
FILE, DECODED = 6000, 2000  # pictures in a file of the pool, and how many of them went through the autoencoder too
ROUGH = {"noise": 0.5, "wobble": 1.0}  # at most; latents in deviations of a channel, edges in px
WEIGHTS = {"attribute": 1.5, "color": 0.5, "size": 0.5, "count": 0.5, "axis": 0.5, "background": 0.3, "place": 0.3}
EMA = 0.998


def scenes(rng: np.random.Generator, n: int, pairs: float = 0.5) -> world.Scenes:
    """n scenes without the world's habits: every shape with every attribute, colour and texture, equally often; all
    individuals, also the strangers; both objects may have one colour."""
    s = world.sample(rng, n, pairs, relation=rng.integers(len(world.RELATIONS), size=n))
    both = (n, 2)
    glyph = rng.random(both) < GLYPH
    nouns, shapes = len(world.NOUNS), len(world.SHAPES)
    s.shape[:] = np.where(glyph, rng.integers(shapes, nouns, size=both), rng.integers(shapes, size=both))
    s.attribute[:] = np.where(glyph, 0, rng.integers(len(world.ATTRIBUTES), size=both))
    s.texture[:] = np.where(glyph, 0, rng.integers(len(world.TEXTURES), size=both))
    s.color[:] = rng.integers(len(world.COLORS), size=both)
    return s


def slots(s: world.Scenes) -> np.ndarray:
    """Which object each slot holds, [B, 2]: the first one is slot 0 unless it is right of or below the other."""
    swap = (s.count == 2) & (s.relation % 2 == 1)
    return np.stack([swap, ~swap], 1).astype(int)


def labels(s: world.Scenes) -> dict[str, Tensor]:
    """What each head should say: int64 [B] or [B, 2], and -1 where there is nothing to say (no second object)."""
    order, pair = slots(s), s.count == 2
    out = {"count": s.count - 1, "axis": np.where(pair, s.relation // 2, -1), "background": s.background}
    there = np.stack([np.ones_like(pair), pair], 1)
    out |= {k: np.where(there, np.take_along_axis(getattr(s, k), order, 1), -1) for k in OBJECT}
    return {k: torch.from_numpy(v.astype(np.int64)) for k, v in out.items()}


def rendered(seed: int, n: int, pairs: float = 0.5, chunk: int = 500) -> dict[str, Tensor]:
    """n balanced pictures `images` [n, 3, 64, 64] uint8, what they show (`labels`), and `place` [n, 2, 64]: the part of
    each slot's visible area in each cell of an 8x8 grid, summing to 1 (0 for a slot without object)."""
    s, images, place = scenes(np.random.default_rng([world.VERSION, 77, seed]), n, pairs), [], []
    for at in range(0, n, chunk):
        part = s[at:at + chunk]
        picture, mask = draw.render(part)
        mask = np.take_along_axis(mask, slots(part)[..., None, None], 1)
        cells = mask.reshape(len(part), 2, 8, 8, 8, 8).mean((3, 5)).reshape(len(part), 2, 64)
        images.append(torch.from_numpy(picture).permute(0, 3, 1, 2))
        place.append(torch.from_numpy(cells / np.maximum(cells.sum(2, keepdims=True), 1e-6)))
    return {"images": torch.cat(images), "place": torch.cat(place)} | labels(s)


# ---------------------------------------------------------------- what a latent diffusion model does to a picture


def autoencoder(folder: Path):
    """The autoencoder that demo/vae.py left in `folder` (else the shipped one), and the deviation of its latents
    [1, 16, 1, 1]."""
    vae = load_vae(folder)
    return vae["model"].to(memory_format=torch.channels_last), vae["std"]


@torch.no_grad()
def round_trip(vae, images: Tensor, generator: torch.Generator, noise: float = 0.0, wobble: float = 0.0) -> Tensor:
    """Pictures [N, 3, 64, 64] uint8 through `vae` (what autoencoder() gives), edges wobbling by up to `wobble` px. The
    latents get noise of a deviation drawn uniformly up to `noise` for each picture, every other time a smooth one."""
    model, deviation = vae
    out = []
    for b in images.split(50):
        x = warp(b.float() / 127.5 - 1, wobble * torch.rand(len(b), generator=generator), generator)
        with half():
            z = model.encode(x.contiguous(memory_format=torch.channels_last)).float()
            grain = torch.randn(z.shape, generator=generator)
            grain[::2] = 3 * functional.avg_pool2d(functional.pad(grain[::2], (1, 1, 1, 1), mode="replicate"), 3, 1)
            strength = noise * torch.rand(len(b), 1, 1, 1, generator=generator)
            y = model.decode(z + deviation * strength * grain).float()
        out.append(((y + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    return torch.cat(out)


def warp(x: Tensor, amount: Tensor, generator: torch.Generator, step: int = 5) -> Tensor:
    """Pictures [B, C, 64, 64] with wobbly edges: each point moves by about `amount` [B] px, its neighbours `step` px
    away by another way."""
    coarse = torch.randn(len(x), 2, 64 // step + 3, 64 // step + 3, generator=generator)
    flow = functional.interpolate(coarse, size=(64, 64), mode="bicubic", align_corners=True)
    flow = flow * (amount / 32).view(-1, 1, 1, 1)  # grid_sample counts in half pictures
    axis = (torch.arange(64) + 0.5) / 32 - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), 2) + flow.movedim(1, 3)
    return functional.grid_sample(x, grid, align_corners=False, padding_mode="border")


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures [B, 3, 64, 64] in 0..1, each moved by up to 3 px, recoloured by a few percent, and some of them wobbly
    (up to 1 px), blurred or noisy (deviation up to 0.08)."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(len(x), *shape, generator=generator)

    top, left = torch.randint(7, (2, len(x)), generator=generator).tolist()
    padded = functional.pad(x, (3, 3, 3, 3), mode="replicate")
    x = torch.stack([padded[i, :, a:a + 64, b:b + 64] for i, (a, b) in enumerate(zip(top, left))])
    x = warp(x, uniform(-1, 1).clamp(min=0), generator, int(torch.randint(4, 11, (), generator=generator)))
    x = (x - 0.5) * (1 + 0.06 * torch.randn(len(x), 3, 1, 1, generator=generator)) + 0.5  # contrast and colour
    x = x + 0.025 * torch.randn(len(x), 1, 1, 1, generator=generator)
    kernel = torch.tensor([0.03, 0.24, 0.46, 0.24, 0.03])
    soft = functional.conv2d(x, torch.outer(kernel, kernel).expand(3, 1, 5, 5), padding=2, groups=3)
    x = torch.lerp(x, soft, uniform(-1.5, 1, 1, 1, 1).clamp(min=0))
    x = x + uniform(-0.08, 0.08, 1, 1, 1).clamp(min=0) * torch.randn(x.shape, generator=generator)
    return x.clamp(0, 1)


# ---------------------------------------------------------------- training


def pool(arg: argparse.Namespace) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The training pictures and their labels, rendered once and kept in --out; the pictures that went through the
    autoencoder, and which ones those are."""
    vae, parts, decoded = autoencoder(arg.vae), [], []
    for i in range(1, arg.files + 1):
        file, soft = arg.out / f"pool-{i}.pt", arg.out / f"decoded-{i}.pt"
        if not file.exists():
            keep(rendered(i, FILE), file)
        parts.append(torch.load(file, weights_only=True))
        if not soft.exists():
            keep(round_trip(vae, parts[-1]["images"][:DECODED], torch.Generator().manual_seed(i), **ROUGH), soft)
        decoded.append(torch.load(soft, weights_only=True))
    which = torch.cat([FILE * i + torch.arange(DECODED) for i in range(arg.files)])
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, torch.cat(decoded), which


def keep(state, file: Path) -> None:
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)  # never a half-written file


def loss_of(logits: dict[str, Tensor], attention: Tensor, truth: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum of the heads' cross entropies, and the accuracy of each in percent."""
    total, accuracy = torch.zeros(()), {}
    for name, value in logits.items():
        flat, said = value.float().flatten(0, -2), truth[name].flatten()
        total = total + WEIGHTS.get(name, 1.0) * functional.cross_entropy(flat, said, ignore_index=-1)
        there = said >= 0
        accuracy[name] = 100 * (flat.argmax(1) == said)[there].float().mean().item()
    place = truth["place"].float()
    missed = -(place * attention.float().log_softmax(2)).sum(2)
    return total + WEIGHTS["place"] * missed.sum() / place.sum(), accuracy


def train(arg: argparse.Namespace) -> None:
    torch.manual_seed(arg.seed)
    arg.out.mkdir(parents=True, exist_ok=True)
    data, decoded, which = pool(arg)
    net = load(arg.start).network.requires_grad_() if arg.start else Network()
    net = net.to(memory_format=torch.channels_last).train()
    adam = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    ema = {k: v.clone() for k, v in net.state_dict().items()}
    step, before, log, path = 0, 0.0, [], arg.out / "judge.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        net.load_state_dict(saved["net"])
        adam.load_state_dict(saved["adam"])
        ema, step, before, log = saved["ema"], saved["step"], saved["seconds"], saved["log"]
    generator = torch.Generator().manual_seed(arg.seed * 7919 + step)
    start = kept = time.time()
    progress, rows = before / (60 * arg.minutes), []
    soft = int(arg.batch * arg.decoded)
    while progress < 1:
        for group in adam.param_groups:
            group["lr"] = rate(progress, arg.lr, 0.1)
        at = torch.randint(len(decoded), (soft,), generator=generator)
        clean = torch.randint(len(data["images"]), (arg.batch - soft,), generator=generator)
        images = torch.cat([decoded[at], data["images"][clean]]).float() / 255
        index = torch.cat([which[at], clean])
        x = augment(images, generator).contiguous(memory_format=torch.channels_last)
        with half():
            logits, attention, _, _ = net(x)
        loss, accuracy = loss_of(logits, attention, {k: v[index] for k, v in data.items() if k != "images"})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        adam.step()
        adam.zero_grad()
        step += 1
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in net.state_dict().items():
                if v.is_floating_point():
                    ema[k].lerp_(v, 1 - decay)
        rows.append({"loss": loss.item()} | accuracy)
        seconds = before + time.time() - start
        progress = seconds / (60 * arg.minutes)
        if step % 100 == 0:
            means = {k: round(float(np.nanmean([r[k] for r in rows])), 3) for k in rows[0]}
            log, rows = [*log, {"step": step, "seconds": round(seconds)} | means], []
            print(log[-1], flush=True)
        if time.time() - kept > 120 or progress >= 1:
            keep({"net": net.state_dict(), "adam": adam.state_dict(), "ema": ema, "step": step, "seconds": seconds,
                  "log": log}, path)
            kept = time.time()
    export(arg, net.config, ema, {"step": step, "seconds": round(seconds), "log": log})


def export(arg: argparse.Namespace, config: dict, state: dict[str, Tensor], made: dict) -> None:
    """The averaged weights as a half-precision file; temperatures are 1 until `validate` sets them."""
    weights = {k: v.half().contiguous() for k, v in state.items() if v.is_floating_point()}
    about = {"config": config, "world": world.VERSION, "temperature": {}, "seed": arg.seed, "batch": arg.batch,
             "lr": arg.lr, "pictures": arg.files * FILE, "commit": commit()} | made
    save_file(weights, str(arg.file), metadata={k: json.dumps(v) for k, v in about.items()})


# ---------------------------------------------------------------- validation


def temperature(logits: Tensor, said: Tensor) -> float:
    """The divisor of logits [N, K] that makes the classes `said` [N] likeliest, between 1/3 and 3: a head without a
    mistake would have it fall to 0."""
    grid = torch.logspace(-1, 1, 201, base=3)
    losses = torch.stack([functional.cross_entropy(logits / t, said) for t in grid])
    return round(grid[losses.argmin()].item(), 3)


def calibration_error(probabilities: Tensor, said: Tensor, bins: int = 15) -> float:
    """Expected calibration error in percent (arXiv 1706.04599 eq. 3): how far confidence is from accuracy, on average
    over bins that hold equally many pictures. probabilities [N, K], said [N]."""
    confidence, guess = probabilities.max(1)
    order = confidence.argsort()
    gap = (guess == said).float()[order] - confidence[order]
    return 100 * sum(part.sum().abs().item() for part in gap.tensor_split(bins)) / len(said)


def spoken(logits: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, K] and classes [N] of what there is to say, from [B, K] or [B, 2, K]."""
    flat, said = logits.flatten(0, -2), said.flatten()
    return flat[said >= 0], said[said >= 0]


def confusions(logits: Tensor, said: Tensor, names: tuple, n: int = 5) -> list[str]:
    """The n most frequent mistakes: 'drawn read as read: how many of how many'."""
    table = torch.zeros(len(names), len(names), dtype=torch.long)
    table.index_put_((said, logits.argmax(1)), torch.ones_like(said), accumulate=True)
    total = table.sum(1)
    wrong = table - torch.diag(table.diag())
    best = wrong.flatten().topk(n).indices.tolist()
    pairs = [(k // len(names), k % len(names)) for k in best]
    return [f"{names[a]} read as {names[b]}: {wrong[a, b]} of {total[a]}" for a, b in pairs if wrong[a, b]]


def truths(s: world.Scenes) -> list[dict]:
    """What score() is asked: everything about each scene, in the order of the scene, not of the slots."""
    out = []
    for i in range(len(s)):
        objects = [{k: CLASSES[k][getattr(s, k)[i, j]] for k in OBJECT} for j in range(s.count[i])]
        relation = {"relation": world.RELATIONS[s.relation[i]]} if s.count[i] == 2 else {}
        out.append({"objects": objects, "background": CLASSES["background"][s.background[i]]} | relation)
    return out


def validate(arg: argparse.Namespace) -> None:
    """Fits the temperatures on one set of fresh pictures, writes them into the file, and measures on another."""
    started, vae, judge = time.time(), autoencoder(arg.vae), load(arg.file)
    generator = torch.Generator().manual_seed(arg.seed)

    # Half of the pictures that calibrate went through the autoencoder, as those that will be judged.
    data = rendered(10**6, arg.n)
    half = arg.n // 2
    images = torch.cat([data["images"][:half], round_trip(vae, data["images"][half:], generator, **ROUGH)])
    logits = judge.logits(images)[0]
    judge = Judge(judge.network, {k: temperature(*spoken(v, data[k])) for k, v in logits.items()}, judge.facts)
    about = judge.facts | {"temperature": judge.temperature}
    with safe_open(str(arg.file), framework="pt") as file:
        weights = {k: file.get_tensor(k) for k in file.keys()}
    save_file(weights, str(arg.file), metadata={k: json.dumps(v) for k, v in about.items()})

    rows, seconds = [], 0.0
    for pairs in (0, 1):
        s = scenes(np.random.default_rng([world.VERSION, 77, 10**6 + 1 + pairs]), arg.n, pairs)
        data, asked = rendered(10**6 + 1 + pairs, arg.n, pairs), truths(s)
        clean = data["images"].float() / 255
        noisy = {f"noise {d}": (clean + d * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
                 for d in (0.03, 0.06)}
        seen = {"clean": clean, "autoencoder": round_trip(vae, data["images"], generator).float() / 255,
                "rough": round_trip(vae, data["images"], generator, **ROUGH).float() / 255} | noisy
        for name, pictures in seen.items():
            clock = time.process_time()  # the machine may have other work
            logits, *rest = judge.logits(pictures)
            seconds += time.process_time() - clock
            score = judge.read(logits, *rest).score(asked)
            row = {"pictures": ("one object, ", "two objects, ")[pairs] + name}
            for head, value in logits.items():
                value, said = spoken(value, data[head])
                if len(said):
                    row[head] = 100 * (value.argmax(1) == said).float().mean().item()
                    row[f"{head} ece before"] = calibration_error(value.softmax(1), said)
                    row[f"{head} ece"] = calibration_error((value / judge.temperature[head]).softmax(1), said)
                    if head in ("shape", "attribute"):
                        row[f"{head} confusions"] = confusions(value, said, CLASSES[head])
            row |= {k: 100 * score[k].mean().item() for k in ("relation", "all") if k in score}
            rows.append(row)
            print(row, flush=True)
    report(arg, judge, rows, 10 * arg.n / seconds, time.time() - started)


def report(arg: argparse.Namespace, judge: Judge, rows: list[dict], speed: float, wall: float) -> None:
    """results/judge.md and .json: a Table, its confusions, its calibration, and the log of the training."""
    heads = ("shape", "color", "texture", "attribute", "size", "count", "axis", "relation", "background", "all")
    columns = {"pictures": ("pictures", "")} | {k: (k, ".1f") for k in heads}
    made = {k: v for k, v in judge.facts.items() if k not in ("log", "temperature", "config")}
    table = Table("judge", "How far to trust the judge: percent right on fresh pictures", columns, rows, notes=[
        f"{arg.n} pictures a row, of every shape with every attribute, colour and texture equally often, "
        f"{GLYPH:.0%} individuals. What is said of objects is counted object by object, the rest picture by picture.",
        "relation: the right axis and the right order, as score() tells them; all: everything is right.",
        f"autoencoder: encoded and decoded; rough: edges wobbling by up to {ROUGH['wobble']} px before, and noise of "
        f"up to {ROUGH['noise']} deviations on the latents; noise: of that deviation on pixels in 0..1.",
        *(f"{r['pictures']}, {head}: {'; '.join(r[f'{head} confusions']) or 'no mistakes'}"
          for r in rows if r["pictures"].endswith(("clean", "rough")) for head in ("attribute", "shape")),
    ], facts={
        "trained": ", ".join(f"{k} {v}" for k, v in made.items()),
        "parameters": sum(p.numel() for p in judge.network.parameters()),
        "temperature": ", ".join(f"{k} {v}" for k, v in judge.temperature.items()),
        "speed": f"{speed:.0f} pictures a second of CPU time, one thread",
    } | facts(time.time() - wall, False) | {"command": "python -m bench.train_judge validate"})
    table.save(RESULTS)
    errors = ["", "## Calibration", "", "Expected calibration error in percent, before -> after the temperatures.", "",
              "| pictures | " + " | ".join(CLASSES) + " |", "|---" * (len(CLASSES) + 1) + "|"]
    for r in rows:
        cells = [f"{r[f'{k} ece before']:.2f} -> {r[f'{k} ece']:.2f}" if k in r else "" for k in CLASSES]
        errors.append("| " + " | ".join([r["pictures"], *cells]) + " |")
    (RESULTS / "judge.md").write_text(table.markdown() + "\n".join([*errors, ""]), encoding="utf-8")
    record = json.loads((RESULTS / "judge.json").read_text())
    record |= {k: judge.facts[k] for k in ("config", "log")} | {"temperature": judge.temperature}
    (RESULTS / "judge.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train", "validate"))
    parser.add_argument("--vae", type=Path, required=True, help="folder with vae.pt")
    parser.add_argument("--out", type=Path, help="folder for pool and checkpoint")
    parser.add_argument("--file", type=Path, default=DEFAULT, help="the judge's file")
    parser.add_argument("--start", type=Path, help="a judge to start from")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--files", type=int, default=8, help=f"of {FILE} training pictures")
    parser.add_argument("--decoded", type=float, default=0.4, help="part of a batch that went through the autoencoder")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--n", type=int, default=2000, help="pictures in a row of the validation")
    arg = parser.parse_args()
    torch.set_num_threads(1)
    {"train": train, "validate": validate}[arg.what](arg)


if __name__ == "__main__":
    main()

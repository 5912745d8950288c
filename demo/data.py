"""Encodes pictures of the shapes world once, for both demo models to learn from.

    COMFYUI_PATH=... python -m demo.data --pictures 60000 --out /tmp/rudder-train    # from the repository root

Writes shards latents-<seed>.npy in --out: [n, 16, 16, 16] float16, normalised per channel; and in latents.txt of which
world and autoencoder they are. The scenes are not kept: they follow from the seed, and captions are written anew
whenever a picture is shown.
"""
from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from . import draw, words, world
from .trainlib import MODELS, half, host, in_parallel, to_input

SHARD = 2500


def scenes_of(seed: int) -> world.Scenes:
    return world.sample(np.random.default_rng([world.VERSION, 1000, seed]), SHARD)


def cells(s: world.Scenes) -> np.ndarray:
    """What is in each of 8x8 cells of a picture, as if objects were discs: indices of noun, attribute and texture,
    [B, 3, 8, 8] int64; -1 where nothing is."""
    centre = np.arange(4, world.SIZE, 8)
    out = np.full((len(s), 3, 8, 8), -1)
    for j in range(2):
        square = (centre - s.x[:, j, None])[:, None] ** 2 + (centre - s.y[:, j, None])[:, :, None] ** 2
        inside = (square < s.radius[:, j, None, None] ** 2) & (s.count > j)[:, None, None]
        what = np.stack([s.shape[:, j], s.attribute[:, j], s.texture[:, j]], 1)
        out = np.where(inside[:, None], what[..., None, None], out)
    return out


def load_vae(out: Path) -> dict:
    """The autoencoder of demo.vae in --out, or the shipped one where there is none: 'model', 'saved' (what demo.vae
    writes), and 'mean' and 'std' of the latents, [1, 16, 1, 1]."""
    from comfy.ldm.models.autoencoder import AutoencoderKL
    if (out / "vae.pt").exists():
        saved = torch.load(out / "vae.pt", weights_only=True)
    else:
        with safe_open(str(MODELS / "shapes-vae.safetensors"), framework="pt") as file:
            about = json.loads(file.metadata()["rudder"])
            saved = {"config": about["vae"], **about["latent"], "psnr": about["training"]["psnr"],
                     "state": {k: file.get_tensor(k).float() for k in file.keys()}}
    model = AutoencoderKL(**saved["config"])
    model.load_state_dict(saved["state"])
    stats = {k: torch.tensor(saved[k]).view(1, -1, 1, 1) for k in ("mean", "std")}
    return {"model": model.eval().requires_grad_(False), "saved": saved, **stats}


def stamped(out: Path, vae: dict) -> None:
    """Note beside the shards whose they are: of which world and autoencoder.

    Raises:
        SystemExit: they are of others, or nobody knows of which.
    """
    state = vae["saved"]["state"]
    weights = b"".join(state[name].float().cpu().numpy().tobytes() for name in sorted(state))
    note, file = f"{world.VERSION} {hashlib.sha256(weights).hexdigest()}\n", out / "latents.txt"
    if not file.exists() and not any(out.glob("latents-????.npy")):
        file.write_text(note)
    if not file.exists() or file.read_text() != note:
        raise SystemExit(f"Latents in {out} belong to another world or autoencoder: delete latents*, run demo.data.")


def work(rank: int, processes: int, arg: argparse.Namespace) -> None:
    host()
    vae = load_vae(arg.out)
    stamped(arg.out, vae)
    for seed in range(rank, -(-arg.pictures // SHARD), processes):
        file = arg.out / f"latents-{seed:04}.npy"
        if file.exists():
            continue
        images = torch.from_numpy(draw.render(scenes_of(seed))[0]).permute(0, 3, 1, 2)
        with torch.no_grad(), half():
            z = torch.cat([vae["model"].encode(to_input(b)).float() for b in images.split(50)])
        np.save(file.with_suffix(".part.npy"), ((z - vae["mean"]) / vae["std"]).half().numpy())
        file.with_suffix(".part.npy").replace(file)  # never a half-written shard


class Pictures:
    """The shards in a folder, as latents and captions; picks up new shards when told to."""

    def __init__(self, out: Path, tokenizer, length: int, rng: np.random.Generator, slip: float):
        self.out, self.tokenizer, self.length, self.rng, self.slip = out, tokenizer, length, rng, slip
        self.shards: dict[int, tuple[np.ndarray, world.Scenes]] = {}
        self.look()
        if not self.shards:
            raise SystemExit(f"No latents in {out}: run demo.vae, then demo.data.")

    def look(self) -> None:
        for file in sorted(self.out.glob("latents-????.npy")):
            seed = int(file.stem[-4:])
            if seed not in self.shards:
                self.shards[seed] = np.load(file), scenes_of(seed)

    def batch(self, n: int, dropout: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents [n, 16, 16, 16], tokens [n, length], a part `dropout` of them without a prompt, and the truth of
        `cells` [n, 3, 8, 8]."""
        z, texts, truth = [], [], []
        seeds = self.rng.choice(list(self.shards), n)
        for seed in np.unique(seeds):
            latents, scenes = self.shards[seed]
            at = self.rng.integers(SHARD, size=(seeds == seed).sum())
            z.append(latents[at])
            truth.append(cells(scenes[at]))
            texts += words.captions(self.rng, scenes[at], self.slip)
        texts = ["" if self.rng.random() < dropout else t for t in texts]
        ids = self.tokenizer(texts, padding="max_length", max_length=self.length, truncation=True)["input_ids"]
        return torch.from_numpy(np.concatenate(z)).float(), torch.tensor(ids), torch.from_numpy(np.concatenate(truth))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=60000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arg = parser.parse_args()
    arg.out.mkdir(parents=True, exist_ok=True)
    in_parallel(work, arg.processes, arg)


if __name__ == "__main__":
    main()

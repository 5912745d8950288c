"""Packs a training checkpoint into the files that the pack ships: fp16 weights, configuration in the metadata; the
model with its text encoder in one file, the autoencoder that the models share in another.

    COMFYUI_PATH=... python -m demo.export unet --out /tmp/rudder-train [--file demo/models/shapes-unet.safetensors]
"""
from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import torch
from safetensors.torch import save_file

from .data import load_vae
from .trainlib import MODELS, host, rendered, to_input


def preview_factors(vae, mean: list[float], std: list[float]) -> list[list[float]]:
    """Least squares from normalised latents to RGB in -1..1: the host's quick previews while sampling."""
    x = to_input(rendered(0, 128)[0])
    with torch.no_grad():
        z = vae.encode(x)
    z = (z - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    rows, rgb = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (z, torch.nn.functional.avg_pool2d(x, 4)))
    return [[round(v, 4) for v in row] for row in torch.linalg.lstsq(rows, rgb).solution.tolist()]


def pack(kind: str, out: Path, file: Path) -> None:
    host()
    train = torch.load(out / f"{kind}.pt", map_location="cpu", weights_only=True)
    vae = load_vae(out)
    saved = vae["saved"]
    weights = {k: train["ema"].get(k, v) for k, v in train["net"].items()}
    tensors = {f"{kind}.{k[4:]}": v for k, v in weights.items() if k.startswith("net.")}
    tensors |= {"text.clip_l.transformer." + k[5:]: v for k, v in weights.items() if k.startswith("text.")}
    tensors["text.clip_l.logit_scale"] = torch.tensor(4.6055)
    config = train["config"]
    autoencoder = {"vae": config.pop("vae"), "latent": {"mean": saved["mean"], "std": saved["std"]},
                   "training": {"psnr": round(saved["psnr"], 2), "world": train["world"]}}
    config["latent"]["rgb"] = preview_factors(vae["model"], saved["mean"], saved["std"])
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=MODELS)
    earlier = train.get("earlier", {})  # of the model that this one went on from
    facts = {"steps": train["step"] + earlier.get("steps", 0), "seed": train["seed"], "slip": train["slip"],
             "minutes": round(train["seconds"] / 60 + earlier.get("minutes", 0), 1),
             "commit": git.stdout.strip(), "world": train["world"]}
    save(file, tensors, config | {"training": facts})
    save(file.with_name("shapes-vae.safetensors"), saved["state"], autoencoder)
    print(facts)


def save(file: Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    small = {k: v.to(torch.float16).contiguous() for k, v in tensors.items()}
    save_file(small, str(file), metadata={"rudder": json.dumps(metadata), "format": "pt"})
    parameters = sum(v.numel() for v in tensors.values())
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, {parameters / 1e6:.2f} M parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=("unet", "flux"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--file", type=Path, help="default: the file that the pack ships")
    arg = parser.parse_args()
    pack(arg.kind, arg.out, arg.file or MODELS / f"shapes-{arg.kind}.safetensors")


if __name__ == "__main__":
    main()

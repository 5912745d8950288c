"""Trains the time predictor of the demo latents, by the code that users train theirs with.

    python -m demo.time --data /tmp/rudder-train            # the shards of demo.data; one thread, a few minutes

Writes demo/models/shapes-time.safetensors, which serves both demo models: they share their latents.
"""
from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "demo" / "models" / "shapes-time.safetensors"


def trainer():
    """guidance.temporal_fit, whatever the folder of the pack is called."""
    sys.path.insert(0, str(ROOT.parent))
    return importlib.import_module(f"{ROOT.name}.guidance.temporal_fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/tmp/rudder-train"), help="folder of demo.data's shards")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FILE)
    arg = parser.parse_args()
    torch.set_num_threads(1)
    files = sorted(arg.data.glob("latents-????.npy"))[: arg.shards]
    if not files:
        raise SystemExit(f"No latents in {arg.data}: run demo.vae, then demo.data.")
    latents = torch.from_numpy(np.concatenate([np.load(file) for file in files]))

    def each(step: int, loss: float) -> None:
        if step % 100 == 0:
            print(f"step {step}, loss {loss:.3f}", flush=True)

    predictor, error = trainer().train(latents, arg.steps, arg.seed, each=each)
    half = {name: weight.half().contiguous() for name, weight in predictor.weights.items()}
    save_file(half, arg.out, {"error": f"{error:.4f}", "steps": str(arg.steps), "latents": str(len(latents))})
    print(f"{arg.out}: off by {error:.4f} of a quarter turn on average, {arg.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

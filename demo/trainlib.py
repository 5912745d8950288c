"""What the training scripts share: the host's modules, initial weights, learning rate, rendered data."""
from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from . import draw, words, world

MODELS = Path(__file__).parent / "models"
LOG = MODELS / "training-log.json"


def host():
    """host/demo.py with ComfyUI booted on the CPU: whoever trains on a GPU moves the modules there. COMFYUI_PATH names
    the ComfyUI folder."""
    folder = os.environ.get("COMFYUI_PATH", "")
    if not (Path(folder) / "comfy").is_dir():
        raise SystemExit("Set COMFYUI_PATH to a ComfyUI folder (the one that holds comfy/).")
    sys.path.insert(0, folder)
    arguments, sys.argv = sys.argv, sys.argv[:1]  # ComfyUI reads the command line when it is imported
    import comfy.cli_args
    sys.argv = arguments
    comfy.cli_args.args.cpu = comfy.cli_args.args.use_pytorch_cross_attention = True
    spec = importlib.util.spec_from_file_location("rudder_host_demo", Path(__file__).parent.parent / "host" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def half(device: str = "cpu") -> torch.autocast:
    """Autocast to bfloat16 where the machine computes in it: on a processor without such instructions it takes more
    than twice as long as fp32, and there this does nothing."""
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or torch.cpu._is_avx512_bf16_supported())


def plain_attention() -> None:
    """Give the host's networks attention out of matrix products while they train on a CPU: torch's fused
    kernel takes three times as long going backward."""
    import comfy.clip_model
    import comfy.ldm.flux.math
    import comfy.ldm.modules.attention as attention
    import comfy.model_management

    def plain(q, k, v, heads, mask=None, skip_reshape=False, **_):
        if not skip_reshape:
            q, k, v = (t.reshape(len(t), -1, heads, t.shape[-1] // heads).transpose(1, 2) for t in (q, k, v))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)

    attention.optimized_attention = attention.optimized_attention_masked = plain
    comfy.ldm.flux.math.optimized_attention = plain
    comfy.model_management.in_training = True  # the host then applies rotary positions in torch
    comfy.clip_model.optimized_attention_for_device = lambda *_, **__: plain


def initialise(module: torch.nn.Module, zero: tuple[str, ...] = ()) -> torch.nn.Module:
    """The host leaves weights unset (it expects a file): give every layer torch's own initial weights, and zero to
    the layers whose name ends with one of `zero`, so that residual branches start silent."""
    kinds = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.RMSNorm,
             torch.nn.Embedding)
    for name, m in module.named_modules():
        for kind in kinds:
            if isinstance(m, kind):
                kind.reset_parameters(m)
        if zero and name.endswith(zero):
            for p in m.parameters():
                torch.nn.init.zeros_(p)
    return module.requires_grad_(True).train()


def adopt(module: torch.nn.Module, file: Path, prefix: str) -> int:
    """Start from a shipped model: copy its tensors under `prefix` wherever name and shape agree. Returns how many."""
    own, taken = module.state_dict(), 0
    with safe_open(str(file), framework="pt") as saved, torch.no_grad():
        for key in saved.keys():
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name in own and saved.get_slice(key).get_shape() == list(own[name].shape):
                own[name].copy_(saved.get_tensor(key))
                taken += 1
    return taken


def rate(progress: float, peak: float, warm: float = 0.03) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak. progress in 0..1."""
    if progress < warm:
        return peak * progress / warm
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (min(progress, 1) - warm) / (1 - warm))))


def rendered(seed: int, n: int, pairs: float = 0.25) -> tuple[torch.Tensor, list[str]]:
    """n pictures [n, 3, 64, 64] uint8 and their captions."""
    rng = np.random.default_rng([world.VERSION, seed])
    scenes = world.sample(rng, n, pairs)
    images, _ = draw.render(scenes)
    return torch.from_numpy(images).permute(0, 3, 1, 2), words.captions(rng, scenes)


def to_input(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> the autoencoder's -1..1."""
    return images.to(torch.float32).div_(127.5).sub_(1)


def in_parallel(work, processes: int, *args, port: int = 29517) -> None:
    """Run work(rank, processes, *args) in that many single-threaded processes that can average gradients. On a few
    shared CPU cores this beats one process with many threads, which waits for its slowest thread at every layer."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.multiprocessing.spawn(_worker, (work, processes, *args), nprocs=processes)


def _worker(rank: int, work, processes: int, *args) -> None:
    torch.set_num_threads(1)
    if processes > 1 and hasattr(os, "sched_setaffinity"):  # two busy processes on one core would halve both
        mine = sorted(os.sched_getaffinity(0))  # fewer than the machine has, in a container
        os.sched_setaffinity(0, {mine[rank % len(mine)]})
    if processes > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=processes)
    work(rank, processes, *args)
    if processes > 1:
        torch.distributed.destroy_process_group()


def average(tensors: list[torch.Tensor]) -> None:
    """Average tensors over the processes, in place, in one message; those of one process are left as they are."""
    if not torch.distributed.is_initialized():
        return
    flat = torch.cat([t.flatten() for t in tensors])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for t, mean in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))


class Log:
    """A JSON log of named runs; each `add` rewrites the file, so an interrupted run keeps what it logged."""

    def __init__(self, run: str, path: Path = LOG, **header):
        self.path, self.run, self.start = path, run, time.time()
        self.data = json.loads(path.read_text()) if path.exists() else {}
        self.data.setdefault(run, {"steps": []}).update(header)

    def add(self, **row) -> None:
        row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
        print(self.run, row, flush=True)
        self.data[self.run]["steps"].append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data).replace("}, {", "},\n{") + "\n")  # one row a line

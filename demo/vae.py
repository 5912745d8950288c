"""Trains the autoencoder of the demo models: 64x64 RGB <-> 16x16x16, the host's AutoencoderKL.

    COMFYUI_PATH=... python -m demo.vae --minutes 11 --out /tmp/rudder-train      # from the repository root

Writes vae.pt in --out: weights, configuration, and the mean and deviation of each latent channel.
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from .trainlib import Log, adopt, average, half, host, in_parallel, initialise, rate, rendered, to_input

CONFIG = {"embed_dim": 16, "ddconfig": {
    "double_z": True, "z_channels": 16, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 2],
    "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}}
KL, NOISE = 1e-4, 0.05  # a whisper of KL keeps latents bounded; noise makes the decoder tolerant of imperfect ones


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """dB, pictures in -1..1."""
    return float(-10 * torch.log10(((a.clamp(-1, 1) - b) ** 2).mean() / 4))


def loss_of(vae, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, logvar = vae.quant_conv(vae.encoder(x)).float().chunk(2, 1)
    z = mean + NOISE * mean.detach().std() * torch.randn_like(mean)
    y = vae.decoder(vae.post_quant_conv(z)).float()
    # Pictures are mostly flat: weigh pixels near an edge five times, or the edges come last.
    edge = torch.nn.functional.max_pool2d((x - torch.nn.functional.avg_pool2d(x, 3, 1, 1)).abs().amax(1, True), 3, 1, 1)
    weight = 1 + 4 * (edge > 0.08)
    error = (weight * ((y - x).abs() + (y - x) ** 2)).mean()
    # The host decodes the mean, so the deviation is not learnt; only the mean is kept near zero.
    return error + KL * (mean**2).mean() + 0 * logvar.mean(), y


def work(rank: int, processes: int, arg: argparse.Namespace) -> None:
    host()
    from comfy.ldm.models.autoencoder import AutoencoderKL
    torch.manual_seed(arg.seed)
    vae = initialise(AutoencoderKL(**CONFIG), zero=("conv2", "proj_out"))
    if arg.start:
        adopt(vae, arg.start, "vae.")
    if (arg.out / "vae.pt").exists():  # go on from there
        vae.load_state_dict(torch.load(arg.out / "vae.pt", weights_only=True)["state"])
    torch.manual_seed(arg.seed + 1 + rank)  # same weights, different pictures
    data, _ = rendered(arg.seed + 10 + rank, arg.pictures)
    parameters = list(vae.parameters())
    adam = torch.optim.AdamW(parameters, betas=(0.9, 0.97), weight_decay=1e-4)
    size = sum(p.numel() for p in parameters)
    log = Log("vae", seed=arg.seed, batch=arg.batch, parameters=size) if rank == 0 else None
    start, step = time.time(), 0
    clock = torch.zeros(1)  # progress, averaged over the processes so that they agree when to stop
    while clock.item() < 1:
        for group in adam.param_groups:
            group["lr"] = rate(clock.item(), arg.lr)
        crop = clock.item() < arg.crops  # most of a picture is flat: first learn from crops around the objects
        x = to_input(data[torch.randint(len(data), (arg.batch * (3 if crop else 1) // processes,))])
        if crop:
            top, left = torch.randint(2, 31, (2,)).tolist()
            x = x[..., top:top + 32, left:left + 32].contiguous()
        with half():
            loss, y = loss_of(vae, x)
        loss.backward()
        clock.fill_((time.time() - start) / (60 * arg.minutes))
        average([p.grad for p in parameters] + [clock])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        step += 1
        if step % 50 == 0 and log:
            log.add(step=step, seconds=time.time() - start, loss=loss.item(), psnr_batch=psnr(y.detach(), x))
    if log:
        vae.eval()
        fresh = to_input(rendered(arg.seed, 256)[0])
        with torch.no_grad():
            z = torch.cat([vae.encode(b) for b in fresh.split(32)])
            y = torch.cat([vae.decode(b) for b in z.split(32)])
        log.add(step=step, seconds=time.time() - start, psnr_fresh=psnr(y, fresh))
        torch.save({"config": CONFIG, "state": vae.state_dict(), "psnr": psnr(y, fresh),
                    "mean": z.mean((0, 2, 3)).tolist(), "std": z.std((0, 2, 3)).tolist()}, arg.out / "vae.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=11)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--pictures", type=int, default=8000, help="rendered by each process")
    parser.add_argument("--crops", type=float, default=0.75, help="part of the time spent on 32x32 crops")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=Path, help="a shipped model whose fitting weights are the initial ones")
    parser.add_argument("--out", type=Path, required=True)
    arg = parser.parse_args()
    arg.out.mkdir(parents=True, exist_ok=True)
    in_parallel(work, arg.processes, arg)


if __name__ == "__main__":
    main()

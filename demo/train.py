"""Trains the first demo model: a cross-attention UNet and its text encoder on the shapes world, in latent space.

    COMFYUI_PATH=... python -m demo.vae   --minutes 9  --out /tmp/rudder-train    # once, from the repository root
    COMFYUI_PATH=... python -m demo.train --minutes 80 --out /tmp/rudder-train    # again to resume
    COMFYUI_PATH=... python -m demo.export --out /tmp/rudder-train                # writes the safetensors file

Epsilon prediction on the host's SD1.5 noise schedule, min-SNR weights, prompt dropout for classifier-free guidance.
The schedule runs on the clock: it ends after --minutes of training, however fast the machine is.
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from .trainlib import Log, average, host, in_parallel, initialise, plain_attention, rate, rendered, to_input

WIDTH = 96  # of the text encoder and of the cross-attention context
UNET = {"image_size": 16, "in_channels": 4, "out_channels": 4, "model_channels": 64, "channel_mult": [1, 2, 2],
        "num_res_blocks": [1, 1, 1], "conv_resample": False, "use_spatial_transformer": True, "context_dim": WIDTH,
        # One transformer a block on 8x8 and 4x4; none on 16x16, where it would double the cost of a step.
        "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1], "transformer_depth_middle": 1,
        "num_heads": 4, "num_head_channels": -1, "legacy": False, "use_linear_in_transformer": False,
        "adm_in_channels": None}
TEXT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH,
        "hidden_act": "quick_gelu", "max_position_embeddings": 77, "layer_norm_eps": 1e-5}
SNR_CAP, PROMPT_DROPOUT, EMA = 5.0, 0.1, 0.999


def configuration(vae: dict, tokenizer) -> dict:
    """What host/demo.py needs to rebuild the model; stored in the file's metadata."""
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {"unet": UNET, "text": TEXT | ids, "vae": vae["config"], "latent": {"mean": vae["mean"], "std": vae["std"]}}


class Networks(torch.nn.Module):
    """The two networks that train together, as the host builds them, in fp32."""

    def __init__(self, demo, config: dict):
        super().__init__()
        import comfy.clip_model
        base = demo.base_model(config)
        self.sigmas = base.model_sampling.sigmas.clone()
        self.unet = initialise(base.diffusion_model, zero=("out_layers.3", "proj_out", "out.2"))
        self.text = initialise(demo.text_class(config["text"])().clip_l.transformer)
        tables = self.text.text_model.embeddings
        torch.nn.init.normal_(tables.token_embedding.weight, std=0.5)
        torch.nn.init.normal_(tables.position_embedding.weight, std=0.02)

        def layer(self, x, mask=None, optimized_attention=None):  # the host's, but not in place: it must differentiate
            x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
            return x + self.mlp(self.layer_norm2(x))
        comfy.clip_model.CLIPLayer.forward = layer

    def forward(self, z: torch.Tensor, tokens: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Min-SNR weighted loss. z [B, 4, 16, 16] normalised latents, tokens [B, 77], t [B] timesteps 0..999."""
        sigma = self.sigmas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(z)
        noisy = (z + sigma * noise) / (1 + sigma**2).sqrt()
        context = self.text(tokens)[0].float()
        error = self.unet(noisy, t, context).float() - noise
        weight = (SNR_CAP * sigma.flatten() ** 2).clamp(max=1)  # min(SNR, cap) / SNR with SNR = 1 / sigma^2
        return (weight * (error**2).mean((1, 2, 3))).mean()


class Pool:
    """Encoded pictures and tokens in memory. Every step a few of the oldest are replaced, so that no picture is seen
    more than a handful of times and rendering costs little."""

    def __init__(self, vae, tokenizer, seed: int, size: int):
        self.vae, self.tokenizer, self.seed, self.size = vae, tokenizer, seed, size
        self.z, self.tokens, self.next = torch.empty(0, 4, 16, 16), torch.empty(0, 77, dtype=torch.long), 0
        while len(self.z) < size:
            self.refresh(min(500, size - len(self.z)))

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        ids = self.tokenizer(texts, padding="max_length", max_length=77, truncation=True)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    @torch.no_grad()
    def refresh(self, n: int) -> None:
        images, texts = rendered(self.seed + self.next, n)
        with torch.autocast("cpu", torch.bfloat16):
            z = torch.cat([self.vae["model"].encode(to_input(b)).float() for b in images.split(50)])
        z = (z - self.vae["mean"]) / self.vae["std"]
        if len(self.z) < self.size:
            self.z, self.tokens = torch.cat([self.z, z]), torch.cat([self.tokens, self.tokenize(texts)])
        else:
            at = torch.arange(self.next, self.next + n) % self.size
            self.z[at], self.tokens[at] = z, self.tokenize(texts)
        self.next += n

    def batch(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        at = torch.randint(self.size, (n,))
        empty = self.tokenize([""])
        return self.z[at], torch.where(torch.rand(n, 1) < PROMPT_DROPOUT, empty, self.tokens[at])


def load_vae(out: Path) -> dict:
    from comfy.ldm.models.autoencoder import AutoencoderKL
    saved = torch.load(out / "vae.pt")
    model = AutoencoderKL(**saved["config"])
    model.load_state_dict(saved["state"])
    stats = {k: torch.tensor(saved[k]).view(1, -1, 1, 1) for k in ("mean", "std")}
    return {"model": model.eval().requires_grad_(False), "saved": saved, **stats}


def work(rank: int, processes: int, arg: argparse.Namespace) -> None:
    demo = host()
    plain_attention()
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(str(Path(__file__).parent / "models" / "tokenizer"))
    vae = load_vae(arg.out)
    torch.manual_seed(arg.seed)
    net = Networks(demo, configuration(vae["saved"], tokenizer))
    named = {k: p for k, p in net.named_parameters() if p.requires_grad and "text_projection" not in k}
    parameters = list(named.values())
    adam = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    ema = {k: p.detach().clone() for k, p in named.items()}
    step, before, path = 0, 0.0, arg.out / "train.pt"
    if path.exists():
        saved = torch.load(path)
        net.load_state_dict(saved["net"], strict=False)
        adam.load_state_dict(saved["adam"])
        ema, step, before = {k: v.detach() for k, v in saved["ema"].items()}, saved["step"], saved["seconds"]
    torch.manual_seed(arg.seed * 7919 + step * processes + rank)  # the same weights, different pictures and noise
    pool = Pool(vae, tokenizer, 10**9 * (1 + rank) + 10**4 * step, arg.pool)
    size = sum(p.numel() for p in parameters)
    log = Log("unet", seed=arg.seed, batch=arg.batch, lr=arg.lr, parameters=size) if rank == 0 else None
    n, losses = arg.batch // processes, []
    start = shown = kept = time.time()
    clock = torch.tensor([before / (60 * arg.minutes)])  # progress, averaged over the processes
    while clock.item() < 1:
        for group in adam.param_groups:
            group["lr"] = rate(clock.item(), arg.lr)
        pool.refresh(arg.fresh)
        z, tokens = pool.batch(n)
        t = ((torch.randperm(n) + torch.rand(n)) / n * 1000).long().clamp(max=999)  # stratified
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(z, tokens, t)
        loss.backward()
        seconds = before + time.time() - start
        clock.fill_(seconds / (60 * arg.minutes))
        average([p.grad for p in parameters] + [clock])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=False)
        step += 1
        if rank == 0:
            losses.append(loss.item())
            decay = min(EMA, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.values()), parameters, 1 - decay)
            if step % 100 == 0:
                log.add(step=step, seconds=seconds, loss=float(np.mean(losses)),
                        images_per_second=100 * arg.batch / (time.time() - shown))
                shown, losses = time.time(), []
            if time.time() - kept > 180 or clock.item() >= 1:
                state = {"net": net.state_dict(), "adam": adam.state_dict(), "ema": ema, "step": step,
                         "seconds": seconds, "seed": arg.seed, "config": configuration(vae["saved"], tokenizer)}
                torch.save(state, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)  # never a half-written checkpoint
                kept = time.time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--pool", type=int, default=8000, help="encoded pictures held by each process")
    parser.add_argument("--fresh", type=int, default=2, help="new pictures a step and process")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arg = parser.parse_args()
    in_parallel(work, arg.processes, arg)


if __name__ == "__main__":
    main()

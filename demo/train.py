"""Trains a demo model and its text encoder on the encoded pictures of the shapes world, in the host's own classes.

    COMFYUI_PATH=... python -m demo.vae   --minutes 9 --out /tmp/rudder-train       # once, from the repository root
    COMFYUI_PATH=... python -m demo.data              --out /tmp/rudder-train
    COMFYUI_PATH=... python -m demo.train unet --minutes 80 --out /tmp/rudder-train # again to resume
    COMFYUI_PATH=... python -m demo.train flux --minutes 99 --out /tmp/rudder-train
    COMFYUI_PATH=... python -m demo.export unet --out /tmp/rudder-train             # writes the safetensors file

Both learn most at high noise: colours and background are most of a latent's variance, so what a prompt says of shape
and attribute is decided where noise / signal is 2 to 12, and below 1 it can be seen without a prompt.

unet: a cross-attention UNet, epsilon prediction on SD1.5's noise schedule, min-SNR weights; above HIGH the error of x0
counts instead, because eps is easy there.
flux: a Flux transformer, rectified flow, logit-normal times shifted to high noise. An auxiliary task, in the spirit of
REPA (arXiv 2410.06940, recalled), shortens the time in which the transformer learns what words mean: its hidden image
tokens must name the noun, attribute and texture at their place. The head that reads them is not shipped. --text starts
from the text encoder of another model, as full-size models share theirs; --teacher also learns from what a trained UNet
predicts for the same noisy latents (at first almost only, in the end not at all): the mean over the pictures that are
possible, where the one picture is mostly chance. --shift moves the times: a transformer that draws what is asked with
sloppy edges errs in the middle of the run.
Prompts are dropped now and then, for classifier-free guidance. The schedule runs on the clock: it ends after --minutes
of training, however fast the machine is.
"""
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from . import world
from .data import Pictures, load_vae, stamped
from .trainlib import MODELS, Log, adopt, average, half, host, in_parallel, initialise, plain_attention, rate

WIDTH, TOKENS = 96, 24  # of the text encoder and of the context; no caption of the world has more than 20 tokens
UNET = {"image_size": 16, "in_channels": 16, "out_channels": 16, "model_channels": 64, "channel_mult": [1, 2, 2],
        "num_res_blocks": [1, 1, 1], "conv_resample": False, "use_spatial_transformer": True, "context_dim": WIDTH,
        # One transformer a block on 8x8 and 4x4; none on 16x16, where it would double the cost of a step.
        "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1], "transformer_depth_middle": 1,
        "num_heads": 4, "num_head_channels": -1, "legacy": False, "use_linear_in_transformer": False,
        "adm_in_channels": None}
# What the host itself finds in the weights of such a file (comfy.model_detection), so that nothing has to be stored.
FLUX = {"image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": WIDTH,
        "context_in_dim": WIDTH, "hidden_size": 256, "num_heads": 2, "mlp_ratio": 4.0, "depth": 2,
        "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True, "guidance_embed": False,
        "txt_ids_dims": []}
TEXT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH,
        "hidden_act": "quick_gelu", "max_position_embeddings": TOKENS, "layer_norm_eps": 1e-5}
SNR_CAP, PROMPT_DROPOUT, EMA = 5.0, 0.1, 0.999
HIGH = 2.0  # sigma from which the UNet's loss is that of x0, up to a factor
SHIFT = 0.8  # of the transformer's logit-normal times; see the module's docstring
TAUGHT = 0.7  # the time up to which the teacher leads: above, a transformer that has learnt the words is the better one
KINDS = (len(world.NOUNS), len(world.ATTRIBUTES), len(world.TEXTURES))  # what the auxiliary task tells apart
NAMING = 0.05  # weight of the auxiliary task


def configuration(kind: str, vae: dict, tokenizer) -> dict:
    """What host/demo.py needs to rebuild the model; stored in the file's metadata."""
    ids = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {kind: UNET if kind == "unet" else FLUX, "text": TEXT | ids, "vae": vae["config"],
            "latent": {"mean": vae["mean"], "std": vae["std"]}}


class Networks(torch.nn.Module):
    """The two networks that train together, as the host builds them, in fp32."""

    def __init__(self, demo, config: dict):
        super().__init__()
        import comfy.clip_model
        base = demo.base_model(config)
        zero = ("out_layers.3", "proj_out", "out.2",  # the UNet's, then the transformer's
                "_mod.lin", "modulation.lin", "adaLN_modulation.1", "final_layer.linear")
        self.net = initialise(base.diffusion_model, zero)
        self.sampling = base.model_sampling
        self.text = initialise(demo.text_class(config["text"])().clip_l.transformer)
        tables = self.text.text_model.embeddings
        torch.nn.init.normal_(tables.token_embedding.weight, std=0.5)
        torch.nn.init.normal_(tables.position_embedding.weight, std=0.02)
        self.forward = self.flow if "flux" in config else self.epsilon
        self.taught, self.shift = None, SHIFT  # the teacher's `velocity`
        if "flux" in config:
            self.head = torch.nn.Sequential(torch.nn.LayerNorm(FLUX["hidden_size"]),
                                            torch.nn.Linear(FLUX["hidden_size"], sum(KINDS)))
            self.net.double_blocks[-1].register_forward_hook(lambda *args: setattr(self, "hidden", args[-1][0]))
        for module in self.net.modules():  # the host adds to a block's input in place: the norm keeps its own copy
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, args: (args[0].clone(),))

        def layer(self, x, mask=None, optimized_attention=None):  # the host's, but not in place: it must differentiate
            x = x + self.self_attn(self.layer_norm1(x), mask, optimized_attention)
            return x + self.mlp(self.layer_norm2(x))
        comfy.clip_model.CLIPLayer.forward = layer

    def epsilon(self, z: torch.Tensor, tokens: torch.Tensor, u: torch.Tensor, *_) -> torch.Tensor:
        """Loss with min-SNR weights, above HIGH with those of x0. z [B, 16, 16, 16] normalised latents, tokens [B, 24],
        u [B] uniform in 0..1."""
        t = (u * 1000).long().clamp(max=999)
        sigma = self.sampling.sigmas[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(z)
        noisy = (z + sigma * noise) / (1 + sigma**2).sqrt()
        error = self.net(noisy, t, self.text(tokens)[0].float()).float() - noise
        weight = (SNR_CAP * sigma.flatten() ** 2).clamp(max=1)  # min(SNR, cap) / SNR with SNR = 1 / sigma^2
        weight = weight * (sigma.flatten() / HIGH).clamp(min=1) ** 2
        return (weight * (error**2).mean((1, 2, 3))).mean()

    @torch.no_grad()
    def velocity(self, x: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """What this UNet says of rectified flow's x_t = (1 - t) z + t noise: its noise - z. t [B, 1, 1, 1]."""
        sigma = t / (1 - t)
        scaled = x / (1 - t) / (1 + sigma**2).sqrt()
        noise = self.net(scaled, self.sampling.timestep(sigma.flatten()), self.text(tokens)[0].float()).float()
        return noise - (x / (1 - t) - sigma * noise)

    def flow(self, z: torch.Tensor, tokens: torch.Tensor, u: torch.Tensor, truth: torch.Tensor, progress: float
             ) -> torch.Tensor:
        """Rectified flow: x_t = (1 - t) z + t noise, target noise - z, t logit-normal from the uniform u; and what the
        hidden image tokens say is where. truth [B, 3, 8, 8], progress of the training 0..1."""
        t = torch.sigmoid(torch.special.ndtri(u.clamp(1e-4, 1 - 1e-4)) + self.shift).view(-1, 1, 1, 1)
        noise = torch.randn_like(z)
        text = self.text(tokens)
        x, target = (1 - t) * z + t * noise, noise - z
        if self.taught:
            known = t < TAUGHT
            target = target.lerp(self.taught(x, t.clamp(max=TAUGHT), tokens), known * (1 - progress**2))
        error = self.net(x, t.flatten(), text[0].float(), text[3].float()).float() - target
        names = self.head(self.hidden).float().movedim(-1, 1).split(KINDS, 1)
        wrong = sum(torch.nn.functional.cross_entropy(said, true, ignore_index=-1)
                    for said, true in zip(names, truth.flatten(2).unbind(1)))
        return (error**2).mean() + NAMING * wrong


def optimizers(kind: str, net: Networks, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; in the transformer, Muon for the matrices of the blocks (it halves the steps that a DiT needs)."""
    named = {k: p for k, p in net.named_parameters() if "text_projection" not in k}
    blocks = [p for k, p in named.items() if kind == "flux" and "_blocks." in k and p.ndim == 2 and ".lin." not in k]
    inside = {id(p) for p in blocks}
    rest = [p for p in named.values() if id(p) not in inside]
    out = [torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)]
    if blocks:
        out.append(torch.optim.Muon(blocks, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    return out


def start_from(net: Networks, kind: str, file: Path) -> dict:
    """Take over what fits from a shipped model, and return how that was trained. New words come last in a vocabulary,
    before the two end marks, and a shorter context keeps the first positions: their tables are taken over row by row.
    """
    from safetensors import safe_open
    taken = adopt(net.net, file, f"{kind}.") + adopt(net.text, file, "text.clip_l.transformer.")
    with safe_open(str(file), framework="pt") as saved, torch.no_grad():
        tables = net.text.text_model.embeddings
        words, places = (saved.get_tensor(f"text.clip_l.transformer.text_model.embeddings.{k}_embedding.weight").float()
                         for k in ("token", "position"))
        tables.token_embedding.weight[:len(words) - 2] = words[:-2]
        tables.token_embedding.weight[-2:] = words[-2:]
        tables.position_embedding.weight.copy_(places[:TOKENS])
        about = json.loads(saved.metadata()["rudder"])["training"]
    print(f"{taken} tensors from {file}", flush=True)
    return about


def work(rank: int, processes: int, arg: argparse.Namespace) -> None:
    demo = host()
    plain_attention()
    from transformers import CLIPTokenizer
    tokenizer = CLIPTokenizer.from_pretrained(str(MODELS / "tokenizer"))
    vae = load_vae(arg.out)
    stamped(arg.out, vae)
    config = configuration(arg.kind, vae["saved"], tokenizer)
    torch.manual_seed(arg.seed)
    device = torch.device(arg.device)
    net = Networks(demo, config).to(device)
    net.shift = arg.shift
    earlier = start_from(net, arg.kind, arg.start) if arg.start else {}
    if arg.text:
        print(adopt(net.text, arg.text, "text.clip_l.transformer."), "tensors of the text encoder", flush=True)
    if arg.teacher:
        teacher = Networks(demo, configuration("unet", vae["saved"], tokenizer)).to(device)
        start_from(teacher, "unet", arg.teacher)
        net.taught = teacher.requires_grad_(False).eval().velocity
    optimizer = optimizers(arg.kind, net, arg.lr)
    parameters = [p for o in optimizer for g in o.param_groups for p in g["params"]]
    names = {id(p): k for k, p in net.named_parameters()}
    ema = {names[id(p)]: p.detach().clone() for p in parameters}
    step, before, path = 0, 0.0, arg.out / f"{arg.kind}.pt"
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        if (saved["world"], saved["config"]) != (world.VERSION, config):
            raise SystemExit(f"{path} belongs to another world or autoencoder: delete it, or use another --out.")
        net.load_state_dict(saved["net"], strict=False)
        for o, state in zip(optimizer, saved["optimizers"]):
            o.load_state_dict(state)
        ema, step, before = {k: v.detach() for k, v in saved["ema"].items()}, saved["step"], saved["seconds"]
        earlier = saved["earlier"]
    torch.manual_seed(arg.seed * 7919 + step * processes + rank)  # the same weights, different pictures and noise
    rng = np.random.default_rng([arg.seed, step, rank])
    pictures = Pictures(arg.out, tokenizer, TOKENS, rng, arg.slip)
    size = sum(p.numel() for p in parameters)
    header = {"seed": arg.seed, "batch": arg.batch, "lr": arg.lr, "slip": arg.slip, "parameters": size}
    log = Log(f"shapes-{arg.kind}", arg.out / f"log-{arg.kind}.json", **header) if rank == 0 else None
    n, losses = arg.batch // processes, []
    start = shown = kept = time.time()
    clock = torch.tensor([before / (60 * arg.minutes)])  # progress, averaged over the processes
    while clock.item() < 1:
        for group in (g for o in optimizer for g in o.param_groups):
            group["lr"] = rate(clock.item(), arg.lr)
        z, tokens, truth = pictures.batch(n, PROMPT_DROPOUT)
        u = (torch.randperm(n) + torch.rand(n)) / n  # stratified noise levels
        with half(device.type):
            loss = net(*(t.to(device) for t in (z, tokens, u, truth)), min(clock.item(), 1))
        loss.backward()
        seconds = before + time.time() - start
        clock.fill_(seconds / (60 * arg.minutes))
        average([p.grad for p in parameters] + [clock])
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for o in optimizer:
            o.step()
            o.zero_grad()
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
                state = {"net": net.state_dict(), "optimizers": [o.state_dict() for o in optimizer], "ema": ema,
                         "step": step, "seconds": seconds, "seed": arg.seed, "slip": arg.slip, "world": world.VERSION,
                         "config": config, "earlier": earlier}
                torch.save(state, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)  # never a half-written checkpoint
                kept = time.time()
        if step % 500 == 0:
            pictures.look()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=("unet", "flux"))
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--slip", type=float, default=world.SLIP, help="chance of each wrong word in a caption")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, help="default: 1 on a GPU, otherwise 2")
    parser.add_argument("--port", type=int, default=29517, help="where the processes meet")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--start", type=Path, help="a shipped model to go on from")
    parser.add_argument("--text", type=Path, help="a shipped model whose text encoder to start from")
    parser.add_argument("--shift", type=float, default=SHIFT, help="flux: of the times; lower for edges and details")
    parser.add_argument("--teacher", type=Path, help="flux: a shipped UNet to learn from as well")
    parser.add_argument("--out", type=Path, required=True)
    arg = parser.parse_args()
    in_parallel(work, arg.processes or (2 if arg.device == "cpu" else 1), arg, port=arg.port)


if __name__ == "__main__":
    main()

"""Makes the pictures of the docs and the thumbnails of the workflows again, after the demo models have changed.

    COMFYUI_PATH=... python -m demo.gallery              # everything, from the repository root; or name workflows

Runs each workflow as a user would (dev.py run) and labels what it saved: nothing is picked.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
IMAGES, THUMBNAIL = ROOT / "web" / "docs" / "images", 768
RARE = ("CFG", "R2F", "fixed blend", "AAPB")
#: What each workflow's strips show, from left to right or from above.
COLUMNS = {
    "rare_concept": RARE, "rare_concept_flux": RARE,
    "guidance_methods": ("CFG", "APG", "CFG-Zero*", "TCFG", "Adaptive", "Schedule", "Perp-Neg", "Extra Neg.",
                         "beta-CFG", "TAG"),
    "guidance_interval": ("CFG in the whole run", "in an interval"),
    "answer": ("CFG", "ANSWER, chain 2", "ANSWER, chain 3", "chain 3, scale 2"),
    "other_models": ("CFG", "CFG + AutoGuidance", "AutoGuidance", "two prompts"),
    "cfg_pp": ("CFG", "CFG++ Euler", "CFG++ ancestral", "CFG++ 2M"),
    "w2sd": ("Euler", "W2SD, cfg 5.5 / 1", "W2SD, weaker prompt"),
    "dynamic_cfg": ("CFG", "Self-tuning CFG", "LinearAG", "alignment"),
    "contrast_guidance": ("CFG", "PAG", "SEG", "SAG", "CFG, 96x96", "entropy, 96x96"),
    "inspect_attention": (),  # a plot, with labels of its own
    "nag": ("cfg 1", "cfg 1 with NAG", "cfg 3", "cfg 3 with NAG"),
    "prompt_to_prompt": ("edited prompts alone", "Prompt-to-Prompt", "and local blend"),
    "edit_chain": ("edited prompts alone", "Prompt-to-Prompt", "with AAPB and PAG"),
    "reference_row": ("edited prompts alone", "MasaCtrl", "Plug-and-Play", "RIVAL"),
}
LINES = {"guidance_methods": 2}  # strips too long for one line
PROMPTS = ("a large striped red circle on a white background", "a hollow square", "a melted heart", "a sliced triangle",
           "a mosaic crescent", "a spiky star", "a ringed heart on a navy background", "a small dotted pink star",
           "a bitten star on a beige background", "a wavy teal circle", "a large blue cross on a gray background",
           "a red circle left of a blue square")


def pen(image: Image.Image, at: tuple[float, float], text: str, size: int = 17, anchor: str = "mm") -> None:
    ImageDraw.Draw(image).multiline_text(at, text, fill="#222222", anchor=anchor, align="center",
                                         font=ImageFont.load_default(size=size))


def saved(folder: Path, prefix: str) -> list[Image.Image]:
    return [Image.open(p).convert("RGB") for p in sorted(folder.glob(f"**/{prefix}_[0-9]*_.png"))]


def sheet(strips: list[Image.Image], columns: tuple[str, ...], lines: int = 1) -> Image.Image:
    """The strips below each other with the columns' names above, cut into ``lines`` parts."""
    gap, top = 6, 30 if columns else 0
    cell = (strips[0].width + gap) / max(len(columns), 1)
    per = -(-len(columns) // lines) if columns else 1
    width, height = round(cell * per) - gap, top + len(strips) * (strips[0].height + gap)
    out = Image.new("RGB", (width, lines * height), "white")
    for line in range(lines):
        for i, name in enumerate(columns[line * per:(line + 1) * per]):
            pen(out, (cell * (i + 0.5), line * height + top / 2), name)
        for row, strip in enumerate(strips):
            left = round(cell * per * line)
            out.paste(strip.crop((left, 0, left + width, strip.height)),
                      (0, line * height + top + row * (strip.height + gap)))
    return out


def thumbnail(image: Image.Image) -> Image.Image:
    scale = THUMBNAIL / max(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.LANCZOS)
    out = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    out.paste(small, ((THUMBNAIL - small.width) // 2, (THUMBNAIL - small.height) // 2))
    return out


def workflow(name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "dev.py"), "run", str(ROOT / "workflows" / f"{name}.json")]
        subprocess.run([*command, "--out", folder], check=True)
        strips, traces = saved(Path(folder), name), saved(Path(folder), f"{name}_trace")
        columns = COLUMNS[name]
        if columns and strips[0].height > strips[0].width:  # methods below each other: pictures side by side
            strips = [sheet([s.rotate(90, expand=True) for s in reversed(strips)], ()).rotate(-90, expand=True)]
            columns = ("from above: " + ", ".join(columns),)
        made = sheet(strips, columns, LINES.get(name, 1)) if columns else strips[0]
        made.save(IMAGES / f"{name}.png", optimize=True)
        thumbnail(made).save(ROOT / "workflows" / f"{name}.jpg", quality=88)
        if name == "rare_concept":
            traces[0].save(IMAGES / "trace.png", optimize=True)


def models() -> None:
    """What both demo models draw, plain CFG, seed 1: web/docs/images/demo.png."""
    import torch

    from .trainlib import host
    demo = host()
    import nodes
    side, step, across = 192, 226, 6
    block = 30 + step * -(-len(PROMPTS) // across)
    out = Image.new("RGB", (across * (side + 8), 2 * block), "white")
    for top, (name, scheduler) in zip((0, block), (("shapes-unet", "karras"), ("shapes-flux", "simple"))):
        model, clip, vae = demo.load_demo(demo.MODELS / f"{name}.safetensors")
        pen(out, (6, top + 15), name, anchor="lm")
        for i, prompt in enumerate(PROMPTS):
            positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (prompt, ""))
            with torch.inference_mode():
                latent = nodes.common_ksampler(model, 1, 25, 5.0, "dpmpp_2m", scheduler, positive, negative,
                                               {"samples": torch.zeros(1, 16, 16, 16)})[0]["samples"]
                picture = (vae.decode(latent)[0] * 255).clamp(0, 255).round().byte().numpy()
            x, y = i % across * (side + 8) + 4, top + 30 + i // across * step
            out.paste(Image.fromarray(picture).resize((side, side), Image.BICUBIC), (x, y))
            words = prompt.split()
            half = len(words) // 2 if len(prompt) > 27 else len(words)
            said = "\n".join(filter(None, (" ".join(words[:half]), " ".join(words[half:]))))
            pen(out, (x + side / 2, y + side + 4), said, 12, "ma")
    out.save(IMAGES / "demo.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="workflows, or 'demo' for the sheet of both models; default: all")
    wanted = parser.parse_args().names or ["demo", *COLUMNS]
    for name in wanted:
        models() if name == "demo" else workflow(name)


if __name__ == "__main__":
    main()

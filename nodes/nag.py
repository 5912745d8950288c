"""A negative prompt inside attention."""

from __future__ import annotations

from comfy_api.latest import io

from ..guidance.contract import Prompt
from ..guidance.nag import NAG
from .guidance import CATEGORY, model_input, model_output, named, patched, share_input
from .reference import named_blocks


class RudderNAG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderNAG",
            display_name=NAG.title,
            category=CATEGORY,
            description="A negative prompt that works at any cfg, also at 1: for few-step and distilled models "
            "(Lightning, LCM, DMD2, Flux). It acts inside the attention to text. NAG (arXiv 2505.21179). No further "
            "model evaluation on SD1.5, SDXL and Wan, one a step on other transformers.",
            search_aliases=["nag", "normalized attention guidance", "negative prompt cfg 1", "few step negative"],
            inputs=[
                model_input(),
                io.Conditioning.Input(
                    "negative", tooltip="What the picture should not show, from the same CLIP: one plain prompt. The "
                    "sampler's own negative still acts above cfg 1 and may be another.",
                ),
                io.Float.Input(
                    "scale", default=5.0, min=1.0, max=50.0, step=0.1, round=False,
                    tooltip="How far attention is pushed away from the negative; 1 is off. Official: 5 (Flux, SD3.5), "
                    "3 (DMD2-SDXL).",
                ),
                io.Float.Input(
                    "tau", default=2.5, min=1.0, max=20.0, step=0.1, round=False,
                    tooltip="The most that the push may lengthen a token, in times its own length. Official: 2.5.",
                ),
                share_input(
                    "alpha", 0.25,
                    "Share of the pushed result; 0 is off. Official: 0.25 (Flux, SD3.5), 0.38 (SD1.5 at cfg 7), 0.5 "
                    "(DMD2-SDXL).",
                ),
                named_blocks("all that attend to text"),
                share_input(
                    "start_percent", 0.0, "Begin here, a share of the model's timesteps: 0 is pure noise, 1 the clean "
                    "picture.", advanced=True,
                ),
                share_input(
                    "end_percent", 1.0, "End here. The official workflows end at sigma 4 on SD1.5 and SDXL (0.25) "
                    "and at sigma 0.75 on flow models.", advanced=True,
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, negative, scale, tau, alpha, blocks, start_percent, end_percent) -> io.NodeOutput:
        return patched(model, NAG(
            negative=Prompt(negative, "negative", negative=True), strength=scale, tau=tau, alpha=alpha,
            blocks=named(blocks), start=start_percent, end=end_percent,
        ))  # fmt: skip


NODES = (RudderNAG,)

"""Nodes that guide by what attention does inside the model, or change it for a picture of another size."""

from __future__ import annotations

from comfy_api.latest import io

from ..guidance.contrast import BLOCKS, PerturbedAttention, SmoothedEnergy
from ..guidance.entropy import AttentionEntropy
from ..guidance.sag import SelfAttentionGuidance
from ..host import trained_cells
from .guidance import CATEGORY, blocks_input, model_input, model_output, named, patched, window_inputs


def contrast_blocks() -> io.String.Input:
    return blocks_input(
        f"Where attention is made worse. Empty: what suits the model's family ('{BLOCKS}'; the papers', on "
        "transformers but SD3 provisional). Or names, ranges and lists: 'middle', 'output.3-5', 'joint.7', "
        "'double.4, single.0-9', 'all'. More or deeper blocks push harder."
    )


def strength_input(default: float, tip: str) -> io.Float.Input:
    return io.Float.Input("strength", default=default, min=-10.0, max=100.0, step=0.05, round=False, tooltip=tip)


class RudderPAG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderPAG",
            display_name=PerturbedAttention.title,
            category=CATEGORY,
            description="Sounder structure: pushes away from what the model predicts when some of its image tokens see "
            "only themselves. PAG (ECCV 2024, arXiv 2403.17377). 1 model evaluation a step more, in the same batched "
            "call. Works at any cfg, also 1.",
            search_aliases=["pag", "perturbed attention guidance", "perturbed self-attention", "structure"],
            inputs=[
                model_input(),
                strength_input(
                    3.0, "s, how far it pushes: 0 is off. Paper: 3 with cfg 4, 5 at cfg 1 (SD1.5, SDXL). Begin at 0.5 "
                    "to 1 on Flux. Too much gives hard contrast and repeated patterns; lower cfg as you raise it.",
                ),
                contrast_blocks(),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, strength, blocks, start_percent, end_percent) -> io.NodeOutput:
        where = {"blocks": named(blocks) or BLOCKS, "start": start_percent, "end": end_percent}
        return patched(model, PerturbedAttention(strength=strength, **where))


class RudderSEG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderSEG",
            display_name=SmoothedEnergy.title,
            category=CATEGORY,
            description="Sounder structure, more gently than PAG: pushes away from what the model predicts when the "
            "queries of its attention are blurred. SEG (NeurIPS 2024, arXiv 2408.00760). 1 model evaluation a "
            "step more, in the same batched call. Works at any cfg, also 1.",
            search_aliases=["seg", "smoothed energy guidance", "blurred attention", "energy curvature"],
            inputs=[
                model_input(),
                strength_input(
                    3.0, "s, how far it pushes: 0 is off. Paper: always 3; sigma is what you turn.",
                ),
                io.Float.Input(
                    "sigma", default=100.0, min=0.0, max=100000.0, step=0.1, round=False,
                    tooltip="Width of the blur in tokens of the attention's own grid, 0 to 100000. 0 is off; it "
                    "reaches half of the grid at most, so large values are alike; above 9999 it is the mean of all. "
                    "Paper: this is what you turn; 100 in its example.",
                ),
                contrast_blocks(),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, strength, sigma, blocks, start_percent, end_percent) -> io.NodeOutput:
        where = {"blocks": named(blocks) or BLOCKS, "start": start_percent, "end": end_percent}
        return patched(model, SmoothedEnergy(strength=strength, sigma=sigma, **where))


class RudderSAG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderSAG",
            display_name=SelfAttentionGuidance.title,
            category=CATEGORY,
            description="More detail where the model looks: pushes away from what it predicts when those areas are "
            "blurred. SAG (ICCV 2023, arXiv 2210.00939), also for flow models. 1 model evaluation a step more, after "
            "the others. Works at any cfg, also 1.",
            search_aliases=["sag", "self-attention guidance", "self attention guidance", "detail"],
            inputs=[
                model_input(),
                strength_input(
                    0.5, "s, how far it pushes: 0 is off. Official code: 0.5 without guidance, 0.1 beside a classifier "
                    "(its flag is 1 + s); usual 0.3 to 1.",
                ),
                io.Float.Input(
                    "blur_sigma", default=2.0, min=0.1, max=30.0, step=0.1, round=False,
                    tooltip="Width of the blur in cells of the latent, above 0: 2 for latents of 64x64 (ComfyUI's own "
                    "node), more for larger ones. Official code, in pixels: 9 at 256x256, 3 at 128x128.",
                ),
                blocks_input(
                    "The one block whose map tells what is salient. Empty: the UNet's middle, as in the paper; on SD3 "
                    "and Flux the block half-way (ours, not published). Or one name: 'middle.0', 'output.3.0', "
                    "'joint.12', 'double.9'.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, strength, blur_sigma, blocks, start_percent, end_percent) -> io.NodeOutput:
        where = {"blocks": named(blocks), "start": start_percent, "end": end_percent}
        return patched(model, SelfAttentionGuidance(strength=strength, sigma=blur_sigma, **where))


class RudderAttentionEntropy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def side(name: str) -> io.Int.Input:
            return io.Int.Input(
                f"trained_{name}", default=0, min=0, max=16384, step=8,
                tooltip=f"Pixels of {name} that the model was trained on. 0: what its family was (512 for SD1.5, 1024 "
                "for SDXL, SD3, Flux and Chroma, 64 for the demo models). At that size the node changes nothing.",
            )

        return io.Schema(
            node_id="RudderAttentionEntropy",
            display_name=AttentionEntropy.title,
            category=CATEGORY,
            description="For pictures of another size than the model was trained on: sharpens attention when they are "
            "larger, against washed-out and repeated things, and softens it when they are smaller. Attention entropy "
            "scaling (NeurIPS 2023, arXiv 2306.08645). No model evaluation of its own.",
            search_aliases=["attention entropy", "entropy scaling", "proportional attention", "high resolution",
                            "variable size"],
            inputs=[
                model_input(),
                side("width"),
                side("height"),
                io.Boolean.Input(
                    "count_text", default=True, advanced=True,
                    tooltip="Only where text and image attend together (Flux, SD3, Qwen-Image, Lumina 2, Z-Image): "
                    "whether text counts among the tokens that attention spreads over (the paper has UNets, this is "
                    "ours). Off: a stronger effect.",
                ),
                blocks_input("Where it acts. Empty: all self and joint attention, as in the paper. Or names, ranges "
                             "and lists: 'output', 'joint.0-11'."),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls, model, trained_width, trained_height, count_text, blocks, start_percent, end_percent
    ) -> io.NodeOutput:
        where = {"blocks": named(blocks), "start": start_percent, "end": end_percent}
        trained = trained_cells(model, trained_width, trained_height)
        return patched(model, AttentionEntropy(trained=trained, text=count_text, **where))


NODES = (RudderPAG, RudderSEG, RudderSAG, RudderAttentionEntropy)

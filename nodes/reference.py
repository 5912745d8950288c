"""Nodes that edit by attention: row 0 of the batch is the source picture, the rows after it look at it."""

from __future__ import annotations

from comfy_api.latest import io

from ..attention.foreground import Masks
from ..guidance.features import PlugAndPlay
from ..guidance.mutual import MasaCtrl
from ..guidance.rival import RIVAL
from .edit_batch import EditPromptsType, phrases
from .guidance import CATEGORY, blocks_input, model_input, model_output, named, patched, share_input, window_inputs

ROWS = "Needs a batch of the source and its edits: the node Source and Edits makes it. No extra model evaluations."


def named_blocks(default: str) -> io.String.Input:
    return blocks_input(
        f"Names of attention blocks such as 'output.3-5, middle' or 'double.0-3, single.7'. Empty: {default}.")


class RudderMasaCtrl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderMasaCtrl",
            display_name=MasaCtrl.title,
            category=CATEGORY,
            description="Changes pose, place or shape and keeps what the source picture shows: the edits attend to the "
            f"source's content with their own layout. MasaCtrl (ICCV 2023, arXiv 2304.08465). {ROWS}",
            search_aliases=["masactrl", "mutual self-attention", "non-rigid editing", "reference", "consistency"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "start_depth", default=0.625, min=0.0, max=0.99, step=0.005, round=False,
                    tooltip="The share of the self-attention blocks, in their order, that are left alone. Paper: "
                    "layer 10 of 16, 0.625. Lower ties the layout too. On Flux and Chroma any value above 0 means the "
                    "13 blocks that carry content in Flux.",
                ),
                io.Boolean.Input(
                    "union", default=False,
                    tooltip="Also attend to the own picture: looser, for edits that need content the source lacks.",
                ),
                io.Mask.Input(
                    "source_mask", optional=True,
                    tooltip="The foreground of the source picture (0 to 1; from 0.5 on). With it, the foreground of "
                    "the edits attends to the source's foreground alone and the background to its background.",
                ),
                io.Mask.Input(
                    "edit_mask", optional=True,
                    tooltip="The foreground of the edits: one mask for all, or one for each. Not connected: the "
                    "source's.",
                ),
                EditPromptsType.Input(
                    "prompts", optional=True, tooltip="From Source and Edits; needed for words.",
                ),
                io.String.Input(
                    "words", default="", advanced=True,
                    tooltip="Masks from words instead: what the source and each edit call the foreground, 'cat, lion'. "
                    "Where it is, is read from attention. Empty: no such masks.",
                ),
                named_blocks("by start_depth"),
                share_input(
                    "start_percent", 0.08,
                    "Begin here, a share of the model's timesteps: 0 is pure noise, 1 the clean picture. Paper: step 4 "
                    "of 50, 0.08: until then each edit finds its own layout.",
                ),
                share_input("end_percent", 1.0, "End here, a share of the model's timesteps. Paper: 1.", advanced=True),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls, model, start_depth, union, words, blocks, start_percent, end_percent, source_mask=None, edit_mask=None,
        prompts=None,
    ) -> io.NodeOutput:
        if edit_mask is not None and source_mask is None:
            raise ValueError(f"{MasaCtrl.title}: edit_mask needs a source_mask: connect the source's foreground too.")
        source, edits = (  # some nodes give one mask as [H, W]
            None if mask is None else mask.reshape(-1, *mask.shape[-2:]) for mask in (source_mask, edit_mask)
        )
        if source is not None and len(source) > 1:
            raise ValueError(f"{MasaCtrl.title}: source_mask holds {len(source)} masks and the source is one picture: "
                             "give its mask alone.")
        masks = None if source is None else Masks(source[:1], source[:1] if edits is None else edits)
        return patched(model, MasaCtrl(
            depth=start_depth, union=union, masks=masks, blocks=named(blocks), start=start_percent, end=end_percent,
            edit=prompts, words=phrases(words),
        ))  # fmt: skip


class RudderPlugAndPlay(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderPlugAndPlay",
            display_name=PlugAndPlay.title,
            category=CATEGORY,
            description="Gives the source picture another look, style or material and keeps its layout: early on, the "
            "edits take the source's queries and keys and the features of one block. Plug-and-Play (CVPR 2023, arXiv "
            f"2211.12572). {ROWS}",
            search_aliases=["plug and play", "pnp features", "structure preserving", "image to image translation"],
            inputs=[
                model_input(),
                share_input(
                    "attention_percent", 0.5,
                    "Share queries and keys until here, a share of the model's timesteps from pure noise on. Paper: "
                    "0.5. Longer keeps more of the layout; about 0.2 on Flux and SD3. 0: never.",
                ),
                share_input(
                    "feature_percent", 0.8,
                    "Share the residual block's features until here. Paper: 0.8. Shorter lets shapes change. 0: never. "
                    "UNets only: it rests on Flux and SD3, with a warning.",
                ),
                named_blocks(
                    "the second half of a UNet's self-attention blocks (paper: output.4 to output.11 of SD1.5), all of "
                    "Flux and SD3"
                ),
                io.String.Input(
                    "feature_block", default="", advanced=True,
                    tooltip="The residual block whose features are shared. Empty: output.4 of SD1.5 (paper), output.1 "
                    "of SDXL and its like on other UNets.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls, model, attention_percent, feature_percent, blocks, feature_block, start_percent, end_percent
    ) -> io.NodeOutput:
        return patched(model, PlugAndPlay(
            attention_until=attention_percent, feature_until=feature_percent,
            blocks=named(blocks), feature=named(feature_block), start=start_percent, end=end_percent,
        ))  # fmt: skip


class RudderRIVAL(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderRIVAL",
            display_name=RIVAL.title,
            category=CATEGORY,
            description="Makes variations that share the source picture's look and colours: the other rows attend to "
            "it everywhere and take over its statistics while the picture forms. RIVAL (NeurIPS 2023, arXiv "
            f"2305.18729). {ROWS}",
            search_aliases=["rival", "image variation", "style alignment", "reference only", "adain"],
            inputs=[
                model_input(),
                share_input(
                    "align_percent", 0.4,
                    "Until here, a share of the model's timesteps from pure noise on, attend to the source alone; "
                    "afterwards to the source and the own picture. Paper: 0.4 (t 600 of 1000). 0: to both throughout.",
                ),
                share_input(
                    "early_percent", 0.4,
                    "Until here the guided noise prediction gets the mean and spread of the source's, in each channel. "
                    "Paper: 0.4 (t 600 of 1000). 0: never.",
                ),
                named_blocks("all self-attention blocks, as the paper"),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, align_percent, early_percent, blocks, start_percent, end_percent) -> io.NodeOutput:
        return patched(model, RIVAL(
            align_until=align_percent, early_until=early_percent, blocks=named(blocks),
            start=start_percent, end=end_percent,
        ))  # fmt: skip


NODES = (RudderMasaCtrl, RudderPlugAndPlay, RudderRIVAL)

"""Nodes that edit a picture by the words of its prompt."""

from __future__ import annotations

import re

from comfy_api.latest import io

from ..attention.operations import MODES, RENORM
from ..guidance.local_blend import LocalBlend
from ..guidance.prompt_to_prompt import PromptToPrompt
from .edit_batch import EditPromptsType, phrases
from .guidance import CATEGORY, blocks_input, model_output, named, patched, share_input


def inputs() -> list:
    return [
        io.Model.Input("model", tooltip="The model to sample with. It is not changed; the output is a patched clone."),
        EditPromptsType.Input("prompts", tooltip="From Source and Edits, whose other outputs go to the sampler."),
    ]


def numbered(name: str, text: str) -> tuple[tuple[str, float], ...]:
    """The entries of "word: 1.5, two words: -1", in order; also one a line.

    Raises:
        ValueError: an entry is no word with a number.
    """
    out = []
    for entry in filter(str.strip, re.split(r"[,\n]", text)):
        word, _, number = entry.rpartition(":")
        try:
            out.append((word.strip(), float(number)))
        except ValueError:
            word = ""
        if not word.strip():
            raise ValueError(f"{name}: '{entry.strip()}' is no word with a number. Write 'word: 1.5, two words: -1'.")
    return tuple(out)


class RudderPromptToPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderPromptToPrompt",
            display_name=PromptToPrompt.title,
            category=CATEGORY,
            description="Changes a picture by changing words of its prompt, and keeps the rest: the edits take over "
            "where the source picture looks at which word, and its layout. Prompt-to-Prompt (ICLR 2023, arXiv "
            "2208.01626). Needs the batch of Source and Edits. No extra evaluations.",
            search_aliases=["p2p", "prompt to prompt", "attention control", "word swap", "attention reweighting"],
            inputs=[
                *inputs(),
                io.Combo.Input(
                    "mode", options=list(MODES), default="replace",
                    tooltip="What becomes of changed words. replace: an exchanged word goes where the old one was "
                    "(paper). refine: it finds its own place, as added words do. degree: an added word ('very') goes "
                    "with the word after it. reorder: words are matched wherever they stand. style: all words blend by "
                    "style_alpha.",
                ),
                share_input(
                    "cross_end", 0.8,
                    "Until when words look where the source's do, a share of the model's timesteps, 0 (never) "
                    "to 1 (to the end). Paper: 0.8. Lower lets the edit change more. Not for transformers (Flux, SD3), "
                    "but for the weights of words.",
                ),
                share_input(
                    "self_end", 0.4,
                    "Until when the layout is the source's, a share of the model's timesteps, 0 (never) to 1. "
                    "Paper: 0.4; on transformers (Flux, SD3) about 0.2. Lower it where the edit needs another shape.",
                ),
                io.String.Input(
                    "words", default="", multiline=True,
                    tooltip="Words of the edits to make stronger or weaker: 'fluffy: 2, red: -1'. -2 to 2, 1 changes "
                    "nothing (paper). Also on its own, with an edit that equals the source. Empty: none.",
                ),
                io.String.Input(
                    "word_ends", default="", advanced=True,
                    tooltip="A cross_end of their own for words of the edits: 'lion: 0.2, crown: 0.5'. Empty: none.",
                ),
                io.Combo.Input(
                    "renorm", options=list(RENORM), default="none", advanced=True,
                    tooltip="What attention sums to after an edit. none: what comes out (paper's code). row: 1 by "
                    "scaling all words. preserve: 1, before weights, by scaling the changed words alone (ours).",
                ),
                share_input(
                    "style_alpha", 0.2,
                    "Only for mode style: share of the edit's own attention, 0 to 1. About 0.2 in a survey.",
                    advanced=True,
                ),
                io.Int.Input(
                    "self_tokens", default=256, min=1, max=65536, advanced=True,
                    tooltip="Layout is kept in self-attention of at most so many tokens. Paper: 256 (16x16, SD1.5 at "
                    "512x512; 576 at 768x768); 1024 keeps more, and is the least at 1024x1024 on SDXL. Not used on "
                    "transformers.",
                ),
                share_input(
                    "start_percent", 0.0,
                    "From when words and layout are the source's, a share of the model's timesteps. Paper: 0. Later "
                    "lets the edit find a layout of its own first.", advanced=True,
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls, model, prompts, mode, cross_end, self_end, words, word_ends, renorm, style_alpha, self_tokens,
        start_percent=0.0,
    ) -> io.NodeOutput:
        return patched(model, PromptToPrompt(
            edit=prompts, mode=mode, alpha=style_alpha, renorm=renorm, cross_end=cross_end, self_end=self_end,
            self_tokens=self_tokens, words=numbered("words", words), ends=numbered("word_ends", word_ends),
            start=start_percent,
        ))  # fmt: skip


class RudderLocalBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderLocalBlend",
            display_name=LocalBlend.title,
            category=CATEGORY,
            description="Keeps the source picture, to the last bit (on Wan and Lumina within 1e-5), wherever chosen "
            "words are not: their places are read from the model's attention. For Prompt-to-Prompt and every other "
            "editing method on the batch of Source and Edits (ICLR 2023, arXiv 2208.01626). No extra evaluations.",
            search_aliases=["local blend", "localblend", "keep background", "attention mask", "word mask"],
            inputs=[
                *inputs(),
                io.String.Input(
                    "words", default="",
                    tooltip="Whose places may change: words of the source or of the edits, separated by commas. Empty: "
                    "the words that each edit drops or adds.",
                ),
                share_input(
                    "threshold", 0.3,
                    "From which share of their strongest attention a place counts as theirs, 0 to 1. Official "
                    "code: 0.3. Lower lets more of the picture change.",
                ),
                share_input(
                    "start_percent", 0.2,
                    "From when the rest is kept, a share of the model's timesteps, 0 (pure noise) to 1 "
                    "(clean). Official code: 0.2. Places are read from the first step on.", advanced=True,
                ),
                io.Int.Input(
                    "tokens", default=256, min=1, max=65536, advanced=True,
                    tooltip="Places are read from cross-attention of at most so many tokens. Official: 256 (16x16, "
                    "SD1.5 at 512x512); SDXL at 1024x1024 needs 1024. Not used on transformers.",
                ),
                blocks_input(
                    "Which blocks are read, as Inspect Attention lists them. Empty: all that are small enough; on "
                    "transformers (Flux, SD3) eight, spread over the depth.",
                ),
                share_input(
                    "end_percent", 1.0,
                    "Until when the rest is kept, a share of the model's timesteps. Earlier than 1 lets the last steps "
                    "smooth seams, and then the rest is no longer the source's to the last bit.", advanced=True,
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls, model, prompts, words, threshold, start_percent, tokens, blocks, end_percent=1.0
    ) -> io.NodeOutput:
        return patched(model, LocalBlend(
            edit=prompts, words=phrases(words), threshold=threshold, blend_start=start_percent, tokens=tokens,
            blocks=named(blocks), end=end_percent,
        ))  # fmt: skip


NODES = (RudderPromptToPrompt, RudderLocalBlend)

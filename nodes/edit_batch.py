"""The batch that editing methods share: a source prompt and its edits as rows that start from the same noise."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.words import encoded

EditPromptsType = io.Custom("RUDDER_EDIT_PROMPTS")
CATEGORY = "model/conditioning/rudder"


class RudderEditBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderEditBatch",
            display_name="Source and Edits",
            category=CATEGORY,
            description="One batch for editing by attention: row 0 is the picture of the source prompt, each further "
            "row one edit of it, all from the same noise. Wire both outputs to the sampler and the prompts to an "
            "editing node (Prompt-to-Prompt and others). Without an editing node the rows are the plain prompts (on "
            "Chroma nearly, where prompts of different length are padded).",
            search_aliases=["prompt to prompt", "edit prompts", "source target batch", "prompt batch", "p2p"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the checkpoint that you sample."),
                io.String.Input(
                    "source", default="", multiline=True,
                    tooltip="The prompt of the picture to edit. Lines are joined.",
                ),
                io.String.Input(
                    "edits", default="", multiline=True,
                    tooltip="One edited prompt a line: the source with words exchanged, added or dropped. Keep the "
                    "other words as they are: words are aligned with the source.",
                ),
                io.Latent.Input(
                    "latent_image",
                    tooltip="A latent of batch 1, empty or a picture. It is repeated for the source and each edit.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the sampler: row 0 the source."),
                io.Latent.Output(display_name="LATENT", tooltip="For the sampler: every row starts from one noise."),
                EditPromptsType.Output(display_name="EDIT_PROMPTS", tooltip="For the editing nodes."),
                io.String.Output(display_name="alignment", tooltip="Which words were kept, exchanged, added, dropped."),
            ],
        )

    @classmethod
    def execute(cls, clip, source, edits, latent_image) -> io.NodeOutput:
        texts = [" ".join(source.split()), *(" ".join(line.split()) for line in edits.splitlines() if line.strip())]
        if clip is None:
            raise ValueError("'clip' is empty: the checkpoint holds no text encoder. Load one with a CLIP loader.")
        if len(texts) < 2:
            raise ValueError("'edits' holds no prompt: write the edited prompt, one a line.")
        conditioning, prompts = encoded(clip, texts)
        return io.NodeOutput(conditioning, repeated(latent_image, len(texts)), prompts, prompts.report())


def repeated(latent: dict, rows: int) -> dict:
    """The latent for each row, with one noise: rows of equal batch index get the same from the host."""
    samples = latent["samples"]
    if getattr(samples, "is_nested", False):
        raise ValueError("'latent_image' holds several tensors (picture and sound): editing works on one. Separate "
                         "them first.")
    if len(samples) != 1:
        raise ValueError(f"'latent_image' has a batch of {len(samples)}: give one picture (Latent From Batch). Each "
                         "edit becomes a row of its own; further seeds are further runs.")
    index = latent.get("batch_index") or [0]
    return {**latent, "samples": samples.repeat(rows, *[1] * (samples.ndim - 1)), "batch_index": [index[0]] * rows}


def phrases(text: str) -> tuple[str, ...]:
    """The entries of "cat, red lion"."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


NODES = (RudderEditBatch,)

"""Nodes that show what the guidance did: record, plot, save."""

from __future__ import annotations

import json
import math
import os
import re

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io

from ..guidance.trace import QUANTITIES, Recorder, Trace, labelled
from ..host import add_guidance
from .chart import line_charts
from .guidance import CATEGORY, model_input, model_output

TraceType = io.Custom("RUDDER_TRACE")


def reading_inputs() -> list:
    return [
        TraceType.Input("trace", tooltip="From Guidance Trace."),
        io.AnyType.Input(
            "after",
            tooltip="The output of the sampler that was traced (LATENT or the decoded IMAGE), so that this node runs "
            "after it. With several samplers on one trace, something that depends on all of them.",
        ),
    ]


def recorded(trace: Recorder, prompt: dict | None) -> dict[str, dict]:
    """The runs of samplers that are still in the graph, by label.

    Raises:
        ValueError: nothing was recorded.
    """
    present = [node for node in trace.runs if not prompt or not node or node.split(".")[0] in prompt]
    present.sort(key=lambda node: [int(number) for number in re.findall(r"\d+", node)])  # not in the order they ran
    if not present:
        raise ValueError(
            "The trace holds no run. Wire the MODEL output of Guidance Trace to the sampler (through other Rudder "
            "nodes if you like) and its result to 'after'. If the sampler was served from the cache, change its seed."
        )
    return labelled(trace.runs[node] for node in present)


def strict(value):
    """``value`` as strict JSON can hold it: NaN and infinity, which a broken model predicts, become null."""
    if isinstance(value, dict):
        return {key: strict(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RudderTrace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderTrace",
            display_name="Guidance Trace",
            category=CATEGORY,
            description="Records what guidance does at every step of every sampler behind it: weight, gamma, the "
            "cosine between the conditional and the unconditional prediction, norms, evaluations. Changes nothing in "
            "the picture.",
            search_aliases=["record guidance", "debug guidance", "cfg trace", "gamma plot"],
            not_idempotent=True,  # two identical trace nodes must not share one recorder
            inputs=[model_input()],
            outputs=[model_output(), TraceType.Output(display_name="TRACE", tooltip="For Guidance Trace Plot and "
            "Save.")],
        )

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        recorder = Recorder()
        return io.NodeOutput(add_guidance(model, Trace(recorder=recorder)), recorder)


class RudderTracePlot(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderTracePlot",
            display_name="Guidance Trace Plot",
            category=CATEGORY,
            description="Draws recorded quantities over the steps, one line a sampler, as an image.",
            search_aliases=["plot guidance", "gamma plot", "cfg plot"],
            inputs=[
                *reading_inputs(),
                io.Combo.Input(
                    "quantity",
                    options=["overview", *QUANTITIES],
                    default="overview",
                    tooltip="What to draw: the overview shows what the methods recorded, in up to four panels. Means "
                    "over the batch. "
                    + " ".join(f"{name}: {what}." for name, what in QUANTITIES.items()),
                ),
                io.Int.Input("width", default=768, min=256, max=4096, step=16, tooltip="Width of the image in pixels."),
                io.Int.Input("height", default=512, min=192, max=4096, step=16, tooltip="Height of the image in "
                "pixels."),
            ],
            outputs=[io.Image.Output(display_name="IMAGE")],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, trace, after, quantity, width, height) -> io.NodeOutput:
        runs = recorded(trace, cls.hidden.prompt)
        picture = line_charts(runs, quantity, width, height)
        return io.NodeOutput(torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)[None])


class RudderSaveTrace(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderSaveTrace",
            display_name="Save Guidance Trace",
            category=CATEGORY,
            description="Writes the recorded runs as a JSON file into the output folder: per step and per picture of "
            "the batch.",
            search_aliases=["export guidance", "trace json"],
            is_output_node=True,
            inputs=[
                *reading_inputs(),
                io.String.Input("filename_prefix", default="rudder/trace", tooltip="Inside ComfyUI's output folder."),
            ],
            outputs=[io.String.Output(display_name="JSON")],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, trace, after, filename_prefix) -> io.NodeOutput:
        text = json.dumps(strict(recorded(trace, cls.hidden.prompt)), indent=1, allow_nan=False)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_.json"
        with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
            out.write(text)
        return io.NodeOutput(text, ui={"files": [{"filename": file, "subfolder": subfolder, "type": "output"}]})


NODES = (RudderTrace, RudderTracePlot, RudderSaveTrace)

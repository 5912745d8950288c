"""Nodes that show what the guidance did: record, plot, save."""

from __future__ import annotations

import json
import math
import os
import re
from itertools import zip_longest

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io

from ..guidance.trace import QUANTITIES, Recorder, Trace, label, labelled, maker
from ..host import add_guidance
from .chart import line_charts
from .guidance import CATEGORY, model_input, model_output

TraceType = io.Custom("RUDDER_TRACE")


def several(name: str, prefix: str, kind: type[io.ComfyTypeIO], tooltip: str) -> io.Autogrow.Input:
    """An input that grows: a fresh socket appears whenever the last one is wired."""
    template = io.Autogrow.TemplatePrefix(kind.Input(prefix, optional=True, tooltip=tooltip), prefix, min=0, max=12)
    return io.Autogrow.Input(name, template=template, optional=True, tooltip=tooltip)


def reading_inputs() -> list:
    return [
        TraceType.Input("trace", tooltip="From Guidance Trace."),
        io.AnyType.Input(
            "after",
            tooltip="The output of the sampler that was traced (LATENT or the decoded IMAGE), so that this node runs "
            "after it. With several samplers, wire the others to more_after.",
        ),
        several("more_traces", "trace_", TraceType, "Traces of other models or branches, to show over the first."),
        several("more_after", "after_", io.AnyType, "The outputs of the other samplers, so that this node runs last."),
    ]


def labels_input() -> io.String.Input:
    return io.String.Input(
        "labels", default="", multiline=True, optional=True,
        tooltip="Names for the runs, one a line, first trace first and then by node number. An empty line keeps the "
        "run's own name: that of its Guidance Trace, or the methods.",
    )


def behind(node: str, start: str, prompt: dict) -> bool:
    """Whether a node gets what ``start`` makes, over any number of links of the prompt. What a node made while the
    prompt ran (a loop's round: its id has a dot, and is not in the prompt) counts as long as its maker is there."""
    made = any("." in one and one not in prompt for one in (node, start))
    if made or not start:
        return node in prompt or node.split(".")[0] in prompt
    seen, todo = set(), [node] if node in prompt else []
    while todo:
        here = todo.pop()
        if here == start:
            return True
        seen.add(here)
        given = [v for v in prompt.get(here, {}).get("inputs", {}).values() if isinstance(v, list) and len(v) == 2]
        todo += {node for node, _ in given if isinstance(node, str)} - seen
    return False


def recorded(
    trace: Recorder, prompt: dict | None, more: dict[str, Recorder] | None = None, labels: str = ""
) -> dict[str, dict]:
    """The runs of samplers that are behind their trace now, by label: trace after trace, each by node, not as they ran.

    Raises:
        ValueError: a trace holds no run, or there are more labels than runs.
    """
    runs, names = [], []
    for source, recorder in {"trace": trace, **(more or {})}.items():
        present = [key for key in recorder.runs
                   if not prompt or not key or behind(maker(key), recorder.node, prompt)]
        present.sort(key=lambda key: [int(number) for number in re.findall(r"\d+", key)])
        if not present:
            raise ValueError(
                f"The trace at '{source}' holds no run. Wire the MODEL output of Guidance Trace to the sampler "
                "(through other Rudder nodes if you like) and its result to 'after' or 'more_after'. If the sampler "
                "was served from the cache, change its seed."
            )
        for run in (recorder.runs[key] for key in present):
            if not any(run is other for other in runs):  # two traces on one MODEL hold the same runs
                runs.append(run)
                alone = len(present) == 1 or not recorder.name
                names.append(recorder.name if alone else f"{recorder.name}: {label(run)}")
    given = [line.strip() for line in labels.rstrip().splitlines()]
    if len(given) > len(runs):
        raise ValueError(
            f"'labels' has {len(given)} lines and {len(runs)} runs were traced: remove lines, or wire the missing "
            "traces to 'more_traces'."
        )
    return labelled(runs, [mine or name for mine, name in zip_longest(given, names, fillvalue="")])


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
            inputs=[
                model_input(),
                io.String.Input(
                    "name", default="", optional=True,
                    tooltip="What the plot's legend calls these runs. Empty: the methods that acted.",
                ),
            ],
            outputs=[model_output(), TraceType.Output(display_name="TRACE", tooltip="For Guidance Trace Plot and "
            "Save.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, name="") -> io.NodeOutput:
        recorder = Recorder(name=name.strip(), node=str(getattr(cls.hidden, "unique_id", None) or ""))
        return io.NodeOutput(add_guidance(model, Trace(recorder=recorder)), recorder)


class RudderTracePlot(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderTracePlot",
            display_name="Guidance Trace Plot",
            category=CATEGORY,
            description="Draws recorded quantities over the steps as an image, one line a sampler; several traces "
            "come over each other.",
            search_aliases=["plot guidance", "gamma plot", "cfg plot", "compare runs"],
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
                labels_input(),
            ],
            outputs=[io.Image.Output(display_name="IMAGE")],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls, trace, after, quantity, width, height, labels="", more_traces=None, more_after=None
    ) -> io.NodeOutput:
        runs = recorded(trace, cls.hidden.prompt, more_traces, labels)
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
                labels_input(),
            ],
            outputs=[io.String.Output(display_name="JSON")],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, trace, after, filename_prefix, labels="", more_traces=None, more_after=None) -> io.NodeOutput:
        runs = recorded(trace, cls.hidden.prompt, more_traces, labels)
        text = json.dumps(strict(runs), indent=1, allow_nan=False)
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_.json"
        with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
            out.write(text)
        return io.NodeOutput(text, ui={"files": [{"filename": file, "subfolder": subfolder, "type": "output"}]})


NODES = (RudderTrace, RudderTracePlot, RudderSaveTrace)

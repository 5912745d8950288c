"""Nodes whose guidance needs more than two predictions of a step: further evaluations, another model, an image."""

from __future__ import annotations

from comfy_api.latest import io

from ..guidance.answer import ANSWER
from ..guidance.autoguidance import AutoGuidance
from ..guidance.contract import GuidanceError, Prompt
from ..guidance.instruct import InstructGuidance
from ..host import companion, plan_of
from .guidance import CATEGORY, model_input, model_output, patched, window_inputs


class RudderANSWER(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderANSWER",
            display_name="Self-found Negative (ANSWER)",
            category=CATEGORY,
            is_experimental=True,
            description="Experimental: finds the negative by itself, from a short look ahead along the sampler's "
            "negative, and guides away from where that leads. After ANSWER (ICCV 2025, arXiv 2508.02973), by an "
            "algorithm of our own derivation: the paper's could not be read. Costs chain + 1 model evaluations a step "
            "(2 chain at another negative_scale than 1). Needs cfg above 1.",
            search_aliases=["answer", "adaptive negative sampling", "dns", "automatic negative prompt"],
            inputs=[
                model_input(),
                io.Int.Input(
                    "chain", default=2, min=1, max=8,
                    tooltip="How many noise levels it looks ahead, K in the paper, 1 to 8; use 2 or 3. Each costs "
                    "one evaluation more, two at another negative_scale than 1. 1 is only CFG at another weight.",
                ),
                io.Float.Input(
                    "negative_scale", default=1.0, min=-2.0, max=8.0, step=0.05, round=False,
                    tooltip="Which way it looks: 1 along the sampler's negative, above 1 further away from the "
                    "prompt. It multiplies with cfg, so lower cfg as you raise it: 2 at cfg 4 guides like cfg 7.",
                ),
                io.Float.Input(
                    "norm_cap", default=2.0, min=0.0, max=100.0, step=0.1, round=False,
                    tooltip="Longest push from the found negative, times the push of plain CFG, for each picture: "
                    "usual 1 to 3 (ours). 0: no limit.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Where it begins, a share of the model's timesteps: 0 is pure noise, 1 the clean picture. "
                    "Outside, guidance is plain CFG.",
                ),
                io.Float.Input(
                    "end_percent", default=0.8, min=0.0, max=1.0, step=0.01,
                    tooltip="Where it ends, 0 to 1. Lower saves evaluations: late steps hardly change what is in the "
                    "picture.",
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, chain, negative_scale, norm_cap, start_percent, end_percent) -> io.NodeOutput:
        window = {"start": start_percent, "end": end_percent}
        return patched(model, ANSWER(chain=chain, negative_scale=negative_scale, cap=norm_cap, **window))


class RudderAutoGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderAutoGuidance",
            display_name="Guide with a Worse Model (AutoGuidance)",
            category=CATEGORY,
            description="Better pictures without losing variety: pushes away from what a worse version of the model "
            "predicts for the same prompt. AutoGuidance (NeurIPS 2024, arXiv 2406.02507). 1 evaluation of the worse "
            "model a step, beside the 1 or 2 of the model; both are loaded. Works at any cfg, also 1.",
            search_aliases=["autoguidance", "bad model", "weak model guidance", "dual model guider", "karras"],
            inputs=[
                model_input(),
                io.Model.Input(
                    "bad_model",
                    tooltip="A worse model of the same family: an earlier or smaller checkpoint, or this one with a "
                    "patch that weakens it. It needs the same VAE and text encoder. If it is a patched version of "
                    "'model' its weights are loaded a second time.",
                ),
                io.Float.Input(
                    "weight", default=2.0, min=-10.0, max=20.0, step=0.05, round=False,
                    tooltip="1 is off, 2 doubles the distance to the worse model. Paper: 2.1 for EDM2-S with a small, "
                    "hardly trained partner; usual 1.5 to 3. On top of cfg, so lower that as you raise this.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, bad_model, weight, start_percent, end_percent) -> io.NodeOutput:
        if plan_of(bad_model.model_options):
            raise GuidanceError(
                f"{AutoGuidance.title}: the bad_model carries guidance nodes of Rudder, which would not act there. "
                "Wire it from before those nodes, and put them on 'model'."
            )
        bad = companion(model, bad_model, "bad_model")
        return patched(model, AutoGuidance(bad=bad, weight=weight, start=start_percent, end=end_percent))


class RudderInstruct(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderInstruct",
            display_name="Image and Text Strength (InstructPix2Pix)",
            category=CATEGORY,
            description="For editing models: how closely the result keeps to the image, apart from how strongly it "
            "follows the text, which stays the sampler's cfg. InstructPix2Pix, Eq. 3 (CVPR 2023, arXiv 2211.09800). "
            "Also weighs any two prompts one after the other. 3 model evaluations a step.",
            search_aliases=["instructpix2pix", "ip2p", "dual cfg", "image cfg", "image guidance", "edit"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "image_scale", default=1.5, min=0.0, max=20.0, step=0.05, round=False,
                    tooltip="How closely the result keeps to the image: 1 is the sampler's CFG alone, above 1 keeps "
                    "more of the image, below 1 less. Paper: 1.5, range 1 to 1.5, at cfg 7.5 (5 to 10).",
                ),
                io.Conditioning.Input(
                    "base", optional=True,
                    tooltip="What stands for neither image nor text. Leave it unconnected: then it is the sampler's "
                    "negative without its image. For two prompts one after the other: base an empty prompt, negative "
                    "the first prompt, positive both together.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, image_scale, start_percent, end_percent, base=None) -> io.NodeOutput:
        window = {"start": start_percent, "end": end_percent}
        given = Prompt(base, "base", negative=True, bare=True) if base is not None else None
        return patched(model, InstructGuidance(weight=image_scale, base=given, **window))


NODES = (RudderANSWER, RudderAutoGuidance, RudderInstruct)

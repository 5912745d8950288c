"""Nodes that change how the predictions of a step become one."""

from __future__ import annotations

from comfy_api.latest import io

from ..guidance.aapb import AAPB
from ..guidance.blend import FixedBlend
from ..guidance.cfg import CFG
from ..guidance.contract import Guidance, Prompt
from ..guidance.interval import LimitedInterval
from ..guidance.r2f import MODES, R2F, STOP_OF_50, stop_fraction
from ..host import add_guidance

CATEGORY = "model/patch/rudder"


def model_input() -> io.Model.Input:
    return io.Model.Input("model", tooltip="The model to guide. It is not changed; the output is a patched clone.")


def patched(model, method: Guidance) -> io.NodeOutput:
    return io.NodeOutput(add_guidance(model, method))


def model_output() -> io.Model.Output:
    return io.Model.Output(display_name="MODEL", tooltip="Wire it to the sampler, or through more Rudder nodes.")


def window_inputs(what: str = "The method acts", outside: str = "Outside, sampling is as without the node.") -> list:
    tip = f"{what} from start to end, a share of the model's timesteps: 0 is pure noise, 1 the clean picture. {outside}"
    return [
        io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=tip),
        io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True, tooltip=tip),
    ]


def share_input(name: str, default: float, tooltip: str, **options) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip, **options)


def blocks_input(tooltip: str) -> io.String.Input:
    return io.String.Input("blocks", default="", advanced=True, tooltip=tooltip)


def named(blocks: str) -> str:
    """What was typed into a field of blocks: empty where it names none."""
    return blocks.strip(", \t\r\n")


def anchor_input() -> io.Conditioning.Input:
    return io.Conditioning.Input(
        "anchor",
        tooltip="A frequent prompt near the rare one, from the same CLIP. Keep the rare attribute and generalise the "
        "noun, as the paper does: 'a hairy frog' -> 'a hairy animal'. Not an empty prompt.",
    )


class RudderAAPB(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderAAPB",
            display_name="Rare Concept Blend (AAPB)",
            category=CATEGORY,
            description="Makes rare combinations appear: at every step the target prompt (the sampler's positive) is "
            "blended with a frequent anchor prompt, by the closed-form weight of AAPB (CVPR 2026, arXiv 2603.19158). "
            "3 model evaluations a step instead of 2. Needs cfg above 1.",
            search_aliases=["aapb", "adaptive auxiliary prompt blending", "rare concept", "anchor prompt"],
            inputs=[
                model_input(),
                anchor_input(),
                io.Combo.Input(
                    "gamma",
                    options=["adaptive", "adaptive unclamped", "fixed"],
                    default="adaptive",
                    tooltip="How much of the anchor is blended in. adaptive: computed at each step for each picture "
                    "(recommended; the paper's Eq. 13, limited to 0.01 .. 0.99 as in the official code). adaptive "
                    "unclamped: the same without the limit. fixed: the constant below, for comparison.",
                ),
                io.Float.Input(
                    "fixed_gamma", default=0.4, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Only for gamma 'fixed': 0 is the target alone, 1 the anchor alone; the paper's best "
                    "constants are 0.3 to 0.5.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, anchor, gamma, fixed_gamma, start_percent, end_percent) -> io.NodeOutput:
        window = {"anchor": Prompt(anchor, "anchor"), "start": start_percent, "end": end_percent}
        if gamma == "fixed":
            return patched(model, FixedBlend(gamma=fixed_gamma, **window))
        return patched(model, AAPB(clamp=gamma == "adaptive", **window))


class RudderFixedBlend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderFixedBlend",
            display_name="Prompt Blend (fixed)",
            category=CATEGORY,
            description="Blends the prediction of the positive prompt with that of an anchor prompt by a constant "
            "weight: the baseline of AAPB. 3 model evaluations a step, 2 at cfg 1, where it works too.",
            search_aliases=["prompt mixing", "blend prompts", "fixed gamma", "average predictions"],
            inputs=[
                model_input(),
                io.Conditioning.Input(
                    "anchor", tooltip="The prompt to mix in, from the same CLIP. For a rare prompt: the same attribute "
                    "on a more general noun. Not an empty prompt.",
                ),
                io.Float.Input(
                    "gamma", default=0.4, min=0.0, max=1.0, step=0.01,
                    tooltip="Weight of the anchor: 0 is the positive alone, 1 the anchor alone; AAPB's paper finds "
                    "0.3 to 0.5 best among constants.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, anchor, gamma, start_percent, end_percent) -> io.NodeOutput:
        blend = FixedBlend(anchor=Prompt(anchor, "anchor"), gamma=gamma, start=start_percent, end=end_percent)
        return patched(model, blend)


class RudderR2F(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderR2F",
            display_name="Rare Concept Schedule (R2F)",
            category=CATEGORY,
            description="Makes rare combinations appear: in the early steps a frequent prompt takes turns with the "
            "rare one (the sampler's positive), later steps use the rare one alone. R2F (ICLR 2025, arXiv "
            "2410.22376). Costs no extra evaluations and works at any cfg.",
            search_aliases=["r2f", "rare to frequent", "prompt scheduling", "prompt alternation", "rare concept"],
            inputs=[
                model_input(),
                io.Conditioning.Input(
                    "frequent",
                    tooltip="A frequent prompt that shares the rare attribute, from the same CLIP: 'a hairy animal' "
                    "for 'a hairy frog'. Its pooled vector and size settings switch with it.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="alternate",
                    tooltip="alternate: even steps use the frequent prompt (SD1.5, SDXL, SD3, 20 steps or more). "
                    "blend: the early steps mix the two embeddings (few-step models such as Flux-schnell).",
                ),
                io.Int.Input(
                    "level", default=4, min=0, max=5,
                    tooltip="Visual detail level of the rare attribute, as the paper's rubric: 1 rough shape, 2 "
                    "action, 3 horns and other parts, 4 texture or material, 5 hair. Finer detail forms later, so "
                    "the frequent prompt stays longer. 0: the rare prompt alone.",
                ),
                io.Combo.Input(
                    "family",
                    options=list(STOP_OF_50),
                    default="SD3",
                    tooltip="Whose stop steps the level stands for, of 50: SD3 5, 10, 20, 30, 40; SDXL 3, 5, 10, 20, "
                    "30 (also for SD1.5). Not used in blend mode.",
                ),
                io.Float.Input(
                    "stop_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="The share of the run's steps in which the frequent prompt has a say, instead of the "
                    "level; lower it for image to image. 0: use the level.",
                ),
                io.Float.Input(
                    "blend_amount", default=0.3, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Blend mode only: share of the frequent embedding in the first quarter of the steps; it "
                    "halves every quarter. Official 0.3.",
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, frequent, mode, level, family, stop_percent, blend_amount) -> io.NodeOutput:
        stop = stop_percent or stop_fraction(level, mode, family)
        method = R2F(frequent=Prompt(frequent, "frequent"), stop=stop, mode=mode, amount=blend_amount)
        return patched(model, method)


class RudderLimitedInterval(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderLimitedInterval",
            display_name="Guidance Interval",
            category=CATEGORY,
            description="Guides only at the noise levels where it helps, and leaves the rest of the run unguided: "
            "more variety and less burn at high cfg (NeurIPS 2024, arXiv 2404.07724). Saves one of two evaluations "
            "in every step outside.",
            search_aliases=["limited interval guidance", "cfg interval", "interval guidance", "sigma range"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "sigma_low", default=0.28, min=0.0, max=10000.0, step=0.01, round=False,
                    tooltip="Guide above this noise level (sigma). Paper: 0.28 for SDXL; about 0.22 for flow models, "
                    "whose sigma runs from 1 to 0. 0: no lower limit.",
                ),
                io.Float.Input(
                    "sigma_high", default=5.42, min=0.0, max=10000.0, step=0.01, round=False,
                    tooltip="Guide up to this noise level (sigma), included. Paper: 5.42 for SDXL, where sigma "
                    "starts at 14.6; about 0.84 for flow models, where 5.42 cuts off nothing. Tune this one first.",
                ),
                *window_inputs("Guidance acts", "Outside, the weight is 1."),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, sigma_low, sigma_high, start_percent, end_percent) -> io.NodeOutput:
        method = LimitedInterval(sigma_low=sigma_low, sigma_high=sigma_high, first=start_percent, last=end_percent)
        return patched(model, method)


class RudderCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderCFG",
            display_name="Guidance Weight (CFG)",
            category=CATEGORY,
            description="Sets the guidance weight on the model, in place of the sampler's cfg, for the whole run or "
            "a part of it (classifier-free guidance, arXiv 2207.12598). 2 evaluations a step, 1 where the weight is 1.",
            search_aliases=["cfg", "classifier free guidance", "cfg override", "guidance scale"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "weight", default=7.0, min=0.0, max=100.0, step=0.1, round=False,
                    tooltip="1 is no guidance, 0 the negative alone. Usual: SD1.5 7 to 7.5, SDXL 5, SD3 3.5 to 7.",
                ),
                *window_inputs(outside="Outside, the sampler's own cfg counts."),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, weight, start_percent, end_percent) -> io.NodeOutput:
        return patched(model, CFG(weight=weight, start=start_percent, end=end_percent))


NODES = (RudderAAPB, RudderFixedBlend, RudderR2F, RudderLimitedInterval, RudderCFG)

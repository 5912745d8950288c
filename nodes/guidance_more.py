"""Nodes that shape classifier-free guidance: its push, its negative, its course over the run."""

from __future__ import annotations

from comfy_api.latest import io

from ..guidance.adaptive import AdaptiveGuidance
from ..guidance.apg import APG
from ..guidance.beta_cfg import BetaCFG
from ..guidance.cfg_zero import CFGZero
from ..guidance.contract import Prompt
from ..guidance.curve import parse
from ..guidance.linear_ag import LinearAG
from ..guidance.negative import ExtraNegative
from ..guidance.perpneg import PerpNeg
from ..guidance.schedule import SHAPES, Schedule
from ..guidance.tag import CTAG, TAG
from ..guidance.tcfg import TCFG
from ..host import add_guidance
from .guidance import CATEGORY, model_input, model_output, patched, window_inputs

ADAPTIVE_MODES = ("stop", "linear", "both")
CoefficientsType = io.Custom("RUDDER_LINEAR_AG")


class RudderAPG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderAPG",
            display_name="High CFG without Burn (APG)",
            category=CATEGORY,
            description="Keeps colours and contrast natural at high cfg: drops the part of the guidance push that only "
            "saturates, limits its length and damps its momentum. APG (ICLR 2025, arXiv 2410.02416). 2 model "
            "evaluations a step, as CFG. Needs cfg above 1.",
            search_aliases=["apg", "adaptive projected guidance", "oversaturation", "burn", "high cfg"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "eta", default=0.0, min=0.0, max=10.0, step=0.05, round=False,
                    tooltip="Share of the push along the prediction, which raises contrast and saturation. 0: none of "
                    "it (paper). 1: all, as CFG. Above 1: more vivid than CFG.",
                ),
                io.Float.Input(
                    "norm_threshold", default=15.0, min=0.0, max=1000.0, step=0.5, round=False,
                    tooltip="Largest length of the push, for SDXL's latents of 1024x1024; scaled to the size of "
                    "yours. Paper: 15 for SDXL; lower is calmer (range 1 to 15). 0: no limit.",
                ),
                io.Float.Input(
                    "momentum", default=-0.5, min=-0.95, max=0.95, step=0.05, round=False,
                    tooltip="Share of the earlier pushes that is added to this one. Negative damps what was pushed "
                    "already. Paper: -0.5 for SDXL. 0: off.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, eta, norm_threshold, momentum, start_percent, end_percent) -> io.NodeOutput:
        window = {"start": start_percent, "end": end_percent}
        return patched(model, APG(eta=eta, threshold=norm_threshold, momentum=momentum, **window))


class RudderCFGZero(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderCFGZero",
            display_name="Flow Guidance Fix (CFG-Zero*)",
            category=CATEGORY,
            description="For flow models (SD3, Flux with true cfg, Wan): scales the negative's prediction to fit the "
            "positive's before guiding, and leaves out the first, inaccurate step. Fewer odd details and motion "
            "errors. CFG-Zero* (arXiv 2503.18886). 2 model evaluations a step, 1 in a step that is left out. Needs "
            "cfg above 1.",
            search_aliases=["cfg zero star", "cfgzerostar", "zero init", "optimized scale"],
            inputs=[
                model_input(),
                io.Int.Input(
                    "zero_init_steps", default=1, min=0, max=20,
                    tooltip="How many first steps leave the latent as it is. Paper: 1 of about 28 on flow models. 0: "
                    "none, only the scale. Rests on models that are not flow models (SD1.5, SDXL), with a warning, "
                    "and in runs that do not start from noise. Best with one-step samplers such as euler.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, zero_init_steps, start_percent, end_percent) -> io.NodeOutput:
        return patched(model, CFGZero(zero_steps=zero_init_steps, start=start_percent, end=end_percent))


class RudderTCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderTCFG",
            display_name="Cleaner Negative (TCFG)",
            category=CATEGORY,
            description="Removes from the negative's prediction what it does not share with the positive's and what "
            "would push the picture off the natural ones. No setting to tune. TCFG (CVPR 2025, arXiv 2503.18137). 2 "
            "model evaluations a step, as CFG. Needs cfg above 1.",
            search_aliases=["tcfg", "tangential damping", "svd guidance"],
            inputs=[model_input(), *window_inputs()],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, start_percent, end_percent) -> io.NodeOutput:
        return patched(model, TCFG(start=start_percent, end=end_percent))


class RudderAdaptiveGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderAdaptiveGuidance",
            display_name="Faster Guidance (Adaptive)",
            category=CATEGORY,
            description="Saves time: once the predictions for positive and negative agree, the rest of the run is "
            "sampled without the negative, for each picture by itself; and early steps may predict the negative from "
            "earlier ones. Adaptive Guidance and LinearAG (AAAI 2025, arXiv 2312.12487). 2 model evaluations a step, "
            "1 where the negative is left out. Needs cfg above 1.",
            search_aliases=["adaptive guidance", "skip uncond", "faster cfg", "linear ag"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "threshold", default=0.991, min=-1.0, max=1.01, step=0.001, round=False,
                    tooltip="Cosine of the two predictions at which a picture stops being guided. Paper: 0.991 for 20 "
                    "steps at cfg 7.5. Lower saves more and keeps less of the prompt; above 1 never switches. The "
                    "Guidance Trace shows the cosine of your model.",
                ),
                io.Float.Input(
                    "start_percent", default=0.3, min=0.0, max=1.0, step=0.01,
                    tooltip="Where it begins to look, a share of the model's timesteps: 0 is pure noise, 1 the clean "
                    "picture. Before, steps are guided as usual: near pure noise both predictions are mostly noise "
                    "and may agree for no good reason. Paper: 0.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="Where it ends, 0 to 1. After it, steps are guided as usual again.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(ADAPTIVE_MODES),
                    default="stop",
                    tooltip="stop: guidance ends when the predictions agree (Adaptive Guidance). linear: some early "
                    "steps predict the negative instead of evaluating it (LinearAG). both: linear early, stop late.",
                ),
                io.Int.Input(
                    "every", default=2, min=2, max=10,
                    tooltip="For linear and both: every how many steps the negative is evaluated. Paper: 2. More saves "
                    "more and follows the run less.",
                ),
                io.Float.Input(
                    "linear_until", default=0.5, min=0.0, max=1.0, step=0.01, round=False,
                    tooltip="For linear and both: up to where negatives are predicted, a share of the model's "
                    "timesteps from 0 (pure noise) to 1 (clean). Paper: 0.5. After it steps are guided as usual.",
                ),
                CoefficientsType.Input(
                    "coefficients", optional=True,
                    tooltip="For linear and both, from Fit Faster Guidance, for this model and these steps. Without "
                    "them the last evaluated push is held, which needs no fitting.",
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls, model, threshold, start_percent, end_percent, mode, every, linear_until, coefficients=None
    ) -> io.NodeOutput:
        if coefficients is not None and (mode == "stop" or linear_until == 0.0):
            raise ValueError("'coefficients' are wired but nothing uses them: set mode to linear or both, and "
                             "linear_until above 0, or remove the link.")
        if mode != "stop" and linear_until == 0.0:
            raise ValueError("'linear_until' is 0, so no step's negative is predicted. Raise it (paper: 0.5), or set "
                             "mode to stop.")
        if mode != "stop":
            model = add_guidance(model, LinearAG(every=every, coefficients=coefficients, end=linear_until))
        if mode == "linear":
            return io.NodeOutput(model)
        return patched(model, AdaptiveGuidance(gamma=threshold, start=start_percent, end=end_percent))


class RudderGuidanceSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderGuidanceSchedule",
            display_name="Guidance Schedule",
            category=CATEGORY,
            description="Guides weakly or strongly at different times of the run: weak-strong-weak presets (stage-wise "
            "guidance, arXiv 2509.22007) or a curve of your own. More variety at equal strength. 2 model "
            "evaluations a step, 1 where the curve is 0. Needs cfg above 1.",
            search_aliases=["cfg schedule", "dynamic cfg", "weak strong weak", "time varying guidance", "cfg curve"],
            inputs=[
                model_input(),
                io.Combo.Input(
                    "shape",
                    options=list(SHAPES),
                    default="triangle",
                    tooltip="triangle: up to the middle and down again (the paper's). cosine: the same, rounded. beta: "
                    "a bump that alpha and beta place. interval: the same from start to end. step: low until start, "
                    "then full. curve: the points below.",
                ),
                io.Float.Input(
                    "low", default=0.0, min=0.0, max=1.0, step=0.05, round=False,
                    tooltip="Factor outside of start and end and at the feet of the shapes: 0 is no guidance, which "
                    "saves an evaluation, 1 the full cfg. Step in the paper: about a third. Not used by 'curve'.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Where the shape begins, a share of the model's timesteps: 0 is pure noise, 1 the clean "
                    "picture. Not used by 'curve'.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Where the shape ends, 0 to 1, above start. Not used by 'step' and 'curve'.",
                ),
                io.Boolean.Input(
                    "keep_average", default=True,
                    tooltip="Scale the curve so that the average over the run is the sampler's cfg, as in the paper: a "
                    "narrow curve gets a high peak. Off: a factor of 1 is the sampler's cfg.",
                ),
                io.String.Input(
                    "curve", default="0:0, 0.5:2, 1:0", multiline=True,
                    tooltip="Only for shape 'curve': points time:factor with straight lines between them. Time 0 is "
                    "noise, 1 the clean picture; factor 0 is no guidance, 1 the sampler's cfg, 2 twice its push.",
                ),
                io.Float.Input(
                    "alpha", default=2.0, min=1.0, max=20.0, step=0.1, round=False, advanced=True,
                    tooltip="Only for shape 'beta': above beta moves the bump to the end, 1 to 20; 2 and 2 in "
                    "beta-CFG's code.",
                ),
                io.Float.Input(
                    "beta", default=2.0, min=1.0, max=20.0, step=0.1, round=False, advanced=True,
                    tooltip="Only for shape 'beta': above alpha moves the bump to the start, 1 to 20; larger values "
                    "of both make it narrower.",
                ),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls, model, shape, low, start_percent, end_percent, keep_average, curve, alpha, beta
    ) -> io.NodeOutput:
        points = parse(curve) if shape == "curve" else ()
        schedule = Schedule(
            shape=shape, low=low, first=start_percent, last=end_percent, alpha=alpha, beta=beta, points=points,
            keep_average=keep_average,
        )  # fmt: skip
        return patched(model, schedule)


def negative_input(name: str, optional: bool = False) -> io.Conditioning.Input:
    return io.Conditioning.Input(
        name, optional=optional,
        tooltip="What the picture should not have, from the same CLIP. Leave the sampler's own negative empty. Areas, "
        "masks and timestep ranges on it count.",
    )


class RudderPerpNeg(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        weight = {"min": -10.0, "max": 10.0, "step": 0.05, "round": False}
        return io.Schema(
            node_id="RudderPerpNeg",
            display_name="Safe Negatives (Perp-Neg)",
            category=CATEGORY,
            description="Negative prompts that do not fight the positive: only what a negative does not share with the "
            "positive pushes. Up to three, each with its weight. Perp-Neg (arXiv 2304.04968), per picture. 3 model "
            "evaluations a step with one negative, one more for each further. Needs cfg above 1.",
            search_aliases=["perp-neg", "perpneg", "perpendicular negative", "several negatives"],
            inputs=[
                model_input(),
                negative_input("negative_1"),
                io.Float.Input("weight_1", default=1.0, **weight, tooltip="How strongly the first negative pushes, "
                               "times cfg: usual 0.5 to 2, 0 is off."),
                negative_input("negative_2", optional=True),
                io.Float.Input("weight_2", default=1.0, **weight, tooltip="The same for the second negative, 0 is "
                               "off. Not used without it."),
                negative_input("negative_3", optional=True),
                io.Float.Input("weight_3", default=1.0, **weight, tooltip="The same for the third negative, 0 is off. "
                               "Not used without it."),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(
        cls, model, negative_1, weight_1, weight_2, weight_3, start_percent, end_percent, negative_2=None,
        negative_3=None,
    ) -> io.NodeOutput:  # fmt: skip
        wired = [(c, w, i) for i, (c, w) in enumerate(
            ((negative_1, weight_1), (negative_2, weight_2), (negative_3, weight_3)), 1) if c is not None]
        return patched(model, PerpNeg(
            negatives=tuple(Prompt(c, f"negative_{i}", negative=True) for c, _, i in wired),
            weights=tuple(w for _, w, _ in wired), start=start_percent, end=end_percent,
        ))  # fmt: skip


class RudderNegative(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderNegative",
            display_name="Extra Negative",
            category=CATEGORY,
            description="A negative prompt with a strength of its own, which does not grow with cfg: the sampler keeps "
            "its (empty) negative and this one is pushed away in addition. 3 model evaluations a step. Needs cfg "
            "above 1.",
            search_aliases=["explicit negative", "second negative", "negative weight", "negative prompt strength"],
            inputs=[
                model_input(),
                negative_input("negative"),
                io.Float.Input(
                    "weight", default=2.0, min=-20.0, max=20.0, step=0.1, round=False,
                    tooltip="How strongly it pushes, 0 to cfg. cfg - 1 is what the prompt would do as the sampler's "
                    "negative; 0 is off, below 0 pulls towards it.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, negative, weight, start_percent, end_percent) -> io.NodeOutput:
        prompt = Prompt(negative, "negative", negative=True)
        return patched(model, ExtraNegative(negative=prompt, weight=weight, start=start_percent, end=end_percent))


class RudderBetaCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderBetaCFG",
            display_name="Normalised Guidance (beta-CFG)",
            category=CATEGORY,
            description="Guides in the middle of the run, with a push of one length at every step, so that one weight "
            "suits every prompt. With alpha and beta above 1 the first and the last step follow the negative alone. "
            "beta-CFG (arXiv 2502.10574). 2 model evaluations a step, as CFG. Needs cfg above 1.",
            search_aliases=["beta cfg", "normalized guidance", "beta schedule"],
            inputs=[
                model_input(),
                io.Float.Input(
                    "alpha", default=2.0, min=1.0, max=20.0, step=0.1, round=False,
                    tooltip="With beta, the place of the most guidance: equal is the middle, above beta is later. 1 to "
                    "20; official 2. 1 and 1: no schedule.",
                ),
                io.Float.Input(
                    "beta", default=2.0, min=1.0, max=20.0, step=0.1, round=False,
                    tooltip="Above alpha puts the most guidance earlier. 1 to 20; official 2 (3 in its readme).",
                ),
                io.Float.Input(
                    "gamma", default=1.0, min=0.0, max=1.0, step=0.05, round=False,
                    tooltip="How much of the push's own length is taken out: 1 all of it (official; cfg is then the "
                    "length in a 512x512 SD1.5 latent: try 7 to 30), 0 nothing, which leaves the schedule.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, alpha, beta, gamma, start_percent, end_percent) -> io.NodeOutput:
        window = {"start": start_percent, "end": end_percent}
        return patched(model, BetaCFG(alpha=alpha, beta=beta, gamma=gamma, **window))


class RudderTAG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderTAG",
            display_name="Sharper Content (TAG)",
            category=CATEGORY,
            description="Amplifies the part of every update that changes content and leaves the part that only removes "
            "noise: more structure and detail, at no cost and at any cfg. TAG (arXiv 2510.04533). No model "
            "evaluations of its own.",
            search_aliases=["tag", "c-tag", "tangential amplifying guidance", "detail"],
            inputs=[
                model_input(),
                io.Combo.Input(
                    "mode",
                    options=["tangential", "guidance (C-TAG)"],
                    default="tangential",
                    tooltip="tangential: amplify the result, at any cfg. guidance (C-TAG): strengthen the direction of "
                    "guidance instead, for a low cfg (paper: 2.5); needs cfg above 1.",
                ),
                io.Float.Input(
                    "eta", default=1.15, min=1.0, max=3.0, step=0.01, round=False,
                    tooltip="For 'tangential': 1 changes nothing. Paper: SD1.5 1.15 (1.05 to 1.25), SDXL 1.2, SD3 "
                    "1.05. Too much gives noise.",
                ),
                io.Float.Input(
                    "guidance_eta", default=2.5, min=0.0, max=20.0, step=0.1, round=False,
                    tooltip="For 'guidance (C-TAG)': 0 changes nothing. Paper: 2.5 at cfg 2.5.",
                ),
                *window_inputs(),
            ],
            outputs=[model_output()],
        )

    @classmethod
    def execute(cls, model, mode, eta, guidance_eta, start_percent, end_percent) -> io.NodeOutput:
        window = {"start": start_percent, "end": end_percent}
        method = TAG(eta=eta, **window) if mode == "tangential" else CTAG(eta=guidance_eta, **window)
        return patched(model, method)


NODES = (
    RudderAPG, RudderCFGZero, RudderTCFG, RudderAdaptiveGuidance, RudderGuidanceSchedule, RudderPerpNeg, RudderNegative,
    RudderBetaCFG, RudderTAG,
)  # fmt: skip

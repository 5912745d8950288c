"""Samplers for SamplerCustom and SamplerCustomAdvanced: methods in which the solver itself is another."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.samplers import cfg_pp, w2sd
from ..inversion.cfg_pp import CFGPP, SOLVERS
from ..inversion.w2sd import W2SD
from .guidance import window_inputs

CATEGORY = "model/sampling/rudder"


def sampler_output() -> io.Sampler.Output:
    return io.Sampler.Output(display_name="SAMPLER", tooltip="Wire it to SamplerCustom or SamplerCustomAdvanced.")


class RudderCFGPP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderCFGPP",
            display_name="Low Guidance Sampler (CFG++)",
            category=CATEGORY,
            description="A sampler that guides gently and keeps the picture near what the model can draw: natural "
            "colours, smooth paths, good inversion. Its strength is guidance_lambda; the cfg of the sampler node does "
            "not count. CFG++ (ICLR 2025, arXiv 2406.08070). 2 model evaluations a step, as CFG. Needs a negative (an "
            "empty prompt will do).",
            search_aliases=["cfg++", "cfgpp", "euler_cfg_pp", "dpmpp_2m_cfg_pp", "manifold constrained guidance"],
            inputs=[
                io.Float.Input(
                    "guidance_lambda", default=0.6, min=0.0, max=1.0, step=0.01, round=False,
                    tooltip="How strongly the prompt guides, in place of cfg: 0 is the negative's picture, 1 the most. "
                    "Paper: 0.6, which matches a cfg of about 7.5; 1 for SDXL-Lightning. More steps guide more at the "
                    "same value; the log says which guidance weights it came to.",
                ),
                io.Combo.Input(
                    "solver", options=list(SOLVERS), default="euler",
                    tooltip="euler: the paper's DDIM. euler ancestral: the same with new noise at every step. dpm++ "
                    "2m: second order, finer and a little more guided at the same lambda.",
                ),
                io.Float.Input(
                    "eta", default=1.0, min=0.0, max=1.0, step=0.01, round=False, advanced=True,
                    tooltip="Only for 'euler ancestral': how much of the noise is drawn anew at every step, 0 (none, "
                    "the same as euler) to 1 (as DDPM, the usual).",
                ),
            ],
            outputs=[sampler_output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, guidance_lambda, solver, eta) -> io.NodeOutput:
        return io.NodeOutput(cfg_pp(CFGPP(strength=guidance_lambda, solver=solver, eta=eta)))


class RudderW2SD(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderW2SD",
            display_name="Reflection Sampler (W2SD)",
            category=CATEGORY,
            description="Walks every step forth with the strong prediction and back with a weak one before it counts, "
            "which pulls the picture towards what only the strong one knows. The sampler's own guider is the strong "
            "one; the weak one is the same at a lower cfg, or a guider with another MODEL, LoRA strength or prompt. "
            "W2SD (arXiv 2502.00473). 3 predictions a step instead of 1: with cfg 5 model evaluations (6 if the weak "
            "one is guided too) instead of 2.",
            search_aliases=["w2sd", "weak to strong", "reflection", "z-sampling", "zigzag"],
            inputs=[
                io.Guider.Input(
                    "weak_guider", optional=True,
                    tooltip="The weak side, from a CFGGuider: a base MODEL against a fine-tune, a LoRA at a negative "
                    "strength, no ControlNet against one. Same kind of latents as the sampler's MODEL. Without it the "
                    "weak side is the sampler's own guider at weak_cfg.",
                ),
                io.Float.Input(
                    "weak_cfg", default=1.0, min=0.0, max=100.0, step=0.1, round=False,
                    tooltip="Only without weak_guider: the cfg of the weak side, below the sampler's. Official: 1 with "
                    "cfg 5.5. 1 costs one evaluation less a step.",
                ),
                *window_inputs("Steps are reflected", "Outside, steps are plain Euler."),
            ],
            outputs=[sampler_output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, weak_cfg, start_percent, end_percent, weak_guider=None) -> io.NodeOutput:
        return io.NodeOutput(w2sd(W2SD(weak_cfg=weak_cfg, start=start_percent, end=end_percent), weak_guider))


NODES = (RudderCFGPP, RudderW2SD)

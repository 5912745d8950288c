"""What a method costs: the time of a step against one batched evaluation of the same number of conds.

Every sampling step is followed at once by the reference, one call of the host's ``calc_cond_batch`` with as many of the
run's own conds on the same x, without our edits of its attention, so both see the same machine: their ratio is taken
step by step, and its median is not moved by whatever else the machine does. What is above 1 is the sampler, ComfyUI's
own bookkeeping and ours, and what methods do inside attention; the rows of plain KSampler show the first two alone.
Nodes of ComfyUI that do what one of ours does are rows of the same run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_patcher
import comfy.sample
import comfy.samplers
import torch
from comfy_extras.nodes_apg import APG as OwnAPG
from comfy_extras.nodes_cfg import CFGZeroStar as OwnCFGZero
from comfy_extras.nodes_pag import PerturbedAttentionGuidance as OwnPAG
from comfy_extras.nodes_sag import SelfAttentionGuidance as OwnSAG
from comfy_extras.nodes_tcfg import TCFG as OwnTCFG

from rudder.attention.edit_prompts import EditPrompts
from rudder.attention.words import Tokens
from rudder.demo.world import COLORS
from rudder.guidance.aapb import AAPB
from rudder.guidance.adaptive import AdaptiveGuidance
from rudder.guidance.answer import ANSWER
from rudder.guidance.apg import APG
from rudder.guidance.beta_cfg import BetaCFG
from rudder.guidance.blend import FixedBlend
from rudder.guidance.cfg import CFG
from rudder.guidance.cfg_zero import CFGZero
from rudder.guidance.contract import Guidance, Prompt
from rudder.guidance.contrast import PerturbedAttention, SmoothedEnergy
from rudder.guidance.dynamic import DynamicCFG
from rudder.guidance.entropy import AttentionEntropy
from rudder.guidance.features import PlugAndPlay
from rudder.guidance.instruct import InstructGuidance
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.linear_ag import LinearAG
from rudder.guidance.local_blend import LocalBlend
from rudder.guidance.mutual import MasaCtrl
from rudder.guidance.nag import NAG
from rudder.guidance.negative import ExtraNegative
from rudder.guidance.perpneg import PerpNeg
from rudder.guidance.prompt_to_prompt import PromptToPrompt
from rudder.guidance.r2f import R2F
from rudder.guidance.rival import RIVAL
from rudder.guidance.sag import SelfAttentionGuidance
from rudder.guidance.schedule import Schedule
from rudder.guidance.scorers import Overshoot
from rudder.guidance.tag import CTAG, TAG
from rudder.guidance.tcfg import TCFG
from rudder.guidance.temporal import TemporalTAG
from rudder.guidance.temporal_fit import fresh
from rudder.guidance.temporal_net import TimePredictor
from rudder.guidance.trace import Recorder, Trace
from rudder.host import add_guidance
from rudder.host import demo as demo_host
from rudder.host.run import KEY
from rudder.host.samplers import cfg_pp, w2sd
from rudder.host.sites import sites_of
from rudder.host.words import encoded
from rudder.inversion.cfg_pp import CFGPP
from rudder.inversion.w2sd import W2SD

from . import Options, Table
from .generate import Painter, counting, files

AIM = 1.03
EDIT_AIM = 1.10  # of what edits a source's batch
WEIGHT = 7.0
INTERVAL = (0.28, 5.42)
LEAST = 2  # repeats, however little time there is
SAME = 1e-5  # of the largest number: rounding
LAST = 0.04  # the noise level of a run's last step is below
PROMPTS = {"positive": "a spiky red circle", "negative": "", "anchor": "a spiky red shape"}
TINY = {
    "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
    "num_res_blocks": [1, 1], "use_spatial_transformer": True, "context_dim": 32, "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "num_heads": 2, "num_head_channels": -1,
    "legacy": False, "use_linear_in_transformer": False, "adm_in_channels": None,
}  # fmt: skip

Conds = dict[str, list]
Words = Callable[[int], tuple[list, EditPrompts]]  # a source and its edits, so many rows, and where their words are
Pairs = list[tuple[int, float, float]]  # step, seconds of the step, seconds of one batched evaluation of as many conds


class Untrained:
    """A time predictor of the shipped size for whatever latents come."""

    def fits(self, x: torch.Tensor) -> bool:
        return True

    def to(self, like: torch.Tensor) -> TimePredictor:
        weights = fresh(like.shape[1], torch.Generator().manual_seed(0))
        return TimePredictor({name: weight.to(like.device) for name, weight in weights.items()})


@dataclass(frozen=True)
class Row:
    """The methods on the MODEL in wiring order, and how many evaluations the step at a noise level must take.

    ``after``: what depends on the first batched call and comes after it: the conds of each further call.
    ``sampler``: a SAMPLER of ours in euler's place. ``joint``: further evaluations on joint attention (Flux).
    ``own``: ComfyUI's own node on the MODEL instead, at its own defaults; ``like``: the name of our row that it does
    the work of, '' while there is none.
    ``edits``: the methods of a batch of a source and its edits, from its prompts.
    """

    name: str
    methods: Callable[[Prompt], tuple[Guidance, ...]] = lambda anchor: ()
    evaluations: Callable[[float], int] = lambda sigma: 2
    after: tuple[int, ...] = ()
    own: Callable[[Any], Any] | None = None
    like: str = ""
    sampler: Any = None
    joint: int = 0
    edits: Callable[[EditPrompts], tuple[Guidance, ...]] | None = None

    @property
    def aim(self) -> float:
        return EDIT_AIM if self.edits else AIM


def own(node: str, execute: Callable[[Any], Any], evaluations: int, like: str = "") -> Row:
    """A node of ComfyUI; what it evaluates beyond two comes after them."""
    return Row(f"ComfyUI's own node {node}", lambda a: (), lambda s: evaluations, (1,) * (evaluations - 2),
               lambda model: execute(model).args[0], like)


ROWS = (
    Row("KSampler alone (CFG)", lambda a: (), lambda s: 2),
    Row("Guidance Weight (CFG), a neutral plan", lambda a: (CFG(weight=WEIGHT),), lambda s: 2),
    Row("Guidance Interval, all inside", lambda a: (LimitedInterval(),), lambda s: 2),
    Row("Guidance Interval, (0.28, 5.42]", lambda a: (LimitedInterval(sigma_low=INTERVAL[0], sigma_high=INTERVAL[1]),),
        lambda s: 2 if INTERVAL[0] < s <= INTERVAL[1] else 1),
    Row("Rare Concept Schedule (R2F), alternate", lambda a: (R2F(frequent=a, stop=0.6),), lambda s: 2),
    Row("Rare Concept Schedule (R2F), blend", lambda a: (R2F(frequent=a, stop=0.5, mode="blend"),), lambda s: 2),
    Row("Prompt Blend (fixed)", lambda a: (FixedBlend(anchor=a),), lambda s: 3),
    Row("Rare Concept Blend (AAPB)", lambda a: (AAPB(anchor=a),), lambda s: 3),
    Row("High CFG without Burn (APG)", lambda a: (APG(),), lambda s: 2),
    own("APG", lambda m: OwnAPG.execute(m, 1.0, 5.0, 0.0), 2, "High CFG without Burn (APG)"),
    Row("Flow Guidance Fix (CFG-Zero*), no zero-init", lambda a: (CFGZero(zero_steps=0),), lambda s: 2),
    own("CFGZeroStar", OwnCFGZero.execute, 2, "Flow Guidance Fix (CFG-Zero*), no zero-init"),
    Row("Cleaner Negative (TCFG)", lambda a: (TCFG(),), lambda s: 2),
    own("TCFG", OwnTCFG.execute, 2, "Cleaner Negative (TCFG)"),
    Row("Faster Guidance (Adaptive), never switching", lambda a: (AdaptiveGuidance(gamma=1.01),), lambda s: 2),
    Row("Faster Guidance (LinearAG), all evaluated", lambda a: (LinearAG(end=0.02),), lambda s: 2),
    Row("Guidance Schedule, flat", lambda a: (Schedule(shape="interval"),), lambda s: 2),
    Row("Safe Negatives (Perp-Neg), one", lambda a: (PerpNeg(negatives=(a,)),), lambda s: 3),
    Row("Extra Negative", lambda a: (ExtraNegative(negative=a),), lambda s: 3),
    Row("Self-found Negative (ANSWER), chain 2", lambda a: (ANSWER(chain=2),), lambda s: 3 if s > LAST else 2, (1,)),
    Row("Image and Text Strength, base given", lambda a: (InstructGuidance(base=a),), lambda s: 3),
    Row("Normalised Guidance (beta-CFG)", lambda a: (BetaCFG(),), lambda s: 2),
    Row("Self-tuning CFG (dynamic), five weights", lambda a: (DynamicCFG(scorer=Overshoot()),), lambda s: 2),
    Row("Sharper Content (TAG)", lambda a: (TAG(),), lambda s: 2),
    Row("Sharper Content (C-TAG)", lambda a: (CTAG(),), lambda s: 2),
    Row("Noise Level Alignment (TAG)", lambda a: (TemporalTAG(predictor=Untrained()),), lambda s: 2),
    Row("Structure Guidance (PAG)", lambda a: (PerturbedAttention(blocks="middle, double.0"),), lambda s: 3),
    own("PerturbedAttentionGuidance", lambda m: OwnPAG.execute(m, 3.0), 3, "Structure Guidance (PAG)"),
    Row("Smoothness Guidance (SEG)", lambda a: (SmoothedEnergy(blocks="middle, double.0"),), lambda s: 3),
    Row("Salient Detail Guidance (SAG)", lambda a: (SelfAttentionGuidance(),), lambda s: 3, after=(1,)),
    own("SelfAttentionGuidance", lambda m: OwnSAG.execute(m, 0.5, 2.0), 3, "Salient Detail Guidance (SAG)"),
    Row("Negative at Any CFG (NAG)", lambda a: (NAG(negative=a),), lambda s: 2, joint=1),
    Row("Other Sizes (attention entropy)", lambda a: (AttentionEntropy(trained=(4, 4)),), lambda s: 2),
    Row("Low Guidance Sampler (CFG++), euler", lambda a: (), lambda s: 2, sampler=cfg_pp(CFGPP())),
    Row("Low Guidance Sampler (CFG++), ancestral", lambda a: (), lambda s: 2,
        sampler=cfg_pp(CFGPP(solver="euler ancestral"))),
    Row("Low Guidance Sampler (CFG++), dpm++ 2m", lambda a: (), lambda s: 2, sampler=cfg_pp(CFGPP(solver="dpm++ 2m"))),
    Row("Reflection Sampler (W2SD), weak side at cfg 1", lambda a: (), lambda s: 5 if s > LAST else 2, (1, 2),
        sampler=w2sd(W2SD())),
    Row("Source and Edits alone", edits=lambda e: ()),
    Row("Edit by Words (Prompt-to-Prompt)", edits=lambda e: (PromptToPrompt(edit=e),)),
    Row("Keep the Rest (Local Blend)", edits=lambda e: (LocalBlend(edit=e),)),
    Row("Move and Pose (MasaCtrl)", edits=lambda e: (MasaCtrl(),)),
    Row("Same Layout, New Look (Plug-and-Play)", edits=lambda e: (PlugAndPlay(),)),
    Row("Variations of a Picture (RIVAL)", edits=lambda e: (RIVAL(),)),
    Row("KSampler, trace on", lambda a: (Trace(recorder=Recorder()),), lambda s: 2),
    Row("Rare Concept Blend (AAPB), trace on", lambda a: (AAPB(anchor=a), Trace(recorder=Recorder())), lambda s: 3),
)  # fmt: skip

#: Methods of the pack without a row, and why.
ELSEWHERE = {
    "AutoGuidance": "its third evaluation is another model's, of which one batched call cannot be the measure",
}


def demo_model(file: Path) -> tuple[Any, Conds, Words]:
    painter = Painter(file)
    colours = list(COLORS)

    def words(rows: int) -> tuple[list, EditPrompts]:
        return encoded(painter.clip, [f"a spiky {colours[row % len(colours)]} circle" for row in range(rows)])

    return painter.model, {role: painter.conditioning([text]) for role, text in PROMPTS.items()}, words


def random_model(unet: dict) -> tuple[Any, Conds, Words]:
    """A UNet of the given sizes with random weights, and random features of 77 tokens for every prompt: those of a
    source and its edits say "a red heart", "a blue heart" in turn."""
    latent = {"mean": [0.0] * unet["in_channels"], "std": [1.0] * unet["in_channels"]}
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        base = demo_host.base_model({"unet": unet, "latent": latent})
        for parameter in base.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    management = comfy.model_management
    model = comfy.model_patcher.ModelPatcher(
        base.eval(), load_device=management.get_torch_device(), offload_device=management.unet_offload_device()
    )
    features = {role: torch.randn(1, 77, unet["context_dim"], generator=generator) for role in PROMPTS}

    def words(rows: int) -> tuple[list, EditPrompts]:
        every = torch.cat([features["positive" if row % 2 == 0 else "anchor"] for row in range(rows)])
        said = [("a", "red" if row % 2 == 0 else "blue", "heart") for row in range(rows)]
        keys = ((0, "start", 0), 0, 1, 2, *((0, "end", place) for place in range(73)))
        layouts = tuple((Tokens("CLIP", one, keys),) for one in said)
        return [[every, {"pooled_output": every[:, 0]}]], EditPrompts(tuple(map(" ".join, said)), layouts, (every,))

    return model, {role: [[tensor, {"pooled_output": tensor[:, 0]}]] for role, tensor in features.items()}, words


def patched(model: Any, row: Row, conds: Conds, edit: EditPrompts) -> Any:
    made = row.edits(edit) if row.edits else row.methods(Prompt(conds["anchor"], "anchor"))
    for method in made:
        model = add_guidance(model, method)
    return row.own(model) if row.own else model


def sample(
    model: Any, conds: Conds, batch: int, steps: int, size: int, each_step: Callable, sampler: Any = None
) -> torch.Tensor:
    """The latents of KSampler with euler, or ``sampler``; ``each_step(guider, index, x, sigma, options)`` is called
    with each step's prediction. The pictures of a source and its edits start from the same noise."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conds["positive"], conds["negative"])
    guider.set_cfg(WEIGHT)
    sigmas = levels(model, steps)
    latent = torch.zeros(batch, model.get_model_object("latent_format").latent_channels, size, size)
    options: dict = {}

    def callback(index: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
        if not options:
            options.update(unedited(guider.model_options))
            options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas.to(x.device)
        each_step(guider, index, x, sigmas[index].to(x.device).expand(batch), options)

    with torch.inference_mode():
        edits = len(conds["positive"][0][0]) > 1
        noise = comfy.sample.prepare_noise(latent, 1, [0] * batch if edits else None)
        sampler = sampler or comfy.samplers.sampler_object("euler")
        return guider.sample(noise, latent, sampler, sigmas, callback=callback, disable_pbar=True, seed=1)


def unedited(model_options: dict) -> dict:
    """A copy of a run's options with which the model is evaluated as ComfyUI alone would: without our edits of its
    attention, which are a wrapper of the run."""
    options = comfy.model_patcher.create_model_options_clone(model_options)
    wrappers = options.get("transformer_options", {}).get("wrappers", {})
    for kind, of in wrappers.items():
        wrappers[kind] = {key: some for key, some in of.items() if key != KEY}
    return options


def levels(model: Any, steps: int) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


def counted(model: Any, conds: Conds, batch: int, steps: int, size: int, sampler: Any = None) -> list[int]:
    """Evaluations of every step, by the rows that reach the network."""
    model, rows = counting(model)
    seen: list[int] = []

    def each_step(guider, index, x, sigma, options) -> None:
        seen.append(sum(rows) // batch)
        rows.clear()

    sample(model, conds, batch, steps, size, each_step, sampler)
    return seen


def refusal(model: Any, plain: Any, *run: Any) -> str:
    """Why a node of ComfyUI cannot be measured on this model, '' if it can; ``plain`` is the MODEL without it."""
    try:
        made = sample(model, *run, lambda *step: None)
    except Exception as error:  # whatever a node that was made for other models runs into
        return f"it fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    without = sample(plain, *run, lambda *step: None)
    changes = (made - without).abs().max() > SAME * without.abs().max()
    return "" if changes else "it changes nothing on this model, and says nothing"


def timed(
    model: Any, conds: Conds, batch: int, steps: int, size: int, evaluations: list[int],
    after: tuple[int, ...] = (), sampler: Any = None,
) -> Pairs:  # fmt: skip
    """One run, from its second step on."""
    out, started = [], [0.0]

    def each_step(guider, index, x, sigma, options) -> None:
        done = clock()
        later = after if evaluations[index] >= 2 + sum(after) else ()
        few = list(guider.conds.values())[: evaluations[index] - sum(later)]
        assert len(few) + sum(later) == evaluations[index], "the run does not hold as many conds as it evaluates"
        begun = clock()
        for some in (few, *(few[:count] for count in later)):
            comfy.samplers.calc_cond_batch(guider.inner_model, some, x, sigma, options)
        reference = clock() - begun
        if index > 0:  # the first also holds the set-up of the run
            out.append((index, done - started[0], reference))
        started[0] = clock()

    sample(model, conds, batch, steps, size, each_step, sampler)
    return out


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def typical(pairs: Pairs, which: int) -> float:
    """Milliseconds: the mean over the steps of a run of their medians over the repeats."""
    steps = sorted({pair[0] for pair in pairs})
    return 1e3 * statistics.fmean(statistics.median(p[which] for p in pairs if p[0] == step) for step in steps)


def measure(
    model: Any, conds: Conds, words: Words, batch: int, steps: int, repeats: int, size: int, until: float = math.inf
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of one model and batch size, and why rows of ComfyUI are missing. Repeats go round the rows, so that a
    slow minute hits them all; after LEAST of them none begins later than ``until``. The batch of an edit has two rows
    at least: a source and an edit."""
    joint = any(site.kind == "joint" for site in sites_of(model.model.diffusion_model))
    positive, edit = words(max(batch, 2))
    runs = {}  # what is sampled for each row: MODEL, prompts, batch, steps, side of the latent
    for row in ROWS:
        its = (conds | {"positive": positive}, max(batch, 2)) if row.edits else (conds, batch)
        runs[row] = (patched(model, row, conds, edit), *its, steps, size)
    why = {row.name: refusal(run[0], model, *run[1:]) for row, run in runs.items() if row.own}
    runs = {row: run for row, run in runs.items() if not why.get(row.name)}
    sigmas = levels(model, steps)[:-1]
    evaluations = {row: counted(*run, row.sampler) for row, run in runs.items()}  # and warms up
    pairs: dict[Row, Pairs] = {row: [] for row in runs}
    for repeat in range(repeats):
        if repeat >= LEAST and time.monotonic() >= until:
            break
        for row, run in runs.items():
            pairs[row] += timed(*run, evaluations[row], row.after, row.sampler)
    table = []
    for row, run in runs.items():
        expected = [row.evaluations(float(sigma)) + row.joint * joint for sigma in sigmas]
        low, middle, high = quartiles([step / reference for _, step, reference in pairs[row]])
        table.append({
            "method": row.name, "batch": run[2], "evaluations": statistics.fmean(evaluations[row]),
            "predicted": statistics.fmean(expected), "as_predicted": evaluations[row] == expected,
            "step_ms": typical(pairs[row], 1), "reference_ms": typical(pairs[row], 2),
            "ratio": middle, "ratio_q1": low, "ratio_q3": high, "pairs": len(pairs[row]),
        })  # fmt: skip
        if row.like:  # the same steps of the same repeat, which ours ran just before
            ours = next(pairs[other] for other in runs if other.name == row.like)
            table[-1]["against"] = quartiles([mine[1] / its[1] for mine, its in zip(ours, pairs[row])])
    return table, {name: reason for name, reason in why.items() if reason}


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def against(rows: list[dict[str, Any]]) -> list[str]:
    """What a step of ours takes against ComfyUI's own node for the same, for each model and batch size."""
    out, slower, open_, count = [], [], [], 0
    for row in (r for r in ROWS if r.own and r.like):
        said = []
        for its in (r for r in rows if r["method"] == row.name):
            low, middle, high = its["against"]
            where = f"{its['model']}, batch {its['batch']}"
            said.append(f"{where}: {middle:.3f} ({low:.3f} .. {high:.3f})")
            count += 1
            if middle > AIM:
                (slower if low > AIM else open_).append(f"{row.like} ({where})")
        out += [f"{row.like}, time of a step over that of {row.name}, median and quartiles: {'; '.join(said)}."
                ] * bool(said)
    if count:
        told = [f"NOT MET by {', '.join(slower)}"] * bool(slower)
        told += [f"undecided, because a quarter of the steps meets it, for {', '.join(open_)}"] * bool(open_)
        out.append(f"Aim: never slower than ComfyUI's own node, to {AIM} for noise: {'; '.join(told) or 'met'} "
                   f"({count} comparisons).")
    return out


def main(options: Options) -> Table:
    if options.quick and not options.models:
        models = [("a tiny UNet with random weights", *random_model(TINY))]
        size, steps, repeats, batches = 8, 4, 1, (2, 1)
    else:
        models = [(file.stem, *demo_model(file)) for file in files(options.models)]
        size, steps, repeats, batches = 16, *((4, 1, (1,)) if options.quick else (12, 6, (8, 1)))
    rows, missing = [], {}
    parts = len(models) * len(batches)
    for name, model, conds, words in models:
        for batch in batches:
            now = time.monotonic()
            until, parts = now + (options.until - now) / parts, parts - 1
            table, why = measure(model, conds, words, batch, steps, repeats, size, until)
            rows += [{"model": name} | row for row in table]
            missing |= {f"{row} on {name}": reason for row, reason in why.items()}
    wrong = ", ".join(f"{row['method']} ({row['model']})" for row in rows if not row["as_predicted"])
    owned = {ROWS[0].name, *(row.name for row in ROWS if row.own)}
    aims = {row.name: row.aim for row in ROWS}
    above = ", ".join(f"{row['method']} ({row['model']}) {row['ratio']:.3f}" for row in rows if
                      row["batch"] == max(*batches, 2) and row["method"] not in owned
                      and row["ratio"] > aims[row["method"]])
    return Table(
        "cost",
        "Cost of a sampling step",
        {
            "model": ("model", ""), "method": ("method", ""), "batch": ("batch", "d"),
            "evaluations": ("evaluations a step", ".2f"), "step_ms": ("step, ms", ".1f"),
            "reference_ms": ("one batched evaluation, ms", ".1f"), "ratio": ("ratio, median", ".3f"),
            "ratio_q1": ("quartile 1", ".3f"), "ratio_q3": ("quartile 3", ".3f"), "pairs": ("pairs", "d"),
        },
        rows,
        [
            f"{size}x{size} latents, euler, {steps} steps, cfg {WEIGHT:g}, {steps - 1} pairs a repeat, "
            f"{repeats} repeats where there was time.",
            "Ratio: a step over one batched evaluation of as many conds by ComfyUI itself, right after it; what a step "
            "asks one after another is so in the reference too. A source and its edits are one batch, of at least two.",
            f"Aim: every row of ours at batch {max(batches)} at most {AIM}, of a source and its edits {EDIT_AIM}: "
            f"{'NOT MET by ' + above if above else 'met'}.",
            *against(rows),
            *(f"Left out: {name}: {reason}." for name, reason in missing.items()),
            f"Evaluations, counted in the network: {'NOT as predicted: ' + wrong if wrong else 'as predicted'}.",
        ],
    )  # fmt: skip

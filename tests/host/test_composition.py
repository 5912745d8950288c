"""Methods compose: one batched call, ordered stages, state of a run, and functions of other packs on the same MODEL."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import ClassVar

import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple
from comfy_extras.nodes_tcfg import TCFG

from rudder.guidance.aapb import AAPB
from rudder.guidance.blend import FixedBlend
from rudder.guidance.cfg import CFG, cfg
from rudder.guidance.contract import Guidance, GuidanceError, Prompt
from rudder.guidance.contrast import PerturbedAttention
from rudder.guidance.interval import LimitedInterval
from rudder.guidance.nag import NAG
from rudder.guidance.r2f import R2F
from rudder.guidance.trace import Recorder, Trace
from rudder.host import add_guidance

from .models import calls, conditioning, evaluate, latent, sample

POSITIVE, NEGATIVE, ANCHOR = conditioning(1), conditioning(2), conditioning(3)
ANCHORED = Prompt(ANCHOR, "anchor")
STEPS, WEIGHT = 4, 4.0


def wired(model, *methods):
    for method in methods:
        model = add_guidance(model, method)
    return model


# Cost: one call of the host's batching a step, one forward of the network, as many rows as distinct branches.

COSTS = {
    "AAPB": ([AAPB(anchor=ANCHORED)], WEIGHT, [3, 3, 3, 3]),
    "FixedBlend": ([FixedBlend(anchor=ANCHORED)], WEIGHT, [3, 3, 3, 3]),
    "FixedBlend, gamma 0": ([FixedBlend(anchor=ANCHORED, gamma=0.0)], WEIGHT, [2, 2, 2, 2]),
    "FixedBlend at cfg 1": ([FixedBlend(anchor=ANCHORED)], 1.0, [2, 2, 2, 2]),
    "R2F": ([R2F(frequent=ANCHORED, stop=0.5)], WEIGHT, [2, 2, 2, 2]),
    "R2F blend": ([R2F(frequent=ANCHORED, stop=0.5, mode="blend")], WEIGHT, [2, 2, 2, 2]),
    "R2F at cfg 1": ([R2F(frequent=ANCHORED, stop=0.5)], 1.0, [1, 1, 1, 1]),
    "CFG 1": ([CFG(weight=1.0)], WEIGHT, [1, 1, 1, 1]),
    "CFG 2 at cfg 1": ([CFG(weight=2.0)], 1.0, [2, 2, 2, 2]),
    "interval": ([LimitedInterval(sigma_low=0.3, sigma_high=0.95)], WEIGHT, None),
    "interval and AAPB": ([LimitedInterval(sigma_low=0.3, sigma_high=0.95), AAPB(anchor=ANCHORED)], WEIGHT, None),
    "AAPB early": ([AAPB(anchor=ANCHORED, end=0.4)], WEIGHT, None),
    "R2F to AAPB's anchor": (
        [R2F(frequent=ANCHORED, stop=1.0), AAPB(anchor=Prompt(ANCHOR, "anchor"))],
        WEIGHT,
        [2, 3, 2, 3],
    ),
    "R2F to another": (
        [R2F(frequent=Prompt(conditioning(4), "frequent"), stop=1.0), AAPB(anchor=ANCHORED)],
        WEIGHT,
        [3] * 4,
    ),
}


@pytest.mark.parametrize("case", COSTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_evaluations(model, kind, case, batch):
    methods, weight, expected = COSTS[case]
    counted, seen = calls(model)
    recorder = Recorder()
    sample(wired(counted, *methods, Trace(recorder=recorder)), kind, POSITIVE, NEGATIVE, cfg=weight, batch=batch)
    (run,) = recorder.runs.values()
    if expected is None:
        inside = [0.3 < step["sigma"] <= 0.95 for step in run["steps"]]
        most = {"interval": 2, "interval and AAPB": 3}.get(case)
        early = [step["sigma"] >= model.model.model_sampling.percent_to_sigma(0.4) for step in run["steps"]]
        expected = [most if i else 1 for i in inside] if most else [3 if e else 2 for e in early]
        assert len(set(expected)) == 2
    assert seen["batching"] == expected
    assert seen["network"] == [batch * n for n in expected]
    assert [step["evaluations"] for step in run["steps"]] == expected


@dataclass(frozen=True, kw_only=True)
class Extra(Guidance):
    """Asks for a branch and adds a tenth of it."""

    prompt: Prompt

    def prompts(self):
        return (self.prompt,)

    def branches(self, step):
        return (self.prompt,)

    def term(self, step, preds):
        return 0.1 * preds[self.prompt]


def test_methods_that_share_an_anchor_pay_for_it_once(model, kind):
    same, equal = Prompt(ANCHOR, "extra"), Prompt(conditioning(3), "extra")
    results = []
    for prompt, rows in ((same, 3), (equal, 4)):
        counted, seen = calls(model)
        results.append(sample(wired(counted, AAPB(anchor=ANCHORED), Extra(prompt=prompt)), kind, POSITIVE, NEGATIVE))
        assert seen["network"] == [rows] * STEPS
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_low_memory_splits_the_batch_and_nothing_else(model, kind, monkeypatch):
    patched = add_guidance(model, AAPB(anchor=ANCHORED))
    together = sample(patched, kind, POSITIVE, NEGATIVE, batch=2)
    counted, seen = calls(patched)
    monkeypatch.setattr(model.model, "memory_required", lambda *a, **k: 1e30)
    apart = sample(counted, kind, POSITIVE, NEGATIVE, batch=2)
    assert seen["batching"] == [3] * STEPS and seen["network"] == [2] * 3 * STEPS
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=5e-4)


@pytest.mark.parametrize("methods", [
    (R2F(frequent=ANCHORED, mode="blend"),), (R2F(frequent=ANCHORED),), (AAPB(anchor=ANCHORED),),
    (R2F(frequent=ANCHORED, mode="blend"), PerturbedAttention(blocks="middle, double")),
])
def test_memory_is_planned_for_what_runs_together(model, kind, methods, monkeypatch):
    planned, own = [], comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory",
                        lambda model, shape, conds: planned.append(shape[0]) or own(model, shape, conds))
    counted, seen = calls(wired(model, *methods))
    sample(counted, kind, POSITIVE, NEGATIVE, batch=4)
    assert planned == [max(seen["network"]) / 2]  # the host doubles it, for two conds


def test_a_run_towards_noise_counts_its_steps_forwards(model, kind):
    recorder = Recorder()
    guider = comfy.samplers.CFGGuider(wired(model, Trace(recorder=recorder)))
    guider.set_conds(POSITIVE, NEGATIVE)
    sigmas = torch.tensor([0.001, 0.2, 0.5, 0.7, 0.9])
    guider.sample(torch.zeros_like(latent(kind)), latent(kind), comfy.samplers.sampler_object("euler"), sigmas,
                  disable_pbar=True, seed=1)
    assert [step["index"] for step in recorder.runs[""]["steps"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "method", [AAPB(anchor=ANCHORED), FixedBlend(anchor=ANCHORED), R2F(frequent=ANCHORED, mode="blend")]
)
def test_a_batch_is_so_many_single_runs(model, kind, method):
    recorder = Recorder()
    patched = wired(model, method, Trace(recorder=recorder))
    noise = comfy.sample.prepare_noise(latent(kind, 3), 7)
    batch = sample(patched, kind, POSITIVE, NEGATIVE, batch=3, noise=noise)
    gammas = recorder.runs[""]["steps"][1].get("gamma")
    for i in range(3):
        single = sample(patched, kind, POSITIVE, NEGATIVE, noise=noise[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-5, atol=5e-4)
        if isinstance(method, AAPB):
            assert recorder.runs[""]["steps"][1]["gamma"] == pytest.approx(gammas[i : i + 1], abs=1e-3)


# The contract: stages in order, wiring order inside a stage, ranks, and what each stage does to the result.


@dataclass(frozen=True, kw_only=True)
class Probe(Guidance):
    """Writes down every hook that is called."""

    name: str
    seen: list = field(default_factory=list)

    def scale(self, step, weight):
        if step.x.numel():  # not the check before the run
            self.seen.append(("scale", self.name))
        return weight

    def sources(self, step):
        self.seen.append(("sources", self.name))
        return {}

    def branches(self, step):
        self.seen.append(("branches", self.name))
        return ()

    def refine(self, step, preds):
        self.seen.append(("refine", self.name))
        return preds

    def direction(self, step, delta):
        self.seen.append(("direction", self.name))
        return delta

    def term(self, step, preds):
        self.seen.append(("term", self.name))
        return None

    def finish(self, step, x0):
        self.seen.append(("finish", self.name))
        return x0


class Late(Probe):
    rank: ClassVar[int] = 1


STAGES = ["scale", "sources", "branches", "refine", "direction", "term", "finish"]


def test_stages_run_in_order_and_methods_in_wiring_order_by_rank(model, kind):
    seen: list = []
    patched = wired(
        model, Late(name="late", seen=seen), Probe(name="first", seen=seen), Probe(name="second", seen=seen)
    )
    evaluate(patched, kind, POSITIVE, NEGATIVE)
    assert seen == [(stage, name) for stage in STAGES for name in ("first", "second", "late")]


@dataclass(frozen=True, kw_only=True)
class Change(Guidance):
    """Changes one stage."""

    stage: str

    def scale(self, step, weight):
        return weight * 0.5 if self.stage == "scale" else weight

    def prompts(self):
        return (ANCHORED,)

    def sources(self, step):
        return {self.stage: ANCHORED} if self.stage in ("cond", "uncond") else {}

    def refine(self, step, preds):
        return preds.replace(uncond=preds.uncond * 0.5) if self.stage == "refine" else preds

    def term(self, step, preds):
        return preds.cond - preds.uncond if self.stage == "term" else None

    def finish(self, step, x0):
        return x0 * 0.5 if self.stage == "finish" else x0


class Turn(Change):
    def direction(self, step, delta):
        return delta * 0.5


CHANGES = {
    "scale": lambda c, u, a: cfg(c, u, WEIGHT / 2),
    "cond": lambda c, u, a: cfg(a, u, WEIGHT),
    "uncond": lambda c, u, a: cfg(c, a, WEIGHT),
    "refine": lambda c, u, a: cfg(c, u / 2, WEIGHT),
    "direction": lambda c, u, a: c + (WEIGHT - 1) * (c - u) / 2,
    "term": lambda c, u, a: cfg(c, u, WEIGHT) + c - u,
    "finish": lambda c, u, a: cfg(c, u, WEIGHT) / 2,
}


@pytest.mark.parametrize("stage", CHANGES)
def test_what_a_stage_changes(model, kind, stage):
    method = Turn(stage=stage) if stage == "direction" else Change(stage=stage)
    run = evaluate(model, kind, POSITIVE, NEGATIVE, ANCHOR, cfg=WEIGHT)
    expected = CHANGES[stage](run["cond_denoised"], run["uncond_denoised"], run["third"])
    ours = evaluate(add_guidance(model, method), kind, POSITIVE, NEGATIVE, cfg=WEIGHT)["denoised"]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_a_gate_limits_whatever_weight_was_chosen_in_any_wiring(model, kind):
    gate, weight = LimitedInterval(sigma_low=0.4, sigma_high=0.95), CFG(weight=2.0)
    runs = [sample(wired(model, *order), kind, POSITIVE, NEGATIVE) for order in ((gate, weight), (weight, gate))]
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], sample(wired(model, weight), kind, POSITIVE, NEGATIVE))


# State lives as long as a run.


@dataclass(frozen=True, kw_only=True)
class Drift(Guidance):
    """Adds the running sum of the run's random numbers: a picture that remembers, if anything is left to remember."""

    born: list = field(default_factory=list)

    def finish(self, step, x0):
        state = step.state(self)
        if not state:
            self.born.append(step.index)
        state["sum"] = state.get("sum", 0.0) + torch.randn(x0.shape, generator=step.generator)
        return x0 + 0.1 * state["sum"]


def test_state_is_born_with_the_run_and_dies_with_it(model, kind):
    drift = Drift()
    patched = add_guidance(model, drift)
    first, again = (sample(patched, kind, POSITIVE, NEGATIVE) for _ in range(2))
    assert torch.equal(first, again)
    assert drift.born == [0, 0]
    noise = comfy.sample.prepare_noise(latent(kind), 7)
    other = sample(patched, kind, POSITIVE, NEGATIVE, seed=8, noise=noise)
    assert not torch.equal(first, other), "the generator is seeded with the seed of the run"


def test_one_model_in_two_samplers(model, kind):
    patched = wired(model, Drift(), AAPB(anchor=ANCHORED))
    alone = [sample(patched, kind, POSITIVE, NEGATIVE, seed=seed, steps=steps) for seed, steps in ((7, 4), (8, 3))]
    swapped = [sample(patched, kind, POSITIVE, NEGATIVE, seed=seed, steps=steps) for seed, steps in ((8, 3), (7, 4))]
    assert torch.equal(alone[0], swapped[1]) and torch.equal(alone[1], swapped[0])


# Nodes of others on the same MODEL, wired before or after ours.


def skip_uncond_batch(model):
    """A cond batching function of another pack, which unpacks exactly two conds."""
    patched = model.clone()

    def batch(args):
        cond, uncond = args["conds"]
        return comfy.samplers.calc_cond_batch(
            args["model"], [cond, uncond], args["input"], args["sigma"], args["model_options"]
        )

    patched.set_model_sampler_calc_cond_batch_function(batch)
    return patched


def louder_network(model):
    patched = model.clone()
    patched.set_model_unet_function_wrapper(
        lambda apply, args: apply(args["input"], args["timestep"], **args["c"]) * 1.1
    )
    return patched


FOREIGN = {
    "APG": lambda m: APG.execute(m, 0.5, 2.0, 0.3).args[0],
    "TCFG": lambda m: TCFG.execute(m).args[0],
    "Mahiro": lambda m: Mahiro.execute(m).args[0],
    "CFGZeroStar": lambda m: CFGZeroStar.execute(m).args[0],
    "CFGNorm": lambda m: CFGNorm.execute(m, 0.9).args[0],
    "RescaleCFG": lambda m: RescaleCFG().patch(m, 0.7)[0],
    "PerturbedAttentionGuidance": lambda m: PerturbedAttentionGuidance.execute(m, 3.0).args[0],
    "SkipLayerGuidanceDiT": lambda m: SkipLayerGuidanceDiT.execute(m, 3.0, 0.0, 1.0, "0", "0", 0.0).args[0],
    "SkipLayerGuidanceDiTSimple": lambda m: SkipLayerGuidanceDiTSimple.execute(m, 0.0, 1.0, "0", "0").args[0],
    "model_function_wrapper": louder_network,
    "calc_cond_batch_function": skip_uncond_batch,
    "LazyCache": lambda m: LazyCacheNode.execute(m, 3.0, 0.0, 1.0, False).args[0],
    "EasyCache": lambda m: EasyCacheNode.execute(m, 3.0, 0.0, 1.0, False).args[0],
}
if hasattr(custom, "CFGOverride"):  # ComfyUI 0.30.0
    FOREIGN["CFGOverride"] = lambda m: custom.CFGOverride.execute(m, 2.0, 0.0, 0.5).args[0]
FOR_THE_OTHER_FAMILY = {
    "unet": {"SkipLayerGuidanceDiT", "SkipLayerGuidanceDiTSimple"},
    "flux": {"PerturbedAttentionGuidance"},
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("weight", [WEIGHT, 1.0])
def test_a_neutral_plan_hands_others_what_the_host_does(model, kind, name, weight):
    foreign = FOREIGN[name]
    reference = sample(foreign(model), kind, POSITIVE, NEGATIVE, cfg=weight)
    for patched in (add_guidance(foreign(model), Guidance()), foreign(add_guidance(model, Guidance()))):
        assert torch.equal(sample(patched, kind, POSITIVE, NEGATIVE, cfg=weight), reference)


@pytest.mark.parametrize("method", [
    PerturbedAttention(blocks="middle, double.0"), NAG(negative=Prompt(ANCHOR, "nag"))], ids=["PAG", "NAG"])
def test_a_step_cache_rests_with_attention_edits(model, kind, method):
    """A forward that EasyCache answers meets no attention; what it remembers was edited."""
    guided = add_guidance(model, method)
    cached = EasyCacheNode.execute(guided, 3.0, 0.0, 1.0, False).args[0]
    run, plain = (sample(m, kind, POSITIVE, NEGATIVE, cfg=WEIGHT, steps=8) for m in (cached, guided))
    assert run.isfinite().all() and not torch.equal(run, plain), "it has skipped steps"


@pytest.mark.parametrize("name", FOREIGN)
def test_others_act_together_with_ours(model, kind, name):
    foreign, ours = FOREIGN[name], AAPB(anchor=ANCHORED)
    cfg = 100.0 if name == "Mahiro" else WEIGHT  # Mahiro acts where the guided picture is unlike the negative's

    def made(patched):
        return sample(patched, kind, POSITIVE, NEGATIVE, cfg=cfg)

    before, after = made(add_guidance(foreign(model), ours)), made(foreign(add_guidance(model, ours)))
    assert torch.equal(before, after) and before.isfinite().all()
    alone = made(add_guidance(model, ours))
    if name not in FOR_THE_OTHER_FAMILY[kind]:
        idle = name == "calc_cond_batch_function"  # it does what the host does
        assert ((before - alone).abs().max() < 1e-6 * alone.abs().max()) == idle, "the other node acts"
    assert not torch.allclose(before, made(foreign(model))), "ours acts"


def test_what_others_are_told(model, kind):
    """Pre-CFG functions get the host's predictions and may change them; post-CFG functions get the refined ones."""
    told = {}

    def pre(args):
        told["pre"] = args
        cond, uncond = args["conds_out"]
        return [cond * 0.9, uncond]

    def post(args):
        told["post"] = args
        return args["denoised"] + 1.0

    patched = add_guidance(model, FixedBlend(anchor=ANCHORED, gamma=0.4))
    patched.set_model_sampler_pre_cfg_function(pre)
    patched.set_model_sampler_post_cfg_function(post)
    ours = evaluate(patched, kind, POSITIVE, NEGATIVE, cfg=WEIGHT)["denoised"]
    run = evaluate(model, kind, POSITIVE, NEGATIVE, ANCHOR, cfg=WEIGHT)
    cond, uncond = run["cond_denoised"], run["uncond_denoised"]
    blended = 0.6 * (cond * 0.9) + 0.4 * run["third"]
    for got, expected in (
        (told["pre"]["conds_out"][0], cond),
        (told["pre"]["conds_out"][1], uncond),
        (told["post"]["cond_denoised"], blended),
        (told["post"]["uncond_denoised"], uncond),
        (told["post"]["denoised"], cfg(blended, uncond, WEIGHT)),
        (ours, cfg(blended, uncond, WEIGHT) + 1.0),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(told["pre"]["conds"]) == 2 and told["pre"]["cond_scale"] == told["post"]["cond_scale"] == WEIGHT
    assert told["post"].keys() == {k for k in run if k != "third"}, "the host's own arguments"


def test_a_foreign_cfg_function_is_reported_and_acts(model, kind, caplog):
    patched = add_guidance(FOREIGN["RescaleCFG"](model), AAPB(anchor=ANCHORED))
    with caplog.at_level(logging.WARNING, "rudder"):
        sample(patched, kind, POSITIVE, NEGATIVE)
    (record,) = [r for r in caplog.records if r.name == "rudder"]
    assert "RescaleCFG" in record.getMessage() and AAPB.title in record.getMessage()


def test_a_foreign_cfg_function_and_a_direction_are_refused(model, kind):
    patched = add_guidance(FOREIGN["RescaleCFG"](model), Turn(stage="direction"))
    with pytest.raises(GuidanceError) as error:
        sample(patched, kind, POSITIVE, NEGATIVE)
    assert all(word in str(error.value) for word in ("RescaleCFG", Turn.title, "Remove")), error.value
    assert sample(FOREIGN["RescaleCFG"](model), kind, POSITIVE, NEGATIVE).isfinite().all()

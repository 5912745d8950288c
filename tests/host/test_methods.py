"""Each method that shapes guidance in whole runs: both models, batches, sampler nodes, video, neutral settings."""

from __future__ import annotations

import comfy.sample
import comfy_extras.nodes_custom_sampler as custom
import pytest
import torch

import nodes as host_nodes
from rudder.guidance.adaptive import AdaptiveGuidance
from rudder.guidance.apg import APG
from rudder.guidance.beta_cfg import BetaCFG
from rudder.guidance.cfg import cfg
from rudder.guidance.cfg_zero import CFGZero, optimal_scale
from rudder.guidance.contract import GuidanceError
from rudder.guidance.contrast import PerturbedAttention
from rudder.guidance.nag import NAG
from rudder.guidance.negative import ExtraNegative
from rudder.guidance.perpneg import PerpNeg
from rudder.guidance.schedule import Schedule
from rudder.guidance.space import expand
from rudder.guidance.tag import CTAG, TAG
from rudder.guidance.tcfg import TCFG, damped
from rudder.guidance.trace import QUANTITIES, Recorder, Trace
from rudder.host import add_guidance, plan_of
from rudder.nodes.guidance import RudderLimitedInterval
from rudder.nodes.guidance_more import (
    RudderAdaptiveGuidance,
    RudderAPG,
    RudderBetaCFG,
    RudderCFGZero,
    RudderGuidanceSchedule,
    RudderNegative,
    RudderPerpNeg,
    RudderTAG,
    RudderTCFG,
)

from .models import calls, conditioning, evaluate, latent, sample, tiny_wan
from .registry import METHODS, NEGATIVE, POSITIVE, evaluations, prompt

STEPS, WEIGHT, SEED = 4, 4.0, 7
NEW = (
    "schedule", "Perp-Neg", "extra negative", "APG", "TCFG", "CFG-Zero*", "beta-CFG", "adaptive", "TAG", "C-TAG",
    "LinearAG", "dynamic", "temporal TAG",
)  # fmt: skip
every_method = pytest.mark.parametrize("name", NEW)


def guided(model, name: str):
    return add_guidance(model, METHODS[name].method)


def by_guider(model, kind: str, batch: int) -> torch.Tensor:
    guider = custom.CFGGuider.execute(model, POSITIVE, NEGATIVE, WEIGHT).args[0]
    noise = custom.RandomNoise.execute(SEED).args[0]
    solver = custom.KSamplerSelect.execute("euler").args[0]
    sigmas = custom.BasicScheduler.execute(model, "normal", STEPS, 1.0).args[0]
    image = {"samples": latent(kind, batch)}
    return custom.SamplerCustomAdvanced.execute(noise, guider, solver, sigmas, image).args[0]["samples"]


def by_ksampler(model, kind: str, batch: int) -> torch.Tensor:
    image, prompts = {"samples": latent(kind, batch)}, (POSITIVE, NEGATIVE)
    return host_nodes.KSampler().sample(model, SEED, STEPS, WEIGHT, "euler", "normal", *prompts, image)[0]["samples"]


@every_method
@pytest.mark.parametrize("batch", [1, 3])
def test_a_run(model, kind, name, batch):
    """Finite, repeatable, the same from both sampler nodes, evaluated as predicted, and the base model is untouched."""
    reference = by_ksampler(model, kind, batch)
    counted, seen = calls(model)
    recorder = Recorder()
    run = by_ksampler(add_guidance(guided(counted, name), Trace(recorder=recorder)), kind, batch)
    assert run.isfinite().all() and not torch.equal(run, reference)
    assert torch.equal(by_guider(guided(model, name), kind, batch), run)
    assert torch.equal(by_ksampler(model, kind, batch), reference)
    (record,) = recorder.runs.values()
    expected = evaluations([name], kind, [step["sigma"] for step in record["steps"]])
    assert seen["batching"] == expected and seen["network"] == [batch * n for n in expected]
    assert {key for step in record["steps"] for key in step} <= {*QUANTITIES, "index", "sigma"}


@every_method
def test_a_batch_is_so_many_single_runs(model, kind, name):
    noise = comfy.sample.prepare_noise(latent(kind, 2), SEED)
    batch = sample(guided(model, name), kind, POSITIVE, NEGATIVE, batch=2, noise=noise)
    for i in range(2):
        single = sample(guided(model, name), kind, POSITIVE, NEGATIVE, noise=noise[i : i + 1])
        assert (batch[i : i + 1] - single).abs().max() < 1e-3 * single.abs().max()


def test_pictures_of_a_batch_stop_being_guided_one_by_one(model, kind):
    noise = comfy.sample.prepare_noise(latent(kind, 3), SEED)

    def traced(gamma: float, noise: torch.Tensor) -> tuple[torch.Tensor, list[dict]]:
        recorder = Recorder()
        patched = add_guidance(add_guidance(model, AdaptiveGuidance(gamma=gamma)), Trace(recorder=recorder))
        run = sample(patched, kind, POSITIVE, NEGATIVE, batch=len(noise), noise=noise, steps=6)
        return run, recorder.runs[""]["steps"]

    never = traced(1.01, noise)[1]
    assert [step["evaluations"] for step in never] == [2] * 6
    gamma = sorted(never[1]["cosine"])[1]  # after two steps one or two of three have switched
    batch, steps = traced(gamma, noise)
    assert any(0 < sum(step["switched"]) < 3 for step in steps if isinstance(step["switched"], list))
    for i in range(3):
        single, _ = traced(gamma, noise[i : i + 1])
        assert (batch[i : i + 1] - single).abs().max() < 1e-3 * single.abs().max()


@every_method
def test_video(name):
    model, image = tiny_wan(), torch.zeros(1, 16, 2, 4, 4)
    run = sample(guided(model, name), "wan", POSITIVE, NEGATIVE, image=image, steps=3)
    assert run.shape == image.shape and run.isfinite().all()
    assert not torch.equal(run, sample(model, "wan", POSITIVE, NEGATIVE, image=image, steps=3))


EXACT = {  # bit-identical to the sampler's own CFG
    "schedule": Schedule(shape="interval", keep_average=False),
    "extra negative": ExtraNegative(negative=prompt(5, "negative"), weight=0.0),
    "beta-CFG": BetaCFG(alpha=1.0, beta=1.0, gamma=0.0),
    "adaptive": AdaptiveGuidance(gamma=1.01),
    "TAG": TAG(eta=1.0),
    "C-TAG": CTAG(eta=0.0),
}
CLOSE = {  # the same in exact arithmetic: cond + (w - 1) delta for uncond + w delta
    "APG": APG(eta=1.0, threshold=0.0, momentum=0.0),
    "Perp-Neg": PerpNeg(negatives=(prompt(5, "negative"),), weights=(0.0,)),
}


@pytest.mark.parametrize("name", [*EXACT, *CLOSE])
def test_neutral_settings_are_cfg(model, kind, name):
    plain = sample(model, kind, POSITIVE, NEGATIVE, batch=2)
    neutral = sample(add_guidance(model, {**EXACT, **CLOSE}[name]), kind, POSITIVE, NEGATIVE, batch=2)
    if name in EXACT:
        assert torch.equal(neutral, plain)
    else:
        torch.testing.assert_close(neutral, plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["TCFG", "CFG-Zero*"])
def test_methods_without_a_neutral_setting_are_their_formula(model, kind, name):
    run = evaluate(model, kind, POSITIVE, NEGATIVE, cfg=WEIGHT, batch=2)
    x, cond, uncond = run["input"], run["cond_denoised"], run["uncond_denoised"]
    e_c, e_u = x - cond, x - uncond
    e_u = damped(e_u, e_c) if name == "TCFG" else expand(optimal_scale(e_c, e_u), e_u) * e_u
    method = TCFG() if name == "TCFG" else CFGZero(zero_steps=0)
    ours = evaluate(add_guidance(model, method), kind, POSITIVE, NEGATIVE, cfg=WEIGHT, batch=2)
    torch.testing.assert_close(ours["denoised"], cfg(cond, x - e_u, WEIGHT), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours["uncond_denoised"], x - e_u, rtol=1e-4, atol=1e-4)  # what others are told


AT_CFG_1 = {  # what a message names instead, by the title of its node
    "CFG-Zero*": TAG, "TCFG": NAG, "beta-CFG": PerturbedAttention, "schedule": PerturbedAttention,
    "dynamic": PerturbedAttention,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NEW if name not in ("TAG", "temporal TAG")])
def test_without_guidance_a_method_says_so_and_names_the_way_out(model, kind, name):
    patched = guided(model, name)
    with pytest.raises(GuidanceError) as error:
        sample(patched, kind, POSITIVE, NEGATIVE, cfg=1.0)
    title = METHODS[name].method.title
    for words in (title, "Set cfg above 1", "distilled guidance (Flux-dev, few-step models) run at cfg 1: "):
        assert words in str(error.value), error.value
    if name in AT_CFG_1:
        assert f"'{AT_CFG_1[name].title}'" in str(error.value).split("run at cfg 1: ")[1]


def test_the_papers_interval_says_where_it_cuts_off_nothing(model, kind, caplog):
    sample(call(RudderLimitedInterval, model=model)[0], kind, POSITIVE, NEGATIVE)
    assert ("sigma_high 5.42 cut off no step" in caplog.text) == (kind == "flux")


@pytest.mark.parametrize("name", ["TAG", "temporal TAG"])
def test_tag_works_without_guidance(model, kind, name):
    run = sample(guided(model, name), kind, POSITIVE, NEGATIVE, cfg=1.0)
    assert run.isfinite().all() and not torch.equal(run, sample(model, kind, POSITIVE, NEGATIVE, cfg=1.0))


BAD = {
    "negative is the positive": (PerpNeg(negatives=(prompt(1, "negative_1"),)), ["negative_1", "identical to the pos"]),
    "negative is the sampler's": (ExtraNegative(negative=prompt(2, "negative")), ["Extra", "sampler's negative"]),
    "a curve that is 0": (Schedule(shape="curve", points=((0.0, 0.0),)), ["no step of this run has guidance"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(model, kind, case):
    method, words = BAD[case]
    with pytest.raises(GuidanceError) as error:
        sample(add_guidance(model, method), kind, POSITIVE, NEGATIVE)
    assert all(word in str(error.value) for word in words), error.value


def test_zero_init_leaves_a_step_to_a_flow_model_and_rests_on_others(model, kind):
    run = add_guidance(model, CFGZero(zero_steps=STEPS))
    if kind == "flux":
        with pytest.raises(GuidanceError, match="zero_init_steps is 4 in a run of 4 steps"):
            sample(run, kind, POSITIVE, NEGATIVE)
    else:
        assert sample(run, kind, POSITIVE, NEGATIVE).isfinite().all()


def test_another_encoder_is_refused(model, kind):
    wide = conditioning(5)
    wide[0][0] = torch.cat([wide[0][0], wide[0][0]], -1)
    for method in (PerpNeg(negatives=(prompt(5, "negative"),)), ExtraNegative(negative=prompt(5, "negative"))):
        method.prompts()[0].conditioning[:] = wide
        with pytest.raises(GuidanceError, match="come from different text encoders"):
            sample(add_guidance(model, method), kind, POSITIVE, NEGATIVE)


# ---------------------------------------------------------------- nodes

AWAY, MORE = conditioning(5), conditioning(6)
NODES = {
    "APG": (RudderAPG, {}, APG()),
    "CFG-Zero*": (RudderCFGZero, {"zero_init_steps": 2}, CFGZero(zero_steps=2)),
    "TCFG": (RudderTCFG, {"end_percent": 0.5}, TCFG(end=0.5)),
    "adaptive": (RudderAdaptiveGuidance, {}, AdaptiveGuidance(start=0.3)),
    "schedule": (RudderGuidanceSchedule, {}, Schedule()),
    "schedule, drawn": (
        RudderGuidanceSchedule, {"shape": "curve", "curve": "0:0\n1:2", "keep_average": False},
        Schedule(shape="curve", points=((0.0, 0.0), (1.0, 2.0)), keep_average=False),
    ),
    "Perp-Neg": (RudderPerpNeg, {"negative_1": AWAY, "weight_1": 0.5}, (AWAY,)),
    "Perp-Neg, two": (RudderPerpNeg, {"negative_1": AWAY, "negative_3": MORE}, (AWAY, MORE)),
    "extra negative": (RudderNegative, {"negative": AWAY}, (AWAY,)),
    "beta-CFG": (RudderBetaCFG, {}, BetaCFG()),
    "TAG": (RudderTAG, {}, TAG()),
    "C-TAG": (RudderTAG, {"mode": "guidance (C-TAG)"}, CTAG()),
}  # fmt: skip


def call(node: type, **inputs) -> tuple:
    """Execute a node as the host does, with the schema's defaults for what is not given."""
    defaults = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(**{**defaults, **inputs}).args


@pytest.mark.parametrize(("node", "inputs", "expected"), NODES.values(), ids=NODES)
def test_a_node_adds_its_method_to_a_clone(model, node, inputs, expected):
    (patched,) = call(node, model=model, **inputs)
    (method,) = plan_of(patched.model_options)
    assert plan_of(model.model_options) == ()
    if isinstance(expected, tuple):  # conditionings, never copied: shared ones cost once
        assert len(method.prompts()) == len(expected)
        assert all(prompt.conditioning is given for prompt, given in zip(method.prompts(), expected))
    else:
        assert method == expected


def test_a_curve_that_cannot_be_read_is_explained(model):
    with pytest.raises(GuidanceError, match="'half' is not a point of the curve. Write time:factor"):
        call(RudderGuidanceSchedule, model=model, shape="curve", curve="0:1, half, 1:0")

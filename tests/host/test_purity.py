"""An empty plan changes nothing, and no run leaves anything behind: not a finished, a cancelled or a failed one."""

from __future__ import annotations

import contextlib
import gc
import weakref
from dataclasses import dataclass

import comfy.hooks
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.model_management import InterruptProcessingException

from rudder.guidance.aapb import AAPB
from rudder.guidance.cfg import CFG
from rudder.guidance.contract import Guidance, Predictions, Prompt, Step
from rudder.guidance.contrast import PerturbedAttention
from rudder.guidance.trace import Recorder, Trace
from rudder.host import add_guidance, plan_of

from .models import MODELS, conditioning, having, latent, lora, sample

POSITIVE, NEGATIVE, ANCHOR = conditioning(1), conditioning(2), conditioning(3)
SAMPLERS = ["euler", "dpmpp_2m", "heun", "euler_ancestral", "euler_cfg_pp", "dpmpp_2m_cfg_pp"]
NEUTRAL = {"guidance": lambda: Guidance(), "trace": lambda: Trace(recorder=Recorder())}


@pytest.fixture(scope="module", params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return MODELS[kind]()


@pytest.mark.parametrize("neutral", NEUTRAL)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("cfg", [4.0, 1.0, 0.0])
def test_a_neutral_plan_is_bit_identical(model, kind, neutral, sampler, cfg):
    patched = add_guidance(model, NEUTRAL[neutral]())
    reference = sample(model, kind, POSITIVE, NEGATIVE, cfg=cfg, sampler=sampler, batch=2, steps=3)
    assert torch.equal(sample(patched, kind, POSITIVE, NEGATIVE, cfg=cfg, sampler=sampler, batch=2, steps=3), reference)


def test_removing_a_node_is_bit_identical_and_clones_keep_their_own_plans(model, kind):
    reference = sample(model, kind, POSITIVE, NEGATIVE)
    aapb = AAPB(anchor=Prompt(ANCHOR, "anchor"))
    child = add_guidance(model, aapb)
    grandchild, sibling = add_guidance(child, CFG(weight=2.0)), add_guidance(model, CFG(weight=2.0))
    foreign = child.clone()
    plans = [
        [method.title for method in plan_of(m.model_options)] for m in (model, child, grandchild, sibling, foreign)
    ]
    assert plans == [[], [AAPB.title], [AAPB.title, CFG.title], [CFG.title], [AAPB.title]]
    assert plan_of(foreign.model_options)[0] is aapb
    guided = [sample(m, kind, POSITIVE, NEGATIVE) for m in (child, grandchild, sibling, foreign)]
    assert torch.equal(guided[0], guided[3]) and len({g.sum().item() for g in [reference, *guided]}) == 4
    assert torch.equal(sample(model, kind, POSITIVE, NEGATIVE), reference)


@dataclass(frozen=True, kw_only=True)
class Failing(Guidance):
    """Raises ``error`` at step 2."""

    error: BaseException

    def refine(self, step: Step, preds: Predictions) -> Predictions:
        if step.index == 2:
            raise self.error
        return preds


def structure(value):
    """Everything reachable through containers, with tensors by value and other objects by identity."""
    if isinstance(value, dict):
        return {key: structure(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [structure(v) for v in value]
    if isinstance(value, torch.Tensor):
        return value.shape, hash(value.numpy().tobytes())
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    return id(value)


def everything(guider: comfy.samplers.CFGGuider, conditionings: list) -> dict:
    """What a run could leave a mark on."""
    model = guider.model_patcher
    state = {
        name: structure(getattr(model, name))
        for name in (
            "model_options",
            "wrappers",
            "callbacks",
            "patches",
            "object_patches",
            "object_patches_backup",
            "attachments",
            "injections",
            "additional_models",
            "hook_patches",
            "hook_patches_backup",
            "hook_mode",
            "current_hooks",
        )
    }
    state["weights"] = structure(dict(model.model.state_dict()))
    state["model"] = sorted(set(vars(model.model)) - {"current_patcher"})
    state["guider"] = {
        name: structure(v) for name, v in vars(guider).items() if name in ("cfg", "original_conds", "model_options")
    }
    state["patcher"] = id(guider.model_patcher)
    state["conditionings"] = structure(conditionings)
    return state


def run(guider: comfy.samplers.CFGGuider, kind: str, callback=None) -> torch.Tensor:
    sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "normal", 4)
    noise = comfy.sample.prepare_noise(latent(kind), 7)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, latent(kind), sampler, sigmas, callback=callback, disable_pbar=True, seed=7)


def cancelled(step: int, *_):
    if step == 1:
        raise InterruptProcessingException()


RINGS = {"guidance": CFG(weight=2.0), "attention": PerturbedAttention(blocks="middle, double")}


@pytest.mark.parametrize("method", RINGS.values(), ids=RINGS)
def test_a_run_leaves_no_ring_of_references_to_its_model(model, kind, method):
    """The host drops a MODEL by its count of references; one that waits for the garbage collector is a leak to it."""
    patched = add_guidance(model, method)
    gone, collecting = weakref.ref(patched), gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        sample(patched, kind, POSITIVE, NEGATIVE, steps=2)
        del patched
        assert gone() is None
    finally:
        if collecting:
            gc.enable()


OUTCOMES = {
    "finished": (Guidance(), None, None),
    "cancelled by the callback": (Guidance(), cancelled, InterruptProcessingException),
    "cancelled in a method": (Failing(error=InterruptProcessingException()), None, InterruptProcessingException),
    "failed": (Failing(error=RuntimeError("at step 2")), None, RuntimeError),
    "refused": (AAPB(anchor=Prompt(POSITIVE, "anchor")), None, ValueError),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("hooks", [False, True], ids=["", "hooks"])
def test_a_run_leaves_nothing_behind(model, kind, outcome, hooks):
    method, callback, error = OUTCOMES[outcome]
    anchor = ANCHOR
    if hooks:
        anchor = having(ANCHOR, hooks=comfy.hooks.create_hook_lora(lora(model, 1), 1.0, 0.0))
    conditionings = [POSITIVE, NEGATIVE, anchor]
    reference = sample(model, kind, POSITIVE, NEGATIVE)
    plan = add_guidance(model, AAPB(anchor=Prompt(anchor, "anchor"))) if outcome != "refused" else model
    guider = comfy.samplers.CFGGuider(add_guidance(plan, method))
    guider.set_conds(POSITIVE, NEGATIVE)
    guider.set_cfg(4.0)
    before = everything(guider, conditionings)

    with pytest.raises(error) if error else contextlib.nullcontext():
        run(guider, kind, callback)
    assert everything(guider, conditionings) == before
    assert getattr(guider, "conds", {}).keys() <= {"positive", "negative"}
    assert torch.equal(sample(model, kind, POSITIVE, NEGATIVE), reference)
    if error is None:
        assert torch.equal(run(guider, kind), run(guider, kind))


class Dynamic(comfy.model_patcher.ModelPatcher):
    """Stands in for the host's patcher of dynamic weights, which cannot take hooks and has a delegate run instead."""

    def is_dynamic(self) -> bool:
        return True

    def get_non_dynamic_delegate(self):
        delegate = self.clone()
        delegate.__class__ = comfy.model_patcher.ModelPatcher
        return delegate


def test_hooks_of_an_anchor_move_one_run_to_a_delegate(model, kind):
    anchor = having(ANCHOR, hooks=comfy.hooks.create_hook_lora(lora(model, 1), 1.0, 0.0))
    patched = add_guidance(model, AAPB(anchor=Prompt(anchor, "anchor")))
    reference = sample(patched, kind, POSITIVE, NEGATIVE)
    patched.__class__ = Dynamic
    guider = comfy.samplers.CFGGuider(patched)
    guider.set_conds(POSITIVE, NEGATIVE)
    guider.set_cfg(4.0)
    before = everything(guider, [POSITIVE, NEGATIVE, anchor])
    assert torch.equal(run(guider, kind), reference)
    assert everything(guider, [POSITIVE, NEGATIVE, anchor]) == before

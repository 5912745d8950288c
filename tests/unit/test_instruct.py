"""InstructPix2Pix: two strengths, one for the image and one for the text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions, Variant
from rudder.guidance.instruct import IMAGELESS, InstructGuidance
from rudder.guidance.space import cosine

from .tensors import at, predictions, prompt, run_step, setup, weights

close = torch.testing.assert_close
BASE = prompt("base")


@given(predictions(4), weights, weights)
def test_it_is_the_papers_equation(tensors, text, image):
    x, both, only_image, neither = tensors
    for method in (InstructGuidance(weight=image), InstructGuidance(weight=image, base=BASE)):
        out = run_step(at(x, weight=text), Predictions(both, only_image, {method.branch: neither}), method)
        close(out, neither + image * (only_image - neither) + text * (both - only_image), rtol=1e-8, atol=1e-8)


@given(predictions(4), weights)
def test_degenerate_cases(tensors, weight):
    x, both, only_image, neither = tensors
    preds, now = Predictions(both, only_image, {IMAGELESS: neither}), at(x, weight=weight)
    close(run_step(now, preds, InstructGuidance(weight=weight)), cfg(both, neither, weight), rtol=1e-8, atol=1e-8)
    plain = Predictions(both, only_image)
    assert torch.equal(run_step(now, plain, InstructGuidance(weight=1.0)), cfg(both, only_image, weight))
    assert InstructGuidance(weight=1.0).branches(now) == () and not InstructGuidance(weight=1.0).needs_uncond
    alone = run_step(at(x, weight=1.0), preds, InstructGuidance(weight=weight))
    close(alone, both + (weight - 1) * (only_image - neither), rtol=1e-8, atol=1e-8)
    assert InstructGuidance().needs_uncond, "the strength of the image counts at cfg 1 too"


def test_what_it_asks_for():
    assert InstructGuidance().branches(at(torch.zeros(1, 2, 3, 3))) == (Variant("uncond", image=False),)
    assert InstructGuidance(base=BASE).prompts() == (BASE,)
    assert IMAGELESS.name == "negative without image"


def test_the_trace_tells_how_image_and_text_differ():
    now = at(torch.zeros(2, 2, 3, 3))
    both, only_image, neither = torch.randn(3, 2, 2, 3, 3)
    run_step(now, Predictions(both, only_image, {IMAGELESS: neither}), InstructGuidance())
    assert now.record["image_cosine"].shape == (2,)


def test_bad_input():
    with pytest.raises(GuidanceError, match="image_scale is nan"):
        InstructGuidance(weight=float("nan"))
    with pytest.raises(GuidanceError, match="base conditioning is identical to the sampler's negative"):
        InstructGuidance(base=BASE).check(setup(likeness="negative"))
    with pytest.raises(GuidanceError, match="there is no negative"):
        InstructGuidance().check(setup(has_negative=False))
    InstructGuidance().check(setup(cfg=1.0))


def test_the_push_of_the_image_is_that_of_the_plain_predictions():
    x, both, only_image, neither, changed = torch.randn(5, 1, 2, 3, 3)
    now = at(x)
    now.plain = Predictions(both, only_image, {IMAGELESS: neither})
    close(InstructGuidance(weight=3.0).term(now, now.plain.replace(uncond=changed)), 2 * (only_image - neither))


def test_the_trace_has_the_cosine_of_image_and_text():
    x, both, only_image, neither = torch.randn(4, 2, 2, 3, 3)
    now = at(x)
    run_step(now, Predictions(both, only_image, {IMAGELESS: neither}), InstructGuidance())
    close(now.record["image_cosine"], cosine(only_image - neither, both - only_image))

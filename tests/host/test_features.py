"""Plug-and-Play in the real host: its two parts, its names, its node. What the reference row methods share is in
test_mutual.py."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from rudder.guidance.contract import GuidanceError
from rudder.guidance.features import PlugAndPlay
from rudder.host import plan_of
from rudder.nodes.reference import RudderPlugAndPlay

from .models import MODELS, tiny_unet
from .test_mutual import edit
from .test_nodes import call

SHARP = 100.0


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def test_both_parts_act():
    """With sharp attention: that of random weights is flat, and whose queries and keys it has makes no difference."""
    unet = tiny_unet()
    with torch.inference_mode(False), torch.no_grad():
        for name, weight in unet.model.diffusion_model.named_parameters():
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                weight.mul_(SHARP)
    outs = [edit(unet, "unet", PlugAndPlay(attention_until=a, feature_until=f)) for a, f in ((0, 1), (1, 0), (1, 1))]
    assert all(torch.equal(out[0], outs[0][0]) for out in outs)
    for one, other in itertools.combinations([edit(unet, "unet"), *outs], 2):
        assert (one[1] - other[1]).abs().max() > 1e-6 * one.abs().max(), "more than rounding"


def test_names_that_no_block_has_are_refused(unet):
    with pytest.raises(GuidanceError, match="feature_block is 'output.9', and none of these is called that: input"):
        edit(unet, "unet", PlugAndPlay(feature="output.9"))
    with pytest.raises(GuidanceError, match="blocks is 'double.1', and none of these is called that: input"):
        edit(unet, "unet", PlugAndPlay(blocks="double.1"))
    with pytest.raises(GuidanceError, match="'up_3' is not a block"):
        edit(unet, "unet", PlugAndPlay(blocks="up_3"))


def test_a_transformer_says_that_the_residual_rests(caplog):
    flux = MODELS["flux"]()
    with caplog.at_level(logging.WARNING, "rudder"):
        edit(flux, "flux", PlugAndPlay())
    assert "has no residual blocks" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rudder"):
        edit(flux, "flux", PlugAndPlay(feature_until=0))
    assert "has no residual blocks" not in caplog.text


def test_the_node(unet):
    (model,) = call(RudderPlugAndPlay, model=unet, feature_block="output.1", blocks="middle")
    assert plan_of(model.model_options) == (PlugAndPlay(feature="output.1", blocks="middle"),)
    (model,) = call(RudderPlugAndPlay, model=unet, feature_block=" ", blocks=" , ")
    assert plan_of(model.model_options) == (PlugAndPlay(feature="", blocks=""),), "blanks name no block"

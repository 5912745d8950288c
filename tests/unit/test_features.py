"""Plug-and-Play features: which blocks, which rows, until when."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.attention.contract import Residual
from rudder.attention.features import Features
from rudder.attention.sites import Site, numbered
from rudder.guidance.contract import GuidanceError
from rudder.guidance.features import PlugAndPlay

from .tensors import at, setup, step
from .test_mutual import acting, attend, attention, close, made, sd15, through


def residuals(inputs: tuple[int, ...], outputs: int) -> list[Site]:
    names = [f"input.{i}" for i in inputs] + ["middle", "middle"] + [f"output.{i}" for i in range(outputs)]
    return numbered(Site(name, "residual") for name in names)


X = torch.zeros(2, 4, 2, 2)
SD15 = residuals((1, 2, 4, 5, 7, 8, 10, 11), 12)
SDXL = residuals((1, 2, 4, 5, 7, 8), 9)
DEMO = residuals((1, 3, 5), 6)


def test_the_default_blocks_are_the_official_codes():
    assert acting(Features(), sd15()) == [f"output.{i}.0" for i in range(4, 12)]
    assert [acting(Features(), sites) for sites in (SD15, SDXL, DEMO)] == [["output.4"], ["output.1"], ["output.1"]]
    joint = numbered(Site(f"joint.{i}", "joint") for i in range(24))
    assert len(acting(Features(), joint)) == 24
    named = Features(feature="output.2-3", blocks="middle")
    assert acting(named, SD15 + sd15()) == ["output.2", "output.3", "middle.0"]
    assert not acting(Features(attention_until=0, feature_until=0), SD15 + sd15())


@given(st.integers(0, 2**31), st.integers(2, 4))
def test_edits_attend_by_the_sources_map_to_their_own_values(seed, samples):
    call = made(seed, samples)
    out = call.by_sample(through(Features(), call))
    q, k, v = (call.by_sample(t) for t in (call.q, call.k, call.v))
    for i in range(samples):
        close(out[1, i], attention(q[1, 0], k[1, 0], v[1, i]))


def test_text_rows_stay():
    call = made(samples=2, text=5)
    out = Features().inputs(call)
    assert torch.equal(out.q[:, :, :5], call.q[:, :, :5]) and torch.equal(out.k[:, :, :5], call.k[:, :, :5])
    assert torch.equal(call.by_sample(out.q)[:, 1, :, 5:], call.by_sample(call.q)[:, 0, :, 5:])


def test_the_windows_end_by_themselves():
    edit, call = Features(attention_until=0.5, feature_until=0.8), made(samples=2)
    h = torch.randn(4, 3, 2, 5)
    for index, attention_on, feature_on in ((0, True, True), (4, True, True), (5, False, True), (7, False, True),
                                            (8, False, False), (9, False, False)):  # fmt: skip
        now = step(index)
        changed = edit.inputs(call.replace(step=now))
        assert torch.equal(changed.q, call.q) is not attention_on
        out = edit.residual(Residual(h, SD15[14], ("uncond", "cond"), 2, now))
        assert torch.equal(out[[0, 2]], h[[0, 2]]) and torch.equal(out[[1, 3]], h[[0, 2] if feature_on else [1, 3]])


def test_a_window_of_nothing_edits_nothing():
    assert PlugAndPlay(attention_until=0, feature_until=0).edits(at(X)) == []
    assert len(PlugAndPlay(attention_until=0).edits(at(X))) == 1
    assert torch.equal(attend(Features(attention_until=0).inputs(made())), attend(made()))


def late(first: int, sites: list[Site]):
    """A run whose first step is ``first`` of 10, as with a low denoise."""
    return replace(setup(), sites=sites, steps=setup().steps[first:])


def test_a_run_that_begins_after_every_window_is_refused(caplog):
    joint = numbered(Site(f"joint.{i}", "joint") for i in range(4))
    for method, run in ((PlugAndPlay(), late(8, SD15 + sd15())), (PlugAndPlay(attention_until=0.2), late(3, joint))):
        with pytest.raises(GuidanceError, match=r"lies at 0\.[38] of the timesteps, and attention_percent is 0\.[25]"):
            method.check(run)
    PlugAndPlay(attention_until=0, feature_until=0).check(late(8, SD15 + sd15()))  # off on purpose
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "rudder"):
        PlugAndPlay().check(late(6, SD15 + sd15()))
    assert "lies at 0.6 of the timesteps, and attention_percent is 0.5, so that part does not act" in caplog.text
    with pytest.raises(GuidanceError, match="start_percent is 0.8 and everything ends before that"):
        PlugAndPlay(start=0.8)


@pytest.mark.parametrize("name", ["attention_until", "feature_until"])
def test_a_share_is_a_share(name):
    with pytest.raises(GuidanceError, match="_percent is 1.5; it must be from 0 to 1"):
        PlugAndPlay(**{name: 1.5})


def test_sd15_gets_no_warning(caplog):
    with caplog.at_level(logging.WARNING, "rudder"):
        PlugAndPlay().check(replace(setup(), sites=SD15 + sd15()))
    assert not caplog.records

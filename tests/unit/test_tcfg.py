"""TCFG: the Gram matrix gives what the singular value decomposition gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.guidance.cfg import cfg
from rudder.guidance.contract import GuidanceError, Predictions
from rudder.guidance.space import norm, residual
from rudder.guidance.tcfg import TCFG, damped

from .tensors import at, predictions, run_step, setup, weights

close = torch.testing.assert_close
METHOD = TCFG()


def by_svd(uncond: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """The paper's own words, sample by sample."""
    out = []
    for u, c in zip(uncond, cond):
        top = torch.linalg.svd(torch.stack([u.flatten(), c.flatten()]), full_matrices=False).Vh[0]
        out.append(((u.flatten() @ top) * top).reshape(u.shape))
    return torch.stack(out)


@given(predictions(2))
def test_it_is_the_projection_on_the_top_singular_vector(tensors):
    uncond, cond = tensors
    if uncond[0].numel() > 1:
        close(damped(uncond, cond), by_svd(uncond, cond), rtol=1e-6, atol=1e-6)


@given(predictions(3), weights)
def test_the_step_is_cfg_with_the_damped_negative(tensors, weight):
    x, cond, uncond = tensors
    kept = damped(residual(x, uncond), residual(x, cond))
    close(run_step(at(x, weight=weight), Predictions(cond, uncond), METHOD), cfg(cond, x - kept, weight))


@given(predictions(1), st.floats(-3, 3))
def test_parallel_scores_are_plain_cfg(tensors, ratio):
    (cond,) = tensors
    close(damped(ratio * cond, cond), ratio * cond, rtol=1e-9, atol=1e-9)


@given(predictions(2))
def test_it_only_shortens_and_signs_do_not_matter(tensors):
    uncond, cond = tensors
    kept = damped(uncond, cond)
    assert (norm(kept) <= norm(uncond) * (1 + 1e-9)).all()
    close(damped(uncond, -cond), kept)
    close(damped(-uncond, cond), -kept)


def test_no_top_vector_and_no_score():
    u, c = torch.zeros(2, 1, 1, 1, 2)
    u[..., 0] = c[..., 1] = 2.0
    assert torch.equal(damped(u, c), u)
    assert torch.equal(damped(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)), torch.zeros(1, 4, 2, 2))


@given(predictions(3))
def test_a_batch_is_so_many_single_runs(tensors):
    x, cond, uncond = tensors
    rows = [run_step(at(x[i:i + 1]), Predictions(cond[i:i + 1], uncond[i:i + 1]), METHOD) for i in range(len(x))]
    close(run_step(at(x), Predictions(cond, uncond), METHOD), torch.cat(rows))


def test_it_rests_without_guidance_and_records():
    x, cond, uncond = torch.randn(3, 2, 4, 3, 3)
    for preds in (Predictions(cond, None), Predictions(cond, uncond)):
        assert METHOD.refine(at(x, weight=1.0), preds) is preds
    now = at(x)
    run_step(now, Predictions(cond, uncond), METHOD)
    assert ((now.record["removed"] >= 0) & (now.record["removed"] <= 1)).all()


def test_a_run_without_guidance_is_refused():
    with pytest.raises(GuidanceError, match=r"\(TCFG\).*above 1.*remove the node"):
        METHOD.check(setup(cfg=1.0))


def test_the_trace_has_what_is_removed():
    x, cond, uncond = torch.randn(3, 2, 4, 3, 3)
    now = at(x)
    run_step(now, Predictions(cond, uncond), TCFG())
    e_u = residual(x, uncond)
    close(now.record["removed"], norm(damped(e_u, residual(x, cond)) - e_u) / norm(e_u))

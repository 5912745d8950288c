"""NAG: the rule, its bound, and who gets what on joint attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rudder.attention.nag import JointNormalisedGuidance, nag
from rudder.attention.sites import Site
from rudder.guidance.contract import GuidanceError, Variant
from rudder.guidance.nag import NAG

from .tensors import at, prompt, seeds, setup

close = torch.testing.assert_close
scales, taus, alphas = st.floats(1, 20), st.floats(1, 10), st.floats(0, 1)


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, 5, 4, generator=generator) for _ in range(2))


def length(z: torch.Tensor) -> torch.Tensor:
    return z.abs().sum((1, 3))


@given(seeds, scales, taus, alphas)
def test_it_is_the_papers_rule(seed, scale, tau, alpha):
    z, other = pair(seed)
    pushed = scale * z - (scale - 1) * other
    ratio = (length(pushed) / length(z))[:, None, :, None]
    expected = alpha * pushed * torch.minimum(ratio, torch.tensor(tau)) / ratio + (1 - alpha) * z
    out = nag(z, other, scale, tau, alpha)
    close(out, expected, rtol=1e-4, atol=1e-4)
    assert (length(out) <= (1 - alpha + alpha * tau) * length(z) * (1 + 1e-4)).all()


@given(seeds, scales, taus, alphas)
def test_neutral_settings_and_an_equal_negative_change_nothing(seed, scale, tau, alpha):
    z, other = pair(seed)
    assert torch.equal(nag(z, other, scale, tau, 0.0), z)
    close(nag(z, other, 1.0, tau, alpha), z)
    close(nag(z, z, scale, tau, alpha), z, rtol=1e-4, atol=1e-4)
    nothing = torch.zeros_like(z)
    assert all(nag(nothing, other, scale, tau, alpha).isfinite().all() for other in (nothing, z))


def test_half_precision_does_not_overflow():
    z, other = (t.half() * 8000 for t in pair(0))
    assert nag(z, other, 5.0, 2.5, 0.25).isfinite().all() and nag(z, other, 5.0, 2.5, 0.25).dtype == torch.float16


def test_on_joint_attention_the_negatives_picture_follows_the_positives():
    site = Site("double.0", "joint", 0, 1, (1, 2, 2), slice(0, 3), slice(3, 7))
    edit = JointNormalisedGuidance(negative="negative", scale=3.0, tau=2.0, alpha=0.5)
    results = [torch.randn(2, 2, 7, 4) for _ in range(3)]
    out = edit.across(site, ("negative", "worse", "cond"), results)
    of_negative, *positives = (z[:, :, 3:] for z in results)
    for made, z in zip(out[1:], positives):
        close(made[:, :, 3:], nag(z, of_negative, 3.0, 2.0, 0.5))
    assert torch.equal(out[0][:, :, 3:], out[2][:, :, 3:])
    assert all(torch.equal(a[:, :, :3], b[:, :, :3]) for a, b in zip(out, results)), "text rows stay"
    for alone in (("cond",), ("negative",), ("worse",)):
        with pytest.raises(ValueError, match="different forward passes"):
            edit.across(site, alone, results[:1])


def test_cost():
    """One more branch on joint attention, none on a UNet; nothing at all where nothing would change."""
    method, x = NAG(negative=prompt("negative")), torch.zeros(1, 4, 2, 2)
    joint, cross = (at(x, sites=[Site("a.0", kind)]) for kind in ("joint", "cross"))
    assert method.branches(joint) == (Variant(method.negative),) and method.branches(cross) == ()
    assert method.prompts() == (Variant(method.negative),)
    for neutral in ({"strength": 1.0}, {"alpha": 0.0}):
        off = NAG(negative=prompt("negative"), **neutral)
        assert not off.prompts() and not off.edits(joint) and not off.branches(joint)


@pytest.mark.parametrize(("given", "says"), [
    ({"strength": 0.5}, "scale is 0.5"), ({"strength": float("nan")}, "scale is nan"), ({"tau": 0.5}, "tau is 0.5"),
    ({"alpha": 1.5}, "alpha is 1.5"), ({"alpha": -1}, "alpha is -1"),
])  # fmt: skip
def test_bad_input(given, says):
    with pytest.raises(GuidanceError, match=says):
        NAG(negative=prompt("negative"), **given)


def test_the_positive_as_negative_is_refused():
    with pytest.raises(GuidanceError, match="identical to the positive"):
        NAG(negative=prompt("negative")).check(setup(likeness="positive"))


def test_it_acts_on_the_positive_alone_with_its_own_numbers():
    method = NAG(negative=prompt("negative"))
    ((edit, on),) = method.edits(at(torch.zeros(1, 4, 2, 2), sites=[Site("a.0", "joint")]))
    assert on == ("cond", method.branch) and (edit.scale, edit.tau, edit.alpha) == (5.0, 2.5, 0.25)


def test_a_method_that_changes_image_tokens_is_named():
    edit = JointNormalisedGuidance(negative="n")
    assert edit.company == ("cond", "n")
    with pytest.raises(ValueError, match="changes the image tokens of 'double.0'"):
        edit.across(Site("double.0", "joint", grid=None), ("cond", "n"), [torch.zeros(1, 1, 4, 2)] * 2)

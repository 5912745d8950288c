"""Attention edits inside the real host: sites, rows, identity, other packs, removal."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from rudder.attention.contract import AttentionEdit
from rudder.guidance.contract import Guidance, GuidanceError
from rudder.guidance.contrast import PerturbedAttention
from rudder.host import add_guidance
from rudder.host.sites import sites_of

from .models import MODELS, sample, tiny_sd3
from .registry import NEGATIVE, POSITIVE
from .test_branches import one_forward_a_cond

FAMILIES = {**MODELS, "sd3": tiny_sd3}
SITES = {"unet": 14, "flux": 2, "sd3": 2}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def network(family):
    return FAMILIES[family]()


@dataclass(frozen=True, kw_only=True, eq=False)
class Same(AttentionEdit):
    """Changes nothing, and writes down what it met."""

    met: list = field(default_factory=list)
    materialise: bool = False

    title = "identity edit"

    def inputs(self, call):
        self.met.append(call)
        return call


class SameMap(Same):
    def map(self, call, probabilities):
        assert torch.allclose(probabilities.sum(-1), torch.ones(()))
        return probabilities


@dataclass(frozen=True, kw_only=True, eq=False)
class Editing(Guidance):
    edit: AttentionEdit
    on: tuple = ()

    title = "edits"

    def edits(self, step):
        return [(self.edit, self.on)]


def run(model, family, *methods, **options):
    for method in methods:
        model = add_guidance(model, method)
    return sample(model, family, POSITIVE, NEGATIVE, **options)


@pytest.mark.parametrize("on", [(), ("cond",), ("uncond",)], ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["joint", "split"])
def test_an_identity_edit_is_bit_identical_and_meets_every_site(family, network, on, split):
    edit = Same()
    bare, model = network.clone(), add_guidance(network, Editing(edit=edit, on=on))
    if split:
        bare, model = one_forward_a_cond(bare), one_forward_a_cond(model)
    out, plain = (sample(m, family, POSITIVE, NEGATIVE, steps=2, batch=2) for m in (model, bare))
    assert torch.equal(out, plain)
    sites = [site for site in sites_of(network.model.diffusion_model) if site.kind != "residual"]
    assert len(sites) == SITES[family]
    forwards = 2 * (2 if split and not on else 1)
    assert [call.site.name for call in edit.met] == [site.name for site in sites] * forwards
    for call in edit.met:
        assert call.samples == 2 and len(call.q) == 2 * len(call.roles)
        assert set(call.roles) <= set(on or ("cond", "uncond"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Copy(AttentionEdit):
    """Every sample gets what the residual block adds to the first."""

    title = "residuals of the first sample"
    kinds = frozenset({"residual"})

    def residual(self, block):
        h = block.by_sample(block.h)
        return h[:, :1].expand_as(h).flatten(0, 1)


def test_a_residual_edit_acts_on_what_a_block_adds():
    model = MODELS["unet"]()
    names = [site.name for site in sites_of(model.model.diffusion_model) if site.kind == "residual"]
    assert "output.1" in names and names.count("middle") == 2
    plain = run(model, "unet", batch=2)
    out = run(model, "unet", Editing(edit=Copy(blocks="output.1")), batch=2)
    assert torch.equal(out[0], plain[0]) and not torch.allclose(out[1], plain[1], atol=1e-3)
    with pytest.raises(GuidanceError, match="no residual attention of this model is called 'input.9'"):
        run(model, "unet", Editing(edit=Copy(blocks="input.9")))
    with pytest.raises(GuidanceError, match="has no residual"):
        run(MODELS["flux"](), "flux", Editing(edit=Copy()))
    assert torch.equal(run(model, "unet", batch=2), plain)


def test_pag_is_cores_on_the_middle_block():
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    model = MODELS["unet"]()
    ours = run(model, "unet", PerturbedAttention(strength=3.0), batch=2)
    core = PerturbedAttentionGuidance.execute(model, 3.0)[0]
    assert torch.allclose(ours, sample(core, "unet", POSITIVE, NEGATIVE, batch=2), atol=1e-5)

"""Inspect Attention in the real host: what it lists, what it draws, and that it leaves nothing."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from rudder.attention.inspect import SelfMaps, TextMaps
from rudder.attention.listing import ListSites
from rudder.guidance.contract import GuidanceError
from rudder.guidance.contrast import PerturbedAttention
from rudder.host import add_guidance, plan_of
from rudder.host.inspect import look
from rudder.host.sites import sites_of
from rudder.nodes.heatmap import heat, heat_maps, table_picture
from rudder.nodes.inspect import RudderInspectAttention

from .models import CHANNELS, calls, conditioning, having, sample
from .registry import NEGATIVE, POSITIVE
from .test_nodes import call

FIRST = {"unet": "input.1", "flux": "double.0", "chroma": "double.0", "sd3": "joint.0"}


def inspected(model, family, size=(6, 10), batch=1, **inputs) -> tuple[torch.Tensor, str]:
    latent = {"samples": torch.zeros(batch, CHANNELS[family], *size)}
    return call(RudderInspectAttention, model=model, positive=POSITIVE, latent_image=latent, **inputs)


def test_the_list_names_every_site(family, network):
    counted, seen = calls(network)
    image, text = inspected(counted, family)
    assert seen["network"] == [1], "one evaluation, of the positive alone"
    names = {(site.name, site.kind) for site in sites_of(network.model.diffusion_model)}
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines()[1:]]
    assert {(row[0], row[1]) for row in rows} == names
    assert all(row[-1] in ("6 x 10", "3 x 5") for row in rows)
    assert image.ndim == 4 and image.shape[0] == 1 and image.shape[3] == 3 and 0 <= image.min() < image.max() == 1


@pytest.mark.parametrize("draw", ["text to image", "self"])
@pytest.mark.parametrize("batch", [1, 2])
def test_maps_are_drawn_and_the_model_stays_as_it_was(family, network, draw, batch):
    plain = sample(network, family, POSITIVE, NEGATIVE, steps=2)
    guided = add_guidance(network, PerturbedAttention(blocks="middle, double, joint"))
    image, _ = inspected(guided, family, batch=batch, blocks="all", draw=draw, tokens="1, 3-4")
    assert image.shape[0] == batch and image.isfinite().all()
    again, _ = inspected(network, family, batch=batch, blocks="all", draw=draw, tokens="1, 3-4")
    assert torch.equal(image, again), "other methods on the model rest"
    assert not torch.equal(image, inspected(network, family, batch=batch, blocks=FIRST[family], draw=draw)[0])
    assert len(plan_of(guided.model_options)) == 1 and not plan_of(network.model_options)
    assert torch.equal(sample(network, family, POSITIVE, NEGATIVE, steps=2), plain)


def test_the_maps_are_those_of_the_run(family, network):
    """The shares of all text tokens: one at a cross-attention, less where the picture is looked at too."""
    text, own = TextMaps(tokens=tuple(range(7))), SelfMaps(x=0.2, y=0.9)
    latent = {"samples": torch.zeros(2, CHANNELS[family], 6, 10)}
    look(network, POSITIVE, latent, 1, 0.4, [text, own, ListSites()])
    assert text.maps and own.maps
    for site, one in text.maps.items():
        assert one.shape[:3] == (2, 7, 1) and tuple(one.shape[3:]) in ((6, 10), (3, 5))
        whole = one.sum(1)
        assert torch.allclose(whole, torch.ones(())) if "cross" in site else bool(((whole > 0) & (whole < 1)).all())
        assert not torch.equal(one[0], one[1]), "two noises"
    for site, one in own.maps.items():
        assert one.shape[:3] == (2, 1, 1) and torch.allclose(one.sum((1, 2, 3, 4)), torch.ones(())) == ("self" in site)


def test_of_a_combined_positive_the_first_part_is_drawn(family, network):
    longer = conditioning(8, tokens=14)
    for more in (having(longer), having(POSITIVE, start_percent=0.9) + longer):
        own, text = inspected(network, family, blocks=FIRST[family], tokens="1, 3")
        first, listed = call(RudderInspectAttention, model=network, positive=[*POSITIVE, *more], tokens="1, 3",
                             latent_image={"samples": torch.zeros(1, CHANNELS[family], 6, 10)}, blocks=FIRST[family])
        assert torch.equal(first, own) and listed == text


@pytest.mark.parametrize("percent", [0.0, 1.0])
def test_both_ends_of_the_run_can_be_looked_at(family, network, percent):
    assert inspected(network, family, percent=percent, blocks=FIRST[family])[0].isfinite().all()


def test_what_cannot_be_drawn_is_explained(family, network):
    with pytest.raises(GuidanceError, match="Inspect Attention: no .* is called 'input.99'"):
        inspected(network, family, blocks="input.99")
    with pytest.raises(ValueError, match="'Middle' is not a block"):
        inspected(network, family, blocks="Middle")
    with pytest.raises(ValueError, match="tokens: 9 is beyond the text, which has the tokens 0 to 6"):
        inspected(network, family, blocks="all", tokens="9")
    late = having(POSITIVE, start_percent=0.8)
    latent = {"samples": torch.zeros(1, CHANNELS[family], 8, 8)}
    with pytest.raises(GuidanceError, match=r"no part of the positive acts at 0.5"):
        call(RudderInspectAttention, model=network, positive=late, latent_image=latent)


# ---------------------------------------------------------------- the drawing


def test_colours_run_from_dark_to_light():
    colours = heat(np.linspace(0, 1, 50)).astype(int)
    light = colours @ np.array([299, 587, 114])
    assert (np.diff(light) > 0).all() and colours.shape == (50, 3)


def test_a_map_is_drawn_where_its_values_are():
    one = torch.zeros(1, 1, 4, 8)
    one[..., 3, 7] = 0.5
    picture = np.asarray(heat_maps({"middle.0 cross": one}, ["token 1"], "title")).astype(int)
    bright = np.argwhere((picture == [250, 232, 100]).all(-1))
    dark = np.argwhere((picture == [10, 8, 32]).all(-1))
    assert len(bright) == 18 * 18 and len(dark) == 31 * 18 * 18, "a cell of a square of pixels each"
    assert (bright.min(0) > dark.min(0)).all() and (bright.max(0) == dark.max(0)).all(), "the last cell"


def test_many_sizes_and_constant_maps_are_drawn():
    maps = {"a": torch.rand(3, 1, 64, 48), "b": torch.full((3, 1, 2, 2), 0.1), "video": torch.rand(3, 5, 4, 6)}
    picture = heat_maps(maps, ["token 0", "token 1", "token 2"], "a title")
    assert picture.width > 3 * 5 * 6 * 24 and picture.height > 3 * 144
    with pytest.raises(ValueError, match="Name fewer blocks or tokens"):
        heat_maps({str(i): torch.rand(9, 1, 2, 2) for i in range(50)}, [str(i) for i in range(9)], "")
    with pytest.raises(ValueError, match="middle.0 self holds NaN .* half precision"):
        heat_maps({"middle.0 self": torch.full((1, 1, 2, 2), torch.nan)}, ["x"], "")
    assert table_picture("name  kind   grid\na     cross  2 x 3\nbb           4 x 5").height > 60

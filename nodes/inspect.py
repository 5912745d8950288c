"""A node that shows what a model attends to."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..attention.inspect import SelfMaps, TextMaps, parse_tokens
from ..attention.listing import ListSites, table
from ..attention.sites import parse
from ..host.inspect import look
from .guidance import CATEGORY
from .heatmap import heat_maps, table_picture

TEXT, SELF = "text to image", "self"


class RudderInspectAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderInspectAttention",
            display_name="Inspect Attention",
            category=CATEGORY,
            description="Lists where a model attends, with the names that other Rudder nodes take as 'blocks', and "
            "draws what chosen places look at. Changes nothing. 1 model evaluation.",
            search_aliases=["attention map", "block names", "layers", "daam", "visualize attention"],
            inputs=[
                io.Model.Input("model", tooltip="The model to look into. Other Rudder nodes on it rest here."),
                io.Conditioning.Input("positive", tooltip="The prompt. Of one with several parts (areas, combined "
                                      "prompts), maps are drawn for the first part that acts."),
                io.Latent.Input("latent_image", tooltip="Sets the size of the token grids. A finished picture shows "
                                "best what belongs to which word; an empty latent is pure noise."),
                io.Int.Input("noise_seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                             tooltip="Of the noise that is added to the latent."),
                io.Float.Input("percent", default=0.5, min=0.0, max=1.0, step=0.01,
                               tooltip="Where in the run to look, a share of the model's timesteps: 0 is pure noise, "
                               "1 the clean picture. The latent gets as much noise as there is then."),
                io.String.Input("blocks", default="", tooltip="Which places to draw: names or their beginnings, with "
                                "ranges, 'middle, output.3-5, double.0' or 'all'. Empty: draw the list of names."),
                io.Combo.Input("draw", options=[TEXT, SELF], default=TEXT,
                               tooltip="text to image: how much every place of the picture looks at the text (cross "
                               "and joint attention). self: what one place looks at in the picture (self and joint "
                               "attention)."),
                io.String.Input("tokens", default="", tooltip="For 'text to image': positions in the text, '2, 4-6', "
                                "one map each. 0 is the start token of CLIP; its words begin at 1. Empty: one map, "
                                "their mean."),
                io.Float.Input("x", default=0.5, min=0.0, max=1.0, step=0.01, advanced=True,
                               tooltip="For 'self': the place, a share of the width from the left."),
                io.Float.Input("y", default=0.5, min=0.0, max=1.0, step=0.01, advanced=True,
                               tooltip="For 'self': the place, a share of the height from the top."),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The maps, one picture for each latent of the batch; "
                                "without blocks the list."),
                io.String.Output(display_name="SITES", tooltip="All places: name, kind, heads, tokens, text tokens, "
                                 "token grid (height x width)."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, latent_image, noise_seed, percent, blocks, draw, tokens, x=0.5, y=0.5
    ) -> io.NodeOutput:
        sites, chosen, wanted = ListSites(), parse_tokens(tokens), bool(parse(blocks))
        maps = TextMaps(blocks=blocks, tokens=chosen) if draw == TEXT else SelfMaps(blocks=blocks, x=x, y=y)
        look(model, positive, latent_image, noise_seed, percent, [sites, maps] if wanted else [sites])
        listed = table(sites.found)
        if not wanted:
            return io.NodeOutput(as_image([table_picture(listed)]), listed)
        if draw == TEXT:
            columns, title = [f"token {token}" for token in chosen] or ["mean of the text"], "What looks at the text"
        else:
            columns, title = [f"from x {x:g}, y {y:g}"], "What the place looks at"
        title += f", at {percent:g} of the run (mean of the heads)"
        samples = len(next(iter(maps.maps.values())))
        pictures = [
            heat_maps({site: one[sample] for site, one in maps.maps.items()}, columns, title)
            for sample in range(samples)
        ]
        return io.NodeOutput(as_image(pictures), listed)


def as_image(pictures) -> torch.Tensor:
    """Pillow's pictures of one size as an IMAGE."""
    return torch.stack([torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0) for picture in pictures])


NODES = (RudderInspectAttention,)

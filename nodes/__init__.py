"""ComfyUI V3 nodes: schemas, tooltips and checks of what the user gave. The methods are in ``guidance/``."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

from . import (
    attention,
    demo,
    edit_batch,
    guidance,
    guidance_feedback,
    guidance_models,
    guidance_more,
    inspect,
    nag,
    prompt_to_prompt,
    reference,
    samplers,
    trace,
)

NODES: tuple[type[io.ComfyNode], ...] = (
    *guidance.NODES, *guidance_more.NODES, *guidance_feedback.NODES, *guidance_models.NODES, *samplers.NODES,
    *attention.NODES, *trace.NODES, *demo.NODES, *edit_batch.NODES, *prompt_to_prompt.NODES, *reference.NODES,
    *inspect.NODES, *nag.NODES,
)  # fmt: skip


class RudderExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes whose schema this ComfyUI accepts: one bad schema would make the host drop the rest of the pack."""
        usable = []
        for node in NODES:
            try:
                node.GET_SCHEMA()
            except Exception:
                logging.getLogger("rudder").exception("Rudder: node %s does not fit this ComfyUI and is left out", node)
            else:
                usable.append(node)
        return usable

"""Rudder: controllable generation in diffusion and flow models, as native ComfyUI nodes.

Importing this package does no work; the nodes and ComfyUI's modules are imported when ComfyUI asks for the nodes.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The V3 extension that ComfyUI loads."""
    from .nodes import RudderExtension

    return RudderExtension()

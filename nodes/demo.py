"""The bundled small model, so that every workflow runs anywhere."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.demo import MODELS, load_demo


class RudderLoadDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RudderLoadDemo",
            display_name="Load Demo Model (shapes)",
            category="model/loaders/rudder",
            description="A small text-to-image model that comes with Rudder: 64x64 pictures of coloured, textured "
            "shapes, sampled in seconds on a CPU. Use it with the ordinary nodes (CLIP Text Encode, KSampler, VAE "
            "Decode, 64x64 empty latent).",
            search_aliases=["shapes", "demo checkpoint", "toy model", "tiny model"],
            inputs=[
                io.Combo.Input(
                    "demo_name",
                    options=["shapes-unet", "shapes-flux"],
                    default="shapes-unet",
                    tooltip="shapes-unet: epsilon prediction, a cross-attention UNet like a very small SD1.5. "
                    "shapes-flux: rectified flow, a very small Flux transformer with real (not distilled) guidance.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL"),
                io.Clip.Output(display_name="CLIP"),
                io.Vae.Output(display_name="VAE"),
            ],
        )

    @classmethod
    def execute(cls, demo_name) -> io.NodeOutput:
        return io.NodeOutput(*load_demo(MODELS / f"{demo_name}.safetensors"))


NODES = (RudderLoadDemo,)

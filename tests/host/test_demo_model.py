"""The demo models on the host: core's own nodes encode, sample, decode and patch it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rudder.demo import draw, world
from rudder.host.demo import KINDS, MODELS, load_demo

nodes = pytest.importorskip("nodes")


@pytest.fixture(scope="module", params=KINDS)
def demo(request):
    return load_demo(MODELS / f"shapes-{request.param}.safetensors")


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Fresh renders as the host's IMAGE, [B, 64, 64, 3] in 0..1."""
    images, _ = draw.render(world.sample(np.random.default_rng(99), 16))
    return torch.from_numpy(images) / 255


def sample(model, clip, text="a red circle", seed=3, steps=4, batch=2, latent=None, denoise=1.0):
    positive, negative = (nodes.CLIPTextEncode().encode(clip, t)[0] for t in (text, ""))
    latent = latent or {"samples": torch.zeros(batch, 16, 16, 16)}
    return nodes.KSampler().sample(model, seed, steps, 5.0, "euler", "normal", positive, negative, latent, denoise)[0]


def test_the_files_are_small():
    assert all((MODELS / f"shapes-{kind}.safetensors").stat().st_size <= 16e6 for kind in KINDS)


def test_the_host_detects_the_transformer_by_itself(demo):
    """The weights alone, without the metadata: what UNETLoader would do."""
    import comfy.model_detection

    model, _, _ = demo
    if not hasattr(model.model.diffusion_model, "double_blocks"):
        pytest.skip("the host's detection knows the UNets of full size only")
    found = comfy.model_detection.detect_unet_config(model.model.diffusion_model.state_dict(), "")
    own = model.model.model_config.unet_config
    assert found["image_model"] == "flux" and found["guidance_embed"] is False
    assert {k: found[k] for k in ("hidden_size", "depth", "depth_single_blocks", "in_channels", "num_heads")} == {
        k: own[k] for k in ("hidden_size", "depth", "depth_single_blocks", "in_channels", "num_heads")
    }


def test_core_nodes_make_a_picture_and_the_same_one_twice(demo):
    model, clip, vae = demo
    a, b = sample(model, clip), sample(model, clip)
    assert a["samples"].shape == (2, 16, 16, 16) and torch.isfinite(a["samples"]).all()
    assert torch.equal(a["samples"], b["samples"])
    image = nodes.VAEDecode().decode(vae, a)[0]
    assert image.shape == (2, 64, 64, 3) and 0 <= image.min() and image.max() <= 1
    assert not torch.equal(a["samples"], sample(model, clip, "a blue star")["samples"])


def test_empty_latents_speak_pixels(demo):
    model, clip, vae = demo
    latent = nodes.EmptyLatentImage().generate(64, 64, 1)[0]
    out = sample(model, clip, latent=latent)
    assert out["samples"].shape == (1, 16, 16, 16)


def test_encoding_returns_a_normalised_latent_and_decoding_the_picture(demo, pictures):
    model, _, vae = demo
    latent = nodes.VAEEncode().encode(vae, pictures)[0]["samples"]
    assert latent.shape == (16, 16, 16, 16)
    inner = model.get_model_object("latent_format").process_in(latent)
    assert inner.mean().abs() < 0.4 and 0.6 < inner.std() < 1.5
    assert torch.allclose(model.get_model_object("latent_format").process_out(inner), latent, atol=1e-4)
    back = nodes.VAEDecode().decode(vae, {"samples": latent})[0]
    assert -10 * torch.log10(((back - pictures) ** 2).mean()) >= 28


def test_image_to_image(demo, pictures):
    model, clip, vae = demo
    latent = nodes.VAEEncode().encode(vae, pictures[:1])[0]
    out = sample(model, clip, latent=latent, denoise=0.5)
    assert torch.isfinite(out["samples"]).all()


def test_words_are_single_tokens_of_24(demo):
    _, clip, _ = demo
    tokens = clip.tokenize("a large striped red circle on a gray background")["l"]
    assert len(tokens) == 1 and len(tokens[0]) == 24
    end = tokens[0][-1][0]
    assert [t for t, _ in tokens[0]].index(end) == 10
    assert len(clip.tokenize("(spiky:1.3) hairy frog " * 30)["l"]) > 1
    cond = nodes.CLIPTextEncode().encode(clip, "a (spiky:1.3) star")[0]
    assert cond[0][0].shape[1] == 24


def test_lora(demo):
    """An empty LoRA changes nothing; a small real one changes the picture; the model itself stays as it was."""
    import comfy.sd

    model, clip, _ = demo
    before = sample(model, clip)["samples"]
    same, same_clip = comfy.sd.load_lora_for_models(model, clip, {}, 1.0, 1.0)
    assert torch.equal(sample(same, same_clip)["samples"], before)
    key = next(k for k in model.model_state_dict() if k.endswith(("attn2.to_v.weight", "img_attn.proj.weight")))
    rows, cols = model.model_state_dict()[key].shape
    name = "lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(".weight").replace(".", "_")
    lora = {f"{name}.lora_up.weight": torch.randn(rows, 2), f"{name}.lora_down.weight": torch.randn(2, cols),
            f"{name}.alpha": torch.tensor(2.0)}
    changed, changed_clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
    assert not torch.equal(sample(changed, changed_clip)["samples"], before)
    assert torch.equal(sample(model, clip)["samples"], before)


def test_a_clone_with_private_weights_gives_the_same_picture(demo):
    model, clip, _ = demo
    reload, arguments = model.cached_patcher_init[:2]
    again = reload(*arguments, disable_dynamic=True)
    assert torch.equal(sample(again, clip)["samples"], sample(model, clip)["samples"])


def test_a_missing_file_is_named_with_the_way_out(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors.*reinstall"):
        load_demo(tmp_path / "nothing.safetensors")

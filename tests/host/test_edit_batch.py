"""Source and Edits on the host's own text encoders in small: rows, lengths, words, noise."""

from __future__ import annotations

import comfy.sample
import comfy.sd
import comfy.sdxl_clip
import pytest
import torch
from comfy import sd1_clip
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders import flux, sd3_clip

from rudder.host.demo import load_demo
from rudder.host.words import encoded
from rudder.nodes.edit_batch import RudderEditBatch

from .test_nodes import call

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3}
T5 = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1}
OPTIONS = {"clip_l_model_config": SMALL, "clip_g_model_config": SMALL, "t5xxl_model_config": T5, "dtype": torch.float32}
SOURCE = "a hippopotamus, wearing sunglasses"
EDITS = ("a small hippopotamus, wearing sunglasses", "a cat, wearing sunglasses", "a hippopotamus")


def clip(kind: str) -> comfy.sd.CLIP:
    if kind == "demo":
        return load_demo()[1]
    tokenizer, model = {
        "sd15": (sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel),
        "sdxl": (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
        "flux": (flux.FluxTokenizer, flux.flux_clip(dtype_t5=torch.float32)),
        "sd3": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(dtype_t5=torch.float32)),
        "sd3 without t5": (sd3_clip.SD3Tokenizer, sd3_clip.sd3_clip(t5=False)),
    }[kind]
    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        out = comfy.sd.CLIP(ClipTarget(tokenizer, model), model_options=dict(OPTIONS), disable_dynamic=True)
        for parameter in out.cond_stage_model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.05
    if kind == "sd3":  # whose wrapper expects T5's full width
        t5 = out.cond_stage_model.t5xxl
        narrow = t5.encode_token_weights

        def wide(tokens):
            features, *rest = narrow(tokens)
            return (torch.nn.functional.pad(features, (0, 4096 - features.shape[-1])), *rest)

        t5.encode_token_weights = wide
    return out


@pytest.fixture(scope="module", params=["sd15", "sdxl", "flux", "sd3", "sd3 without t5"])
def encoder(request):
    return request.param, clip(request.param)


SEGMENTS = {"sd15": ["CLIP"], "sdxl": ["CLIP"], "flux": ["T5"], "sd3": ["CLIP", "T5"], "sd3 without t5": ["CLIP"]}


def test_a_row_is_the_plain_prompt_and_words_are_found(encoder):
    kind, clip = encoder
    [[features, settings]], prompts = encoded(clip, (SOURCE, *EDITS))
    assert len(features) == len(settings["pooled_output"]) == 4 and prompts.features[0] is features
    for row, text in enumerate(prompts.texts):
        [[alone, plain]] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        assert torch.allclose(features[row], alone[0], atol=1e-6)
        assert torch.allclose(settings["pooled_output"][row], plain["pooled_output"][0], atol=1e-6)
        assert [tokens.encoder for tokens in prompts.layouts[row]] == SEGMENTS[kind]
        assert prompts.length(row) == features.shape[1]
    raw = clip.tokenize(SOURCE, return_word_ids=True)
    names = {"CLIP": "l", "T5": "t5xxl"}
    start = 0
    for tokens in prompts.layouts[0]:
        assert "".join(tokens.words).replace(" ", "") == SOURCE.replace(" ", "")
        parts = [i for i in prompts.positions(0, "hippopotamus") if start <= i < start + len(tokens.keys)]
        name = names[tokens.encoder]
        ids = [raw[name][0][i - start][0] for i in parts]
        assert len(ids) > 1
        vocabulary = getattr(clip.tokenizer, name, None) or clip.tokenizer.clip_l
        assert vocabulary.tokenizer.decode(ids).strip() == "hippopotamus"
        start += len(tokens.keys)
    assert prompts.positions(2, "hippopotamus") == [] and prompts.positions(0, "Hippo Potamus")
    old, new = prompts.changed(1)
    assert old == [] and new == prompts.positions(1, "small")
    assert prompts.changed(2) == (prompts.positions(0, "hippopotamus"), prompts.positions(2, "cat"))
    assert "[hippopotamus (3 tokens) > cat]" in prompts.report() or kind == "flux"
    assert "[+ small]" in prompts.report() and "wearing sunglasses]" in prompts.report()


def test_words_of_a_script_without_spaces(encoder):
    """No space tells where a word ends: every token is one, in CLIP every letter."""
    kind, clip = encoder
    if "CLIP" not in SEGMENTS[kind]:
        pytest.skip("T5 has no Chinese")
    _, prompts = encoded(clip, ("a cat, 一只猫", "a cat, 一只狗"))
    assert prompts.layouts[0][0].words == ("a", "cat", ",", "一", "只", "猫")
    assert prompts.positions(0, "猫") and not prompts.positions(1, "猫")
    assert prompts.positions(0, "一只") == prompts.positions(1, "一只")


def test_long_prompts_and_weights(encoder):
    kind, clip = encoder
    long = "a (red:1.3) cat " + " ".join(["on a (very:0.8) long road"] * 40)
    [[features, _]], prompts = encoded(clip, ("a red cat", long))
    assert len(features) == 2 and features.shape[1] % prompts.length(0) == features.shape[1] % prompts.length(1) == 0
    for row in (0, 1):
        for word in ("red", "cat"):
            assert len(prompts.positions(row, word)) == len(SEGMENTS[kind])
    assert len(prompts.positions(1, "road")) == 40 * len(SEGMENTS[kind])
    if kind in ("sd15", "sdxl", "sd3 without t5"):  # repetition is exact in cross-attention
        [[alone, _]] = clip.encode_from_tokens_scheduled(clip.tokenize("a red cat"))
        assert torch.allclose(features[0], alone[0].repeat(features.shape[1] // 77, 1), atol=1e-6)
    else:
        assert prompts.length(0) == prompts.length(1) == features.shape[1]


def test_the_node_gives_rows_of_one_noise():
    demo = clip("demo")
    latent = {"samples": torch.zeros(1, 4, 8, 6), "batch_index": [3], "noise_mask": torch.ones(1, 8, 6)}
    edits = "a blue circle on a white background\n\n a striped red  circle on a white background "
    positive, out, prompts, report = call(
        RudderEditBatch, clip=demo, source="a red circle\non a white background", edits=edits, latent_image=latent)
    assert prompts.texts[0] == "a red circle on a white background" and prompts.rows == 3
    assert out["samples"].shape == (3, 4, 8, 6) and out["batch_index"] == [3, 3, 3] and "noise_mask" in out
    noise = comfy.sample.prepare_noise(out["samples"], 5, out["batch_index"])
    alone = comfy.sample.prepare_noise(latent["samples"], 5, [3])
    assert all(torch.equal(row, alone[0]) for row in noise)
    assert "a [red > blue] circle on a white background" in report and "[+ striped] red" in report
    assert len(positive) == 1 and len(positive[0][0]) == 3
    assert latent["samples"].shape[0] == 1 and latent["batch_index"] == [3]


def test_bad_input_is_refused():
    inputs = {"clip": clip("demo"), "source": "a red circle", "latent_image": {"samples": torch.zeros(1, 4, 8, 8)}}
    with pytest.raises(ValueError, match="'edits' holds no prompt"):
        call(RudderEditBatch, **inputs, edits=" \n ")
    with pytest.raises(ValueError, match="batch of 2"):
        call(RudderEditBatch, **{**inputs, "latent_image": {"samples": torch.zeros(2, 4, 8, 8)}}, edits="a circle")

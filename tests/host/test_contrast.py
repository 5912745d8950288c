"""PAG, SEG, SAG and attention entropy scaling in whole runs, against guidance written by hand and ComfyUI's own nodes.

The hand's way into the model is a plain override of the host's attention that counts its calls.
"""

from __future__ import annotations

import math

import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance as OwnPAG
from comfy_extras.nodes_sag import SelfAttentionGuidance as OwnSAG

from rudder.guidance.contract import GuidanceError
from rudder.guidance.contrast import PerturbedAttention, SmoothedEnergy
from rudder.guidance.entropy import AttentionEntropy
from rudder.guidance.sag import SelfAttentionGuidance
from rudder.guidance.trace import QUANTITIES, Recorder, Trace
from rudder.host import add_guidance, plan_of, trained_cells
from rudder.host.attention import check_edit
from rudder.host.sites import sites_of
from rudder.nodes.attention import RudderAttentionEntropy, RudderPAG, RudderSAG, RudderSEG

from .models import CHANNELS, FAMILIES, calls, conditioning, having, sample, tiny_scail, tiny_wan
from .registry import NEGATIVE, POSITIVE
from .test_branches import one_forward_a_cond
from .test_methods import call

STEPS = 2
BLOCKS = "middle, joint.1, double.0"
CALL = {"unet": 4, "flux": 0, "chroma": 0, "sd3": 1}  # which attention call of a forward BLOCKS means
READ = {"unet": 4, "flux": 1, "chroma": 1, "sd3": 1}  # and which SAG reads: the middle, the block half-way
GRID = (4, 6)  # of the tokens there, for all three, from latents of 8x12


LOUD = {  # attention of small random weights is even, and says next to nothing
    "middle_block.1.transformer_blocks.0.norm1.weight": 20, "middle_block.1.transformer_blocks.0.attn1": 6,
    "middle_block.1.proj_out": 40, "query_norm": 60, "key_norm": 60, "attn.proj": 5,
    "x_block.attn.qkv": 8, "context_block.attn.qkv": 8,
}  # fmt: skip


def loud(family: str):
    model = FAMILIES[family]()
    for name, weight in model.model.diffusion_model.named_parameters():
        weight.data *= next((factor for part, factor in LOUD.items() if part in name), 1)
    return model


@pytest.fixture(scope="module")
def network(family):
    return loud(family)


def wired(model, *methods):
    for method in methods:
        model = add_guidance(model, method)
    return model


def picture(family: str, batch: int = 2) -> torch.Tensor:
    return torch.zeros(batch, CHANNELS[family], 8, 12)


def run(model, family: str, *methods, cfg: float = 4.0, steps: int = STEPS, **options) -> torch.Tensor:
    options = {"image": picture(family), **options}
    return sample(wired(model, *methods), family, POSITIVE, NEGATIVE, cfg=cfg, steps=steps, **options)


# ---------------------------------------------------------------- by hand


def heads_apart(tokens: torch.Tensor, heads: int, apart: bool) -> torch.Tensor:
    return tokens if apart else tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def overriding(options: dict, at: int, act) -> dict:
    """``options`` with an attention override: ``act(q, k, v, attend, restore)`` in the ``at``-th call, heads apart."""
    count = [0]

    def override(func, q, k, v, heads, *args, **kwargs):
        count[0] += 1
        if count[0] - 1 != at:
            return func(q, k, v, heads, *args, **kwargs)
        apart = kwargs.get("skip_reshape", False)
        join = (lambda t: t) if apart else (lambda t: t.transpose(1, 2).flatten(2))
        inside = tuple(heads_apart(t, heads, apart) for t in (q, k, v))

        def attend(q, k, v):
            return func(*map(join, (q, k, v)), heads, *args, **kwargs)

        return act(*inside, attend, lambda out: out.transpose(1, 2).flatten(2))

    transformer = {**options.get("transformer_options", {}), "optimized_attention_override": override}
    return {**options, "transformer_options": transformer}


def gaussian_matrix(size: int, sigma: float, span: float) -> torch.Tensor:
    """``[size, size]``: the blur of one side, with reflection, weight by weight. As the official code of SEG has it: an
    odd kernel, ceil(2 span sigma) wide, and no wider than the first odd number from the side on."""
    width = math.ceil(2 * span * sigma)
    reach = min(width + 1 - width % 2, size + 1 - size % 2) // 2
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-reach, reach + 1)]
    out = torch.zeros(size, size)
    for row in range(size):
        for i, weight in zip(range(-reach, reach + 1), weights):
            source = abs(row + i)
            out[row, source if source < size else 2 * (size - 1) - source] += weight / sum(weights)
    return out


def blurred_by_hand(tokens: torch.Tensor, sigma: float) -> torch.Tensor:
    """The last tokens of ``[R, heads, tokens, D]``, as many as the grid has."""
    height, width = GRID
    image = tokens[:, :, -height * width:]
    if sigma > 9999:
        image = image.mean(2, keepdim=True).expand_as(image)
    else:
        planes = image.unflatten(2, GRID)
        planes = torch.einsum("yh,xw,rnhwd->rnyxd", *(gaussian_matrix(s, sigma, 3) for s in GRID), planes)
        image = planes.flatten(2, 3)
    return torch.cat([tokens[:, :, : -height * width], image], 2)


def own_tokens(q, k, v, attend, restore):
    out = attend(q, k, v)
    out[:, -GRID[0] * GRID[1]:] = restore(v)[:, -GRID[0] * GRID[1]:]
    return out


def degraded(method, family: str, options: dict) -> dict:
    """The options under which the model predicts worse."""
    if isinstance(method, PerturbedAttention):
        return overriding(options, CALL[family], own_tokens)
    if family in ("flux", "chroma"):  # where q is met before its rotary embedding

        def patch(q, k, v, pe, attn_mask, extra_options):
            first = (extra_options["block_type"], extra_options["block_index"]) == ("double", 0)
            return {"q": blurred_by_hand(q, method.sigma)} if first else {}

        transformer = dict(options.get("transformer_options", {}))
        transformer["patches"] = {**transformer.get("patches", {}), "attn1_patch": [patch]}
        return {**options, "transformer_options": transformer}

    def blurred(q, k, v, attend, restore):
        return attend(blurred_by_hand(q, method.sigma), k, v)

    return overriding(options, CALL[family], blurred)


def by_hand(model, family: str, method, cfg: float, batch: int = 2) -> torch.Tensor:
    class Guider(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006 (the host's signature)
            def predict(name, x=x, options=model_options):
                conds = [self.conds[name]]
                return comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)[0]

            if isinstance(method, SelfAttentionGuidance):
                return salient_by_hand(x, timestep, predict, model_options)
            cond = predict("positive")
            x0 = cond if cfg == 1 else predict("negative") + cfg * (cond - predict("negative"))
            return x0 + method.strength * (cond - predict("positive", options=degraded(method, family, model_options)))

    def salient_by_hand(x, timestep, predict, options):
        maps = []

        def read(q, k, v, attend, restore):
            q_image, k_image = (t[:, :, -GRID[0] * GRID[1]:] for t in (q, k))
            joint = (q_image @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)[..., -k_image.shape[2]:]
            maps.append((joint / joint.sum(-1, keepdim=True)).mean(1).sum(1))
            return attend(q, k, v)

        cond, uncond = predict("positive"), predict("negative")
        x0 = cond if cfg == 1 else uncond + cfg * (cond - uncond)
        name, base = ("positive", cond) if cfg == 1 else ("negative", uncond)
        predict(name, options=overriding(options, READ[family], read))
        mask = (maps[0] > 1).float().unflatten(1, GRID)[:, None]
        mask = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert 0 < mask.mean() < 1
        blur = [gaussian_matrix(side, method.sigma, 2) for side in x.shape[2:]]
        smooth = mask * torch.einsum("yh,xw,bchw->bcyx", *blur, base) + (1 - mask) * base
        sigma = timestep.reshape(-1, 1, 1, 1)
        if family == "unet":
            again = smooth + sigma * ((x - base) / sigma)
        else:
            noise = base + (x - base) / sigma
            again = (1 - sigma) * smooth + sigma * noise
        return x0 + method.strength * (smooth - predict(name, x=again))

    image = picture(family, batch)
    guider = Guider(model)
    guider.set_conds(POSITIVE, NEGATIVE)
    levels = comfy.samplers.KSampler(model, STEPS, model.load_device, "euler", "normal").sigmas
    noise = comfy.sample.prepare_noise(image, 7)
    solver = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, image, solver, levels, disable_pbar=True, seed=7)


METHODS = {
    "PAG": PerturbedAttention(strength=2.0, blocks=BLOCKS),
    "SEG": SmoothedEnergy(strength=2.0, sigma=1.3, blocks=BLOCKS),
    "SEG, the mean": SmoothedEnergy(strength=2.0, sigma=1e4, blocks=BLOCKS),
    "SAG": SelfAttentionGuidance(strength=0.7, sigma=1.1),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@every_method
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_it_is_its_formula(family, network, method, cfg):
    expected = by_hand(network, family, method, cfg)
    ours, plain = run(network, family, method, cfg=cfg), run(network, family, cfg=cfg)
    assert (ours - plain).abs().max() > 1e-3 * plain.abs().max(), "it acts"
    assert (ours - expected).abs().max() < 1e-2 * (ours - plain).abs().max()


@every_method
@pytest.mark.parametrize(("cfg", "split"), [(1.0, False), (4.0, True)])
def test_cost_and_repetition(family, network, method, cfg, split):
    """One evaluation more, in the step's one call (after it for SAG); split batches, base model untouched."""
    plain, recorder = run(network, family, cfg=cfg), Recorder()
    counted, seen = calls(network)
    traced = wired(counted, method, Trace(recorder=recorder))
    one = run(one_forward_a_cond(traced) if split else traced, family, cfg=cfg)
    apart, usual = isinstance(method, SelfAttentionGuidance), 1 if cfg == 1 else 2
    assert seen["batching"] == ([usual, 1] if apart else [usual + 1]) * STEPS
    rows = ([2] * (usual + 1) if split else [2 * usual, 2] if apart else [2 * usual + 2]) * STEPS
    assert seen["network"] == rows
    steps = recorder.runs[""]["steps"]
    assert [step["evaluations"] for step in steps] == [usual + 1] * STEPS
    assert {key for step in steps for key in step} <= {*QUANTITIES, "index", "sigma"}
    again = run(network, family, method, cfg=cfg)
    assert torch.equal(again, run(network, family, method, cfg=cfg))
    assert (one - again).abs().max() < 1e-3 * again.abs().max()
    assert torch.equal(run(network, family, cfg=cfg), plain)


@every_method
def test_a_batch_is_so_many_single_runs(family, network, method):
    noise = comfy.sample.prepare_noise(picture(family), 7)
    batch = run(network, family, method, noise=noise)
    for i in range(2):
        single = run(network, family, method, noise=noise[i : i + 1], image=picture(family, 1))
        assert (batch[i : i + 1] - single).abs().max() < 1e-3 * single.abs().max()


OFF = [PerturbedAttention(strength=0.0), SmoothedEnergy(sigma=0.0), SelfAttentionGuidance(strength=0.0)]


@pytest.mark.parametrize("method", OFF, ids=lambda method: type(method).__name__)
def test_off_is_bit_identical_and_free(family, network, method):
    counted, seen = calls(network)
    assert torch.equal(run(counted, family, method), run(network, family))
    assert seen["batching"][:STEPS] == [2] * STEPS


@pytest.mark.parametrize("method", [PerturbedAttention(), SelfAttentionGuidance()], ids=["PAG", "SAG"])
def test_a_model_of_another_family_is_refused(method):
    with pytest.raises(GuidanceError, match="the attention of 'SCAILWanModel' is not known to Rudder"):
        sample(wired(tiny_scail(), method), "wan", POSITIVE, NEGATIVE, image=torch.zeros(1, 16, 2, 4, 4), steps=1)


# ---------------------------------------------------------------- ComfyUI's own nodes


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_pag_is_cores(cfg):
    model = loud("unet")
    own = sample(OwnPAG.execute(model, 3.0).args[0], "unet", POSITIVE, NEGATIVE, cfg=cfg, batch=2)
    ours = sample(wired(model, PerturbedAttention(strength=3.0)), "unet", POSITIVE, NEGATIVE, cfg=cfg, batch=2)
    assert (ours - own).abs().max() < 1e-4 * own.abs().max()


def test_sag_is_cores_where_both_guide_by_the_negative():
    """With cfg, square pictures and a kernel of 9, which is ours at sigma 2. At cfg 1 core evaluates the negative for
    this alone and takes its map; ours takes the positive's."""
    model, counted = loud("unet"), {}
    results = {}
    for cfg in (4.0, 1.0):
        for name, patched in (("own", OwnSAG.execute(model, 0.5, 2.0).args[0]),
                              ("ours", wired(model, SelfAttentionGuidance(strength=0.5, sigma=2.0)))):
            patched, seen = calls(patched)
            results[cfg, name] = sample(patched, "unet", POSITIVE, NEGATIVE, cfg=cfg, batch=2, steps=STEPS)
            counted[cfg, name] = sum(seen["batching"])
    own, ours = results[4.0, "own"], results[4.0, "ours"]
    assert (ours - own).abs().max() < 1e-4 * own.abs().max()
    assert counted == {(4.0, "own"): 6, (4.0, "ours"): 6, (1.0, "own"): 6, (1.0, "ours"): 4}
    assert not torch.allclose(results[1.0, "own"], results[1.0, "ours"], atol=1e-3)


# ---------------------------------------------------------------- SAG where it is delicate


def test_sag_needs_a_prompt_for_the_whole_picture():
    """A negative of areas alone has no map; one of areas beside a whole one, which the host makes of the areas of the
    positive, has; so have masks and combined prompts."""
    model = wired(loud("unet"), SelfAttentionGuidance())
    areas = [*having(NEGATIVE, area=(8, 4, 0, 0)), *having(conditioning(6), area=(8, 8, 0, 4))]
    with pytest.raises(GuidanceError, match=r"\(SAG\).*the negative is evaluated in parts.*Combine it"):
        sample(model, "unet", POSITIVE, areas, image=picture("unet"), steps=1)
    assert sample(model, "unet", areas, NEGATIVE, image=picture("unet"), steps=1).isfinite().all()
    masked = having(NEGATIVE, mask=torch.ones(1, 8, 12), mask_strength=1.0)
    assert sample(model, "unet", POSITIVE, masked, image=picture("unet"), steps=1).isfinite().all()
    combined = [*NEGATIVE, *conditioning(6)]
    assert sample(model, "unet", POSITIVE, combined, image=picture("unet"), steps=1).isfinite().all()


def test_a_unet_without_a_middle_block_is_told_to_name_one():
    network = FAMILIES["unet"]().model.diffusion_model
    sites = [site for site in sites_of(network) if not site.name.startswith("middle")]
    with pytest.raises(GuidanceError, match="SAG: no .* is where it acts unless 'blocks' names another. It has: input"):
        check_edit("SAG", SelfAttentionGuidance().reader, sites, network)


def test_sag_reads_the_steps_own_attention(family, network):
    """Not that of what another pack asks the model for before CFG, at a latent of its own."""
    def ask(args: dict) -> list:
        comfy.samplers.calc_cond_batch(
            args["model"], args["conds"], args["input"].flip(-1) + 1, args["timestep"], args["model_options"])
        return args["conds_out"]

    asking = network.clone()
    asking.set_model_sampler_pre_cfg_function(ask)
    method = SelfAttentionGuidance(sigma=1.0)
    counted, seen = calls(asking)
    assert torch.equal(run(counted, family, method), run(network, family, method)) and len(seen["batching"]) > 2 * STEPS


def test_sag_reads_one_block(family, network):
    blocks = {"unet": "output", "sd3": "joint"}.get(family, "double, single")
    with pytest.raises(GuidanceError, match=r"it reads the map of one block, and .* names \d: .*Write one of them"):
        run(network, family, SelfAttentionGuidance(blocks=blocks))
    one = {"unet": "output.3.0", "sd3": "joint.0"}.get(family, "double.0")
    out = run(network, family, SelfAttentionGuidance(blocks=one))
    assert out.isfinite().all() and not torch.equal(out, run(network, family, SelfAttentionGuidance()))


# ---------------------------------------------------------------- entropy


@pytest.mark.parametrize("split", [False, True], ids=["joint", "split"])
def test_entropy_at_the_trained_size_is_bit_identical(family, network, split):
    few = one_forward_a_cond if split else lambda model: model

    def trained_at(height: int, width: int) -> torch.Tensor:
        return run(few(wired(network, AttentionEntropy(trained=(height, width)))), family)

    plain = run(few(network), family)
    assert torch.equal(trained_at(8, 12), plain)
    assert torch.equal(trained_at(16, 6), plain), "as many tokens"
    assert not torch.equal(trained_at(4, 6), plain)


def test_entropy_costs_nothing(family, network):
    counted, seen = calls(network)
    run(counted, family, AttentionEntropy(trained=(4, 4)))
    assert seen["batching"] == [2] * STEPS and seen["network"] == [4] * STEPS


@pytest.mark.parametrize("text", [True, False])
def test_entropy_by_hand(family, network, text):
    """Every self and joint attention of the run, with the tokens that are there."""

    def override(func, q, k, v, heads, *args, **kwargs):
        dim = 2 if kwargs.get("skip_reshape", False) else 1
        keys, queries = k.shape[dim], q.shape[dim]
        if keys == 7:  # cross-attention
            return func(q, k, v, heads, *args, **kwargs)
        image = queries if family == "unet" else 24
        others = keys - image if text else 0
        factor = math.sqrt(math.log(image + others) / math.log(image / 4 + others))
        q = torch.cat([q.narrow(dim, 0, queries - image), q.narrow(dim, queries - image, image) * factor], dim)
        return func(q, k, v, heads, *args, **kwargs)

    patched = network.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    expected = run(patched, family)
    ours = run(network, family, AttentionEntropy(trained=(4, 6), text=text))
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.allclose(ours, run(network, family), atol=1e-5)


# ---------------------------------------------------------------- nodes


NODES = {
    "PAG": (RudderPAG, {}, PerturbedAttention(strength=3.0)),
    "PAG, blocks": (RudderPAG, {"blocks": " output.3-5 ", "strength": 1.0},
                    PerturbedAttention(strength=1.0, blocks="output.3-5")),
    "SEG": (RudderSEG, {"end_percent": 0.5}, SmoothedEnergy(strength=3.0, sigma=100.0, end=0.5)),
    "SAG": (RudderSAG, {}, SelfAttentionGuidance(strength=0.5, sigma=2.0)),
    "entropy": (RudderAttentionEntropy, {}, AttentionEntropy(trained=(64.0, 64.0))),
    "entropy, given": (RudderAttentionEntropy, {"trained_width": 256, "trained_height": 128, "count_text": False},
                       AttentionEntropy(trained=(16.0, 32.0), text=False)),
}


@pytest.mark.parametrize(("node", "inputs", "expected"), NODES.values(), ids=NODES)
def test_a_node_adds_its_method_to_a_clone(node, inputs, expected):
    model = FAMILIES["unet"]()
    (patched,) = call(node, model=model, **inputs)
    assert plan_of(patched.model_options) == (expected,) and plan_of(model.model_options) == ()


def test_the_trained_size_of_a_family(family, network):
    assert trained_cells(network) == {"unet": (64, 64)}.get(family, (128, 128))
    assert trained_cells(network, width=512) == (trained_cells(network)[0], 64)


def test_the_trained_size_of_the_demo_models_and_of_strangers():
    from rudder.host import demo

    model = demo.load_model(demo.DEFAULT)
    assert trained_cells(model) == (16, 16)
    with pytest.raises(GuidanceError, match="'Tiny' was trained on is not known.*trained_width and trained_height"):
        trained_cells(tiny_wan())
    assert trained_cells(tiny_wan(), 832, 480) == (60, 104)

"""How much memory editing by attention takes in networks of full size, in one forward pass.

Forward passes of the whole networks on torch's meta device, which has shapes and no numbers: every tensor that lives is
counted, by the size that it would have, and the peak is exact, whatever the machine. The kernel of attention counts as
one that makes its result alone, as PyTorch's and the other memory efficient ones do. Weights and the sampler's few
latents come on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from comfy.conds import CONDCrossAttn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rudder.attention.edit_prompts import EditPrompts
from rudder.attention.words import Tokens
from rudder.guidance.contract import Guidance, Step
from rudder.guidance.features import PlugAndPlay
from rudder.guidance.local_blend import LocalBlend
from rudder.guidance.mutual import MasaCtrl
from rudder.guidance.prompt_to_prompt import PromptToPrompt
from rudder.guidance.rival import RIVAL
from rudder.guidance.space import Parametrisation
from rudder.host.attention import OVERRIDE, Attention

from . import Options, Table
from .architectures import NETWORKS, Network

PICTURES = {"SD1.5": 512, "SDXL": 1024, "Flux": 1024}  # pixels a side
DTYPE = torch.bfloat16
SAID = ("a red cat on a sofa", "a blue cat on a sofa")  # the source and one edit


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[EditPrompts, bool], tuple[Guidance, ...]] = lambda edit, joint: ()


def blend(edit: EditPrompts, joint: bool) -> LocalBlend:
    return LocalBlend(edit=edit, tokens=1024, blocks="double.8-12" if joint else "")


ROWS = (
    Row("source and edit, no method"),
    Row("Prompt-to-Prompt", lambda e, _: (PromptToPrompt(edit=e, self_tokens=1024),)),
    Row("Prompt-to-Prompt, a weighted word", lambda e, _: (
        PromptToPrompt(edit=e, self_tokens=1024, words=(("blue", 1.5),)),)),
    Row("Prompt-to-Prompt + Local Blend", lambda e, j: (PromptToPrompt(edit=e, self_tokens=1024), blend(e, j))),
    Row("MasaCtrl", lambda e, _: (MasaCtrl(start=0.0),)),
    Row("MasaCtrl, union", lambda e, _: (MasaCtrl(start=0.0, union=True),)),
    Row("Plug-and-Play", lambda e, _: (PlugAndPlay(),)),
    Row("RIVAL", lambda e, _: (RIVAL(),)),
)  # fmt: skip


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still live. ``within`` is the most that a call through
    ``watched`` adds."""

    def __init__(self) -> None:
        super().__init__()
        self.known: weakref.WeakSet = weakref.WeakSet()
        self.live = self.peak = self.recent = self.within = self.largest = 0

    def watched(self, function: Callable) -> Callable:
        def call(*args, **kwargs):
            before = self.recent = self.live
            out = function(*args, **kwargs)
            self.within = max(self.within, self.recent - before)
            return out

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                size = storage.nbytes()
                self.known.add(storage)
                weakref.finalize(storage, self.freed, size)
                self.live += size
                self.peak, self.recent = max(self.peak, self.live), max(self.recent, self.live)
                self.largest = max(self.largest, size)
        return out

    def freed(self, size: int) -> None:
        self.live -= size


@dataclass
class Kernel:
    """Attention that makes its result and nothing else. ``map`` becomes the bytes that the probabilities of one picture
    would have in float32, where they are largest."""

    map: int = 0

    def __call__(
        self, func: Callable, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *args, **kwargs
    ) -> torch.Tensor:
        self.map = max(self.map, heads * q.shape[-2] * k.shape[-2] * 4)
        if not kwargs.get("skip_reshape"):
            return torch.empty_like(q)
        batch, _, tokens, width = q.shape
        apart = kwargs.get("skip_output_reshape")
        return q.new_empty((batch, heads, tokens, width) if apart else (batch, tokens, heads * width))


def prompts(network: Network) -> EditPrompts:
    """SAID as an encoder of the network's text length would spread it: one token a word."""
    layouts = []
    for text in SAID:
        words = tuple(text.split())
        keys = [(0, "start", 0), *range(len(words))]
        keys += [(0, "end", i) for i in range(network.text[0] - len(keys))]
        layouts.append((Tokens("one", words, tuple(keys)),))
    return EditPrompts(SAID, tuple(layouts))


def step(x: torch.Tensor) -> Step:
    """The second of 50, where every method acts."""
    sigmas = torch.linspace(1, 0, 51)
    return Step(x=x, sigma=sigmas[1:2].expand(len(x)), level=float(sigmas[1]), sigmas=sigmas, index=1,
                parametrisation=Parametrisation.FLOW, percent_to_sigma=lambda percent: 1.0 - percent)


def forward(network: Network, model: torch.nn.Module, pixels: int, made: Sequence[Guidance]) -> tuple[Peak, int]:
    """One pass with the negative's and the positive's rows of source and edit; and ``Kernel.map``."""
    pictures = len(SAID)
    x = torch.zeros(2 * pictures, network.channels, pixels // 8, pixels // 8, device="meta", dtype=DTYPE)
    inputs = network.inputs(len(x), DTYPE)
    attention = Attention()
    attention.step = step(x[:pictures])
    attention.who = {0: ("uncond",), 1: ("cond",)}
    attention.entries = dict.fromkeys((0, 1), {"model_conds": {"c_crossattn": CONDCrossAttn(inputs["context"])}})
    attention.acting = [pair for method in made for pair in method.edits(attention.step)]

    def run(x: torch.Tensor, t: torch.Tensor, transformer_options: dict) -> torch.Tensor:
        options = {**transformer_options, OVERRIDE: seen.watched(transformer_options[OVERRIDE])}
        return model(x, t, transformer_options=options, **inputs)

    run.class_obj = SimpleNamespace(diffusion_model=model)
    times = torch.zeros(len(x), device="meta", dtype=DTYPE)
    kernel, seen = Kernel(), Peak()
    with torch.inference_mode(), seen:
        attention.apply_model(run, x, times, transformer_options={"uuids": [0, 1], OVERRIDE: kernel})
    return seen, kernel.map


def main(options: Options) -> Table:
    rows = []
    for name, pixels in PICTURES.items():
        if options.quick and name != "SD1.5":
            continue
        network = NETWORKS[name]
        model, edit = network.on_meta(DTYPE), prompts(network)
        joint, plain = name == "Flux", None
        for row in ROWS:
            seen, whole = forward(network, model, pixels, row.make(edit, joint))
            plain = plain or (seen, whole)
            rows.append({"model": f"{name}, {pixels} px", "method": row.name, "peak": seen.peak / 1e6,
                         "within": seen.within / 1e6, "largest": seen.largest / 1e6, "map": plain[1] / 1e6})
    columns = {"model": ("network", ""), "method": ("method", ""), "peak": ("peak, MB", ",.0f"),
               "within": ("inside attention, MB", ",.0f"), "largest": ("largest tensor, MB", ",.0f"),
               "map": ("one picture's full map, MB", ",.0f")}
    return Table("memory", "Memory of editing by attention", columns, rows, [
        "One forward pass with four rows, the negative's and the positive's of a source and one edit, in bfloat16, "
        "weights not counted; the second step of 50, where every method acts. Exact, and without a GPU: shapes alone, "
        "on torch's meta device, with a memory efficient kernel for what goes through the host's.",
        "Inside attention: the most that one attention, with all that a method does there, adds to what lives. Where "
        "the peak is as without a method, it lies elsewhere, in a feed-forward layer.",
        "Full map: the probabilities of the network's largest attention for one picture, all heads, float32: what "
        "Prompt-to-Prompt and Plug-and-Play hold where they are written with maps.",
    ])

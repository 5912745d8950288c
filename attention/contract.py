"""The contract of an attention edit: what it may know about one attention call and what it may change.

An edit is a frozen dataclass that derives from :class:`AttentionEdit`. A guidance method brings edits in two ways: as a
``Variant`` branch, whose rows alone are edited (PAG, SEG), or from its hook ``edits``, for the step's own branches. The
executor (``host/attention.py``) runs them where their sites are met, for one run, in this order:

1. ``inputs``    change q, k, v, or the mask (k and v may get more tokens)
2. ``map``       change the attention probabilities, which are made only for edits that implement this
3. ``output``    change or replace the result
4. ``across``    change the results of several branches by one another
and, at the residual blocks of a UNet, ``residual``: change what a block adds to its input.

Inside a stage edits run in the order of their methods. An edit sees just the rows of the branches it acts on; every
other row goes through the host's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from .sites import ALL, Site, selected

TINY = 1e-12  # the least that a sum is divided by


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(D), ``[..., queries, keys]``, float32, from ``[..., tokens, D]``: attention before its softmax."""
    return q.float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5


class Rows:
    """Rows that an edit acts on: R = len(roles) * samples."""

    roles: Sequence[Any]
    samples: int

    def by_sample(self, tensor: Tensor) -> Tensor:
        """``tensor`` ``[R, ...]`` as ``[chunks, samples, ...]``, a view."""
        return tensor.unflatten(0, (len(self.roles), self.samples))


@dataclass(frozen=True)
class Call(Rows):
    """One attention call, for the rows that an edit acts on.

    Attributes:
        q, k, v: ``[R, heads, tokens, D]`` in the model's precision, after the rotary embedding where there is one.
        site: where in the model this is, with the token layout of this forward pass.
        roles: who the chunks of the batch are, "cond", "uncond" or a branch; each chunk holds ``samples`` rows, so
            R = len(roles) * samples, and row 0 of a chunk is its first sample.
        first: which sample of the batch that is: 0, but where another edit asks for a part (see :meth:`only`).
        step: the step of the run (``guidance.contract.Step``).
        mask: the host's attention mask, None nearly always.
        rope: the rotary embedding, ``[1 or R, 1, tokens, D / 2, 2, 2]``, or None.
        latent: ((t,) h, w) of the latents of this forward pass; less than the step's where a prompt has an area.
        to_text: ``to_text(q, branch)`` is what queries get from the text of a prompt branch that need not be evaluated,
            in place of their own: the plain attention, without edits. At cross sites only.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    site: Site
    roles: Sequence[Any]
    samples: int
    step: Any
    mask: Tensor | None = None
    rope: Tensor | None = None
    latent: tuple[int, ...] = ()
    to_text: Callable[[Tensor, Any], Tensor] | None = None
    first: int = 0

    def replace(self, **changes: Tensor) -> Call:
        return replace(self, **changes)

    def only(self, which: slice) -> Call:
        """The call for these samples of each chunk alone, side by side; an edit that compares samples cannot act on it.
        """
        def rows(tensor: Tensor | None) -> Tensor | None:
            whole = tensor is not None and len(tensor) == len(self.q)
            return self.by_sample(tensor)[:, which].flatten(0, 1) if whole else tensor

        held = range(self.samples)[which]
        return replace(self, q=rows(self.q), k=rows(self.k), v=rows(self.v), mask=rows(self.mask), rope=rows(self.rope),
                       samples=len(held), first=self.first + held.start)

    @property
    def of_whole_picture(self) -> bool:
        """Whether the latents are as high and wide as the step's; some frames of a video may do."""
        return self.latent[-2:] == tuple(self.step.x.shape[-2:])

    def probabilities(self) -> Tensor:
        """softmax(q k^T / sqrt(D)), ``[R, heads, tokens, tokens]``, float32."""
        logits = scores(self.q, self.k)
        if self.mask is not None:
            mask = self.mask.unsqueeze(1) if self.mask.ndim == 3 else self.mask  # [R, tokens, tokens]: for every head
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(-1)

    def unrotated(self, tokens: Tensor, where: slice = ALL) -> Tensor:
        """The tokens ``where`` of q or k as they were before the rotary embedding; ``tokens`` holds just those."""
        return tokens if self.rope is None else rotate(tokens, self.rope[:, :, where].transpose(-1, -2))

    def rotated(self, tokens: Tensor, where: slice = ALL) -> Tensor:
        return tokens if self.rope is None else rotate(tokens, self.rope[:, :, where])


@dataclass(frozen=True)
class Residual(Rows):
    """What a residual block adds to its input, for the rows that an edit acts on: ``h`` ``[R, C, H, W]``. The other
    attributes are those of :class:`Call`."""

    h: Tensor
    site: Site
    roles: Sequence[Any]
    samples: int
    step: Any


def rotate(tokens: Tensor, rope: Tensor) -> Tensor:
    """Turn the pairs of the last dimension by the 2x2 matrices of ``rope``; they are rotations: the transpose undoes.
    """
    pairs = tokens.float().unflatten(-1, (-1, 1, 2))
    rope = rope.to(pairs)
    return (rope[..., 0] * pairs[..., 0] + rope[..., 1] * pairs[..., 1]).flatten(-2).to(tokens.dtype)


@dataclass(frozen=True, kw_only=True)
class AttentionEdit:
    """Base of every edit; all hooks are optional.

    ``blocks`` says at which sites it acts, see ``sites.selected``; "" is everywhere that ``kinds`` allows.
    """

    blocks: str = ""

    title: ClassVar[str] = "Attention edit"
    kinds: ClassVar[frozenset[str]] = frozenset({"self", "cross", "joint"})
    needs_grid: ClassVar[bool] = False  # acts on neighbouring tokens: cannot work on merged or tiled ones

    @property
    def company(self) -> Sequence[Any]:
        """Who must be in the same forward pass as whatever it acts on. Where the host splits the batch they are
        evaluated beside each part."""
        return ()

    def acts_at(self, site: Site) -> bool:
        return site.kind in self.kinds and selected(self.blocks, site.name)

    def inputs(self, call: Call) -> Call:
        return call

    def map(self, call: Call, probabilities: Tensor) -> Tensor:
        """``probabilities`` ``[R, heads, tokens, tokens]``, float32; must not be changed in place."""
        return probabilities

    def output(self, call: Call, attend: Callable[..., Tensor]) -> Tensor:
        """``attend()`` is the result so far, ``[R, heads, tokens, D]``; who does not ask for it saves the work.
        ``attend(other)`` is that of another call, with other keys and values or fewer samples for instance, through the
        same edits."""
        return attend()

    def across(self, site: Site, roles: Sequence[Any], results: Sequence[Tensor]) -> Sequence[Tensor]:
        """The results of all chunks that it acts on, ``[samples, heads, tokens, D]`` each, whichever other edits they
        went through. Only chunks of one forward pass meet, see ``company``."""
        return results

    def residual(self, block: Residual) -> Tensor:
        """The new ``h``. Only asked at sites of kind "residual"."""
        return block.h


def overrides(edit: AttentionEdit, hook: str) -> bool:
    """Whether ``edit`` implements ``hook`` itself."""
    return getattr(type(edit), hook) is not getattr(AttentionEdit, hook)

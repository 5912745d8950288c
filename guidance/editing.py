"""What methods that edit by attention ask of the run: a batch of a source and its edits, and the prompts of both."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..attention.edit_prompts import EditPrompts
from .contract import GuidanceError, Setup, Step

log = logging.getLogger("rudder")

SAME = 0.01  # a noise mask scales its rows' noise by a fraction of a percent
PURE_NOISE = 0.01  # percent of the timesteps before which a run starts from noise
WAY_OUT = "Wire the positive, the LATENT and the prompts of one 'Source and Edits' (RudderEditBatch) to one sampler."


def require_source(title: str, step: Step) -> None:
    """Refuse a batch that cannot hold a source and an edit. ``step.x`` is empty before the run starts."""
    if step.x.numel() and len(step.x) < 2:
        raise GuidanceError(
            f"{title}: the latent batch holds one picture. It must be the source and then the edits of it, at least 2 "
            "rows, with one prompt for each in the positive. 'Source and Edits' (RudderEditBatch) makes both."
        )


def check_share(title: str, **shares: float) -> None:
    for name, value in shares.items():
        if not 0.0 <= value <= 1.0:
            raise GuidanceError(f"{title}: {name} is {value:g}; it must be from 0 to 1.")


def check_ends(title: str, start: float, **ends: float) -> None:
    """Refuse a start after which nothing acts. Ends of 0 without a start are said on purpose: the node is off."""
    if start and start >= max(ends.values()):
        raise GuidanceError(f"{title}: start_percent is {start:g} and everything ends before that: "
                            f"{' and '.join(f'{name} is {until:g}' for name, until in ends.items())}.")


def check_reached(title: str, setup: Setup, start: float, end: float, **ends: float) -> None:
    """Refuse a run of which no step in the window ``start`` .. ``end`` comes before one of ``ends``, the percents of
    the timesteps until which the parts of a method act; say which part never acts. A part that ends at 0 is off."""
    steps = [step for step in setup.steps if step.within(start, end)]
    late = [name for name, until in ends.items() if until and not any(step.before(until) for step in steps)]
    if not (steps and late):
        return
    first = max(steps, key=lambda step: step.level)
    said = (f"{title}: the first step of this run in its window lies at {first.percent_of(first.level):.2g} of the "
            f"timesteps, and {' and '.join(f'{name} is {ends[name]:g}' for name in late)}")
    if all(name in late for name, until in ends.items() if until):
        raise GuidanceError(f"{said}, so it could not act. Raise that, or begin the run earlier: its denoise is below "
                            "1, or it has a start_at_step.")
    log.warning("Rudder: %s, so that part does not act. Raise it, or set it to 0 to say so.", said)


def check_positive(title: str, edit: EditPrompts, setup: Setup) -> None:
    """Refuse a positive that the prompts do not describe."""
    if not setup.features or not all(any(_same(f, own) for own in edit.features) for f in setup.features):
        raise GuidanceError(f"{title}: the sampler's positive is not that of the prompts: its words would be taken for "
                            f"others. {WAY_OUT}")


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or a.shape == b.shape and torch.equal(a.to(b), b)


def check_rows(title: str, edit: EditPrompts, step: Step, state: dict) -> None:
    """Refuse another batch than that of the prompts. ``step.x`` is empty before the run starts. Of one run's ``state``
    only the first call looks at the noise: a solver may ask again within the first step, where edits have left the
    source."""
    if not step.x.numel():
        return
    if len(step.x) != edit.rows:
        raise GuidanceError(f"{title}: the latent batch holds {len(step.x)} pictures, and the prompts are a source and "
                            f"{edit.rows - 1} edits of it, {edit.rows} rows. {WAY_OUT}")
    at_start = "rows looked at" not in state and step.percent_of(step.level) < PURE_NOISE
    state["rows looked at"] = True
    source = step.x[:1]
    if at_start and bool((step.x - source).abs().amax() > SAME * source.abs().amax()):
        raise GuidanceError(f"{title}: the rows of the batch start from different noise, so the edits would be other "
                            f"pictures. {WAY_OUT} A noise node must heed the latent's batch index.")


def check_sizes(
    title: str, name: str, limit: int, step: Step, seen: dict[str, set[int]] | None, way_out: str = ""
) -> None:
    """Refuse a limit on tokens that no site of the picture is below; say once in a run when it leaves out the quarter
    of the latent's resolution, where SD1.5 keeps the layout (the paper's 256 tokens at 512x512)."""
    if not seen or "skipped" not in seen:
        return
    if "acted" not in seen:
        raise GuidanceError(f"{title}: {name} is too low for this picture, whose smallest attention has "
                            f"{min(seen['skipped'])} tokens: raise it to that.{way_out}")
    quarter = [size for size in seen["skipped"] if limit < size <= math.prod(step.x.shape[2:]) / 16]
    if quarter and "told" not in seen:
        seen["told"] = set(quarter)
        log.warning("Rudder: %s: at this size of picture the attention that holds the layout has %d tokens, and %s is "
                    "%d, so only smaller ones act. Raise it to that.", title, max(quarter), name, limit)


def check_words(title: str, edit: EditPrompts, phrases: Sequence[str], rows: Iterable[int]) -> None:
    """Refuse words that none of these prompts says."""
    if phrases and not edit.layouts[0]:
        raise GuidanceError(f"{title}: where the words of this text encoder are is not known, so none can be named. It "
                            "is known for CLIP and T5.")
    for phrase in phrases:
        if not any(edit.positions(row, phrase) for row in rows):
            raise GuidanceError(f"{title}: no prompt says '{phrase}' in whole words. They are: "
                                f"{'; '.join(edit.texts[row] for row in rows)}.")

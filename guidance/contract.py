"""The contract of a guidance method: what it may ask of a step and what it may change.

A method is a frozen dataclass that derives from :class:`Guidance`. It is appended to the plan which a MODEL carries;
one executor (``host/run.py``) runs the whole plan at every step, in this order:

1. ``scale``      the guidance weight, before anything is evaluated (a weight of 1 drops the negative branch)
   ``left``       which pictures of the batch guidance has left, while it goes on for others
   ``latent``     what the model sees in place of the sampler's latent
2. ``sources``    which conditioning plays the role "cond" or "uncond" at this step (prompt scheduling)
   ``predicts_uncond``  whether the negative is not evaluated although there is guidance
3. ``branches``   further conditionings to evaluate; all of them ride in one batched call of the host
   ``edits``      what attention does inside that call (``attention/contract.py``)
4. ``refine``     change the branch predictions
5. ``direction``  change delta = cond - uncond; the estimate is then cond + (weight - 1) * direction(delta).
                  Where no method changes delta it is uncond + weight * (cond - uncond), the host's own formula.
6. ``term``       add to the estimate
7. ``finish``     change the estimate

Inside a stage methods run by ``rank``, and in wiring order inside a rank. Methods of which the order matters have
different ranks or share a role in ``claims``, so the wiring never decides the result:

    -1  the weight itself, other prompts to push from     CFG, Perp-Neg, extra negative
     0  its course, who plays the positive                schedule, beta-CFG, R2F
     1  where it is switched off                          interval
     2  the negative's prediction, on the plain pair      TCFG, CFG-Zero*
     3  the positive's prediction, also at weight 1       fixed blend
     4  when guidance ends, with what is left without it  Adaptive Guidance
     5  the guided blend; the push as a whole             AAPB; APG
     6  the result                                        TAG
     7, 8  terms beside it                                AutoGuidance; InstructPix2Pix
     9 to 11  the same, by what attention does            PAG; SEG; SAG
     0 to 4  what attention does: words, layout, content  Prompt-to-Prompt; Plug-and-Play; MasaCtrl;
             of the edits; the negative; its sharpness    NAG; entropy
     9, 10, 12  what an edit keeps; what samplers add    RIVAL; temporal TAG; local blend

A method acts only while the noise level is inside its ``[start, end]`` window, so no method has to code that itself.

What depends on an earlier answer cannot ride in the batched call: such a method asks ``Step.evaluate`` for further
predictions at another latent and noise level, from any stage after ``branches``. Each is counted as an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..attention.contract import AttentionEdit
from ..attention.sites import Site
from .space import Parametrisation, expand


class GuidanceError(ValueError):
    """A method cannot act on this model, conditioning or sampler. The message says why and what to do instead."""


def check_window(title: str, start: float, end: float) -> None:
    """Refuse a window that is none. Both ends are percent of the model's timesteps, 0 (pure noise) .. 1 (clean)."""
    if not 0.0 <= start <= end <= 1.0:
        raise GuidanceError(f"{title}: start {start:g} and end {end:g} must satisfy 0 <= start <= end <= 1.")


def check_finite(title: str, name: str, value: float, hint: str) -> None:
    """Refuse inf and nan. ``name`` is the node's input, ``hint`` says what a usual number does."""
    if not math.isfinite(value):
        raise GuidanceError(f"{title}: {name} is {value:g}; give a finite number, {hint}.")


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conditioning as a branch of the step. Equal when it wraps the same object, so shared anchors cost once.
    ``negative``: it says what is not wanted; ``bare``: it is meant to lack what else the positive shows the model."""

    conditioning: Any
    name: str
    negative: bool = field(default=False, repr=False)
    bare: bool = field(default=False, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prompt) and self.conditioning is other.conditioning

    def __hash__(self) -> int:
        return id(self.conditioning)


@dataclass(frozen=True)
class Mix:
    """The positive with its embeddings moved towards ``prompt``: (1 - amount) * positive + amount * prompt."""

    prompt: Prompt
    amount: float

    @property
    def name(self) -> str:
        return f"{self.amount:g} {self.prompt.name} in positive"


@dataclass(frozen=True)
class Variant:
    """A branch seen in another way: by another MODEL, without the image that it shows the model, or with edits of the
    attention inside the model.

    ``of`` is "cond" (whichever prompt plays it at the step), "uncond" (the guider's own) or another branch.
    """

    of: str | Branch
    model: Any = None
    image: bool = True
    edits: tuple[AttentionEdit, ...] = ()

    @property
    def name(self) -> str:
        role = {"cond": "positive", "uncond": "negative"}.get(self.of) if isinstance(self.of, str) else self.of.name
        ways = ["" if self.image else " without image", "" if self.model is None else " by another model"]
        return role + "".join(ways + [f" with {edit.title}" for edit in self.edits])


Branch = Prompt | Mix | Variant
Edits = Sequence[tuple[AttentionEdit, tuple[str | Branch, ...]]]  # and the branches that each acts on; () is every one


@dataclass(frozen=True)
class Predictions:
    """The x0 predictions of a step, each ``[B, C, H, W]`` or ``[B, C, T, H, W]``, float32, model space.

    ``uncond`` is None when the weight is 1 and nothing else needs it. Where an extra branch has no say (outside its
    area, mask or timestep range) it equals ``cond``; ``silent`` tells where, True there, for branches of which the
    conditioning has any of these.
    """

    cond: Tensor
    uncond: Tensor | None
    extra: Mapping[Branch, Tensor] = field(default_factory=dict)
    silent: Mapping[Branch, Tensor] = field(default_factory=dict)

    def __getitem__(self, branch: Branch) -> Tensor:
        return self.extra[branch]

    def said(self, branch: Branch, push: Tensor) -> Tensor:
        """``push`` with 0 where ``branch`` has no say: for what is measured from anything but ``cond``."""
        return torch.where(self.silent[branch], 0, push) if branch in self.silent else push

    def replace(self, **changes: Tensor) -> Predictions:
        return replace(self, **changes)


@dataclass
class Step:
    """What a method may know about the step. Created by the executor for every model call of the sampler.

    Attributes:
        x: the sampler's tensor, ``[B, C, (T,) H, W]``.
        sigma: noise level, ``[B]``; ``level``: the same as a number; ``sigma_next``: the level this call leads to.
        sigmas: the noise levels of the run, ``[N + 1]``.
        index: position of ``sigma`` in ``sigmas``, 0 .. N - 1. A solver's inner evaluation belongs to the interval
            that it falls in, or, if ``ahead``, to the interval before: it is asked at the end of that and leads back
            to its beginning.
        weight: the guidance weight after the ``scale`` stage; 1 means no guidance.
        player: the branch that plays the positive at this step; None for the guider's own, and before ``sources``.
        left: pictures, ``[B]`` bool, that guidance has left: to them every method does what it does to all at weight 1,
            see :meth:`guided_only`. None: there are none.
        plain: the predictions as the model gave them, None until they exist.
        preds: the predictions after the ``refine`` stage, for the stages that follow it.
        parametrisation: what sigma means.
        generator: CPU generator of this run, seeded with the run's seed.
        evaluate: ``evaluate(x, sigma, *roles)`` are the model's x0 predictions at the latents ``x`` (as ``Step.x``) and
            the noise level ``sigma`` (a number above 0), one for each of ``roles`` ("cond", "uncond"), in one batched
            call. The conditionings, and the strength of scheduled LoRA hooks, are those of the step.
        sites: where the model attends; empty for a family that is not known.
    """

    x: Tensor
    sigma: Tensor
    level: float
    sigmas: Tensor
    index: int
    parametrisation: Parametrisation
    ahead: bool = False
    weight: float = 1.0
    player: Branch | None = None
    left: Tensor | None = None
    plain: Predictions | None = None
    preds: Predictions | None = None
    generator: torch.Generator | None = None
    percent_to_sigma: Callable[[float], float] = float
    states: dict[int, dict] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    evaluate: Callable[..., list[Tensor]] | None = None
    sites: Sequence[Site] = ()

    @property
    def steps(self) -> int:
        return max(len(self.sigmas) - 1, 1)

    @property
    def sigma_next(self) -> float:
        return float(self.sigmas[min(self.index + (not self.ahead), len(self.sigmas) - 1)])

    @property
    def progress(self) -> float:
        """0 at the first step of the run, 1 at the last."""
        return self.index / max(self.steps - 1, 1)

    def state(self, owner: Guidance) -> dict:
        """A dictionary of ``owner`` that is born with the run and dies with it, or when a sampler changes the size."""
        return self.states.setdefault(id(owner), {})

    def within(self, start: float, end: float) -> bool:
        """Whether sigma lies in the window of timestep percents, both ends included, as the host's own ranges."""
        return self.percent_to_sigma(end) <= self.level and not self.before(start)

    def before(self, percent: float) -> bool:
        """Whether sigma is still above that of the timestep percent: never for 0, always for 1."""
        return self.level > self.percent_to_sigma(percent) * (1 + 1e-5)  # with room for rounding

    def percent_of(self, sigma: float) -> float:
        """Where ``sigma`` lies on the model's timesteps, 0 (pure noise) .. 1 (clean): ``percent_to_sigma`` inverted."""
        low, high = 0.0, 1.0
        for _ in range(24):  # halvings, and the run remembers every point that it was asked for
            middle = (low + high) / 2
            low, high = (middle, high) if self.percent_to_sigma(middle) > sigma else (low, middle)
        return round(high, 6)

    def guided_only(self, push: Tensor) -> Tensor:
        """``push``, ``[B]`` or ``[B, ...]``, with 0 for the pictures that guidance has left."""
        return push if self.left is None else torch.where(expand(self.left, push) > 0, 0, push)

    def log(self, **values: float | Tensor) -> None:
        """Record quantities of this step for the trace; free when nobody traces."""
        if self.record is not None:
            self.record.update(values)


@dataclass(frozen=True)
class Setup:
    """What is known when sampling starts, before the model is evaluated.

    ``weights`` are the guidance weights of the steps after the ``scale`` stage; ``overridden`` tells whether another
    node may set them yet. ``likeness`` tells what a prompt is the same as: "positive", "negative", "empty" (all zeros)
    or None; ``limits``, in words, what holds it to parts of the picture or of the run. ``sites`` are where the model
    attends. ``steps`` are those of the run, each with an empty ``x``. ``features`` are the text features of the
    positive, ``[1 or rows, tokens, D]`` for each of its entries, and ``parts`` how many of those can share a forward
    pass (they act at once, on areas of one size).
    """

    cfg: float
    weights: Sequence[float]
    has_negative: bool
    parametrisation: Parametrisation
    likeness: Callable[[Prompt], str | None] = lambda prompt: None
    limits: Callable[[Prompt], Sequence[str]] = lambda prompt: ()
    sites: Sequence[Site] = ()
    steps: Sequence[Step] = ()
    features: Sequence[Tensor] = ()
    parts: int = 1
    overridden: bool = False

    @property
    def guided(self) -> bool:
        """Whether any step of the run has, or may have, classifier-free guidance."""
        return self.has_negative and (self.overridden or any(weight != 1.0 for weight in self.weights))


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Base of every guidance method; all hooks are optional. See the module docstring for their order.

    ``start`` and ``end`` are the window in percent of the model's timesteps, 0 (pure noise) .. 1 (clean).
    """

    start: float = 0.0
    end: float = 1.0

    title: ClassVar[str] = "Guidance"
    claims: ClassVar[frozenset[str]] = frozenset()  # exclusive roles: two claims of one role cannot be wired together
    rank: ClassVar[int] = 0
    needs_uncond: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_window(self.title, self.start, self.end)

    def __deepcopy__(self, memo: dict) -> Guidance:
        return self  # frozen: a clone of a MODEL shares it, and shared conditionings keep their identity

    def prompts(self) -> Sequence[Branch]:
        """Every branch beyond cond and uncond that the method may ask for during a run."""
        return ()

    def check(self, setup: Setup) -> None:
        """Raise :class:`GuidanceError` if the method cannot act in this run."""

    def scale(self, step: Step, weight: float) -> float:
        """The weight of this step. Also asked for every step before the run starts, with an empty ``step.x``."""
        return weight

    def latent(self, step: Step, x: Tensor) -> Tensor:
        """The latent on which the rest of the step goes on; the sampler keeps its own."""
        return x

    def left(self, step: Step) -> Tensor | None:
        """Pictures, ``[B]`` bool, that are not guided at this step although others are. Asked once, with the step's
        final weight."""
        return None

    def predicts_uncond(self, step: Step) -> bool:
        """Whether ``refine`` supplies the negative's prediction at this step, so that nobody need evaluate it. Asked
        once, with the step's final weight."""
        return False

    def sources(self, step: Step) -> Mapping[str, Branch]:
        return {}

    def branches(self, step: Step) -> Sequence[Branch]:
        return ()

    def edits(self, step: Step) -> Edits:
        """Attention edits of this step's own branches, each with those it acts on: "cond" (and its variants), "uncond"
        or a branch; () is every branch. Also asked for every step before the run starts, with an empty ``step.x``.
        """
        return ()

    def refine(self, step: Step, preds: Predictions) -> Predictions:
        return preds

    def direction(self, step: Step, delta: Tensor) -> Tensor:
        return delta

    def term(self, step: Step, preds: Predictions) -> Tensor | None:
        return None

    def finish(self, step: Step, x0: Tensor) -> Tensor:
        return x0


def overrides(method: Guidance, hook: str) -> bool:
    """Whether ``method`` implements ``hook`` itself."""
    return getattr(type(method), hook) is not getattr(Guidance, hook)


Plan = tuple[Guidance, ...]


def extended(plan: Plan, method: Guidance) -> Plan:
    """``plan`` with ``method`` appended.

    Raises:
        GuidanceError: two methods claim the same exclusive role; names both and the way out.
    """
    for other in plan:
        for role in sorted(other.claims & method.claims):
            raise GuidanceError(
                f"'{method.title}' and '{other.title}' both decide the {role}, so they cannot act on the same MODEL. "
                f"Keep one of them, or give each its own sampler by branching the MODEL line before the first."
            )
    return (*plan, method)

"""What the tests of the methods share: random predictions of images and videos, steps, and a small executor."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st

from rudder.guidance.contract import Guidance, Predictions, Prompt, Setup, Step
from rudder.guidance.space import Parametrisation, expand

KINDS = list(Parametrisation)
sides = st.integers(1, 4)
images = st.tuples(sides, sides, sides, sides)  # [B, C, H, W]
videos = st.tuples(sides, sides, st.integers(1, 3), sides, sides)  # [B, C, T, H, W]
shapes = images | videos
weights = st.floats(1.0, 20.0).map(lambda w: round(w, 3))
kinds = st.sampled_from(KINDS)
seeds = st.integers(0, 2**31)


@st.composite
def predictions(draw, count: int = 3, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """``count`` random tensors of one shape, float64 so that identities can be held to rounding."""
    shape, generator = draw(shapes), torch.Generator().manual_seed(draw(seeds))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count))


def levels(batch: int, kind: Parametrisation, seed: int = 0) -> torch.Tensor:
    """One noise level a sample, ``[B]``, away from the ends where conversions lose digits."""
    uniform = torch.rand(batch, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 0.05 + 0.9 * uniform if kind is Parametrisation.FLOW else 0.05 + 14 * uniform


def step(index: int = 0, steps: int = 10, weight: float = 7.0, level: float | None = None, **options) -> Step:
    """Step ``index`` of a run of ``steps`` whose noise level falls from 1 to 0; percents are 1 - sigma."""
    sigmas = torch.linspace(1, 0, steps + 1)
    level = float(sigmas[index]) if level is None else level
    options = {"percent_to_sigma": lambda percent: 1 - percent, "parametrisation": Parametrisation.EPS, **options}
    return Step(x=torch.zeros(1, 4, 2, 2), sigma=torch.tensor([level]), level=level, sigmas=sigmas, index=index,
                weight=weight, record={}, **options)


def setup(cfg: float = 7.0, steps: int = 10, weights: list[float] | None = None, likeness: str | None = None,
          has_negative: bool = True) -> Setup:
    return Setup(cfg=cfg, weights=[cfg] * steps if weights is None else weights, has_negative=has_negative,
                 parametrisation=Parametrisation.EPS, likeness=lambda prompt: likeness,
                 steps=[step(i, steps) for i in range(steps)])


def prompt(name: str = "anchor") -> Prompt:
    return Prompt([[torch.zeros(1, 2, 3), {}]], name)


def guided(method: Guidance, step: Step, cond: torch.Tensor, uncond: torch.Tensor | None, **extra) -> torch.Tensor:
    """The x0 that ``method`` alone gives at ``step``: the host's CFG formula on the refined predictions."""
    (branch,) = method.prompts() or (None,)
    given = {branch: extra["anchor"]} if extra else {}
    preds = method.refine(step, Predictions(cond, uncond, given))
    return preds.cond if preds.uncond is None else preds.uncond + (preds.cond - preds.uncond) * step.weight


def at(x: torch.Tensor, index: int = 3, **options) -> Step:
    """A step whose latent is ``x``."""
    now = step(index, **options)
    return replace(now, x=x, sigma=torch.full((len(x),), now.level, dtype=x.dtype))


def run_step(step: Step, preds: Predictions, *methods: Guidance) -> torch.Tensor:
    """The x0 of ``methods`` on given predictions, by the stages of ``host/run.py`` in its order."""
    plan = sorted(methods, key=lambda method: method.rank)
    step.plain = preds
    for method in plan:
        step.left = method.left(step) if step.left is None else step.left
    for method in plan:
        preds = method.refine(step, preds)
    step.preds = preds
    cond, uncond = preds.cond, preds.uncond
    x0 = cond if uncond is None else uncond + (cond - uncond) * step.weight
    if uncond is not None:
        delta = plain_delta = cond - uncond
        for method in plan:
            delta = method.direction(step, delta)
        x0 = x0 if delta is plain_delta else cond + (step.weight - 1) * delta
    if step.left is not None:
        x0 = torch.where(expand(step.left, x0) > 0, cond, x0)
    for method in plan:
        added = method.term(step, preds)
        x0 = x0 if added is None else x0 + added
    for method in plan:
        x0 = method.finish(step, x0)
    return x0

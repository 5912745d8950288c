"""CFG++. Chung, Kim, Park, Nam, Ye, ICLR 2025, arXiv 2406.08070, Alg. 2 (number recalled), and the official code.

    D   = D_u + lambda (D_c - D_u),  lambda in [0, 1]
    x'  = a' D + s' N_u,             N_u = (x - a D_u) / s       (the noise that the *negative's* prediction sees)

a is the share of x0 in x: 1 in the sampler's coordinates of eps and v models, 1 - s for flow [flow derived: the paper
is for eps]. Two more solvers: ancestral (DDIM's eta: the part u = eta sqrt(1 - (s' a / (s a'))^2) of the noise is drawn
anew) and DPM-Solver++ 2M as in the official code, which adds (1 - e^-h)(D - D_u of the step before) / 2r with
e^-h = s' / s. For flow the guided part of that carries a' too, without which it is over-guided by 1 / a' [derived;
ComfyUI's own lacks it].

**Equivalence** [derived, and a test]: Euler CFG++ is Euler CFG at the weight of the step

    w = lambda a' s / (s - s')

so lambda depends on the number of steps, and w is below 1 where steps are long. It is also how CFG++ composes: the
guider, with whatever shapes its guidance, is asked for its prediction D_w at this weight, and D follows from it,
D = D_u + (D_w - D_u)(s - s') / (a' s). Without a D_u (guidance is off in this step) the step is the plain solver's. A
picture's first step after guidance went on or off has no 2M term: it would be the push itself [derived].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..guidance.contract import GuidanceError
from ..guidance.space import Parametrisation, expand, signal
from .solver import Report, check_falling

Guided = Callable[[Tensor, float, float], tuple[Tensor, "Tensor | None"]]
"""(x, sigma, guidance weight) -> (guided x0, x0 of the negative or None where guidance is off)."""

SOLVERS = ("euler", "euler ancestral", "dpm++ 2m")


def weight(lam: float, sigma: float, to: float, kind: Parametrisation) -> float:
    """The weight w at which an Euler step of CFG is the step of CFG++ from ``sigma`` to ``to``."""
    return lam * signal(to, kind) * sigma / (sigma - to)


def at_lambda(guided: Tensor, uncond: Tensor, sigma: float, to: float, kind: Parametrisation) -> Tensor:
    """D from the prediction at :func:`weight`. Shapes as the inputs."""
    return uncond + (guided - uncond) * ((sigma - to) / (signal(to, kind) * sigma))


def fresh(sigma: float, to: float, eta: float, kind: Parametrisation) -> float:
    """u, the part of the noise at ``to`` that an ancestral step draws anew: 0 .. 1, DDIM's stochastic step at eta 1."""
    kept = to * signal(sigma, kind) / (sigma * signal(to, kind))
    return min(1.0, eta * math.sqrt(1.0 - kept * kept))


def correction(x0: Tensor, uncond: Tensor, earlier: Tensor, levels: tuple[float, float, float],
               kind: Parametrisation) -> Tensor:  # fmt: skip
    """What 2M adds to the Euler step; ``levels`` are those of the step before, of this one and of the next."""
    before, sigma, to = levels
    ratio = math.log(before / sigma) / math.log(sigma / to)
    return (1 - to / sigma) / (2 * ratio) * (uncond - earlier + signal(to, kind) * (x0 - uncond))


@dataclass(frozen=True, kw_only=True)
class CFGPP:
    """A sampler: one guided prediction a step (2 evaluations), ``strength`` is the paper's lambda, 0 .. 1."""

    strength: float = 0.6
    solver: str = "euler"
    eta: float = 1.0

    title: ClassVar[str] = "Low Guidance Sampler (CFG++)"

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise GuidanceError(
                f"{self.title}: guidance_lambda is {self.strength:g}; it lies in 0 .. 1 (paper 0.6, which matches a "
                "cfg of about 7.5) and is not a cfg."
            )
        if self.solver not in SOLVERS:
            raise GuidanceError(f"{self.title}: there is no solver '{self.solver}'; use one of {', '.join(SOLVERS)}.")
        if not 0.0 <= self.eta <= 1.0:
            raise GuidanceError(f"{self.title}: eta is {self.eta:g}; use 0 for no new noise .. 1 for DDPM's share.")

    def sample(self, predict: Guided, x: Tensor, sigmas: Sequence[float], kind: Parametrisation,
               noise: Callable[[], Tensor], report: Report = lambda i, x, x0: None) -> Tensor:  # fmt: skip
        """x at the last of ``sigmas``. ``noise`` draws a unit normal of x's shape; only the ancestral solver does."""
        check_falling(self.title, sigmas)
        earlier: tuple[float, Tensor, Tensor] | None = None
        for i, (sigma, to) in enumerate(zip(sigmas, sigmas[1:])):
            guided, uncond = predict(x, sigma, weight(self.strength, sigma, to, kind))
            uncond = guided if uncond is None else uncond
            x0 = at_lambda(guided, uncond, sigma, to, kind)
            report(i, x, x0)
            if to == 0:
                return x0
            u = fresh(sigma, to, self.eta, kind) if self.solver == "euler ancestral" else 0.0
            renoised = (to / sigma) * (x - signal(sigma, kind) * uncond)
            new = signal(to, kind) * x0 + math.sqrt(1 - u * u) * renoised
            if u:
                new = new + to * u * noise()
            guides = (guided != uncond).flatten(1).any(1)
            if self.solver == "dpm++ 2m" and earlier:
                more = correction(x0, uncond, earlier[1], (earlier[0], sigma, to), kind)
                new = torch.where(expand(guides == earlier[2], x) > 0, new + more, new)
            x, earlier = new, (sigma, uncond, guides)
        return x

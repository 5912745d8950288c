"""W2SD, weak-to-strong reflection. Bai, Sugiyama, Xie, arXiv 2502.00473, Alg. 1 (number recalled), official code.

    x' = step(x, strong: s -> s')            a step of DDIM / Euler
    x~ = step(x', weak: s' -> s)             DDIM inversion, which is Euler in reverse
    x  <- step(x~, strong: s -> s')          the step that counts, from the reflected x~

To first order x~ = x + (s - s') (e_weak - e_strong) with e = (x - D) / s, the direction in which x changes with s
[derived]: the reflection walks towards what the strong prediction does and the weak one does not. Equal predictions
give x~ = x up to O((s - s')^2) [derived, a test]. Any pair will do: a better and a worse model, a LoRA at two
strengths, cfg 5.5 and 1 [official code], with and without ControlNet. The last step, to s' = 0, is not reflected.

Flow models need no other formula, see ``solver.py`` [derived]. The weak prediction is made at (x', s').
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..guidance.contract import GuidanceError, check_window
from .solver import Denoiser, Report, check_falling, euler


def reflected(strong: Denoiser, weak: Denoiser, x: Tensor, sigma: float, to: float) -> Tensor:
    """x~ at ``sigma``, shape of ``x``: forth with the strong, back with the weak. Two predictions; ``to`` above 0."""
    ahead = euler(x, strong(x, sigma), sigma, to)
    return euler(ahead, weak(ahead, to), to, sigma)


@dataclass(frozen=True, kw_only=True)
class W2SD:
    """A sampler: 3 predictions in a reflected step, 1 in the others. ``start`` .. ``end``: percent of the timesteps."""

    weak_cfg: float = 1.0
    start: float = 0.0
    end: float = 1.0

    title: ClassVar[str] = "Reflection Sampler (W2SD)"

    def __post_init__(self) -> None:
        check_window(self.title, self.start, self.end)

    def reflects(self, sigmas: Sequence[float], within: Callable[[float], bool]) -> list[bool]:
        """Which steps are reflected; ``within`` tells whether a noise level lies in the window.

        Raises:
            GuidanceError: none is, so the sampler would be plain Euler.
        """
        steps = [to > 0 and within(sigma) for sigma, to in zip(sigmas, sigmas[1:])]
        if not any(steps):
            raise GuidanceError(
                f"{self.title}: none of the {len(steps)} steps is reflected: the last never is, and the others lie "
                f"outside start {self.start:g} .. end {self.end:g}. Widen the window or use more steps."
            )
        return steps

    def sample(self, strong: Denoiser, weak: Denoiser, x: Tensor, sigmas: Sequence[float],
               within: Callable[[float], bool] = lambda sigma: True,
               report: Report = lambda i, x, x0: None) -> Tensor:  # fmt: skip
        """x at the last of ``sigmas``."""
        check_falling(self.title, sigmas)
        for i, reflects in enumerate(self.reflects(sigmas, within)):
            sigma, to = sigmas[i : i + 2]
            if reflects:
                x = reflected(strong, weak, x, sigma, to)
            x0 = strong(x, sigma)
            report(i, x, x0)
            x = euler(x, x0, sigma, to)
        return x

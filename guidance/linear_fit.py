"""The coefficients of LinearAG (``linear_ag.py``), by least squares on a model's own runs.

    min_b  sum | eps_u(k) - sum_{i <= k} b_i eps_c(i) - sum_{i < k} b'_i eps_u(i) |^2

over all samples and dimensions, for every step k that will not evaluate the negative. Castillo et al., arXiv
2312.12487, fit one set for each model and list of noise levels (recalled); the ridge towards the held push is derived:
neighbouring steps are nearly equal, and without it they cancel each other with huge coefficients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Coefficients:
    """b of the steps at ``sigmas [N]``: ``cond [N, N]`` and ``uncond [N, N]``, row k for step k, 0 beyond its past.
    Negatives are evaluated at the steps 0, every, 2 every ..."""

    sigmas: Tensor
    cond: Tensor
    uncond: Tensor
    every: int

    def step(self, sigma: float) -> int | None:
        """The step at this noise level, within 0.1 %; None if there is none."""
        near = int((self.sigmas - sigma).abs().argmin())
        return near if math.isclose(float(self.sigmas[near]), sigma, rel_tol=1e-3) else None

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file; :meth:`read` is the way back."""
        every = torch.tensor([self.every])
        return {"sigmas": self.sigmas, "cond": self.cond, "uncond": self.uncond, "every": every}

    @classmethod
    def read(cls, tensors: dict[str, Tensor]) -> Coefficients:
        """Raises ValueError if the file holds something else."""
        names, steps = {"sigmas", "cond", "uncond", "every"}, len(tensors.get("sigmas", ()))
        if {*tensors} != names or any(tensors[name].shape != (steps, steps) for name in ("cond", "uncond")):
            raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'nothing'} instead of LinearAG's coefficients")
        return cls(tensors["sigmas"], tensors["cond"], tensors["uncond"], int(tensors["every"]))


def gram(rows: Tensor, chunk: int = 65536) -> Tensor:
    """Inner products of ``rows [M, D]`` in float64, ``[M, M]``, without a float64 copy of all of them."""
    parts = (part.double() for part in rows.split(chunk, dim=1))
    return sum((part @ part.T for part in parts), torch.zeros(len(rows), len(rows), dtype=torch.float64))


def held(k: int, j: int, steps: int) -> Tensor:
    """b and b' as one vector ``[2 steps]`` that hold the push of step j: eps_c(k) - eps_c(j) + eps_u(j)."""
    b = torch.zeros(2 * steps, dtype=torch.float64)
    b[k], b[j], b[steps + j] = 1, -1, 1
    return b


def fit(products: Tensor, sigmas: Tensor, every: int, ridge: float = 1e-4) -> Coefficients:
    """Coefficients for every step that is no multiple of ``every``.

    Args:
        products: ``[2 N, 2 N]``, :func:`gram` of eps_c(0) .. eps_c(N-1), eps_u(0) .. eps_u(N-1), summed over the runs.
        sigmas: the noise levels of the N steps.
        ridge: weight of the pull towards the held push, relative to the mean square of the data.
    """
    steps = len(sigmas)
    b = torch.zeros(steps, 2 * steps, dtype=torch.float64)
    for k in (k for k in range(steps) if k % every):
        basis = torch.tensor([*range(k + 1), *range(steps, steps + k, every)])
        b[k] = held(k, k - k % every, steps)
        inner = products[basis][:, basis]
        missed = products[basis, steps + k] - inner @ b[k, basis]
        damping = ridge * inner.diagonal().mean() * torch.eye(len(basis), dtype=torch.float64)
        b[k, basis] += torch.linalg.solve(inner + damping, missed)
    return Coefficients(sigmas.float(), b[:, :steps].float(), b[:, steps:].float(), every)


def errors(products: Tensor, found: Coefficients) -> tuple[float, float]:
    """Mean squared error of the predicted negatives on the data of :func:`fit`, as a share of the mean squared push,
    with ``found`` and with the held push."""
    steps = len(found.sigmas)
    missed = [0.0, 0.0]
    push = 0.0
    for k in (k for k in range(steps) if k % found.every):
        target = torch.zeros(2 * steps, dtype=torch.float64)
        target[steps + k] = 1
        ours = torch.cat((found.cond[k], found.uncond[k])).double()
        for n, b in enumerate((ours, held(k, k - k % found.every, steps))):
            missed[n] += float((b - target) @ products @ (b - target))
        target[k] = -1
        push += float(target @ products @ target)
    return missed[0] / max(push, 1e-30), missed[1] / max(push, 1e-30)

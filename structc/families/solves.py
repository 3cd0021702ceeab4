"""Least-squares steps that never raise the error, whatever the rank of their systems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

RIDGES = (1e-10, 1e-8, 1e-6, 1e-4, 1e-2)
"""Of the mean diagonal, added to every system: the first that makes it definite."""
FLAT = 1e-5
"""Curvature below this share of what the preconditioner expects is rounding: no step is taken."""
PROGRESS = 3e-3
"""A fit stops when a sweep lowers the squared error by less than this share."""

Factors = tuple[Tensor, ...]


class Sweeps(Protocol):
    """What alternates between the factors of a matrix."""

    def at(self, factors: Factors) -> float:
        """The squared error of these factors, from which the next sweep starts."""

    def sweep(self) -> Factors:
        """One step for each factor, none of which raises the error."""


def descend(sweeps: Sweeps, start: Factors, most: int) -> Factors:
    """Up to so many sweeps, each from a point beyond the last one if that is better: the best.

    Alternating steps creep along valleys in a direction that hardly changes. Going on in it costs
    nothing, since a sweep begins with what tells the error of its starting point; where that is
    not well below where the last sweep began, the sweep starts from where the steps ended.
    """
    x, before, error, run = start, start, math.inf, 0
    best, least = start, math.inf
    for turn in range(most + 1):
        wanted, point = error * (1 - PROGRESS), x
        if run:
            pace = run / (run + 3)
            point = tuple(f + pace * (f - g) for f, g in zip(x, before, strict=True))
        now = sweeps.at(point)
        if run and not now <= wanted:
            point, run = x, 0
            now = sweeps.at(x)
        if now < least:
            best, least = point, now
        if not now <= wanted or turn == most:
            break
        before, x, error, run = x, sweeps.sweep(), now, run + 1
    return best


def damped_solve(system: Tensor, residual: Tensor) -> Tensor:
    """``(N + eps I)^-1 R`` for positive semidefinite systems: the change that a factor takes.

    Factors are changed by the solution for the residual of their present value, not replaced. Then
    the ridge makes each step a proximal one: it lowers the error whatever the rank of N, directions
    that N does not see stay as they are, and repeated steps end at the exact solution.
    """
    return torch.cholesky_solve(residual, _damped_root(system, RIDGES))


def damped_inverse(system: Tensor) -> Tensor:
    """``(N + eps I)^-1`` as a preconditioner: directions of rounding alone are not blown up."""
    return torch.cholesky_inverse(_damped_root(system, RIDGES[2:]))


def _damped_root(system: Tensor, ridges: Sequence[float]) -> Tensor:
    """The Cholesky factor with the least ridge that makes the system definite.

    A Gram that was summed in a narrow dtype has negative eigenvalues of its rounding.
    """
    size = system.shape[-1]
    level = system.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    for ridge in ridges:
        amount = ridge * level + torch.finfo(system.dtype).tiny
        damped = system + torch.diag_embed(amount.expand(*amount.shape[:-1], size))
        root, info = torch.linalg.cholesky_ex(damped)
        if not bool(info.any()):
            return root
    raise torch.linalg.LinAlgError("a system of least squares is not positive semidefinite")


def conjugate(
    image: Callable[[Tensor], Tensor],
    tame: Callable[[Tensor], Tensor],
    start: Tensor,
    residual: Tensor,
    dims: tuple[int, ...],
    turns: int,
) -> tuple[Tensor, Tensor]:
    """Preconditioned conjugate gradients towards ``S t = wanted``, and the residual they leave.

    Each turn lowers ``t S t - 2 t wanted`` of every problem of the batch, or leaves it.

    Args:
        image: S, positive semidefinite.
        tame: the preconditioner, an approximate inverse of S.
        residual: ``wanted - S start``.
        dims: the dimensions that belong to one problem; the others are a batch.
    """
    t, step = start, tame(residual)
    size = (residual * step).sum(dims, keepdim=True)
    for _ in range(turns):
        moved = image(step)
        slope = (step * moved).sum(dims, keepdim=True)
        far = torch.where(slope > FLAT * size, size / slope, 0.0)
        t, residual = t + far * step, residual - far * moved
        tamed = tame(residual)
        size, before = (residual * tamed).sum(dims, keepdim=True), size
        step = tamed + torch.where(before > 0, size / before, 0.0) * step
    return t, residual


def least_squares(rows: Tensor, gram: Tensor, columns: Tensor) -> Tensor:
    """What some columns (K) of a matrix become when they stand for all: ``W C[:, K] C[K, K]^+``.

    It is the change from ``W[:, K]`` that is solved for: columns of which the data say nothing
    stay as they are.
    """
    corner, start = gram[columns][:, columns], rows[:, columns]
    pull = rows @ gram[:, columns] - start @ corner
    return start + damped_solve(corner, pull.mT).mT

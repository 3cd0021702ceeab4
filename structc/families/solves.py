"""Least-squares steps that never raise the error, whatever the rank of their systems."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-10
"""Of the mean diagonal, added to every system."""


def damped_solve(system: Tensor, residual: Tensor) -> Tensor:
    """``(N + eps I)^-1 R`` for positive semidefinite systems: the change that a factor takes.

    Factors are changed by the solution for the residual of their present value, not replaced. Then
    the ridge makes each step a proximal one: it lowers the error whatever the rank of N, directions
    that N does not see stay as they are, and repeated steps end at the exact solution.
    """
    size = system.shape[-1]
    level = system.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    ridge = RIDGE * level + torch.finfo(system.dtype).tiny
    damped = system + torch.diag_embed(ridge.expand(*ridge.shape[:-1], size))
    return torch.cholesky_solve(residual, torch.linalg.cholesky(damped))


def least_squares(rows: Tensor, gram: Tensor, columns: Tensor) -> Tensor:
    """What some columns (K) of a matrix become when they stand for all: ``W C[:, K] C[K, K]^+``.

    It is the change from ``W[:, K]`` that is solved for: columns of which the data say nothing
    stay as they are.
    """
    corner, start = gram[columns][:, columns], rows[:, columns]
    pull = rows @ gram[:, columns] - start @ corner
    return start + damped_solve(corner, pull.mT).mT

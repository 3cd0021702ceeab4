"""Kronecker products and short sums of them, on every grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from structc.families import Kronecker
from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import tensor
from structc.recognition.rank import thin

Array = NDArray[Any]
TERMS = 16
PROBE = TERMS + 8
TRIED = 4
FEW = 512
"""Blocks, and entries of a block, among which a probe chooses."""


class Grid(NamedTuple):
    """Shapes of the factors, and the number of terms that a probe saw."""

    cost: int
    terms: int
    m1: int
    n1: int


def kronecker(matrix: Matrix) -> Iterator[Proposal]:
    """W = sum_t A_t (x) B_t with few terms.

    Math:    the rearranged matrix, a row for each block of W, has as many ranks as there are terms.
    Cost:    a singular value decomposition of at most 24 x 24 entries a grid; O(m n) for a hit.
    Source:  Van Loan and Pitsianis 1993.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> recognize(torch.kron(torch.randn(3, 4), torch.randn(5, 6))).words
    'a Kronecker product of 3 x 4 and 5 x 6'
    """
    found = sorted(grid for grid in _grids(matrix) if grid.terms)
    for grid in found[:TRIED]:
        factors = _factors(matrix, grid)
        if factors is not None:
            a, b = factors
            shapes = f"{a.shape[1]} x {a.shape[2]} and {b.shape[1]} x {b.shape[2]}"
            words = f"a Kronecker product of {shapes}"
            words = words if len(a) == 1 else f"a sum of {len(a)} Kronecker products of {shapes}"
            yield Proposal("kronecker", Kronecker(tensor(a), tensor(b)), words)


def divisors(n: int) -> list[int]:
    """All divisors, upwards.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def _grids(matrix: Matrix) -> Iterator[Grid]:
    m, n = matrix.shape
    rng = np.random.default_rng(0)
    for m1 in divisors(m):
        for n1 in divisors(n):
            if (m1, n1) in ((1, n), (m, 1)):
                continue  # columns times rows: terms are ranks, which low rank has been asked about
            one, other = m1 * n1, (m // m1) * (n // n1)
            most = min((m * n - 1) // (one + other), min(one, other) - 1, TERMS)
            if most < 1:
                continue
            left, right = (
                rng.permutation(min(c, FEW))[:PROBE] * (c // min(c, FEW)) for c in (one, other)
            )
            i = (left // n1)[:, None] * (m // m1) + right // (n // n1)
            j = (left % n1)[:, None] * (n // n1) + right % (n // n1)
            terms = int(seen_ranks(matrix.values[i, j], most, matrix.slack))
            yield Grid(terms * (one + other), terms, m1, n1)


def seen_ranks(parts: Array, most: int, slack: float) -> Array:
    """The ranks of small matrices ``(..., a, b)`` where they are at most ``most``, else 0."""
    s = np.linalg.svd(parts, compute_uv=False)
    if s.shape[-1] <= most:
        return np.zeros(s.shape[:-1], dtype=np.int64)
    tails = np.sqrt(np.cumsum((s**2)[..., ::-1], axis=-1)[..., ::-1])
    ranks = (tails > slack * tails[..., :1]).sum(axis=-1)
    return np.where(ranks <= most, ranks, 0)


def _factors(matrix: Matrix, grid: Grid) -> tuple[Array, Array] | None:
    (m, n), (_, terms, m1, n1) = matrix.shape, grid
    m2, n2 = m // m1, n // n1
    rows = matrix.values.reshape(m1, m2, n1, n2).transpose(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
    found = thin(rows, terms, matrix.tolerance)
    if found is None:
        return None
    u, v = found
    return u.T.reshape(-1, m1, n1), v.reshape(-1, m2, n2)

"""Low rank, and the two questions about rank that other recognisers ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dgetrf, zgetrf

from structc.families import LowRank
from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import tensor

Array = NDArray[Any]
MARGIN = 8
SHARE = 1.25
GROWTH = 8
"""By how much elimination may enlarge the rounding of entries."""
FIRST = 24


def low_rank(matrix: Matrix) -> Iterator[Proposal]:
    """W = U V with fewer parameters than W.

    Cost:    one LU factorisation of a random part, a little more than half as high and wide; if
             that is deficient, O(m n r) for a randomised range finder.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> recognize(torch.randn(9, 2) @ torch.randn(2, 9)).words
    'a 9 x 9 matrix of rank 2'
    """
    m, n = matrix.shape
    most = (m * n - 1) // (m + n)
    if most < 1 or not may_be_deficient(matrix.values, most, matrix.noise):
        return
    found = thin(matrix.values, most, matrix.tolerance)
    if found is not None:
        u, v = found
        family = LowRank(tensor(v), tensor(u))
        yield Proposal("low_rank", family, f"a {m} x {n} matrix of rank {len(v)}")


def may_be_deficient(values: Array, most: int, noise: float) -> bool:
    """Whether the rank can be at most ``most``, seen on a random part; False is certain.

    Math:    Gaussian elimination with row pivots has at most as many pivots above rounding as
             there are ranks. A part that is a quarter larger than ``most`` is enough to tell.

    Args:
        noise: what rounding may have done to an entry.

    >>> rng = np.random.default_rng(0)
    >>> may_be_deficient(rng.normal(size=(60, 60)), 20, 1e-12)
    False
    >>> may_be_deficient(rng.normal(size=(60, 20)) @ rng.normal(size=(20, 60)), 20, 1e-12)
    True
    """
    m, n = values.shape
    side = min(m, n, part_side(most))
    rng = np.random.default_rng(0)
    part = values[np.ix_(rng.permutation(m)[:side], rng.permutation(n)[:side])]
    return part_is_deficient(part, most, noise)


def part_side(most: int) -> int:
    """The size of a part that tells whether the rank of the whole is at most ``most``."""
    return int(SHARE * most) + MARGIN


def part_is_deficient(part: Array, most: int, noise: float) -> bool:
    """:func:`may_be_deficient` of a part that was chosen already."""
    factorise = zgetrf if np.iscomplexobj(part) else dgetrf
    pivots = np.abs(factorise(part)[0].diagonal())
    return int((pivots > GROWTH * noise).sum()) <= most


def thin(values: Array, most: int, tolerance: float) -> tuple[Array, Array] | None:
    """U ``(m, r)`` and V ``(r, n)`` of the least rank r <= most within a relative residual.

    Math:    Q from a random range finder of growing size with one power step, W ~ Q (Q^H W), then
             the SVD of the small factor; the tail of its singular values decides the rank.
    Source:  Halko, Martinsson and Tropp 2011.

    >>> u, v = thin(np.outer([1.0, 2.0, 3.0], [1.0, 1.0]), 1, 1e-12)
    >>> np.allclose(u @ v, [[1, 1], [2, 2], [3, 3]])
    True
    """
    norm = float(np.linalg.norm(values))
    if not norm:
        return None
    rng = np.random.default_rng(0)
    size, full = FIRST, min(values.shape)
    while True:
        size = min(size, most + MARGIN, full)
        sample = values @ rng.normal(size=(values.shape[1], size))
        basis = np.linalg.qr(sample)[0]
        # once more: a sample hardly wider than the rank would enlarge what rounding left
        basis = np.linalg.qr(values @ (values.conj().T @ basis))[0]
        rest = basis.conj().T @ values
        if np.linalg.norm(values - basis @ rest) <= tolerance * norm:
            break
        if size == min(most + MARGIN, full):
            return None
        size *= 4
    u, s, vh = np.linalg.svd(rest, full_matrices=False)
    tails = np.sqrt(np.cumsum((s**2)[::-1])[::-1])
    rank = max(1, int(np.count_nonzero(tails > tolerance * norm / 2)))
    if rank > most:
        return None
    root = np.sqrt(s[:rank])
    return basis @ u[:, :rank] * root, root[:, None] * vh[:rank]

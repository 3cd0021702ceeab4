"""Low displacement rank: Toeplitz-like and Hankel-like matrices, inverses of Toeplitz ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from structc.families import Displacement
from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import product, selection, tensor
from structc.recognition.rank import may_be_deficient, thin

SHARE = 8
"""Ranks up to n / 8 are looked for: more cost as much as the matrix."""


def displacement(matrix: Matrix) -> Iterator[Proposal]:
    """W = sum_q K(Z_1, g_q) K(Z_-1, h_q)^T with few terms, also with the columns reversed.

    Math:    D = W - Z_1 W Z_-1^T = 2 G H^T has as many ranks as there are terms; then the sum is W,
             because Z_1^n = I and Z_-1^n = -I telescope.
    Cost:    O(n^2), and an LU factorisation of a part of D of about n / 6.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> at, taps = torch.arange(32), torch.randn(63, dtype=torch.float64)
    >>> toeplitz = taps[at[:, None] - at + 31] + 20 * torch.eye(32)
    >>> recognize(torch.linalg.inv(toeplitz)).words
    'a Toeplitz-like matrix of displacement rank 2'
    """
    m, n = matrix.shape
    if m != n or n < 2 * SHARE:
        return
    for flip in (False, True):
        values = matrix.values[:, ::-1] if flip else matrix.values
        moved = np.roll(values, (1, 1), (0, 1))
        moved[:, 0] *= -1
        d = (values - moved) / 2
        norm = float(np.linalg.norm(d))
        if not norm or not may_be_deficient(d, n // SHARE, matrix.noise):
            continue
        # rounding of W is all of its size, also where D is small
        found = thin(d, n // SHARE, min(0.1, 2 * matrix.tolerance * matrix.norm / norm))
        if found is not None:
            g, h = found
            family = Displacement(tensor(g.T), tensor(h))
            order = selection(np.arange(n)[::-1].copy(), n) if flip else []
            what = "Hankel" if flip else "Toeplitz"
            words = f"a {what}-like matrix of displacement rank {len(h)}"
            yield Proposal("displacement", product([*order, family]), words)

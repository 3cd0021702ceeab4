"""Which column is which in a DFT with unknown orders and phases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ROWS_TRIED = 200
"""A row whose index is coprime to n is needed; among 200 random ones there is one."""


def fourier_columns(q: Array, slack: float) -> Iterator[tuple[str, Array, Array]]:
    """Columns of a DFT whose entries have modulus one.

    Math:    q[i, j] = e[i] d[j] w^(a[i] b[j]), w = exp(-2 pi i / n). With reference row 0 and
             column 0, ``q[i, j] conj(q[0, j]) conj(q[i, 0]) q[0, 0] = w^((a[i] - a[0]) (b[j] -
             b[0]))``. A row of exponents that are all different may be called row 1: that renames
             a and b by a unit of Z_n.
    Cost:    O(n) a row that is tried; 1 of log log n rows serves.

    >>> t = np.exp(-2j * np.pi / 6 * np.outer([3, 1, 0, 5], [2, 0, 1, 5, 3, 4]))
    >>> [(kind, sorted(index.tolist())) for kind, index, _ in fourier_columns(t, 1e-9)]
    [('dft', [0, 1, 2, 3, 4, 5])]
    """
    m, n = q.shape
    if not np.iscomplexobj(q) or np.abs(np.abs(q[:ROWS_TRIED]) - 1).max() > slack:
        return
    reference, zero = reference_row(q), reference_row(q.T)
    phase = q[reference] / np.abs(q[reference])
    for i in [i for i in range(m) if i != reference][:ROWS_TRIED]:
        row = q[i] * phase.conj()
        turns = np.angle(row * row[zero].conj()) / (2 * np.pi)
        index = np.rint(-n * turns).astype(np.int64) % n
        if (np.bincount(index, minlength=n) == 1).all():
            yield "dft", index, phase
            return


def reference_row(q: Array) -> int:
    """A row of equal entries if there is one: it takes no phases to make it row 0."""
    sums = np.abs(q.sum(axis=1))
    return int(sums.argmax()) if sums.max() > 0.9 * q.shape[1] else 0

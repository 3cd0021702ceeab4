"""Which column is which in a Hadamard matrix with unknown orders and signs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structc.recognition.permuted_fourier import reference_row

Array = NDArray[Any]


def hadamard_columns(q: Array, slack: float) -> Iterator[tuple[str, Array, Array]]:
    """Columns of Sylvester's Hadamard matrix, by linear algebra over two elements.

    Math:    with a reference row and column made positive, q[i, j] = (-1)^<a[i], b[j]> of bit
             vectors. log2(n) independent rows, read as bits, are codes of the columns.
    Cost:    O(n) a row that is tried.

    >>> t = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, -1, 1], [1, -1, 1, -1]]) * 1.0
    >>> [(kind, index.tolist()) for kind, index, _ in hadamard_columns(t, 1e-9)]
    [('hadamard', [0, 1, 3, 2])]
    """
    n = q.shape[1]
    if np.iscomplexobj(q) or n & (n - 1) or np.abs(np.abs(q) - 1).max() > slack:
        return
    phase, zero = np.sign(q[reference_row(q)]), reference_row(q.T)
    codes, found = np.zeros(n, dtype=np.int64), 1
    for row in q:
        bits = (row * phase < 0) ^ (row[zero] * phase[zero] < 0)
        first = np.zeros(found, dtype=bool)
        first[codes] = bits  # of each class of columns, one column's bit
        if np.array_equal(first[codes], bits):
            continue  # the row depends on those that were taken
        codes, found = 2 * codes + bits, 2 * found
        if found > n:
            return
        if found == n:
            break
    if (np.bincount(codes, minlength=n) == 1).all() and codes.max() < n:
        yield "hadamard", codes, phase

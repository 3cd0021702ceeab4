"""Zero, diagonal and (scaled) permutation matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from structc.families import Diagonal, LowRank
from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import diagonal, product, selection, tensor


def zero(matrix: Matrix) -> Iterator[Proposal]:
    """W = 0, as factors of rank one that are zero.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> recognize(torch.zeros(2, 3)).name
    'zero'
    """
    m, n = matrix.shape
    if not matrix.values.any():
        family = LowRank(tensor(np.zeros((1, n))), tensor(np.zeros((m, 1))))
        yield Proposal("zero", family, f"{m} x {n} zeros")


def one_a_row(matrix: Matrix) -> Iterator[Proposal]:
    """Diagonal and permutation matrices: at most one nonzero in each row and column.

    Math:    y[i] = s[i] x[index[i]]. Entries below the rounding of the largest count as zero.
    Cost:    O(n) where the first row has two nonzeros, O(m n) else.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> [recognize(w).name for w in (2 * torch.eye(3), torch.eye(3)[[2, 0, 1]])]
    ['diagonal', 'permutation']
    """
    values, (m, n) = matrix.values, matrix.shape
    small = matrix.negligible
    if min(m, n) < 2 or np.count_nonzero(np.abs(values[0]) > small) > 1:
        return
    present = np.abs(values) > small
    if present.sum(axis=1).max() > 1 or present.sum(axis=0).max() > 1:
        return
    index = present.argmax(axis=1)
    scale = np.where(present.any(axis=1), values[np.arange(m), index], 0)
    if m == n and (index[scale != 0] == np.flatnonzero(scale)).all():
        yield Proposal("diagonal", Diagonal(tensor(scale)), f"a diagonal matrix of size {n}")
        return
    plain = bool(np.all(scale == 1))
    parts = [*selection(index, n), *diagonal(scale)]
    name = "permutation" if plain else "scaled permutation"
    what = "one nonzero in each row" if (scale != 0).all() else "at most one nonzero in each row"
    yield Proposal(name, product(parts), f"a {name}: {what}")

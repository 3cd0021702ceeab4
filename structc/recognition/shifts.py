"""Matrices whose entries depend on i - j or i + j alone: circulant, Toeplitz, Hankel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structc.families import Circulant, Hankel, Toeplitz
from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import tensor
from structc.recognition.permuted_circulant import wrapped_mean

Array = NDArray[Any]


def circulant(matrix: Matrix) -> Iterator[Proposal]:
    """W[i, j] = c[(i - j) mod n].  Cost: O(n) where two rows differ, O(n^2) else.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> found = recognize(torch.tensor([[1.0, 3.0, 2.0], [2.0, 1.0, 3.0], [3.0, 2.0, 1.0]]))
    >>> found.name, found.family.taps.tolist()
    ('circulant', [1.0, 2.0, 3.0])
    """
    values, (m, n) = matrix.values, matrix.shape
    if m == n > 1 and _equal(np.roll(values[0], 1), values[1], matrix):
        taps = wrapped_mean(values)
        yield Proposal("circulant", Circulant(tensor(taps)), f"a circulant of size {n}")


def toeplitz(matrix: Matrix) -> Iterator[Proposal]:
    """W[i, j] = t[i - j + n - 1].  Cost: O(n) where two rows differ, O(m n) else.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> recognize(torch.tensor([[1.0, 2.0, 4.0], [7.0, 1.0, 2.0]])).family.taps.tolist()
    [4.0, 2.0, 1.0, 7.0]
    """
    values, (m, n) = matrix.values, matrix.shape
    if min(m, n) > 1 and _equal(values[0, :-1], values[1, 1:], matrix):
        family = Toeplitz(tensor(_diagonal_means(values)), n)
        yield Proposal("toeplitz", family, f"a {m} x {n} Toeplitz matrix")


def hankel(matrix: Matrix) -> Iterator[Proposal]:
    """W[i, j] = t[i + j].  Cost: as Toeplitz.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> recognize(torch.tensor([[1.0, 2.0, 4.0], [2.0, 4.0, 7.0]])).family.taps.tolist()
    [1.0, 2.0, 4.0, 7.0]
    """
    values, (m, n) = matrix.values, matrix.shape
    if min(m, n) > 1 and _equal(values[0, 1:], values[1, :-1], matrix):
        family = Hankel(tensor(_diagonal_means(values[:, ::-1])), n)
        yield Proposal("hankel", family, f"a {m} x {n} Hankel matrix")


def _equal(one: Array, other: Array, matrix: Matrix) -> bool:
    return float(np.abs(one - other).max()) <= matrix.noise


def _diagonal_means(values: Array) -> Array:
    """The mean over each diagonal i - j, from -(n - 1) to m - 1."""
    m, n = values.shape
    first = np.concatenate([values[0, ::-1], values[1:, 0]])
    sums = np.zeros_like(first)  # of differences: what is equal stays so to the last bit
    for i, row in enumerate(values):
        sums[i : i + n] += row[::-1] - first[i : i + n]
    return first + sums / np.convolve(np.ones(m), np.ones(n)).round()

"""Monarch matrices of rank one under unknown row and column orders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import inverse, product, selection
from structc.recognition.monarch import fitted

Array = NDArray[Any]
WIDEST = 1e-6
"""Units of dtypes whose ratios still tell equal from near; sixteen bits do not."""
SAMPLE = 128
COINCIDENCES = 6
REFERENCES = 3


def permuted_monarch(matrix: Matrix) -> Iterator[Proposal]:
    """k x j blocks of rank one, and nothing known about which row or column is in which.

    Math:    for two columns of one input block the ratio of entries is constant on each row group:
             m entries, j values. Equal ratios are the row groups; within two rows of one group the
             same holds for columns.
    Cost:    O(n) sorts of 128 ratios where there is no such structure, O(m n) else.
    Refuses: dtypes of sixteen bits, whose ratios are equal by chance.

    >>> from structc.families import Monarch
    >>> import torch
    >>> from structc.recognition import recognize
    >>> w = Monarch(torch.randn(4, 6, 1, 9), torch.randn(6, 8, 1, 4)).to_dense()
    >>> recognize(w[torch.randperm(48)][:, torch.randperm(36)]).name
    'permuted monarch'
    """
    m, n = matrix.shape
    if min(m, n) < 4 or matrix.unit > WIDEST:
        return
    rows = _groups_of_rows(matrix)
    if rows is None:
        return
    first = np.flatnonzero(rows == 0)
    columns = _clusters(_ratios(matrix.values[first[1]], matrix.values[first[0]]), matrix.slack)
    if columns is None:
        return
    k, j = int(columns.max()) + 1, int(rows.max()) + 1
    l, i = m // j, n // k
    if k * j * (l + i) >= m * n:
        return
    by_row, by_column = np.argsort(rows, kind="stable"), np.argsort(columns, kind="stable")
    family = fitted(matrix.values[np.ix_(by_row, by_column)], k, j, 1)
    parts = [*selection(by_column, n), family, *selection(inverse(by_row), m)]
    words = f"a Monarch matrix of {k} x {j} blocks of rank 1 under row and column permutations"
    yield Proposal("permuted monarch", product(parts), words)


def _groups_of_rows(matrix: Matrix) -> Array | None:
    """The row group of each row, from the first pair of columns whose ratios repeat."""
    m, n = matrix.shape
    picked = np.random.default_rng(0).permutation(m)[:SAMPLE]
    part = matrix.values[picked]
    for reference in range(min(n, REFERENCES)):
        ratios = np.sort(_ratios(part, part[:, reference : reference + 1]), axis=0)
        close = np.abs(np.diff(ratios, axis=0)) <= matrix.slack * np.abs(ratios[1:])
        counts = close.sum(axis=0)
        counts[reference] = 0
        for column in np.argsort(-counts)[:REFERENCES]:
            if counts[column] < min(COINCIDENCES, m // 4):
                break
            whole = _ratios(matrix.values[:, column], matrix.values[:, reference])
            groups = _clusters(whole, matrix.slack)
            if groups is not None:
                return groups
    return None


def _ratios(one: Array, other: Array) -> Array:
    return np.divide(one, other, out=np.zeros_like(one + other), where=other != 0)


def _clusters(ratios: Array, slack: float) -> Array | None:
    """Numbers of equal clusters of equal values; None if sizes differ or all are alone."""
    order = np.argsort(ratios, kind="stable")
    ranked = ratios[order]
    apart = np.abs(np.diff(ranked)) > slack * np.maximum(np.abs(ranked[1:]), np.abs(ranked[:-1]))
    labels = np.concatenate([[0], np.cumsum(apart)])
    sizes = np.bincount(labels)
    if len(sizes) == len(ratios) or (sizes != sizes[0]).any():
        return None
    return np.asarray(labels[inverse(order)])

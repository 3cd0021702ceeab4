"""Fixed transforms under unknown row and column orders, scales, signs and phases.

One file a class proposes which column is which; that fixes everything else: a fast inverse
transform along the rows then has one nonzero a row, which names the row and its scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from structc.recognition import kinds
from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import Scrambled, is_permutation
from structc.recognition.permuted_cosine import (
    NARROW,
    cosine4_columns,
    cosine_columns,
    natural_cosine,
)
from structc.recognition.permuted_fourier import fourier_columns
from structc.recognition.permuted_hadamard import hadamard_columns
from structc.recognition.permuted_hartley import hartley_columns, real_fourier_columns
from structc.recognition.scaling import Balanced, row_balanced, rows_are_orthogonal

Array = NDArray[Any]
PROBES = 4
SHARP, BLURRED = 0.6, 0.1
"""Share of a row's energy that its largest coefficient must have; in narrow dtypes the second.

Their entries place a few columns wrongly; the rows then correct them.
"""
REFINEMENTS = 3


class Columns(NamedTuple):
    """A claim: column j of Q is column ``places[j]`` of the transform, times ``phase[j]``."""

    kind: str
    places: Array
    phase: Array


LABELLERS: tuple[Callable[[Array, float], Iterator[tuple[str, Array, Array]]], ...] = (
    fourier_columns,
    hadamard_columns,
    cosine_columns,
    hartley_columns,
    real_fourier_columns,
    cosine4_columns,
)
"""Claims (kind, index, phase) about the columns of Q ``(m, n)``, given the slack of entries."""


def permuted_transforms(matrix: Matrix) -> Iterator[Proposal]:
    """DFT, Hadamard, DCT-II and IV, DST-II, Hartley, real DFT, and transposes of them.

    Math:    W[i, j] = r[i] T[p(i), q(j)] s[j] with all of r, s, p, q unknown; at least two rows,
             no more rows than columns, and s = +-1 or a phase unless W is square.
    Cost:    O(n^2 log n); O(n^2) where rows are not orthogonal, which is most of the time.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> w = torch.fft.fft(torch.eye(12, dtype=torch.float64))
    >>> recognize(w[torch.randperm(12)][:, torch.randperm(12)]).words
    'the dft of size 12 with permuted rows, permuted columns'
    """
    m, n = matrix.shape
    for turned in (False, True):
        parts = _orthogonal(matrix, turned)
        if parts is None:
            if m == n:
                return  # then the transpose has no orthogonal rows either
            continue
        for found in _labelled(parts, matrix.slack):
            which = found.transposed() if turned else found
            if which is not None:
                yield which.proposal(matrix.slack)


def _orthogonal(matrix: Matrix, turned: bool) -> Balanced | None:
    """``W = diag(r) O diag(s)`` or W^T, with O of orthogonal rows, times sqrt(n); or None."""
    values = matrix.values.T if turned else matrix.values
    m, n = values.shape
    if m > n or m < 2:
        return None
    plain = row_balanced(values)
    if rows_are_orthogonal(plain.q):
        return plain
    if m < n or not rows_are_orthogonal(matrix.balanced.q):
        return None
    return matrix.balanced.turned() if turned else matrix.balanced


def _labelled(parts: Balanced, slack: float) -> Iterator[Scrambled]:
    for labeller in LABELLERS:
        for claim in labeller(parts.q, slack):
            found = _rows_of(parts, Columns(*claim), slack)
            if found is not None:
                yield found


def _rows_of(parts: Balanced, claim: Columns, slack: float) -> Scrambled | None:
    """Which rows those are if the columns are what was claimed; None if they are no rows of T."""
    m, n = parts.q.shape
    order = np.argsort(claim.places)
    probes = np.unique(np.linspace(0, m - 1, PROBES).astype(int))
    narrow = slack > NARROW
    some = _sorted(parts.q[probes], claim, order)
    if not _one_hot(claim.kind, some, BLURRED if narrow else SHARP):
        return None
    rows, r = _named(claim.kind, _sorted(parts.q, claim, order))
    for _ in range(REFINEMENTS if narrow and m == n else 0):
        better = _named_columns(claim, parts.q, rows, r)
        if better is None or np.array_equal(better.places, claim.places):
            break
        claim = better
        rows, r = _named(claim.kind, _sorted(parts.q, claim, np.argsort(claim.places)))
    found = Scrambled(claim.kind, n, rows, claim.places, parts.r * r, parts.s * claim.phase)
    return natural_cosine(found)


def _sorted(q: Array, claim: Columns, order: Array) -> Array:
    """The columns in the transform's order, without their phases."""
    return np.asarray((q * claim.phase.conj())[:, order])


def _one_hot(kind: str, rows: Array, share: float) -> bool:
    energy = np.abs(kinds.analyse(kind, rows)) ** 2
    return bool((energy.max(axis=1) >= share * energy.sum(axis=1)).all())


def _named(kind: str, ordered: Array) -> tuple[Array, Array]:
    """The row of T that each row is, and its factor."""
    coefficients = kinds.analyse(kind, ordered)
    rows = np.abs(coefficients).argmax(axis=1)
    return rows, coefficients[np.arange(len(rows)), rows]


def _named_columns(claim: Columns, q: Array, rows: Array, r: Array) -> Columns | None:
    n = q.shape[1]
    other = kinds.transposed(claim.kind, n)
    if other is None or not is_permutation(rows, n):
        return None
    columns = ((q * claim.phase.conj()) * np.sign(r)[:, None])[np.argsort(rows)].T
    index, _ = _named(other[0], columns)
    return claim._replace(places=index) if is_permutation(index, n) else None

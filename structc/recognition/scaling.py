"""Diagonal scalings of rows and columns, taken off before structure is looked for.

A recogniser that wants orthogonal rows first leaves columns as they are: a matrix with a choice of
rows has no other way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SWEEPS = 60
ORTHOGONAL = 0.1
"""Rows count as orthogonal where their products are this small against those of random rows."""


class Balanced(NamedTuple):
    """``W = diag(r) Q diag(s)`` with |Q|^2 of row means 1 and, if s was free, column means 1."""

    q: Array
    r: Array
    s: Array

    def turned(self) -> Balanced:
        """The same of W^T, for a square W that was balanced on both sides."""
        return Balanced(self.q.T, self.s, self.r)


def balanced(values: Array, sweeps: int = SWEEPS) -> Balanced:
    """Sinkhorn's iteration on |W|^2.

    Math:    u = 1 / mean(P v), v = 1 / mean(P^T u) with P = |W|^2; then Q = sqrt(u) W sqrt(v).
    Cost:    4 m n a sweep. On diag(r) O diag(s) with O orthonormal it ends at O: |O|^2 is doubly
             stochastic and the scaling to that is unique.
    Source:  Sinkhorn and Knopp 1967; the rate is the square of the second singular value of P.

    >>> q = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    >>> found = balanced(np.arange(1, 9)[:, None] * q, sweeps=200)
    >>> np.allclose(found.q, q * 8**0.5)
    True
    """
    power = np.abs(values) ** 2
    m, n = values.shape
    v = np.ones(n)
    u = _reciprocal(power @ v / n)
    for _ in range(sweeps):
        before = v
        v = _reciprocal(u @ power / m)
        u = _reciprocal(power @ v / n)
        if np.abs(v - before).max() <= 1e-15 * np.abs(v).max():
            break
    r, s = _reciprocal(np.sqrt(u)), _reciprocal(np.sqrt(v))
    return Balanced(values * np.sqrt(u)[:, None] * np.sqrt(v), r, s)


def row_balanced(values: Array) -> Balanced:
    """Rows of mean square 1, columns as they are."""
    n = values.shape[1]
    r = np.linalg.norm(values, axis=1) / np.sqrt(n)
    return Balanced(values * _reciprocal(r)[:, None], r, np.ones(n))


def _reciprocal(x: Array) -> Array:
    """1 / x; zero rows and columns are left alone."""
    return np.divide(1.0, x, out=np.ones_like(x), where=x > 0)


def rows_are_orthogonal(q: Array) -> bool:
    """A few rows against all others: the root mean square of the products of unit rows."""
    m, n = q.shape
    picked = np.unique(np.linspace(0, m - 1, 4).astype(int))
    products = np.abs(q[picked].conj() @ q.T) / n
    products[np.arange(len(picked)), picked] = 0
    return bool(np.sqrt((products**2).mean()) <= ORTHOGONAL / np.sqrt(n))

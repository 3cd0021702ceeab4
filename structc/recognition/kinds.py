"""The fixed transforms of the dictionary: applied fast, inverted fast, transposed.

``T`` is the matrix of one kind. Rows of a matrix X that are multiples of rows of T show in
``X T^-1``, which has one nonzero a row; every function here costs O(rows * n log n).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from structc import spectral
from structc.spectral_steps import Transform

Array = NDArray[Any]
COMPLEX = ("dft", "idft")
REAL = (
    *("dct2", "dst2", "hartley", "hadamard", "dct3", "dst3"),
    *("dct4", "dst4", "dct1", "dst1", "rdft", "haar"),
)
TRANSPOSE = {"dct2": "dct3", "dct3": "dct2", "dst2": "dst3", "dst3": "dst2", "rdft": "irdft"}
"""Kinds whose transpose is another kind times diagonals; the others are symmetric up to those."""


def exists(kind: str, n: int) -> bool:
    """Whether there is a transform of this kind and size.

    >>> exists("hadamard", 12), exists("dct1", 12)
    (False, True)
    """
    if kind in ("hadamard", "haar"):
        return n > 1 and n & (n - 1) == 0
    return n > 1


def forward(kind: str, x: Array) -> Array:
    """``x T^T``: the transform of every row of x ``(rows, n)``.

    >>> forward("hadamard", np.eye(2)).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    >>> forward("hartley", np.eye(4)).round(9)[1].tolist()
    [1.0, 1.0, -1.0, -1.0]
    """
    given = torch.from_numpy(np.ascontiguousarray(x))
    return spectral.transform(given, Transform(kind, x.shape[1])).numpy()


def analyse(kind: str, x: Array) -> Array:
    """``x T^+``: the coefficients of every row of x ``(rows, n)`` in the rows of T.

    Math:    T = diag(p) O diag(q) with O orthonormal up to one factor, so ``x T^-1 = ((x / q^2)
             T^T) / p^2`` with the squares of the diagonals that :func:`diagonals` gives.

    >>> for kind in (*REAL, *COMPLEX):
    ...     rows = 10 if kind == "rdft" else 8
    ...     t = forward(kind, np.eye(8)).T
    ...     left = analyse(kind, t)
    ...     assert np.allclose(left @ t, t), kind
    """
    n = x.shape[1]
    if kind in COMPLEX:
        return forward("idft" if kind == "dft" else "dft", x)
    before, after = diagonals(kind, n)
    return forward(kind, x * before) * after


def diagonals(kind: str, n: int) -> tuple[Array, Array]:
    """The diagonals a ``(n,)`` and b ``(rows,)`` with ``T^+ = diag(a) T^T diag(b)``."""
    before, after = np.ones(n), np.full(n, 1 / n)
    if kind in ("dct2", "dst2"):
        after = np.full(n, 1 / (2 * n))
        after[0 if kind == "dct2" else -1] /= 2
    elif kind in ("dct3", "dst3"):
        before, after = np.full(n, 1 / 2), after
        before[0 if kind == "dct3" else -1] = 1
    elif kind in ("dct4", "dst4"):
        after /= 2
    elif kind == "dst1":
        after = np.full(n, 1 / (2 * (n + 1)))
    elif kind == "dct1":
        before, after = np.full(n, 1 / 2), np.full(n, 1 / (n - 1))
        before[[0, -1]], after[[0, -1]] = 1, 1 / (2 * (n - 1))
    elif kind == "haar":
        after = np.ones(n)
    elif kind == "rdft":
        half = n // 2 + 1
        after = np.full(2 * half, 2 / n)
        after[0] = 1 / n
        if n % 2 == 0:
            after[half - 1] = 1 / n
    return before, after


def transposed(kind: str, n: int) -> tuple[str, Array, Array] | None:
    """The kind S and diagonals with ``T^T = diag(left) S diag(right)``; None if there is none.

    >>> kind, left, right = transposed("dct2", 4)
    >>> t, s = forward("dct2", np.eye(4)).T, forward(kind, np.eye(4)).T
    >>> np.allclose(t.T, left[:, None] * s * right)
    True
    """
    if kind == "haar":
        return None
    left, right = np.ones(n), np.ones(n)
    if kind in ("dct2", "dst2"):
        right[0 if kind == "dct2" else -1] = 2
    elif kind in ("dct3", "dst3"):
        left[0 if kind == "dct3" else -1] = 0.5
    elif kind == "dct1":
        left[1:-1], right[1:-1] = 2, 0.5
    elif kind == "rdft":
        right = 1 / diagonals("rdft", n)[1]
    return TRANSPOSE.get(kind, kind), left, right

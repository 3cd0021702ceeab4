"""The fixed transforms of the dictionary: applied fast, inverted fast, transposed.

``T`` is the matrix of one kind. Rows of a matrix X that are multiples of rows of T show in
``X T^-1``, which has one nonzero a row; every function here costs O(rows * n log n).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg
from numpy.typing import NDArray

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
    if kind == "dft":
        return np.asarray(scipy.fft.fft(x))
    if kind == "idft":
        return np.asarray(scipy.fft.ifft(x))
    if kind in ("hartley", "rdft") and np.iscomplexobj(x):
        return forward(kind, x.real) + 1j * forward(kind, x.imag)
    if kind == "hartley":
        spectrum = scipy.fft.fft(x)
        return np.asarray(spectrum.real - spectrum.imag)
    if kind == "hadamard":
        return _hadamard(x)
    if kind == "haar":
        return _haar(x)
    if kind == "rdft":
        spectrum = scipy.fft.rfft(x)
        return np.concatenate([spectrum.real, spectrum.imag], axis=1)
    one = scipy.fft.dct if kind.startswith("dct") else scipy.fft.dst
    return np.asarray(one(x, type=int(kind[-1])))


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
    if kind == "dft":
        return np.asarray(scipy.fft.ifft(x))
    if kind == "idft":
        return np.asarray(scipy.fft.fft(x))
    before, after = diagonals(kind, n)
    return np.asarray(forward(kind, x * before) * after)


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


def _hadamard(x: Array) -> Array:
    """The Kronecker product of factors of at most 64 x 64: few passes over memory."""
    rows, n = x.shape
    width = 1
    while width < n:
        size = min(64, n // width)
        factor = scipy.linalg.hadamard(size).astype(np.float64)
        x = np.matmul(factor, x.reshape(-1, size, width))
        width *= size
    return x.reshape(rows, n)


def _haar(x: Array) -> Array:
    """Orthonormal: the mean first, then details from coarse to fine."""
    details = []
    while x.shape[1] > 1:
        even, odd = x[:, ::2], x[:, 1::2]
        details.append((even - odd) / np.sqrt(2))
        x = (even + odd) / np.sqrt(2)
    return np.concatenate([x, *details[::-1]], axis=1)

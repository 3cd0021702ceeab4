"""Rows of fixed transforms in their natural column order: chosen, permuted, scaled, windowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structc.recognition import kinds
from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import Scrambled

Array = NDArray[Any]
PROBES = 4
SILENT = 1e-9
"""Rows of a transform below it are zero but for rounding."""
HIDDEN = 1e-6
"""Of the largest column: smaller ones tell nothing of a transform."""
PURE, WINDOWED = 0.98, 0.5
"""Share of a row's energy in its largest coefficient, with flat columns and with a window."""


def dictionary(matrix: Matrix) -> Iterator[Proposal]:
    """W = diag(r) S T diag(s): rows S of a transform T, with a window s; also W^T.

    Math:    each row of ``W diag(1/s) T^-1`` has one nonzero, which names the row of T and r. The
             window is guessed from the norms of columns: cos^2 + sin^2 = 1 for every frequency
             that is there with both, so an STFT kernel shows its window.
    Cost:    a fast transform of four rows a kind; O(m n log n) for a hit.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> window = torch.hann_window(16, dtype=torch.float64)
    >>> spectrum = torch.fft.rfft(torch.eye(16, dtype=torch.float64)).T
    >>> recognize(torch.cat([spectrum.real, spectrum.imag]) * window).name
    'rdft'
    """
    if min(matrix.shape) < 2:
        return
    for turned in (False, True):
        this = matrix.transposed() if turned else matrix
        for window in (None, _window(this)):
            found = [_rows_of(this, kind, window) for kind in _kinds(this)]
            # a DFT is an inverse one with other rows: the natural order is the better name
            for each in sorted((f for f in found if f), key=lambda f: not f.natural):
                which = each.transposed() if turned else each
                if which is not None:
                    yield which.proposal(matrix.slack)


def _kinds(matrix: Matrix) -> tuple[str, ...]:
    return kinds.COMPLEX + kinds.REAL if np.iscomplexobj(matrix.values) else kinds.REAL


def _window(matrix: Matrix) -> Array:
    """Root mean square of each column."""
    return np.linalg.norm(matrix.values, axis=0) / np.sqrt(matrix.shape[0])


def _rows_of(matrix: Matrix, kind: str, window: Array | None) -> Scrambled | None:
    values, (m, n) = matrix.values, matrix.shape
    if not kinds.exists(kind, n):
        return None
    norms = np.linalg.norm(values, axis=1)
    empty = norms <= SILENT * norms.max()
    picked = np.unique(np.linspace(1, m - 1, PROBES).astype(int))
    picked = picked[~empty[picked]]
    flat = _flattened(values[picked], window)
    energy = np.abs(kinds.analyse(kind, flat)) ** 2
    share = PURE
    if window is not None:  # a row that is seen in part leaks into other coefficients
        share = WINDOWED * float((window > HIDDEN * window.max()).mean())
    if not len(picked) or (energy.max(axis=1) < share * energy.sum(axis=1)).any():
        return None
    flat = _flattened(values, window)
    coefficients = kinds.analyse(kind, flat)
    likeness = np.abs(coefficients)
    if window is not None and (flat == 0).all(axis=0).any():
        likeness = _likeness(kind, flat)
    rows = likeness.argmax(axis=1)
    r = coefficients[np.arange(m), rows]
    if 2 * len(np.unique(rows[~empty])) < m - empty.sum():
        return None  # few rows again and again: that is low rank
    rows[empty] = _unused(rows[~empty], coefficients.shape[1], int(empty.sum()))
    r[empty] = 0
    if window is None:
        return Scrambled(kind, n, rows, np.arange(n), r, np.ones(n))
    dense = kinds.forward(kind, np.eye(n)).T[rows]
    r, s = _scales(values, dense, window)
    silent = np.abs(dense).max(axis=1) < SILENT  # sin 0 and sin pi k: any scale will do
    if not silent.all():
        r[silent] = r[~silent][0]
    return Scrambled(kind, n, rows, np.arange(n), r, s)


def _flattened(rows: Array, window: Array | None) -> Array:
    """Without the window; columns that it hides stay zero."""
    if window is None:
        return rows
    return np.divide(rows, window, out=np.zeros_like(rows), where=window > HIDDEN * window.max())


def _likeness(kind: str, rows: Array) -> Array:
    """Cosines between rows and those of a transform, on the columns that are seen at all."""
    seen = ~(rows == 0).all(axis=0)
    norms = np.linalg.norm(kinds.forward(kind, np.eye(rows.shape[1]))[seen], axis=0)
    return _divided(np.abs(kinds.forward(kind, rows.conj())), np.where(norms > SILENT, norms, 0))


def _unused(taken: Array, count: int, wanted: int) -> Array:
    """Row names for zero rows, so that no name stands twice where that can be."""
    free = np.setdiff1d(np.arange(count), taken)
    return free[:wanted] if len(free) >= wanted else np.zeros(wanted, dtype=np.int64)


def _scales(values: Array, dense: Array, window: Array) -> tuple[Array, Array]:
    """r and s with ``values ~ diag(r) dense diag(s)``, from the window by least squares."""
    s, r = window, np.ones(len(values))
    product, power = values * dense.conj(), np.abs(dense) ** 2
    for _ in range(3):
        r = _divided(product @ np.conj(s), power @ np.abs(s) ** 2)
        s = _divided(np.conj(r) @ product, np.abs(r) ** 2 @ power)
    return r, s


def _divided(x: Array, y: Array) -> Array:
    return np.divide(x, y, out=np.zeros_like(x), where=y > 0)

"""Which column is which in a Hartley transform or a real DFT with unknown orders and signs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structc.recognition.permuted_cosine import ROWS_TRIED, generators, sign_candidates

Array = NDArray[Any]
GENERATORS = 8


def hartley_columns(q: Array, slack: float) -> Iterator[tuple[str, Array, Array]]:
    """Columns of the Hartley transform.

    Math:    row 1 is g = cos + sin and row -1 is h = cos - sin of 2 pi j / n; they are found by
             g^2 + h^2 = 2 in every column, and give the angle on the whole circle.
    Cost:    O(n log n) a row that is tried for g, O(n^2) to find h.
    """
    n = q.shape[1]
    x = 2 * np.pi * np.arange(n) / n
    for g, h, signs in _pairs(q, np.sort(np.cos(x) + np.sin(x)), slack):
        yield from _by_angle("hartley", (g + h) / 2, (g - h) / 2, signs)


def real_fourier_columns(q: Array, slack: float) -> Iterator[tuple[str, Array, Array]]:
    """Columns of a real DFT, whose rows are cosines and sines.

    Math:    the partner h of g = sqrt(2) cos is sqrt(2) sin, again by g^2 + h^2 = 2.
    """
    n = q.shape[1]
    for g, h, signs in _pairs(q, np.sort(np.sqrt(2) * np.cos(2 * np.pi * np.arange(n) / n)), slack):
        yield from _by_angle("rdft", g, h, signs)


def _pairs(q: Array, template: Array, slack: float) -> Iterator[tuple[Array, Array, Array]]:
    if np.iscomplexobj(q):
        return
    for signs in sign_candidates(q, slack):
        # other rows than those of coprime indices may hold the same values: more than one is tried
        for row in islice(generators(q[:ROWS_TRIED] * signs, template, slack), GENERATORS):
            for partner in _partners(q, q[row], slack):
                yield q[row] * signs, q[partner] * signs, signs


def _partners(q: Array, g: Array, slack: float) -> Iterator[int]:
    """Rows h with g^2 + h^2 = 2, looked for in a few columns first."""
    wide = 8 * slack  # squares of entries up to sqrt(2)
    some = slice(0, 16)
    for i in np.flatnonzero(np.abs(q[:, some] ** 2 + g[some] ** 2 - 2).max(axis=1) <= wide):
        if np.abs(q[i] ** 2 + g**2 - 2).max() <= wide:
            yield int(i)


def _by_angle(
    kind: str, cosine: Array, sine: Array, signs: Array
) -> Iterator[tuple[str, Array, Array]]:
    n = len(cosine)
    index = np.rint(n * np.arctan2(sine, cosine) / (2 * np.pi)).astype(np.int64) % n
    if (np.bincount(index, minlength=n) == 1).all():
        yield kind, index, signs

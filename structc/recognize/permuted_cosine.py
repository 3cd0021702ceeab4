"""Which column is which in a DCT-II, DST-II or DCT-IV with unknown orders and signs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ROWS_TRIED = 200
SIGNS_TRIED = 8


def sign_candidates(q: Array, slack: float) -> Iterator[Array]:
    """Signs of the columns: none, then those of each row that has entries +-1 only.

    In transforms with a constant row that row shows them, up to a global sign.
    """
    flat = np.flatnonzero(np.abs(np.abs(q[:, :8]) - 1).max(axis=1) <= slack)
    flat = flat[np.abs(np.abs(q[flat]) - 1).max(axis=1, initial=0) <= slack][:SIGNS_TRIED]
    ones = np.ones(q.shape[1])
    known = [ones]
    for row in flat:
        signs = np.sign(q[row]) * np.sign(q[row, 0])
        if not any(np.array_equal(signs, other) for other in known):
            known.append(signs)
    constant = [bool((np.sign(q[row]) == np.sign(q[row, 0])).all()) for row in flat]
    yield from (known if any(constant) or len(known) == 1 else [*known[1:], ones])


def generators(q: Array, template: Array, slack: float) -> Iterator[int]:
    """Rows that hold exactly the values of the template, which is sorted upwards.

    Those are the rows of indices coprime to the period: any of them may be called the first.
    """
    picked = np.arange(min(len(q), ROWS_TRIED))
    for i in picked:
        if np.abs(np.sort(q[i]) - template).max() <= 2 * slack:
            yield int(i)


def cosine_columns(q: Array, slack: float) -> Iterator[tuple[str, Array, Array]]:
    """Columns of a DCT-II, or of a DST-II where the signs alternate.

    Math:    sqrt(2) cos(pi k (2 j + 1) / 2n) falls from j = 0 to n - 1 for k = 1: sorting that row
             orders the columns. Any k coprime to 2n may be called 1, which renames the others up
             to signs. DST-II[k, j] = (-1)^j DCT-II[n - 1 - k, j].
    Cost:    O(n log n) a row that is tried.
    """
    n = q.shape[1]
    if np.iscomplexobj(q):
        return
    template = np.sort(np.sqrt(2) * np.cos(np.pi * (2 * np.arange(n) + 1) / (2 * n)))
    for signs in sign_candidates(q, slack):
        row = next(generators(q * signs if len(q) <= ROWS_TRIED else q[:ROWS_TRIED] * signs,
                              template, slack), None)
        if row is None:
            continue
        index = np.empty(n, dtype=np.int64)
        index[np.argsort(-q[row] * signs, kind="stable")] = np.arange(n)
        alternating = signs * (1 - 2 * (index % 2))
        if n > 1 and (alternating == alternating[0]).all():
            yield "dst2", index, alternating
        else:
            yield "dct2", index, signs


def cosine4_columns(q: Array, slack: float) -> Iterator[tuple[str, Array, Array]]:
    """Columns of a DCT-IV; a DST-IV is one with signs of rows and the columns reversed.

    Math:    sqrt(2) |cos(pi (2 k + 1) (2 j + 1) / 4n)| are different for all j, for 2 k + 1
             coprime to 2n in the same set: moduli order the columns, the row's signs are theirs.
    """
    n = q.shape[1]
    if np.iscomplexobj(q):
        return
    template = np.sort(np.sqrt(2) * np.cos(np.pi * (2 * np.arange(n) + 1) / (4 * n)))
    row = next(generators(np.abs(q[:ROWS_TRIED]), template, slack), None)
    if row is not None:
        index = np.empty(n, dtype=np.int64)
        index[np.argsort(-np.abs(q[row]), kind="stable")] = np.arange(n)
        yield "dct4", index, np.sign(q[row])

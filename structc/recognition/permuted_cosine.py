"""Which column is which in a DCT-II, DST-II or DCT-IV with unknown orders and signs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structc.recognition.build import Scrambled

Array = NDArray[Any]
ROWS_TRIED = 200
SIGNS_TRIED = 8
NARROW = 1e-3
"""Slack of dtypes of sixteen bits."""


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

    Those are the rows of indices coprime to the period: any of them may be called the first. In
    narrow dtypes others are near: the best come first.
    """
    if slack <= NARROW:
        yield from (i for i in range(len(q)) if _apart(q[i], template) <= 2 * slack)
        return
    gaps = np.array([_apart(row, template) for row in q])
    yield from (int(i) for i in np.argsort(gaps) if gaps[i] <= 2 * slack)


def _apart(row: Array, template: Array) -> float:
    return float(np.abs(np.sort(row) - template).max())


def cosine_columns(q: Array, slack: float) -> Iterator[tuple[str, Array, Array]]:
    """Columns of a DCT-II; a DST-II is one with alternating signs and the rows reversed.

    Math:    sqrt(2) cos(pi k (2 j + 1) / 2n) falls from j = 0 to n - 1 for k = 1: sorting that row
             orders the columns. Any k coprime to 2n may be called 1, which renames the others up
             to signs.
    Cost:    O(n log n) a row that is tried.
    """
    n = q.shape[1]
    if np.iscomplexobj(q):
        return
    template = np.sort(np.sqrt(2) * np.cos(np.pi * (2 * np.arange(n) + 1) / (2 * n)))
    for signs in sign_candidates(q, slack):
        row = next(generators(q[:ROWS_TRIED] * signs, template, slack), None)
        if row is not None:
            yield "dct2", _falling(q[row] * signs), signs


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
        yield "dct4", _falling(np.abs(q[row])), np.sign(q[row])


def _falling(row: Array) -> Array:
    """The place of each entry when they are sorted downwards."""
    index = np.empty(len(row), dtype=np.int64)
    index[np.argsort(-row, kind="stable")] = np.arange(len(row))
    return index


def natural_cosine(found: Scrambled) -> Scrambled:
    """The DCT-II with as few signs as there are, as a DST-II where that is what it is.

    Math:    with u coprime to 2n, ``cos(pi k (2 j + 1) / 2n)`` is ``+-cos(pi k' (2 j' + 1) / 2n)``,
             k' the distance of k u to multiples of 2n, 2 j' + 1 that of (2 j + 1) / u to multiples
             of 4n. DST-II[k, j] = (-1)^j DCT-II[n - 1 - k, j].
    """
    n = found.size
    if found.kind != "dct2" or np.iscomplexobj(found.r):
        return found
    wanted = np.sign(found.r)
    units = np.arange(1, 2 * n, 2)
    units = units[np.gcd(units, n) == 1]
    for some in (slice(0, 64), slice(None)):
        signs = _folded(units[:, None] * found.rows[some], n)[1] * wanted[some]
        units = units[(signs == signs[:, :1]).all(axis=1)]
        if not len(units):
            return found
    u = int(units[0])
    rows, signs = _folded(u * found.rows, n)
    odd = pow(u, -1, 4 * n) * (2 * found.columns + 1) % (4 * n)
    columns = (np.minimum(odd, 4 * n - odd) - 1) // 2
    alternating = np.sign(found.s) * (1 - 2 * (columns % 2))
    if (alternating == alternating[0]).all():
        s = found.s * (1 - 2 * (columns % 2))
        return replace(
            found, kind="dst2", rows=n - 1 - rows, columns=columns, r=found.r * signs, s=s
        )
    return replace(found, rows=rows, columns=columns, r=found.r * signs)


def _folded(k: Array, n: int) -> tuple[Array, Array]:
    """The index in 0 .. n-1 and the sign of row k of a DCT-II that goes on for ever."""
    k = k % (4 * n)
    k = np.minimum(k, 4 * n - k)
    return np.where(k > n, 2 * n - k, k), np.where(k > n, -1, 1)

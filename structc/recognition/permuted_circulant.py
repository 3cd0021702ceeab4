"""Circulants under unknown row and column orders, and signs or phases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from structc.families import Circulant
from structc.recognition.base import EXACT, Matrix, Proposal
from structc.recognition.build import diagonal, inverse, is_permutation, product, selection, tensor
from structc.recognition.scaling import Balanced

Array = NDArray[Any]
LABELS = 24
"""Values that are followed through the matrix until two of them order the columns.

For n a power of two that is one value at an even place and one at an odd place.
"""


def permuted_circulants(matrix: Matrix) -> Iterator[Proposal]:
    """``W[i, j] = r[i] c[p(i) - q(j)] s[j]`` with unknown orders p and q of Z_n.

    Math:    let a and b be values that |c| takes once, at x_a and x_b. In every row i the columns
             A(i) and B(i) that hold them are x_a - x_b apart, so A(i) -> B(i) is a shift of the
             columns by that much. If it is a single cycle of length n it orders the columns, and
             A orders the rows. Signs and phases follow along the cycle.
    Cost:    O(n^2) a value; O(n log n) where two rows do not hold the same moduli.
    Refuses: filters without two such values, symmetric ones without one beside a pair.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> at = torch.arange(20)
    >>> w = torch.randn(20)[(at[:, None] - at) % 20]
    >>> recognize(w[torch.randperm(20)][:, torch.randperm(20)]).name
    'permuted circulant'
    """
    m, n = matrix.shape
    if m != n or n < 3:
        return
    ones = np.ones(n)
    for scaled in (False, True):
        found = matrix.balanced if scaled else Balanced(matrix.values, ones, ones)
        if _rows_agree(np.abs(found.q), matrix.slack):
            for p, q in _orders(np.abs(found.q), matrix.slack):
                yield _proposal(found, p, q, matrix.slack)
            return


def _rows_agree(moduli: Array, slack: float) -> bool:
    """Whether a few rows hold the same values."""
    first = np.sort(moduli[0])
    rows = {1, len(moduli) // 2, len(moduli) - 1}
    return all(np.abs(np.sort(moduli[i]) - first).max() <= slack * first[-1] for i in rows)


def _orders(moduli: Array, slack: float) -> Iterator[tuple[Array, Array]]:
    """Orders (p, q) that labels of the values give; few, most often one that is right."""
    row = np.sort(moduli[0])
    for gap in (
        EXACT,
        slack,
    ):  # narrow dtypes round different values together, not equal ones apart
        found = _order(moduli, *_isolated(row, gap * row[-1]))
        if found is not None:
            yield found


def _order(moduli: Array, single: Array, double: Array) -> tuple[Array, Array] | None:
    """p and q from values that a row holds once, and twice."""
    n = len(moduli)
    places: list[Array] = []
    for value in single[:LABELS]:
        b = np.abs(moduli - value).argmin(axis=1)
        if not is_permutation(b, n):
            continue
        for a in places:
            order = _cycle(b[inverse(a)])
            if len(order) == n:
                q = inverse(order)
                return q[a], q
        places.append(b)
    for a in places[:2]:
        for value in double[:LABELS]:
            two = np.argpartition(np.abs(moduli[:, a] - value), 1, axis=1)[:, :2]
            order = _walk(two)
            if len(order) == n:
                p = inverse(order)
                q = np.empty_like(p)
                q[a] = p
                return p, q
    return None


def _isolated(row: Array, gap: float) -> tuple[Array, Array]:
    """Values that a sorted row holds once, and twice, those far from others first."""
    starts = np.flatnonzero(np.diff(row, prepend=-np.inf) > gap)
    counts = np.diff(starts, append=len(row))
    ends = row[starts + counts - 1]
    below = np.diff(row[starts], prepend=-np.inf)
    room = np.minimum(below, np.append(below[1:], np.inf))
    order = np.argsort(-room, kind="stable")
    middle = (row[starts] + ends) / 2
    return middle[order[counts[order] == 1]], middle[order[counts[order] == 2]]


def _cycle(step: Array) -> Array:
    """0, step[0], step[step[0]], ... up to its return."""
    order, at = [0], int(step[0])
    while at != 0 and len(order) < len(step):
        order.append(at)
        at = int(step[at])
    return np.array(order)


def _walk(neighbours: Array) -> Array:
    """The cycle through 0 in a graph where each vertex has two neighbours."""
    order, before, at = [0], 0, int(neighbours[0, 0])
    while at != 0 and len(order) < len(neighbours):
        order.append(at)
        one, other = neighbours[at]
        before, at = at, int(other if one == before else one)
    return np.array(order) if len(set(order)) == len(order) else np.array([0])


def _proposal(found: Balanced, p: Array, q: Array, slack: float) -> Proposal:
    n = len(p)
    ordered = found.q[inverse(p)][:, inverse(q)]
    e, d = _phases(ordered)
    if np.abs(d - 1).max() <= slack:
        d = np.ones(n)
    taps = wrapped_mean(ordered * e.conj()[:, None] * d.conj())
    r, s = found.r * e[p], found.s * d[q]
    if np.abs(r - r[0]).max() <= slack * np.abs(r[0]):  # one sign or phase belongs to the taps
        taps, r = taps * r[0], np.ones(n)
    parts = [*diagonal(s), *selection(inverse(q), n), Circulant(tensor(taps)), *selection(p, n)]
    scaled = not (np.all(r == 1) and np.all(s == 1))
    words = f"a circulant of size {n} under row and column permutations"
    words += " and scales or signs of rows and columns" if scaled else ""
    return Proposal("permuted circulant", product([*parts, *diagonal(r)]), words)


def _phases(ordered: Array) -> tuple[Array, Array]:
    """Unit factors (e, d) with ``ordered[i, j] = e[i] d[j] c[i - j]``.

    Two neighbouring taps c_k and c_k+1 give d[j] / d[j-1] up to one constant, the n-th root of
    the product around the circle.
    """
    n = len(ordered)
    moduli = np.abs(ordered[:, 0])
    k = int(np.minimum(moduli, np.roll(moduli, -1)).argmax())
    i = np.arange(n)
    here, before = ordered[i, (i - k) % n], ordered[i, (i - k - 1) % n]
    steps = np.empty(n, dtype=ordered.dtype)
    steps[(i - k) % n] = _unit(here * before.conj())
    root = _root(steps)
    d = np.cumprod(steps * np.conj(root))
    d = d * np.conj(d[0])
    return _unit(here * d[(i - k) % n].conj()), d


def _root(steps: Array) -> Any:
    """The n-th root of the product of unit steps that is nearest to their mean."""
    n, mean = len(steps), steps.mean()
    if not np.iscomplexobj(steps):
        return np.sign(np.prod(steps)) if n % 2 else np.sign(mean) or 1.0
    turn = np.angle(np.prod(steps)) / n
    nearest = np.round((np.angle(mean) - turn) * n / (2 * np.pi))
    return np.exp(1j * (turn + 2 * np.pi * nearest / n))


def _unit(x: Array) -> Array:
    moduli = np.abs(x)
    return np.divide(x, moduli, out=np.ones_like(x), where=moduli > 0)


def wrapped_mean(square: Array) -> Array:
    """``s -> mean_j square[(j + s) mod n, j]``: the circulant nearest to a matrix.

    >>> wrapped_mean(np.array([[1.0, 3.0], [2.0, 1.0]])).tolist()
    [1.0, 2.5]
    """
    n = len(square)
    # rows turned until the wrapped diagonals are columns
    at = (np.arange(n)[:, None] - np.arange(n)) % n
    turned = np.take_along_axis(square, at, axis=1)
    first = turned[0]  # sums of differences: what is equal stays so to the last bit
    return np.asarray(first + (turned - first).mean(axis=0))

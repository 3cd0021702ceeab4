"""Monarch matrices on every grid, in the orders that fast transforms have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from structc.families import Monarch
from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import inverse, product, selection, tensor
from structc.recognition.kronecker import divisors, seen_ranks
from structc.recognition.rank import part_is_deficient, part_side

Array = NDArray[Any]
RANKS = 16
PROBE = RANKS + 8
COARSE = (2, 3, 4, 8)
"""On grids of these many blocks any rank that saves parameters is looked for, in two orders."""
TRIED = 4


class Grid(NamedTuple):
    """Parameters, rank that a probe saw, input and output blocks, and orders by name."""

    cost: int
    rank: int
    k: int
    j: int
    rows: str
    columns: str


def monarch(matrix: Matrix) -> Iterator[Proposal]:
    """Every block of a k x j grid has rank r, in contiguous, strided or even-odd order.

    Math:    block (a, b) of the ordered matrix is w2[b, :, :, a] w1[a, b]. Orders: as it is; index
             mod the number of blocks; even then odd reversed, and then that.
    Cost:    a singular value decomposition of at most 24 x 24 entries a grid and order, an LU
             factorisation of one block on coarse grids; O(m n r) for a hit.
    Source:  Dao et al. 2022, arXiv:2204.00595; Makhoul 1980 for the order of cosine transforms.

    >>> import torch
    >>> from structc.recognition import recognize
    >>> m = Monarch(torch.randn(4, 6, 1, 9), torch.randn(6, 5, 1, 4))
    >>> recognize(m.to_dense()).family.hyper()
    {'in_blocks': 4, 'out_blocks': 6, 'rank': 1}
    """
    found = sorted(_grids(matrix))
    for grid in found[:TRIED]:
        m, n = matrix.shape
        rows, columns = _order(m, grid.j, grid.rows), _order(n, grid.k, grid.columns)
        family = fitted(matrix.values[np.ix_(rows, columns)], grid.k, grid.j, grid.rank)
        parts = [*selection(columns, n), family, *selection(inverse(rows), m)]
        words = f"a Monarch matrix of {grid.k} x {grid.j} blocks of rank {grid.rank}"
        words += f", rows {grid.rows}, columns {grid.columns}"
        yield Proposal("monarch", product(parts), words)


def _order(n: int, blocks: int, how: str) -> Array:
    """The order that makes blocks contiguous.

    >>> _order(6, 2, "strided").tolist(), _order(6, 1, "even-odd").tolist()
    ([0, 2, 4, 1, 3, 5], [0, 2, 4, 5, 3, 1])
    """
    index = np.arange(n)
    if how == "contiguous":
        return index
    if how == "even-odd":
        index = np.concatenate([index[::2], index[1::2][::-1]])
    return index.reshape(n // blocks, blocks).T.ravel()


def _grids(matrix: Matrix) -> Iterator[Grid]:
    """Grids and orders where a random block is deficient."""
    m, n = matrix.shape
    row_blocks = {j: _some_blocks(m, j) for j in divisors(m)}
    column_blocks = {k: _some_blocks(n, k) for k in divisors(n)}
    for k, columns in column_blocks.items():
        for j, rows in row_blocks.items():
            l, i = m // j, n // k
            most = (l * i - 1) // (l + i)
            if k * j == 1 or most < 1:
                continue
            coarse = k in COARSE and j in COARSE and most > RANKS
            parts = [(a, b) for a in rows for b in columns]
            r = np.stack([rows[a][:PROBE] for a, _ in parts])[:, :, None]
            c = np.stack([columns[b][:PROBE] for _, b in parts])[:, None, :]
            ranks = seen_ranks(matrix.values[r, c], min(most, RANKS), matrix.slack)
            for (a, b), seen in zip(parts, ranks, strict=True):
                rank = int(seen)
                if not rank and coarse and "even-odd" not in (a, b):
                    rank = _rank_of_block(matrix, rows[a], columns[b], most)
                if rank:
                    yield Grid(rank * k * j * (l + i), rank, k, j, a, b)


def _some_blocks(n: int, blocks: int) -> dict[str, Array]:
    """For each order that differs the indices of one random block, shuffled."""
    orders: tuple[str, ...] = ("contiguous", "strided", "even-odd")
    if blocks in (1, n):
        orders = orders[: 1 + (blocks == n > 1)]
    rng = np.random.default_rng(0)
    at = rng.integers(blocks) * (n // blocks)
    return {o: rng.permutation(_order(n, blocks, o)[at : at + n // blocks]) for o in orders}


def _rank_of_block(matrix: Matrix, rows: Array, columns: Array, most: int) -> int:
    """The rank of a large block, if it is deficient."""
    side = part_side(most)
    part = matrix.values[np.ix_(rows[:side], columns[:side])]
    if not part_is_deficient(part, most, matrix.noise):
        return 0
    return int(seen_ranks(part[None], most, matrix.slack)[0])


def fitted(ordered: Array, k: int, j: int, rank: int) -> Monarch:
    """The Monarch matrix whose blocks are truncated to a rank, by a batched range finder.

    Args:
        ordered: ``(m, n)`` with contiguous blocks.
    """
    m, n = ordered.shape
    l, i = m // j, n // k
    blocks = ordered.reshape(j, l, k, i).transpose(2, 0, 1, 3)  # (k, j, l, i)
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(blocks @ rng.normal(size=(i, min(l, i, rank + 4))))[0]
    u, s, vh = np.linalg.svd(basis.conj().swapaxes(-1, -2) @ blocks, full_matrices=False)
    root = np.sqrt(s[..., :rank])
    left = basis @ u[..., :rank] * root[..., None, :]  # (k, j, l, r)
    right = root[..., None] * vh[..., :rank, :]  # (k, j, r, i)
    return Monarch(tensor(right), tensor(left.transpose(1, 2, 3, 0)))

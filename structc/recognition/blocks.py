"""Block-diagonal matrices under unknown row and column orders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from structc.families import BlockDiagonal
from structc.recognition.base import Matrix, Proposal
from structc.recognition.build import product, selection, tensor

Array = NDArray[Any]
DENSE = 0.5
"""Matrices with more nonzeros than this share, or blocks that store more, gain nothing."""


def block_diagonal(matrix: Matrix) -> Iterator[Proposal]:
    """Blocks that share no row and no column, in any order; of one size, or filled up to one.

    Math:    the connected components of the bipartite graph of rows and columns with an edge for
             each nonzero. Smaller blocks are padded to the largest: y = S blockdiag(B) P x, where
             padded columns read any input with weight zero. Sizes so unequal that the padded
             blocks would store more than half of the matrix are not proposed.
    Cost:    O(m n).

    >>> import torch
    >>> from structc.recognition import recognize
    >>> w = torch.block_diag(*torch.randn(4, 3, 3))
    >>> recognize(w[torch.randperm(12)][:, torch.randperm(12)]).name
    'permuted block_diagonal'
    """
    m, n = matrix.shape
    if min(m, n) < 2:
        return
    present = np.abs(matrix.values[0]) > matrix.negligible
    if present.mean() > DENSE and (np.abs(matrix.values[-1]) > matrix.negligible).mean() > DENSE:
        return
    edges = np.abs(matrix.values) > matrix.negligible
    if edges.mean() > DENSE:
        return
    rows, columns, count = _components(edges)
    heights, widths = np.bincount(rows, minlength=count), np.bincount(columns, minlength=count)
    real = (heights > 0) & (widths > 0)
    empty = bool((heights[~real] > 0).any())  # rows of zeros read one more block, of zeros
    size = (int(real.sum()) + empty, int(heights[real].max()), int(widths[real].max()))
    if np.prod(size) > DENSE * m * n:
        return
    family = _family(matrix.values, rows, columns, np.flatnonzero(real), size)
    told = f"{int(real.sum())} blocks of at most {size[1]} x {size[2]}"
    ordered = (np.diff(rows) >= 0).all() and (np.diff(columns) >= 0).all()
    name = "block_diagonal" if ordered else "permuted block_diagonal"
    yield Proposal(name, family, f"{told} on a diagonal" + ("" if ordered else ", permuted"))


def _components(edges: Array) -> tuple[Array, Array, int]:
    """The component of each row and each column, numbered by their first rows."""
    m, n = edges.shape
    i, j = edges.nonzero()
    graph = csr_matrix((np.ones(len(i), dtype=np.int8), (i, j + m)), shape=(m + n, m + n))
    count, labels = connected_components(graph, directed=False)
    return labels[:m], labels[m:], int(count)


def _family(
    values: Array, rows: Array, columns: Array, real: Array, size: tuple[int, int, int]
) -> Any:
    count, height, width = size
    blocks = np.zeros(size, dtype=values.dtype)
    inputs = np.zeros(count * width, dtype=np.int64)
    outputs = np.full(len(rows), (count - 1) * height, dtype=np.int64)
    for at, component in enumerate(real):
        i, j = np.flatnonzero(rows == component), np.flatnonzero(columns == component)
        blocks[at, : len(i), : len(j)] = values[np.ix_(i, j)]
        inputs[at * width : at * width + len(j)] = j
        outputs[i] = at * height + np.arange(len(i))
    parts = [*selection(inputs, len(columns)), BlockDiagonal(tensor(blocks))]
    return product([*parts, *selection(outputs, count * height)])

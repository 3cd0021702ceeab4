"""Block sparse: a matrix of which whole blocks are kept, the others zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, with_epilogue
from structc.families.fits import analytic, refuse_rank
from structc.families.solves import least_squares
from structc.forms import Sparse, Tile
from structc.numerics import weighted_error
from structc.records import Hyper, Refusal

SIZES = (32, 16, 8, 4)
"""Sides of blocks that are proposed, the first that divides both sides often enough."""
FRACTIONS = (0.5, 0.25)
SAMPLED = 1 << 14
"""Blocks that are drawn for a null, at most."""


@final
class BlockSparse(AbstractStructured):
    """Some blocks of a grid, wherever the weight has most to lose.

    Math:    y[row of e] += values[e] @ x[columns[e]] for each kept block e; block row a keeps the
             blocks rows[a] .. rows[a + 1].
    Shapes:  x (..., n);  values (nnz, b, c);  rows (m/b + 1,) and columns (nnz,) of int64;
             y (..., m).
    Cost:    flops = 2*rows*nnz*b*c;  params = nnz*b*c.
    Errors:  none; blocks that do not divide the sides, a count outside 1..all and weights that are
             not finite are Refusals of fit.
    Source:  the largest blocks are the Frobenius optimum; under an input Gram the kept blocks of a
             row are the least-squares solution for its kept columns.

    >>> w = torch.zeros(6, 8)
    >>> w[0:2, 4:8] = 1.0
    >>> m = BlockSparse.fit(w, height=2, width=4, count=1)
    >>> m.rows.tolist(), m.columns.tolist(), m.fit_error
    ([0, 1, 1, 1], [1], 0.0)
    """

    name: ClassVar[str] = "block_sparse"
    rows: Tensor
    columns: Tensor

    def __init__(self, values: Tensor, rows: Tensor, columns: Tensor, in_features: int) -> None:
        super().__init__(in_features, (len(rows) - 1) * values.shape[1])
        self.values = nn.Parameter(values)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        n, m = in_features, out_features
        for size in SIZES:
            if n % size == m % size == 0 and min(n, m) >= 4 * size:
                blocks = (n // size) * (m // size)
                counts = [int(fraction * blocks) for fraction in FRACTIONS]
                return [{"height": size, "width": size, "count": c} for c in counts]
        return []

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        height, width = hyper["height"], hyper["width"]
        step = Sparse(out_features, in_features, height, width, hyper["count"])
        return with_epilogue(Tile((step,)), bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        height, width, count = hyper["height"], hyper["width"], hyper["count"]
        down, right = out_features // height, in_features // width
        kept = torch.zeros(down * right, dtype=torch.bool)
        kept[torch.arange(count) * (down * right) // count] = True  # any places that are valid
        rows, columns = places(kept.reshape(down, right))
        return cls(torch.empty(count, height, width, dtype=dtype), rows, columns, in_features)

    @classmethod
    @analytic
    def fit(
        cls, weight: Tensor, gram: Tensor | None = None, *, height: int, width: int, count: int
    ) -> Self | Refusal:
        """The largest blocks; under a Gram the better of two choices, each solved exactly.

        Args:
            weight: ``(m, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``, positive semidefinite; None is the identity.
            height, width: of a block; must divide m and n.
            count: of kept blocks, 1 .. all.
        """
        m, n = weight.shape
        if height < 1 or width < 1 or m % height or n % width:
            reason = f"blocks of {height} x {width} do not divide {n} inputs, {m} outputs"
            return Refusal("", cls.name, "GRID", reason)
        if refusal := refuse_rank(cls.name, count, (m // height) * (n // width)):
            return refusal
        blocks = weight.reshape(m // height, height, n // width, width).transpose(1, 2)
        masks = [_largest(blocks.square().sum((2, 3)), count)]
        if gram is not None:  # what a block does to the outputs when it alone is left out
            corner = gram.reshape(n // width, width, n // width, width)
            metrics = corner[range(len(corner)), :, range(len(corner))]
            masks.append(_largest(((blocks @ metrics) * blocks).sum((2, 3)), count))
        best, least = None, math.inf
        for kept in masks:
            rows, columns = places(kept)
            made = cls(solved(weight, gram, kept, height, width), rows, columns, n)
            error = weighted_error(weight, made.to_dense(), gram) if gram is not None else 0.0
            if error < least:
                best, least = made, error
        assert best is not None
        return best

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        height, width, count = hyper["height"], hyper["width"], hyper["count"]
        blocks = (out_features // height) * (in_features // width)
        drawn = min(blocks, SAMPLED)  # the energy of a block is chi-squared with its size
        g = torch.Generator().manual_seed(0)
        size = height * width
        if drawn * size > SAMPLED * 64:  # many small summands: normal
            energy = size + (2 * size) ** 0.5 * torch.randn(drawn, generator=g).double()
        else:
            energy = torch.randn(drawn, size, generator=g).double().square().sum(1)
        held = energy.sort(descending=True).values.cumsum(0) / energy.sum()
        return float((1 - held[max(1, round(count * drawn / blocks)) - 1]).clamp_min(0).sqrt())

    def hyper(self) -> Hyper:
        count, height, width = self.values.shape
        return {"height": height, "width": width, "count": count}

    def factors(self) -> list[Tensor]:
        return [self.values, self.rows, self.columns]

    def to_dense(self) -> Tensor:
        return scattered(self.values, self.rows, self.columns, self.in_features)


def _largest(scores: Tensor, count: int) -> Tensor:
    """A mask of so many entries, the largest."""
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().argsort(descending=True, stable=True)[:count]] = True
    return kept.reshape(scores.shape)


def places(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where the kept blocks of a grid are: edges of its rows, and the column of each block."""
    edges = nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    return edges, kept.nonzero()[:, 1].contiguous()


def scattered(values: Tensor, rows: Tensor, columns: Tensor, n: int) -> Tensor:
    """The matrix (m, n) of some blocks (nnz, b, c)."""
    _, height, width = values.shape
    down = torch.arange(len(rows) - 1, device=rows.device).repeat_interleave(rows.diff())
    empty = (len(rows) - 1, n // width, height, width)
    grid = values.new_zeros(empty).index_put((down, columns), values)
    return grid.transpose(1, 2).reshape(-1, n)


def solved(weight: Tensor, gram: Tensor | None, kept: Tensor, height: int, width: int) -> Tensor:
    """The best values (nnz, b, c) of the kept blocks: one least-squares problem a block row."""
    m, n = weight.shape
    if gram is None:
        return weight.reshape(m // height, height, n // width, width).transpose(1, 2)[kept]
    found = []
    for row, mask in zip(weight.split(height), kept, strict=True):
        columns = mask.repeat_interleave(width).nonzero()[:, 0]
        if len(columns):
            part = least_squares(row, gram, columns)
            found.append(part.reshape(height, -1, width).transpose(0, 1))
    return torch.cat(found)

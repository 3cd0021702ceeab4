"""Pixelfly: a fixed butterfly pattern of blocks, plus low rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, balanced, ranks_for, with_epilogue
from structc.families.block_sparse import places, scattered, solved
from structc.families.fits import analytic, refuse_grid, refuse_rank, simulated
from structc.families.low_rank import leading
from structc.forms import Add, Block, Keep, Load, Sparse, Tile
from structc.numerics import squared_norm
from structc.records import Hyper, Refusal

PROPOSED = (16, 2)
"""Blocks and levels that are proposed: 3 of 16 blocks in each row."""
FRACTIONS = (0.5, 0.35)
SWEEPS, FEW, LARGE = 20, 3, 2048
"""Sweeps of a fit; fewer above LARGE x LARGE."""
PROGRESS = 3e-3
TURNS = 2
"""Orthogonal iterations that follow the low-rank part from one sweep to the next."""
SAMPLED = 128


@final
class Pixelfly(AbstractStructured):
    """A flat block butterfly and a low-rank term: M = S + U V.

    Math:    y = S x + U (V x); of a q x q grid of blocks, S keeps (a, b) with a = b, and those
             where a xor b is a power of two below 2^levels.
    Shapes:  x (..., n);  values (q*(levels + 1), m/q, n/q);  v (r, n);  u (m, r);  y (..., m).
    Cost:    flops = 2*rows*params;  params = (levels + 1)*m*n/q + r*(m + n).
    Errors:  none; a q that is no power of two or does not divide both sides, levels or a rank
             outside their ranges and weights that are not finite are Refusals of fit.
    Source:  Dao et al. 2022, arXiv:2112.00029 (the pattern, trained there). Here S and U V are
             fitted in turn, each exactly in the metric of the input Gram.

    >>> w, x = torch.randn(8, 12), torch.randn(3, 12)
    >>> m = Pixelfly.fit(w, blocks=4, levels=2, rank=2)
    >>> torch.allclose(m(x), x @ m.to_dense().T, atol=1e-4)
    True
    """

    name: ClassVar[str] = "pixelfly"
    finds_members: ClassVar[bool] = False
    rows: Tensor
    columns: Tensor

    def __init__(self, values: Tensor, v: Tensor, u: Tensor, levels: int) -> None:
        super().__init__(v.shape[1], u.shape[0])
        self.values, self.v, self.u = nn.Parameter(values), nn.Parameter(v), nn.Parameter(u)
        self.levels = levels
        rows, columns = places(pattern(len(values) // (levels + 1), levels))
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        n, m = in_features, out_features
        blocks, levels = PROPOSED
        if n % blocks or m % blocks or min(n, m) < 4 * blocks:
            return []
        sparse = (levels + 1) / blocks
        fractions = [f - sparse for f in FRACTIONS]
        ranks = ranks_for(n * m, n + m, min(n, m), fractions, multiple=8)
        return [{"blocks": blocks, "levels": levels, "rank": rank} for rank in ranks]

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        n, m, q, r = in_features, out_features, hyper["blocks"], hyper["rank"]
        sparse = Sparse(m, n, m // q, n // q, q * (hyper["levels"] + 1))
        low_rank = Block(1, r, n, 1), Block(1, m, r, 1)
        program = Tile((sparse, Keep(m, 1), Load(n, 0), *low_rank, Add(m, 1)))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        n, m, q, r = in_features, out_features, hyper["blocks"], hyper["rank"]
        values = torch.empty(q * (hyper["levels"] + 1), m // q, n // q, dtype=dtype)
        v, u = torch.empty(r, n, dtype=dtype), torch.empty(m, r, dtype=dtype)
        return cls(values, v, u, hyper["levels"])

    @classmethod
    @analytic
    def fit(
        cls, weight: Tensor, gram: Tensor | None = None, *, blocks: int, levels: int, rank: int
    ) -> Self | Refusal:
        """A local optimum of the output error, from the low-rank optimum downwards.

        Args:
            weight: ``(m, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``, positive semidefinite; None is the identity.
            blocks: q, a power of two that divides n and m.
            levels: of the butterfly, 1 .. log2 q.
            rank: of the dense term, 1 .. min(m, n).
        """
        if refusal := refuse_grid(cls.name, weight, blocks, blocks) or refuse_rank(
            cls.name, rank, min(weight.shape)
        ):
            return refusal
        if blocks & (blocks - 1) or not 1 <= levels < blocks.bit_length():
            reason = f"{blocks} blocks, {levels} levels: a power of two, and up to its logarithm"
            return Refusal("", cls.name, "GRID", reason)
        u, v = leading(weight, gram, rank)
        values, u, v = _descend(weight, gram, pattern(blocks, levels), u, v)
        u, v = balanced(u, v)
        return cls(values, v, u, levels)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        n, m, q, r = in_features, out_features, hyper["blocks"], hyper["rank"]
        scale = max(1.0, min(n, m) / SAMPLED)
        width, height = (max(1, round(side / scale / q)) * q for side in (n, m))
        low, part = divmod(max(1.0, r * (width / n + height / m) / 2), 1)
        ends = [
            simulated(cls, width, height, {**hyper, "rank": int(low) + i})
            for i in range(2 if part > 1e-9 else 1)
        ]
        return ends[0] + part * (ends[-1] - ends[0])

    @classmethod
    def output_blocks(cls, hyper: Hyper) -> int:
        return hyper["blocks"]

    def mix_outputs(self, mix: Tensor) -> None:
        owner = torch.arange(len(mix)).repeat_interleave(self.rows.diff())
        self.values.data = mix[owner] @ self.values.data
        mixed = (mix @ self.u.data.unflatten(0, mix.shape[:2])).flatten(0, 1)
        u, v = balanced(mixed, self.v.data)
        self.u.data, self.v.data = u.contiguous(), v.contiguous()

    def hyper(self) -> Hyper:
        blocks = len(self.values) // (self.levels + 1)
        return {"blocks": blocks, "levels": self.levels, "rank": len(self.v)}

    def factors(self) -> list[Tensor]:
        return [self.values, self.rows, self.columns, self.v, self.u]

    def to_dense(self) -> Tensor:
        sparse = scattered(self.values, self.rows, self.columns, self.in_features)
        return torch.addmm(sparse, self.u, self.v)


def pattern(blocks: int, levels: int) -> Tensor:
    """The mask (q, q) of the flat block butterfly.

    >>> pattern(4, 1).int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """
    at = torch.arange(blocks)
    apart = at[:, None] ^ at
    return (apart & (apart - 1)).eq(0) & (apart < 1 << levels)


def _descend(
    weight: Tensor, gram: Tensor | None, mask: Tensor, u: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks for a given low-rank term, and in turn, until the error settles.

    The term is followed by orthogonal iteration: for positive semidefinite matrices each turn
    lowers the error, and a few suffice because it moves little from sweep to sweep.
    """
    q = len(mask)
    height, width = weight.shape[0] // q, weight.shape[1] // q
    edges, columns = places(mask)
    error = math.inf
    for _ in range(SWEEPS if weight.numel() <= LARGE**2 else FEW):
        values = solved(_less(weight, u, v), gram, mask, height, width)
        rest = weight - scattered(values, edges, columns, weight.shape[1])
        now = squared_norm(_less(rest, u, v), gram)
        if now > error * (1 - PROGRESS):
            return values, u, v
        error = now
        basis = u
        for _ in range(TURNS):
            basis = torch.linalg.qr(basis)[0]
            down = basis.mT @ rest
            basis = rest @ (down if gram is None else down @ gram).mT
        u = torch.linalg.qr(basis)[0]
        v = u.mT @ rest
        del rest  # as large as the weight
    return solved(_less(weight, u, v), gram, mask, height, width), u, v


def _less(matrix: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return torch.addmm(matrix, u, v, alpha=-1)

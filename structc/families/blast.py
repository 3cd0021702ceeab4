"""BLAST: blocks of one low rank whose factors rows and columns of blocks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, ranks_for, with_epilogue
from structc.families.fits import analytic, refuse_grid, refuse_rank, simulated
from structc.families.low_rank import LowRank
from structc.families.solves import damped_solve
from structc.forms import Block, Tile
from structc.records import Hyper, Refusal

BLOCKS = (8, 4, 2)
"""Counts of blocks that are proposed, the first that divides both sides: more fit better."""
FRACTIONS = (0.5, 0.35)
SWEEPS = 30
LEAST, WORK = 2, 2 * 10**12
"""Sweeps and products of a fit: only matrices above 2048 x 2048 get fewer sweeps than the rest."""
PROGRESS = 3e-3
"""A fit stops when a sweep lowers the squared error by less than this share."""
SAMPLED = 192
SMALL = 4096
"""Elements up to which the unweighted fit is tried too: near an exact fit, which small matrices
allow, each has local optima of its own."""
JOINT = 256
"""Couplings of one row of blocks are solved for together up to so many, else block by block.

Together needs a few sweeps less, which above this size costs more than it gains.
"""


Factors = tuple[Tensor, Tensor, Tensor]
"""V, s and U."""


@final
class Blast(AbstractStructured):
    """Block (a, b) of the matrix is U_a diag(s_ab) V_b: low rank whose couplings vary by block.

    Math:    y[a] = u[a] @ sum_b s[a, b] * (v[b] @ x[b]);  x[b] is input block b, y[a] output
             block a, * is elementwise.
    Shapes:  x (..., k*i);  v (k, r, i);  s (j, k, r);  u (j, l, r);  y (..., j*l).
    Cost:    flops = 2*rows*params;  params = r*(m + n + j*k).
    Errors:  none; blocks that do not divide both sides, a rank outside 1..min(m, n) and weights
             that are not finite are Refusals of fit.
    Source:  Lee et al. 2024, arXiv:2410.21262 (the class; fitted there by preconditioned gradient
             steps). Here every step is a linear least-squares problem, solved exactly, in the
             metric of the input Gram.

    >>> w, x = torch.randn(12, 8), torch.randn(3, 8)
    >>> m = Blast.fit(w, blocks=2, rank=8)
    >>> torch.allclose(m(x), x @ w.T, atol=1e-3)
    True
    """

    name: ClassVar[str] = "blast"
    finds_members: ClassVar[bool] = False

    def __init__(self, v: Tensor, s: Tensor, u: Tensor) -> None:
        super().__init__(v.shape[0] * v.shape[2], u.shape[0] * u.shape[1])
        self.v, self.s, self.u = nn.Parameter(v), nn.Parameter(s), nn.Parameter(u)

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        n, m = in_features, out_features
        for b in BLOCKS:
            if n % b == m % b == 0 and min(n, m) >= b * b:
                ranks = ranks_for(n * m, n + m + b * b, min(n, m), FRACTIONS, multiple=8)
                return [{"blocks": b, "rank": rank} for rank in ranks]
        return []

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        b, r = hyper["blocks"], hyper["rank"]
        steps = (
            Block(b, r, in_features // b, 1),
            Block(1, b, b, r),
            Block(b, out_features // b, r, 1),
        )
        return with_epilogue(Tile(steps), bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        b, r = hyper["blocks"], hyper["rank"]
        return cls(
            torch.empty(b, r, in_features // b, dtype=dtype),
            torch.empty(b, b, r, dtype=dtype),
            torch.empty(b, out_features // b, r, dtype=dtype),
        )

    @classmethod
    @analytic
    def fit(
        cls, weight: Tensor, gram: Tensor | None = None, *, blocks: int, rank: int
    ) -> Self | Refusal:
        """A local optimum of the output error, at or below low rank of the same rank.

        Sweeps of exact least-squares steps, one factor at a time, that start from the (weighted)
        low-rank optimum and never raise the error.

        Args:
            weight: ``(m, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``, positive semidefinite; None is the identity.
            blocks: of each side; must divide n and m.
            rank: 1 .. min(m, n).
        """
        if refusal := refuse_grid(cls.name, weight, blocks, blocks) or refuse_rank(
            cls.name, rank, min(weight.shape)
        ):
            return refusal
        start = LowRank.fit(weight, gram, rank=rank)
        if isinstance(start, Refusal):
            return Refusal("", cls.name, start.code, start.reason)
        v = start.v.data.reshape(rank, blocks, -1).transpose(0, 1).contiguous()
        u = start.u.data.reshape(blocks, -1, rank)
        factors = v, v.new_ones(blocks, blocks, rank), u
        sweeps = _Plain(weight, blocks) if gram is None else _Weighted(weight, gram, blocks)
        made = cls(*_levelled(*_descend(sweeps, factors)))
        if gram is None or weight.numel() > SMALL:
            return made
        plain = cls.fit(weight, blocks=blocks, rank=rank)
        if isinstance(plain, Refusal) or made.error(weight, gram) <= plain.error(weight, gram):
            return made
        return plain

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        return _gaussian(in_features, out_features, hyper["blocks"], hyper["rank"])

    @classmethod
    def output_blocks(cls, hyper: Hyper) -> int:
        return hyper["blocks"]

    def mix_outputs(self, mix: Tensor) -> None:
        mixed = _levelled(self.v.data, self.s.data, mix @ self.u.data)
        self.v.data, self.s.data, self.u.data = mixed

    def hyper(self) -> Hyper:
        return {"blocks": self.v.shape[0], "rank": self.v.shape[1]}

    def factors(self) -> list[Tensor]:
        return [self.v, self.s, self.u]

    def to_dense(self) -> Tensor:
        blocks = (self.u[:, None] * self.s[:, :, None]) @ self.v  # (j, k, l, i)
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1)


def _levelled(v: Tensor, s: Tensor, u: Tensor) -> Factors:
    """The same matrix with each component's scale shared evenly by the three factors."""
    norms = v.norm(dim=(0, 2)), s.norm(dim=(0, 1)), u.norm(dim=(0, 1))
    level = (norms[0] * norms[1] * norms[2]) ** (1 / 3)
    a, b, c = (torch.where(level > 0, level / n, 0.0) for n in norms)
    return v * a[:, None], s * b, u * c


class _Plain:
    """Sweeps in the Frobenius norm, where blocks of columns do not see each other."""

    def __init__(self, weight: Tensor, blocks: int) -> None:
        m, n = weight.shape
        self.w = weight.reshape(blocks, m // blocks, blocks, n // blocks).transpose(1, 2)
        self.total = float((weight * weight).sum())

    def at(self, factors: Factors) -> float:
        """The squared error of these factors, from which the next sweep starts."""
        self.factors = factors
        v, s, u = factors
        self.wv = self.w @ v.mT  # (j, k, l, r)
        self.vv = v @ v.mT  # (k, r, r)
        self.uu = u.mT @ u
        self.wanted = torch.einsum("jlr,jklr->jkr", u, self.wv)
        rows = zip(self.uu, s, strict=True)  # a row of blocks at a time: (k, r, r) is enough
        self.now = torch.stack([((uu * self.vv) @ row[..., None])[..., 0] for uu, row in rows])
        return self.total - float(((2 * self.wanted - self.now) * s).sum())

    def sweep(self) -> Factors:
        """One exact step for each factor."""
        v, s, u = self.factors
        gaps = (self.wanted - self.now)[..., None]
        steps = [damped_solve(uu * self.vv, gap) for uu, gap in zip(self.uu, gaps, strict=True)]
        s = s + torch.stack(steps)[..., 0]
        system = torch.einsum("jkr,krs,jks->jrs", s, self.vv, s)
        pull = torch.einsum("jklr,jkr->jlr", self.wv, s) - u @ system
        u = u + damped_solve(system, pull.mT).mT
        system = torch.einsum("jkr,jrs,jks->krs", s, u.mT @ u, s)
        pull = -(system @ v)
        for row, w, left in zip(s, self.w, u.mT, strict=True):
            pull += (left @ w) * row[..., None]
        return v + damped_solve(system, pull), s, u


class _Weighted:
    """Sweeps in the metric of a Gram matrix, which couples the blocks of columns.

    Attributes:
        wc: W C by blocks of columns, ``(k, m, i)``.
        wv: of all blocks (W C)_ab V_b^T, ``(k, j, l, r)``.
        inner: V_b C_bc V_c^T of all pairs of column blocks, ``(k, r, k, r)``.
    """

    def __init__(self, weight: Tensor, gram: Tensor, blocks: int) -> None:
        product, i = weight @ gram, len(gram) // blocks
        self.blocks, self.gram = blocks, gram
        self.total = float((product * weight).sum())
        self.wc = product.reshape(-1, blocks, i).transpose(0, 1)
        corner = gram.reshape(blocks, i, blocks, i)
        self.metrics = corner[range(blocks), :, range(blocks)]

    def at(self, factors: Factors) -> float:
        """The squared error of these factors, from which the next sweep starts."""
        self.factors = factors
        v, s, u = factors
        k, r, i = v.shape
        self.wv = (self.wc @ v.mT).unflatten(1, (k, -1))
        self.inner = v.new_empty(k, r, k, r)
        for b in range(k):
            row = (v[b] @ self.gram[b * i : b * i + i]).unflatten(1, (k, i)).transpose(0, 1)
            self.inner[b] = (row @ v.mT).transpose(0, 1)
        left = self.total
        for a in range(k):
            pull = (self.wv[:, a] * s[a][:, None]).sum(0)
            left += float(((u[a] @ self._scaled(s[a]) - 2 * pull) * u[a]).sum())
        return left

    def sweep(self) -> Factors:
        """One exact step for each row of couplings, each U_a and each V_b."""
        v, s, u = (f.clone() for f in self.factors)
        for a in range(self.blocks):
            self._couplings(s[a], u[a].mT @ u[a], (u[a] * self.wv[:, a]).sum(1))
            system = self._scaled(s[a])
            pull = (self.wv[:, a] * s[a][:, None]).sum(0) - u[a] @ system
            u[a] += damped_solve(system, pull.mT).mT
        for b in range(self.blocks):
            self._columns(b, v, s, u)
        return v, s, u

    def _scaled(self, s: Tensor) -> Tensor:
        """``sum_bc diag(s_b) V_b C_bc V_c^T diag(s_c)``, (r, r)."""
        left = [s[b][:, None] * (self.inner[b] * s).sum(1) for b in range(len(s))]
        return torch.stack(left).sum(0)

    def _couplings(self, s: Tensor, uu: Tensor, wanted: Tensor) -> None:
        """s_a (k, r) for fixed U and V: jointly, or block after block where that is too large."""
        k, r = s.shape
        if k * r <= JOINT:
            system = (self.inner * uu[:, None]).reshape(k * r, k * r)
            pull = wanted.reshape(-1, 1) - system @ s.reshape(-1, 1)
            s += damped_solve(system, pull).reshape(k, r)
            return
        for b in range(k):
            now = (uu * (self.inner[b] * s).sum(1)).sum(1)
            s[b] += damped_solve(self.inner[b, :, b] * uu, (wanted[b] - now)[:, None])[:, 0]

    def _columns(self, b: int, v: Tensor, s: Tensor, u: Tensor) -> None:
        """V_b for fixed others; its system is a Kronecker product, so two small solves do."""
        i, uu = v.shape[2], u.mT @ u
        mixed = torch.einsum("jr,jrt,jkt->krt", s[:, b], uu, s)  # F_b^T F_c of all c
        theirs = (mixed @ v).transpose(0, 1).flatten(1)  # (r, n)
        wanted = (u * s[:, b, None]).flatten(0, 1).mT @ self.wc[b]
        pull = wanted - theirs @ self.gram[:, b * i : b * i + i]
        v[b] += damped_solve(mixed[b], damped_solve(self.metrics[b], pull.mT).mT)


def _descend(sweeps: _Plain | _Weighted, start: Factors) -> Factors:
    """Sweeps until the error settles, each from a point beyond the last one if that is better.

    Alternating steps creep along valleys in a direction that hardly changes. Going on in it costs
    nothing, since a sweep begins with what tells the error of its starting point; where that is
    not below the last one's, the sweep starts from where the steps ended.
    """
    x, before, error, run = start, start, math.inf, 0
    k, r, i = start[0].shape
    m, n = start[2].shape[0] * start[2].shape[1], k * i
    once = 2 * (3 * m * n * r + 4 * n * k * r * r + 3 * n * n * r)
    for _ in range(min(SWEEPS, max(LEAST, WORK // once))):
        pace = run / (run + 3)
        ahead = tuple(f + pace * (f - g) for f, g in zip(x, before, strict=True))
        now = sweeps.at((ahead[0], ahead[1], ahead[2])) if run else math.inf
        if now >= error or not run:
            run, now = 0, sweeps.at(x)
        if now > error * (1 - PROGRESS):
            return x
        before, x, error, run = x, sweeps.sweep(), now, run + 1
    return x


def _gaussian(n: int, m: int, blocks: int, rank: float) -> float:
    """The error of noise: simulated up to a short side of ``SAMPLED``, extrapolated above.

    Couplings are blocks^2 a rank, so they count less the larger a matrix is: measured, each
    doubling of both sides changes the error by 2^(-1/2) of what the doubling before changed.
    """
    if min(n, m) <= SAMPLED:
        low, part = divmod(max(rank, 1.0), 1)
        ends = [
            simulated(Blast, n, m, {"blocks": blocks, "rank": int(low) + i})
            for i in range(2 if part else 1)
        ]
        return ends[0] + part * (ends[-1] - ends[0])
    halvings = math.ceil(math.log2(min(n, m) / SAMPLED))
    errors = []
    for scale in (2**halvings, 2 ** (halvings + 1)):
        height, width = (max(1, round(side / scale / blocks)) * blocks for side in (m, n))
        ratio = (height / m + width / n) / 2
        errors.append(_gaussian(width, height, blocks, min(rank * ratio, height, width)))
    series = sum(0.5 ** (step / 2) for step in range(1, halvings + 1))
    return min(1.0, errors[0] + series * (errors[0] - errors[1]))

"""BLAST: blocks of one low rank whose factors rows and columns of blocks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, ranks_for, with_epilogue
from structc.families.fits import analytic, refuse_grid, refuse_rank, simulated
from structc.families.low_rank import leading
from structc.families.solves import Factors, damped_solve, descend
from structc.forms import Block, Tile
from structc.records import Hyper, Refusal

BLOCKS = (8, 4, 2)
"""Counts of blocks that are proposed, the first that divides both sides: more fit better."""
FRACTIONS = (0.5, 0.35)
SWEEPS = 30
LEAST, WORK = 2, 15 * 10**11
"""Sweeps and products of a fit: only matrices above 2048 x 2048 get fewer sweeps than the rest."""
HELD = 1 << 22
"""Elements of what a fit keeps of its products; more are made again when they are needed."""
CACHED = 1 << 16
"""Elements of a product that is summed at once."""
SAMPLED = 192
SMALL = 4096
"""Elements up to which the unweighted fit is tried too: near an exact fit, which small matrices
allow, each has local optima of its own."""
JOINT = 256
"""Couplings of one row of blocks are solved for together up to so many, else block by block.

Together needs a few sweeps less, which above this size costs more than it gains.
"""


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
        u, v = leading(weight, gram, rank)
        v = v.reshape(rank, blocks, -1).transpose(0, 1).contiguous()
        u = u.reshape(blocks, -1, rank)
        factors = v, v.new_ones(blocks, blocks, rank), u
        sweeps = _Plain(weight, blocks) if gram is None else _Weighted(weight, gram, blocks)
        most = _most(weight, gram is not None, blocks, rank)
        made = cls(*_levelled(*descend(sweeps, factors, most)))
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
        rows = [(u * s[:, None]) @ self.v for u, s in zip(self.u, self.s, strict=True)]  # (k, l, i)
        return torch.cat([row.transpose(0, 1).flatten(1) for row in rows])


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
        self.vv = v @ v.mT  # (k, r, r)
        self.uu = u.mT @ u
        self.wanted = torch.stack([(w @ v.mT * a).sum(1) for w, a in zip(self.w, u, strict=True)])
        rows = zip(self.uu, s, strict=True)  # a row of blocks at a time: (k, r, r) is enough
        self.now = torch.stack([((uu * self.vv) @ row[..., None])[..., 0] for uu, row in rows])
        return self.total - float(((2 * self.wanted - self.now) * s).sum())

    def sweep(self) -> Factors:
        """One exact step for each factor."""
        v, s, u = self.factors
        gaps = (self.wanted - self.now)[..., None]
        steps = [damped_solve(uu * self.vv, gap) for uu, gap in zip(self.uu, gaps, strict=True)]
        s, u = s + torch.stack(steps)[..., 0], u.clone()
        for a, row in enumerate(s):
            system = _summed(self.vv, row)
            pull = (self.w[a] @ v.mT * row[:, None]).sum(0) - u[a] @ system
            u[a] += damped_solve(system, pull.mT).mT
        uu, v = u.mT @ u, v.clone()
        for b, column in enumerate(s.unbind(1)):
            system = _summed(uu, column)
            pull = -(system @ v[b])
            for a, row in enumerate(column):
                pull += (u[a].mT @ self.w[a, b]) * row[:, None]
            v[b] += damped_solve(system, pull)
        return v, s, u


def _summed(matrices: Tensor, scales: Tensor) -> Tensor:
    """``sum_k diag(s_k) M_k diag(s_k)``, one matrix after the other."""
    found = torch.zeros_like(matrices[0])
    for matrix, scale in zip(matrices, scales, strict=True):
        found += matrix * scale * scale[:, None]
    return found


class _Weighted:
    """Sweeps in the metric of a Gram matrix, which couples the blocks of columns.

    ``V_b C_bc V_c^T`` of all pairs of blocks and ``(W C)_ab V_b^T`` take a few times the memory of
    the weight: they are kept while small, else made again, a block at a time.
    """

    def __init__(self, weight: Tensor, gram: Tensor, blocks: int) -> None:
        product, i = weight @ gram, len(gram) // blocks
        self.blocks, self.gram = blocks, gram
        self.total = float((product * weight).sum())
        self.wc = product.reshape(blocks, -1, blocks, i).transpose(1, 2)  # (j, k, l, i)
        corner = gram.reshape(blocks, i, blocks, i)
        self.metrics = corner[range(blocks), :, range(blocks)]

    def at(self, factors: Factors) -> float:
        """The squared error of these factors, from which the next sweep starts."""
        self.factors = factors
        _, s, u = factors
        self.kept: dict[tuple[str, int], Tensor] = {}
        left, systems = self.total, self._systems(s)
        for a in range(self.blocks):
            pull = (self._pulls(a) * s[a][:, None]).sum(0)
            left += float(((u[a] @ systems[a] - 2 * pull) * u[a]).sum())
        return left

    def sweep(self) -> Factors:
        """One exact step for each row of couplings, each U_a and each V_b."""
        v, s, u = (f.clone() for f in self.factors)
        self._couplings(s, u)
        for a, system in enumerate(self._systems(s)):
            pull = (self._pulls(a) * s[a][:, None]).sum(0) - u[a] @ system
            u[a] += damped_solve(system, pull.mT).mT
        uu = u.mT @ u
        for b in range(self.blocks):
            self._columns(b, v, s, u, uu)
        return v, s, u

    def _inner(self, b: int) -> Tensor:
        """``V_b C_bc V_c^T`` of all c, (r, k, r)."""
        if ("inner", b) in self.kept:
            return self.kept["inner", b]
        v = self.factors[0]
        k, r, i = v.shape
        row = (v[b] @ self.gram[b * i : b * i + i]).unflatten(1, (k, i)).transpose(0, 1)
        made = (row @ v.mT).transpose(0, 1).contiguous()
        if (k * r) ** 2 <= HELD:
            self.kept["inner", b] = made
        return made

    def _pulls(self, a: int) -> Tensor:
        """``(W C)_ab V_b^T`` of all b, (k, l, r)."""
        if ("pulls", a) in self.kept:
            return self.kept["pulls", a]
        v = self.factors[0]
        made = self.wc[a] @ v.mT
        if made.numel() * self.blocks <= HELD:
            self.kept["pulls", a] = made
        return made

    def _systems(self, s: Tensor) -> Tensor:
        """``sum_bc diag(s_ab) V_b C_bc V_c^T diag(s_ac)`` of all a, (j, r, r)."""
        found = s.new_zeros(len(s), s.shape[2], s.shape[2])
        for b in range(self.blocks):
            found += _mixed(self._inner(b), s).mul_(s[:, b, :, None])
        return found

    def _couplings(self, s: Tensor, u: Tensor) -> None:
        """s (j, k, r) for fixed U and V: rows jointly, or block by block where that is large."""
        k, r = s.shape[1:]
        uus = u.mT @ u
        wanted = torch.stack([(u[a] * self._pulls(a)).sum(1) for a in range(k)])
        if k * r <= JOINT:
            inner = torch.stack([self._inner(b) for b in range(k)])  # (k, r, k, r)
            for row, uu, want in zip(s, uus, wanted, strict=True):
                system = (inner * uu[:, None]).reshape(k * r, k * r)
                pull = want.reshape(-1, 1) - system @ row.reshape(-1, 1)
                row += damped_solve(system, pull).reshape(k, r)
            return
        for b in range(k):  # rows do not see each other
            inner = self._inner(b)
            gaps = wanted[:, b] - _mixed(inner, s).mul_(uus).sum(2)
            for row, uu, gap in zip(s, uus, gaps, strict=True):
                row[b] += damped_solve(inner[:, b] * uu, gap[:, None])[:, 0]

    def _columns(self, b: int, v: Tensor, s: Tensor, u: Tensor, uu: Tensor) -> None:
        """V_b for fixed others; its system is a Kronecker product, so two small solves do."""
        i = v.shape[2]
        seen = _mixed((uu * s[:, b, :, None]).transpose(0, 1), s.transpose(0, 1))
        theirs = (seen @ v).transpose(0, 1).flatten(1)  # with F_b^T F_c = seen[c], (r, n)
        wanted = sum((u[a] * s[a, b]).mT @ self.wc[a, b] for a in range(self.blocks))
        pull = wanted - theirs @ self.gram[:, b * i : b * i + i]
        v[b] += damped_solve(seen[b], damped_solve(self.metrics[b], pull.mT).mT)


def _mixed(inner: Tensor, s: Tensor) -> Tensor:
    """``sum_c I[:, c, :] s[a, c, :]`` of all a, (a, r, t), as many rows at once as caches hold."""
    rows, parts, columns = inner.shape
    found = s.new_empty(len(s), rows, columns)
    step = max(1, CACHED // (parts * columns))
    for first in range(0, rows, step):
        now = slice(first, first + step)
        for row, into in zip(s, found, strict=True):
            torch.sum(inner[now] * row, 1, out=into[now])
    return found


def _most(weight: Tensor, aware: bool, blocks: int, rank: int) -> int:
    """How many sweeps a fit of this size may take."""
    m, n = weight.shape
    once = 2 * (3 * m * n * rank + 2 * n * rank**2)
    if aware:
        once += 2 * (3 * n * n * rank + 4 * n * blocks * rank**2)
    return min(SWEEPS, max(LEAST, WORK // once))


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

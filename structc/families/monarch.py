"""Monarch: two block-diagonal factors and a permutation, on any grid and of any rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import (
    AbstractStructured,
    balanced,
    ranks_for,
    with_epilogue,
)
from structc.families.fits import analytic, gaussian_tail, refuse_grid, refuse_rank
from structc.families.low_rank import DIRECT, leading
from structc.forms import Block, Permute, Tile
from structc.numerics import squared_norm
from structc.records import Hyper, Refusal

GRIDS = ((2, 2), (4, 4))
FRACTIONS = (0.75, 0.5)
SWEEPS, FEW, LARGE = 8, 3, 2048
"""Sweeps of a descent; fewer above LARGE x LARGE, where one takes ten seconds."""
TURNS = 2
PROGRESS = 1e-3
"""Coordinate descent stops when a sweep lowers the squared error by less than this share."""


@final
class Monarch(AbstractStructured):
    """Two block factors: each of the k x j blocks of the matrix has rank r.

    Math:    y[b] = sum_a w2[b, :, :, a] @ (w1[a, b] @ x[a]);  x[a] is input block a, y[b] output
             block b.
    Shapes:  x (..., k*i);  w1 (k, j, r, i);  w2 (j, l, r, k);  y (..., j*l).
    Cost:    flops = 2*rows*r*(k*j*i + k*j*l);  params = r*k*j*(i + l).
    Errors:  none; sizes that the grid does not divide, a rank outside 1..min(i, l) and weights that
             are not finite are Refusals of fit.
    Source:  Dao et al. 2022, arXiv:2204.00595 (projection by a truncated SVD of every block, the
             Frobenius optimum); data-aware by block coordinate descent with closed-form steps.

    >>> w1, w2, x = torch.randn(2, 3, 4, 5), torch.randn(3, 6, 4, 2), torch.randn(7, 10)
    >>> m = Monarch(w1, w2)
    >>> torch.allclose(m(x), x @ m.to_dense().T, atol=1e-4)
    True
    """

    name: ClassVar[str] = "monarch"

    def __init__(self, w1: Tensor, w2: Tensor) -> None:
        super().__init__(w1.shape[0] * w1.shape[3], w2.shape[0] * w2.shape[1])
        self.w1, self.w2 = nn.Parameter(w1), nn.Parameter(w2)

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        n, m = in_features, out_features
        found: list[Hyper] = []
        for k, j in GRIDS:
            if n % k or m % j:
                continue
            most = min(n // k, m // j)
            for rank in ranks_for(n * m, k * m + j * n, most, FRACTIONS, multiple=8):
                found.append({"in_blocks": k, "out_blocks": j, "rank": rank})
        return found

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        k, j, r = hyper["in_blocks"], hyper["out_blocks"], hyper["rank"]
        i, l = in_features // k, out_features // j
        program = Tile((Block(k, j * r, i, 1), Permute(k, j * r), Block(j, l, r * k, 1)))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        k, j, r = hyper["in_blocks"], hyper["out_blocks"], hyper["rank"]
        return cls(
            torch.empty(k, j, r, in_features // k, dtype=dtype),
            torch.empty(j, out_features // j, r, k, dtype=dtype),
        )

    @classmethod
    @analytic
    def fit(
        cls,
        weight: Tensor,
        gram: Tensor | None = None,
        *,
        in_blocks: int,
        out_blocks: int,
        rank: int,
    ) -> Self | Refusal:
        """Fit a weight: the analytic projection, refined on data when there is a Gram.

        Without a Gram this is the global Frobenius optimum. With one it is a local optimum of the
        output error, at or below the projection and the block-whitened projection: every step of
        the descent is exact and lowers the error.

        Args:
            weight: ``(m, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``, positive semidefinite; None is the identity.
            in_blocks, out_blocks: the grid; they must divide n and m.
            rank: of each block, 1 .. min(n / in_blocks, m / out_blocks).
        """
        m, n = weight.shape
        refusal = refuse_grid(cls.name, weight, in_blocks, out_blocks)
        if refusal or (
            refusal := refuse_rank(cls.name, rank, min(n // in_blocks, m // out_blocks))
        ):
            return refusal
        wb = _blocks(weight, in_blocks, out_blocks)
        factors = _project(wb, rank)
        if gram is not None:
            factors = _descend(wb, gram, rank, factors)
        p, q = balanced(*factors)  # (k, j, l, r), (k, j, r, i)
        return cls(q, p.permute(1, 2, 3, 0))

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        k, j, r = hyper["in_blocks"], hyper["out_blocks"], hyper["rank"]
        return gaussian_tail(out_features // j, in_features // k, r)

    @classmethod
    def output_blocks(cls, hyper: Hyper) -> int:
        return hyper["out_blocks"]

    def mix_outputs(self, mix: Tensor) -> None:
        p, q = balanced(mix @ self.w2.data.permute(3, 0, 1, 2), self.w1.data)
        self.w1.data, self.w2.data = q.contiguous(), p.permute(1, 2, 3, 0).contiguous()

    def hyper(self) -> Hyper:
        k, j, r, _ = self.w1.shape
        return {"in_blocks": k, "out_blocks": j, "rank": r}

    def factors(self) -> list[Tensor]:
        return [self.w1, self.w2]

    def to_dense(self) -> Tensor:
        return torch.einsum("jlrk,kjri->jlki", self.w2, self.w1).flatten(2).flatten(0, 1)


Factors = tuple[Tensor, Tensor]
"""Of all blocks: P (k, j, l, r) and Q (k, j, r, i); block (a, b) is P[a, b] @ Q[a, b]."""


def _blocks(w: Tensor, k: int, j: int) -> Tensor:
    """(m, n) -> (k, j, l, i), rows and columns in contiguous groups."""
    m, n = w.shape
    return w.reshape(j, m // j, k, n // k).permute(2, 0, 1, 3)


def _project(wb: Tensor, rank: int) -> Factors:
    """Truncated SVD of every block, the singular values shared between both factors."""
    k, j, l, i = wb.shape
    p, q = wb.new_empty(k, j, l, rank), wb.new_empty(k, j, rank, i)
    for a in range(k):  # a column of blocks at a time bounds the memory of the SVDs
        if min(l, i) > DIRECT:
            for b in range(j):
                p[a, b], q[a, b] = leading(wb[a, b], None, rank)
            continue
        u, s, vh = torch.linalg.svd(wb[a], full_matrices=False)
        root = s[:, :rank].sqrt()
        p[a], q[a] = u[..., :rank] * root[:, None, :], root[..., None] * vh[:, :rank]
    return p, q


def _follow(target: Tensor, metric: Tensor, p: Tensor) -> Factors:
    """Orthogonal iterations towards :func:`_truncate` from the last P, which moves little.

    For positive semidefinite matrices each one lowers the error.
    """
    for _ in range(TURNS):
        p = torch.linalg.qr(target @ (metric @ (target.mT @ p)))[0]
    return p, p.mT @ target


def _truncate(target: Tensor, metric: Tensor, root: Tensor, rank: int) -> Factors:
    """The rank-r minimiser of ||(T - M) A^(1/2)|| for a batch of targets (j, l, i).

    Args:
        metric: A, ``(i, i)``.
        root: R with A = R R^T, used where the input side is the smaller one.
    """
    l, i = target.shape[-2:]
    if l <= i:
        p = torch.linalg.eigh(target @ metric @ target.mT)[1][..., -rank:]
    else:
        t = target @ root
        v = torch.linalg.eigh(t.mT @ t)[1][..., -rank:]
        p = torch.linalg.qr(t @ v)[0]
    return p, p.mT @ target


def _descend(wb: Tensor, gram: Tensor, rank: int, start: Factors) -> Factors:
    """Block coordinate descent on the output error, from the better of two starts.

    Row groups decouple; column blocks are swept. With E = W - M, the best block a for fixed others
    is the truncation of ``W_a + [(E C)_a - E_a A] A^+`` in the metric A = C_aa.
    """
    k, _, _, i = wb.shape
    cb = gram.reshape(k, i, k, i).transpose(1, 2)  # (k, k, i, i)
    metrics = cb[range(k), range(k)]
    inverses, roots = _halves(metrics)
    other = torch.empty_like(start[0]), torch.empty_like(start[1])
    for a in range(k):
        other[0][a], other[1][a] = _truncate(wb[a], metrics[a], roots[a], rank)
    errors = [_squared(wb, f, gram) for f in (start, other)]
    best, error = (start, errors[0]) if errors[0] <= errors[1] else (other, errors[1])
    p, q = best[0].clone(), best[1].clone()
    gaps = wb - p @ q  # E, kept up to date block by block
    for _ in range(SWEEPS if wb.numel() <= LARGE**2 else FEW):
        for a in range(k):
            pull = torch.einsum("bjli,bih->jlh", gaps, cb[:, a]) - gaps[a] @ metrics[a]
            target = wb[a] + pull @ inverses[a]
            if min(target.shape[-2:]) > DIRECT:
                p[a], q[a] = _follow(target, metrics[a], torch.linalg.qr(p[a])[0])
            else:
                p[a], q[a] = _truncate(target, metrics[a], roots[a], rank)
            gaps[a] = wb[a] - p[a] @ q[a]
        now = _squared(wb, (p, q), gram)
        if now > error * (1 - PROGRESS):
            return (p, q) if now < error else best
        best, error = (p.clone(), q.clone()), now
    return best


def _halves(metrics: Tensor) -> tuple[Tensor, Tensor]:
    """A^+ and R with A = R R^T, of a batch."""
    lam, vectors = torch.linalg.eigh(metrics)
    able = lam > lam[:, -1:] * metrics.shape[-1] * torch.finfo(lam.dtype).eps  # as a pinv cuts
    inverses = (vectors * torch.where(able, 1 / lam, 0)[:, None, :]) @ vectors.mT
    return inverses, vectors * lam.clamp_min(0).sqrt()[:, None, :]


def _squared(wb: Tensor, factors: Factors, gram: Tensor) -> float:
    rows = zip(wb.unbind(1), factors[0].unbind(1), factors[1].unbind(1), strict=True)
    gaps = ((w - p @ q).transpose(0, 1).flatten(1) for w, p, q in rows)
    return sum(squared_norm(gap, gram) for gap in gaps)

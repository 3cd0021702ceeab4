"""Low rank: the baseline that every other family must beat at equal cost."""

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
from structc.families.fits import analytic, gaussian_tail, refuse_rank
from structc.forms import Block, Tile
from structc.records import Hyper, Refusal

FRACTIONS = (0.85, 0.75, 0.65, 0.55, 0.45, 0.35, 0.25)
"""Shares of the dense parameters that are proposed."""
DIRECT = 1024
"""Sides up to here have an SVD of their own; above, one of the Gram matrix of rows or columns.

That takes a fifth of the time, and leaves an error of 1e-8 of the largest singular value at most.
"""


@final
class LowRank(AbstractStructured):
    """Two thin factors: M = U V.

    Math:    y = U (V x).
    Shapes:  x (..., n);  v (r, n);  u (m, r);  y (..., m).
    Cost:    flops = 2*rows*r*(m + n);  params = r*(m + n).
    Errors:  none; a rank outside 1..min(m, n) and weights that are not finite are Refusals of fit.
    Source:  Eckart-Young; weighted by the input Gram through the eigenvectors of W C W^T, which
             needs no inverse and no Cholesky factor, so a singular C is harmless.

    >>> w, x = torch.randn(6, 8), torch.randn(3, 8)
    >>> m = LowRank.fit(w, rank=6)
    >>> torch.allclose(m(x), x @ w.T, atol=1e-4)
    True
    """

    name: ClassVar[str] = "low_rank"

    def __init__(self, v: Tensor, u: Tensor) -> None:
        super().__init__(v.shape[1], u.shape[0])
        self.v, self.u = nn.Parameter(v), nn.Parameter(u)

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        n, m = in_features, out_features
        return [{"rank": r} for r in ranks_for(n * m, n + m, min(n, m), FRACTIONS)]

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        r, most = hyper["rank"], min(in_features, out_features)
        if not 1 <= r <= most:
            raise ValueError(f"rank {r} is not in 1..{most}")
        program = Tile((Block(1, r, in_features, 1), Block(1, out_features, r, 1)))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        r = hyper["rank"]
        return cls(
            torch.empty(r, in_features, dtype=dtype), torch.empty(out_features, r, dtype=dtype)
        )

    @classmethod
    @analytic
    def fit(cls, weight: Tensor, gram: Tensor | None = None, *, rank: int) -> Self | Refusal:
        """The rank-r matrix of least output error ``||(W - M) C^(1/2)||_F``: a global optimum.

        Args:
            weight: ``(m, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``, positive semidefinite; None is the identity.
            rank: 1 .. min(m, n).
        """
        if refusal := refuse_rank(cls.name, rank, min(weight.shape)):
            return refusal
        u, v = leading(weight, gram, rank)
        return cls(v, u)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        return gaussian_tail(out_features, in_features, hyper["rank"])

    @classmethod
    def curve(cls, weight: Tensor, gram: Tensor | None, ranks: Sequence[int]) -> list[float]:
        """Relative output error of several ranks from one eigendecomposition."""
        w = weight.detach().double()
        energy = _basis(w, None if gram is None else gram.double())[1].clamp_min(0).flip(0)
        total = float(energy.sum())
        tails = energy.flip(0).cumsum(0).flip(0)  # tails[r] = sum of the energies after r
        return [
            0.0 if r >= len(tails) or total == 0 else float((tails[r] / total).sqrt())
            for r in ranks
        ]

    @classmethod
    def output_blocks(cls, hyper: Hyper) -> int:
        return 1

    def mix_outputs(self, mix: Tensor) -> None:
        u, v = balanced(mix[0] @ self.u.data, self.v.data)
        self.u.data, self.v.data = u.contiguous(), v.contiguous()

    def hyper(self) -> Hyper:
        return {"rank": self.v.shape[0]}

    def factors(self) -> list[Tensor]:
        return [self.v, self.u]

    def to_dense(self) -> Tensor:
        return self.u @ self.v


def leading(weight: Tensor, gram: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (r, n) of the best matrix of rank r, in float64: where other fits begin."""
    basis = _basis(weight, gram)[0][:, -rank:]
    return balanced(basis, basis.mT @ weight)


def _basis(w: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """Orthonormal output directions ``(m, min(m, n))``, weakest first, and their energies."""
    m, n = w.shape
    if gram is None and min(m, n) <= DIRECT:
        u, s, _ = torch.linalg.svd(w, full_matrices=False)
        return u.flip(1), (s * s).flip(0)
    if m <= n:
        g = (w if gram is None else w @ gram) @ w.mT
        energy, vectors = torch.linalg.eigh((g + g.mT) / 2)
        return vectors, energy
    # the smaller side: C = R R^T, eigenvectors of R^T W^T W R, carried over by W R
    t = w
    if gram is not None:
        lam, q = torch.linalg.eigh((gram + gram.mT) / 2)
        t = w @ (q * lam.clamp_min(0).sqrt())
    energy, vectors = torch.linalg.eigh(t.mT @ t)
    ordered, _ = torch.linalg.qr((t @ vectors).flip(1))  # QR keeps the span of each leading part
    return ordered.flip(1), energy

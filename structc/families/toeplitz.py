"""Toeplitz: constant along every diagonal, of any shape."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from scipy import linalg
from torch import Tensor, nn

from structc.families.base import AbstractStructured, with_epilogue
from structc.families.fits import analytic
from structc.forms import Convolve, Tile
from structc.numerics import squared_norm
from structc.records import Hyper, Refusal

RIDGES = (1e-14, 1e-12, 1e-10, 1e-8, 1e-6)
"""Shares of the mean energy that are added until the normal equations have a Cholesky factor."""


@final
class Toeplitz(AbstractStructured):
    """Constant diagonals: a convolution with zeros outside.

    Math:    W[i, j] = taps[i - j + n - 1].
    Shapes:  x (..., n);  taps (m + n - 1,), the first row backwards, then down the first column;
             y (..., m).
    Cost:    flops = two real FFTs of about m + n points a row;  params = m + n - 1.
    Errors:  none; weights that are not finite are Refusals of fit.
    Source:  the projection is the mean over diagonals; weighted, the normal equations of the m +
             n - 1 taps, whose matrix is sums along the diagonals of C, by Cholesky.

    >>> t = Toeplitz.fit(torch.tensor([[2.0, 1.0], [3.0, 2.0], [4.0, 3.0]]))
    >>> t.taps.tolist()
    [1.0, 2.0, 3.0, 4.0]
    """

    name: ClassVar[str] = "toeplitz"

    def __init__(self, taps: Tensor, in_features: int) -> None:
        super().__init__(in_features, len(taps) - in_features + 1)
        self.taps = nn.Parameter(taps)

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        program = Tile((Convolve.toeplitz(in_features, out_features),))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        return cls(torch.empty(in_features + out_features - 1, dtype=dtype), in_features)

    @classmethod
    @analytic
    def fit(cls, weight: Tensor, gram: Tensor | None = None) -> Self | Refusal:
        """The Toeplitz matrix of least output error: a global optimum.

        Args:
            weight: ``(m, n)``, any floating dtype.
            gram: ``E[x x^T]``, ``(n, n)``; None is the identity. Where the inputs say nothing about
                a combination of taps, that of the unweighted fit stays.
        """
        return cls(best_taps(weight, gram), weight.shape[1])

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        free = in_features + out_features - 1
        return (1 - free / (in_features * out_features)) ** 0.5

    def hyper(self) -> Hyper:
        return {}

    def factors(self) -> list[Tensor]:
        return [self.taps]

    def to_dense(self) -> Tensor:
        return spread(self.taps, self.in_features)


def spread(taps: Tensor, n: int) -> Tensor:
    """The matrix ``(len(taps) - n + 1, n)`` with these diagonals.

    >>> spread(torch.tensor([1, 2, 3]), 2)
    tensor([[2, 1],
            [3, 2]])
    """
    return taps.unfold(0, n, 1).flip(1)


def best_taps(w: Tensor, gram: Tensor | None) -> Tensor:
    """The taps of least output error, float64 ``(m + n - 1,)``.

    The correction of the unweighted taps solves ``A d = b`` with ``A[s, t] = sum_a C[a - s,
    a - t]`` and b the diagonal sums of ``(W - M) C``: a combination without energy stays as it was.
    """
    m, n = w.shape
    at = torch.arange(m + n - 1)
    taps = diagonal_sums(w) / torch.minimum(at + 1, m + n - 1 - at).clamp_max(min(m, n))
    if gram is None:
        return taps
    wanted = diagonal_sums((w - spread(taps, n)) @ gram)
    for ridge in RIDGES:
        normal = _normal_matrix(gram, m)
        level = float(normal.diagonal().mean())
        if level <= 0:
            break
        normal.diagonal().add_(ridge * level)
        try:  # of the transpose, which is the same and lies in memory as LAPACK wants it
            factor = linalg.cho_factor(normal.numpy().T, overwrite_a=True, check_finite=False)
        except linalg.LinAlgError:
            continue
        step = torch.from_numpy(linalg.cho_solve(factor, wanted.numpy(), check_finite=False))
        found = taps + step
        del normal, factor  # of four times the weight
        better = _squared(w, found, gram) <= _squared(w, taps, gram)
        return found if better else taps
    return taps


def diagonal_sums(matrix: Tensor) -> Tensor:
    """``d -> sum of matrix[i, j] over i - j = d``, from 1 - n to m - 1."""
    m, n = matrix.shape
    at = torch.arange(m, dtype=torch.int32)[:, None] - torch.arange(n, dtype=torch.int32) + n - 1
    return matrix.new_zeros(m + n - 1).index_add(0, at.flatten(), matrix.flatten())


def _normal_matrix(gram: Tensor, m: int) -> Tensor:
    """``A[s, t] = sum_a C[a - s, a - t]``, s and t from 1 - n to m - 1.

    One step down a diagonal one product enters the sum and one leaves it.
    """
    n = len(gram)
    normal = gram.new_zeros(m + n - 1, m + n - 1)
    for row, into in enumerate(normal):
        if row:
            into[1:] = normal[row - 1, :-1]
        if row < n:
            into[:n] += gram[n - 1 - row].flip(0)
        if row >= m:
            into[m:] -= gram[n - 1 - row + m, 1:].flip(0)
    return normal


def _squared(w: Tensor, taps: Tensor, gram: Tensor) -> float:
    return squared_norm(w - spread(taps, w.shape[1]), gram)

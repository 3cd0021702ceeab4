"""Hankel: constant along every antidiagonal."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, with_epilogue
from structc.families.fits import analytic
from structc.families.toeplitz import best_taps, spread
from structc.forms import Convolve, Flip, Tile
from structc.records import Hyper, Refusal


@final
class Hankel(AbstractStructured):
    """Constant antidiagonals: a Toeplitz matrix with its columns backwards.

    Math:    W[i, j] = taps[i + j].
    Shapes:  x (..., n);  taps (m + n - 1,), the first row, then down the last column;  y (..., m).
    Cost:    as Toeplitz;  params = m + n - 1.
    Errors:  none; weights that are not finite are Refusals of fit.
    Source:  the fit of a Toeplitz matrix to W J with the Gram matrix J C J, J the flip.

    >>> Hankel.fit(torch.tensor([[1.0, 2.0], [2.0, 3.0], [3.0, 4.0]])).taps.tolist()
    [1.0, 2.0, 3.0, 4.0]
    """

    name: ClassVar[str] = "hankel"

    def __init__(self, taps: Tensor, in_features: int) -> None:
        super().__init__(in_features, len(taps) - in_features + 1)
        self.taps = nn.Parameter(taps)

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        program = Tile((Flip(in_features), Convolve.toeplitz(in_features, out_features)))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        return cls(torch.empty(in_features + out_features - 1, dtype=dtype), in_features)

    @classmethod
    @analytic
    def fit(cls, weight: Tensor, gram: Tensor | None = None) -> Self | Refusal:
        """The Hankel matrix of least output error: a global optimum.

        Args:
            weight: ``(m, n)``, any floating dtype.
            gram: ``E[x x^T]``, ``(n, n)``; None is the identity.
        """
        turned = None if gram is None else gram.flip(0, 1)
        return cls(best_taps(weight.flip(1), turned), weight.shape[1])

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        free = in_features + out_features - 1
        return (1 - free / (in_features * out_features)) ** 0.5

    def hyper(self) -> Hyper:
        return {}

    def factors(self) -> list[Tensor]:
        return [self.taps]

    def to_dense(self) -> Tensor:
        return spread(self.taps, self.in_features).flip(1)

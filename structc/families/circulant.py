"""Circulant: a convolution around a circle."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, with_epilogue
from structc.families.diagonal import refuse_rectangular
from structc.families.fits import analytic
from structc.families.toeplitz import diagonal_sums
from structc.forms import Convolve, Tile
from structc.records import Hyper, Refusal

FLAT = 1e-12
"""Share of the largest frequency's energy below which data say nothing about a frequency."""


@final
class Circulant(AbstractStructured):
    """Every column is the one before it, shifted down around a circle.

    Math:    W[i, j] = taps[(i - j) mod n];  y = ifft(fft(taps) * fft(x)).
    Shapes:  x (..., n);  taps (n,), the first column;  y (..., n).
    Cost:    flops = two real FFTs of n points a row, about 5*n*log2(n);  params = n.
    Errors:  none; a matrix that is not square is a Refusal of fit.
    Source:  the projection is the mean over wrapped diagonals; weighted by C the normal equations
             are circulant themselves: fft(taps) = fft(h) / fft(g) with h_s = sum_a (W C)[a, a - s]
             and g_s = sum_a C[a, a + s].

    >>> c = Circulant.fit(torch.tensor([[1.0, 3.0, 2.0], [2.0, 1.0, 3.0], [3.0, 2.0, 1.0]]))
    >>> c.taps.tolist()
    [1.0, 2.0, 3.0]
    """

    name: ClassVar[str] = "circulant"

    def __init__(self, taps: Tensor) -> None:
        super().__init__(len(taps), len(taps))
        self.taps = nn.Parameter(taps)

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        program = Tile((Convolve.circulant(in_features),))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        return cls(torch.empty(in_features, dtype=dtype))

    @classmethod
    @analytic
    def fit(cls, weight: Tensor, gram: Tensor | None = None) -> Self | Refusal:
        """The circulant matrix of least output error: a global optimum.

        Args:
            weight: ``(n, n)``, any floating dtype.
            gram: ``E[x x^T]``, ``(n, n)``; None is the identity. A frequency that the inputs do not
                have keeps the value of the unweighted fit.
        """
        if refusal := refuse_rectangular(cls.name, weight):
            return refusal
        taps = wrapped_sums(weight) / len(weight)
        if gram is not None:
            energy = torch.fft.fft(wrapped_sums(gram)).real
            able = energy > FLAT * energy.max()
            wanted = torch.fft.fft(wrapped_sums(weight @ gram))
            plain = torch.fft.fft(taps)
            plain[able] = wanted[able] / energy[able]
            taps = torch.fft.ifft(plain).real
        return cls(taps)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        return (1 - 1 / in_features) ** 0.5

    def hyper(self) -> Hyper:
        return {}

    def factors(self) -> list[Tensor]:
        return [self.taps]

    def to_dense(self) -> Tensor:
        at = torch.arange(self.in_features, device=self.taps.device)
        return self.taps[(at[:, None] - at) % self.in_features]


def wrapped_sums(matrix: Tensor) -> Tensor:
    """``s -> sum_a matrix[a, (a - s) mod n]``, the sums over wrapped diagonals.

    >>> wrapped_sums(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([5., 5.])
    """
    n = len(matrix)
    sums = diagonal_sums(matrix)  # of i - j from 1 - n on
    return sums[n - 1 :] + nn.functional.pad(sums[: n - 1], (1, 0))

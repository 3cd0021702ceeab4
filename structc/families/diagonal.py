"""Diagonal: one number for each feature."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, with_epilogue
from structc.families.fits import analytic
from structc.forms import Block, Tile
from structc.records import Hyper, Refusal


@final
class Diagonal(AbstractStructured):
    """A scale for each feature: M = diag(s).

    Math:    y_i = s_i x_i.
    Shapes:  x (..., n);  scale (n,);  y (..., n).
    Cost:    flops = 2*rows*n;  params = n.
    Errors:  none; a matrix that is not square is a Refusal of fit.
    Source:  least squares for each row: s_i = (W C)_ii / C_ii.

    >>> m = Diagonal.fit(torch.diag(torch.tensor([2.0, 3.0])))
    >>> m(torch.ones(1, 2))
    tensor([[2., 3.]], grad_fn=<...>)
    """

    name: ClassVar[str] = "diagonal"

    def __init__(self, scale: Tensor) -> None:
        super().__init__(len(scale), len(scale))
        self.scale = nn.Parameter(scale)

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        program = Tile((Block(in_features, 1, 1, 1),))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        return cls(torch.empty(in_features, dtype=dtype))

    @classmethod
    @analytic
    def fit(cls, weight: Tensor, gram: Tensor | None = None) -> Self | Refusal:
        """The diagonal matrix of least output error; a feature without energy keeps W_ii.

        Args:
            weight: ``(n, n)``, any floating dtype.
            gram: ``E[x x^T]``, ``(n, n)``; None is the identity.
        """
        if refusal := refuse_rectangular(cls.name, weight):
            return refusal
        scale = weight.diagonal().clone()
        if gram is not None:
            energy = gram.diagonal()
            able = energy > 0
            scale[able] = torch.einsum("ij,ji->i", weight, gram)[able] / energy[able]
        return cls(scale)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        return (1 - 1 / in_features) ** 0.5

    def hyper(self) -> Hyper:
        return {}

    def factors(self) -> list[Tensor]:
        return [self.scale]

    def to_dense(self) -> Tensor:
        return torch.diag(self.scale)


def refuse_rectangular(family: str, weight: Tensor) -> Refusal | None:
    """The refusal of classes of square matrices."""
    m, n = weight.shape
    if m == n:
        return None
    return Refusal("", family, "SQUARE", f"the weight is {m} x {n}, the class is of square ones")

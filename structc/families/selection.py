"""Selection: every output is one of the inputs; a permutation if none is left out."""

from __future__ import annotations

from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structc.families.base import AbstractStructured, with_epilogue
from structc.families.fits import analytic, simulated
from structc.forms import Select, Tile
from structc.records import Hyper, Refusal


@final
class Selection(AbstractStructured):
    """Rows of the identity: a permutation, a part of one, or copies.

    Math:    y_i = x[index_i].
    Shapes:  x (..., n);  index (m,) of int64, a buffer;  y (..., m).
    Cost:    flops = 0;  params = 0.
    Errors:  none; places outside 0..n-1 raise IndexError where they are used.
    Source:  the best selection in output error takes, for each row i, the column j with the largest
             2 (W C)_ij - C_jj: each row is a choice of its own.

    >>> m = Selection(torch.tensor([2, 0]), 3)
    >>> m(torch.tensor([[5.0, 6.0, 7.0]]))
    tensor([[7., 5.]])
    """

    name: ClassVar[str] = "selection"
    scales: ClassVar[bool] = False
    index: Tensor
    like: Tensor

    def __init__(self, index: Tensor, in_features: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(in_features, len(index))
        self.register_buffer("index", index.to(torch.int64))
        self.register_buffer("like", torch.empty(0, dtype=dtype))

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        program = Tile((Select(out_features, in_features),))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        return cls(torch.zeros(out_features, dtype=torch.int64), in_features, dtype)

    @classmethod
    @analytic
    def fit(cls, weight: Tensor, gram: Tensor | None = None) -> Self | Refusal:
        """The selection of least output error, a global optimum.

        Args:
            weight: ``(m, n)``, any floating dtype.
            gram: ``E[x x^T]``, ``(n, n)``; None is the identity.
        """
        gain = 2 * weight if gram is None else 2 * weight @ gram - gram.diagonal()
        return cls(gain.argmax(1), weight.shape[1], weight.dtype)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        return simulated(cls, in_features, min(out_features, 256), hyper)

    def hyper(self) -> Hyper:
        return {}

    def factors(self) -> list[Tensor]:
        return [self.index]

    def to_dense(self) -> Tensor:
        rows = torch.arange(self.out_features, device=self.index.device)
        dense = self.like.new_zeros(self.out_features, self.in_features)
        dense[rows, self.index] = 1
        return dense

"""The dense matrix itself: the candidate that is at every site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc import ops
from structc.families.base import AbstractFamily
from structc.families.fits import check_tensors, refuse_weight
from structc.forms import PackedDense
from structc.records import Hyper, Refusal


@final
class Dense(AbstractFamily):
    """The weight as it is, multiplied by the fastest dense kernel known for the machine.

    Math:    y = x @ W.T + b.
    Shapes:  x (..., n);  weight (m, n), or (n, m) if stored transposed;  y (..., m).
    Cost:    flops = 2*rows*m*n;  params = m*n.
    Errors:  none: an exact rewrite, equal up to the order of summation.
    Source:  a packed weight (oneDNN, MKL) is a derived cache of the operator, not a parameter.

    >>> w, x = torch.randn(5, 3), torch.randn(7, 3)
    >>> torch.allclose(Dense(w)(x), x @ w.T, atol=1e-5)
    True
    """

    name: ClassVar[str] = "dense"

    def __init__(self, weight: Tensor, *, transposed: bool = False) -> None:
        shape = weight.shape[::-1] if transposed else weight.shape
        super().__init__(shape[1], shape[0])
        self.transposed = transposed
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        return ({},)

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> PackedDense:
        return PackedDense(in_features, out_features, activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        return cls(torch.empty(out_features, in_features, dtype=dtype))

    @classmethod
    def fit(cls, weight: Tensor, gram: Tensor | None = None) -> Self | Refusal:
        """The weight itself; the Gram does not matter."""
        check_tensors(f"{cls.__name__}.fit", weight, gram)
        refusal = refuse_weight(cls.name, weight, None)
        if refusal and refusal.code not in ("NONFINITE", "RANGE"):
            return refusal
        made = cls(weight)
        made.fit_error = 0.0
        return made

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        return 0.0

    def hyper(self) -> Hyper:
        return {}

    def factors(self) -> list[Tensor]:
        return [self.weight]

    def to_dense(self) -> Tensor:
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        return ops.dense(x, self.weight, self.bias, "", self.transposed)

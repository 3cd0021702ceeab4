"""Stand-ins for three families that are not merged yet: the same constructors, dense products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured
from structc.forms import Form
from structc.records import Hyper


class _Standin(AbstractStructured):
    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        return ()

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Form:
        raise NotImplementedError

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        raise NotImplementedError

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        raise NotImplementedError

    def hyper(self) -> Hyper:
        return {}

    def factors(self) -> list[Tensor]:
        return list(self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.to_dense().T


class Kronecker(_Standin):
    """A sum of Kronecker products."""

    name: ClassVar[str] = "kronecker"

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__(a.shape[2] * b.shape[2], a.shape[1] * b.shape[1])
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def to_dense(self) -> Tensor:
        return torch.stack([torch.kron(a, b) for a, b in zip(self.a, self.b)]).sum(0)


class BlockDiagonal(_Standin):
    """Blocks on a diagonal."""

    name: ClassVar[str] = "block_diagonal"

    def __init__(self, w: Tensor) -> None:
        super().__init__(w.shape[0] * w.shape[2], w.shape[0] * w.shape[1])
        self.w = nn.Parameter(w)

    def to_dense(self) -> Tensor:
        return torch.block_diag(*self.w)


class BlockSparse(_Standin):
    """Sparse blocks."""

    name: ClassVar[str] = "block_sparse"
    rows: Tensor
    columns: Tensor

    def __init__(self, values: Tensor, rows: Tensor, columns: Tensor, in_features: int) -> None:
        super().__init__(in_features, (len(rows) - 1) * values.shape[1])
        self.values = nn.Parameter(values)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def to_dense(self) -> Tensor:
        _, b, c = self.values.shape
        m = self.out_features
        out = torch.zeros(m // b, self.in_features // c, b, c, dtype=self.values.dtype)
        row = torch.repeat_interleave(torch.arange(m // b), self.rows.diff())
        out[row, self.columns] = self.values
        return out.permute(0, 2, 1, 3).reshape(m, self.in_features)

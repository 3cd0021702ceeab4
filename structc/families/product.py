"""Product: one structured map after another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractFamily, AbstractStructured, with_epilogue
from structc.families.composition import empty_parts, forms_of, in_turn, part_of, written
from structc.families.diagonal import Diagonal
from structc.families.fits import analytic
from structc.families.selection import Selection
from structc.forms import Tile
from structc.records import Hyper, Refusal


@final
class Product(AbstractStructured):
    """Structured maps in turn: a scaled transform of permuted inputs, say.

    Math:    M = M_p ... M_2 M_1.
    Shapes:  as the parts', each taking what the one before gives.
    Cost:    the sum of the parts'.
    Errors:  ValueError if the parts do not chain. ``fit`` is a Refusal: products are recognised
             (:func:`structc.recognize`), there is no general way to fit one.
    Source:  a rewrite is a concatenation of tile programs.

    >>> from structc.families import Diagonal, Transform
    >>> m = Product([Diagonal(torch.tensor([1.0, 2.0])), Transform("hadamard", 2)])
    >>> m.to_dense()
    tensor([[ 1.,  2.],
            [ 1., -2.]], grad_fn=<...>)
    """

    name: ClassVar[str] = "product"

    def __init__(self, parts: Sequence[AbstractFamily]) -> None:
        sizes = [(p.in_features, p.out_features) for p in parts]
        if not parts or any(a[1] != b[0] for a, b in itertools.pairwise(sizes)):
            raise ValueError(f"parts of sizes {sizes} do not follow each other")
        super().__init__(sizes[0][0], sizes[-1][1])
        self.parts = nn.ModuleList(parts)
        self._text = written([part_of(p) for p in parts])

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        program = in_turn(forms_of(hyper["parts"]))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        return cls(empty_parts(hyper["parts"], dtype))

    @classmethod
    @analytic
    def fit(cls, weight: Tensor, gram: Tensor | None = None, *, parts: str) -> Self | Refusal:
        """A Refusal, always.

        Args:
            weight, gram: as for any family.
            parts: their text.
        """
        reason = "products are recognised where they are exact, not fitted"
        return Refusal("", cls.name, "NO_FIT", reason)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        return math.nan  # nothing is fitted

    def hyper(self) -> Hyper:
        return {"parts": self._text}

    def factors(self) -> list[Tensor]:
        return [f for part in self._modules_in_turn() for f in part.factors()]

    def to_dense(self) -> Tensor:
        """The matrix; scales and choices are applied to it from both sides, not multiplied."""
        parts = self._modules_in_turn()
        simple = (Diagonal, Selection)
        heavy = next((k for k, p in enumerate(parts) if not isinstance(p, simple)), 0)
        dense = parts[heavy].to_dense()
        for part in reversed(parts[:heavy]):
            if isinstance(part, Diagonal):
                dense = dense * part.scale
            elif isinstance(part, Selection):
                wide = dense.new_zeros(len(dense), part.in_features)
                dense = wide.index_add(1, part.index, dense)
        for part in parts[heavy + 1 :]:
            if isinstance(part, Diagonal):
                dense = part.scale[:, None] * dense
            elif isinstance(part, Selection):
                dense = dense[part.index]
            else:
                following = part.to_dense()
                dtype = torch.promote_types(dense.dtype, following.dtype)
                dense = following.to(dtype) @ dense.to(dtype)
        return dense

    def _modules_in_turn(self) -> list[AbstractFamily]:
        return [p for p in self.parts if isinstance(p, AbstractFamily)]

"""Sum: structured maps beside each other, a block pattern and what is of low rank in the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.errors import InternalError
from structc.families.base import AbstractFamily, AbstractStructured, with_epilogue
from structc.families.composition import (
    beside,
    empty_parts,
    forms_of,
    part_of,
    read,
    written,
)
from structc.families.dense import Dense
from structc.families.fits import analytic, simulated
from structc.forms import Tile
from structc.numerics import weighted_error
from structc.records import Hyper, Refusal

SWEEPS, PROGRESS = 10, 2e-4


@final
class Sum(AbstractStructured):
    """Structured maps of one input, added: Monarch + low rank, block sparse + low rank.

    Math:    M = M_1 + M_2 + ... + M_p.
    Shapes:  as the parts', all of one size.
    Cost:    the sum of the parts'.
    Errors:  ValueError if the parts differ in size; a part that cannot be fitted is a Refusal.
    Source:  alternating fits, each part to what the others leave; on weights without structure a
             sum of Monarch and low rank beats both at equal parameters.

    >>> from structc.families import Diagonal, LowRank
    >>> w = torch.diag(torch.tensor([5.0, 6.0, 7.0])) + torch.ones(3, 3)
    >>> m = Sum.fit(w, parts="diagonal(3,3); low_rank(3,3,rank=1)")
    >>> m.to_dense().shape
    torch.Size([3, 3])
    """

    name: ClassVar[str] = "sum"
    finds_members: ClassVar[bool] = False

    def __init__(self, parts: Sequence[AbstractFamily]) -> None:
        sizes = {(p.in_features, p.out_features) for p in parts}
        if len(sizes) != 1:
            raise ValueError(f"parts of sizes {sorted(sizes)} cannot be added")
        super().__init__(*sizes.pop())
        self.parts = nn.ModuleList(parts)
        self._text = written([part_of(p) for p in parts])

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        program = beside(forms_of(hyper["parts"]))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        return cls(empty_parts(hyper["parts"], dtype))

    @classmethod
    @analytic
    def fit(cls, weight: Tensor, gram: Tensor | None = None, *, parts: str) -> Self | Refusal:
        """Alternate fits of the parts; a step that does not lower the error is not taken.

        Args:
            weight: ``(m, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``; None is the identity.
            parts: text of the parts, ``"monarch(64,64,in_blocks=4,out_blocks=4,rank=2);
                low_rank(64,64,rank=8)"``.
        """
        fits = _fits(parts, weight)
        if isinstance(fits, Refusal):
            return fits
        found = _alternate(weight, None, fits)
        if isinstance(found, Refusal) or gram is None:
            return found if isinstance(found, Refusal) else cls(found)
        aware = _alternate(weight, gram, fits)
        if isinstance(aware, Refusal):
            return aware
        return min((cls(found), cls(aware)), key=lambda made: made.error(weight, gram))

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        return simulated(cls, in_features, out_features, hyper)

    def hyper(self) -> Hyper:
        return {"parts": self._text}

    def factors(self) -> list[Tensor]:
        parts = [p for p in self.parts if isinstance(p, AbstractFamily)]
        return [f for part in parts for f in part.factors()]

    def to_dense(self) -> Tensor:
        parts = [p.to_dense() for p in self.parts if isinstance(p, AbstractFamily)]
        return torch.stack(parts).sum(0)


Fit = Callable[[Tensor, Tensor | None], AbstractFamily | Refusal]


def _fits(text: str, weight: Tensor) -> list[Fit] | Refusal:
    from structc.families import BY_NAME  # the table names this family too

    try:
        parts = read(text)
    except InternalError as e:
        return Refusal("", Sum.name, "PARTS", str(e))
    m, n = weight.shape
    for part in parts:
        if part.name not in BY_NAME or (part.out_features, part.in_features) != (m, n):
            return Refusal("", Sum.name, "PARTS", f"{part} is no family of {n} inputs, {m} outputs")
        names = BY_NAME[part.name].hyper_names()
        if set(part.hyper) != set(names) or part.name == Dense.name:
            return Refusal("", Sum.name, "PARTS", f"{part.name} takes {', '.join(names) or 'none'}")
    if not parts:
        return Refusal("", Sum.name, "PARTS", "a sum needs at least one part")

    def fit_of(name: str, hyper: Any) -> Fit:
        fit: Any = BY_NAME[name].fit  # type: ignore[attr-defined]
        return lambda w, c: fit(w, c, **hyper)

    return [fit_of(part.name, part.hyper) for part in parts]


def _alternate(
    w: Tensor, data: Tensor | None, fits: Sequence[Fit]
) -> list[AbstractFamily] | Refusal:
    parts: list[AbstractFamily] = []
    values: list[Tensor] = []
    for fit in fits:
        part = fit(w - sum(values, torch.zeros_like(w)), data)
        if isinstance(part, Refusal):
            return part
        parts.append(part)
        values.append(part.to_dense().detach())
    error = weighted_error(w, sum(values, torch.zeros_like(w)), data)
    for _ in range(SWEEPS if len(fits) > 1 else 0):
        before = error
        for at, fit in enumerate(fits):
            others = sum((v for i, v in enumerate(values) if i != at), torch.zeros_like(w))
            part = fit(w - others, data)
            if isinstance(part, Refusal):
                continue
            value = part.to_dense().detach()
            now = weighted_error(w, others + value, data)
            if now < error:
                parts[at], values[at], error = part, value, now
        if error > before * (1 - PROGRESS):
            break
    return parts

"""What recognisers read and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structc.errors import ConfigError
from structc.families.base import AbstractFamily
from structc.recognition.scaling import Balanced, balanced

Array = NDArray[Any]
UNITS = {
    torch.float64: 2.0**-53,
    torch.complex128: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.complex64: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.complex32: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
"""Unit roundoff of the dtypes that weights are stored in."""
NARROWER = {
    torch.float64: (torch.float32, torch.float16, torch.bfloat16),
    torch.float32: (torch.float16, torch.bfloat16),
}
"""Dtypes whose rounding the values of a wider one may carry."""
FEW_LEVELS = 15
"""Values that are all small multiples of one power of two are exact, not rounded."""
EXACT = 1e-12
"""Least relative residual that is asked for: what products of factors in float64 keep."""
SAFE_EXPONENT = 300
"""Matrices whose largest entry lies beyond ``2**+-300`` are scaled before they are looked at."""


@dataclass(frozen=True)
class Recognition:
    """A structure that a matrix has, with the factors that reproduce it.

    Attributes:
        name: ``"dft"``, ``"permuted dct2"``, ``"circulant"``, ``"low_rank"``, ...
        family: the factors, float64 or complex128; ``family.to_dense()`` is the matrix.
        residual: ``||W - M||_F / ||W||_F`` of the factors as they stand.
        max_error: the largest ``|W - M|`` of an entry.
        tolerance: what the residual was held against; it follows from the rounding of W.
        words: what was found, in a sentence.
    """

    name: str
    family: AbstractFamily
    residual: float
    max_error: float
    tolerance: float
    words: str


@dataclass(frozen=True)
class Proposal:
    """A structure that a recogniser believes in; it counts by its residual only."""

    name: str
    family: AbstractFamily
    words: str


@dataclass(frozen=True)
class Matrix:
    """A finite, non-empty matrix as recognisers see it.

    Attributes:
        values: ``(m, n)``, float64 or complex128, scaled so that squares neither overflow nor
            vanish: the weight is ``values * 2**exponent``.
        exponent: 0 unless the scale is extreme.
        unit: relative rounding error of the entries as they were stored.
    """

    values: Array
    exponent: int
    unit: float

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        m, n = self.values.shape
        return int(m), int(n)

    @cached_property
    def norm(self) -> float:
        """Frobenius norm of the values."""
        return float(np.linalg.norm(self.values))

    @cached_property
    def largest(self) -> float:
        """max |W|."""
        return float(np.abs(self.values).max())

    @property
    def tolerance(self) -> float:
        """Residual that a structure may leave.

        Pure rounding leaves about 0.4 units. Narrow dtypes may leave about twice that. Entries of
        float32 are often results of sums that rounded on their way, so they may leave more.
        """
        return max(EXACT, self.unit if self.unit > 1e-6 else 32 * self.unit)

    @property
    def slack(self) -> float:
        """By how much single entries of order one may differ where they should be equal."""
        return 4 * self.tolerance

    @property
    def noise(self) -> float:
        """What rounding may have done to an entry."""
        return self.slack * self.largest

    @property
    def negligible(self) -> float:
        """Entries up to this size count as zero: narrow dtypes round zeros to zeros too."""
        return self.largest * min(self.slack, 4 * 2.0**-24)

    @cached_property
    def balanced(self) -> Balanced:
        """Scales of rows and columns taken off, for those who look at what is left."""
        return balanced(self.values)

    def transposed(self) -> Matrix:
        """W^T under the same rounding."""
        return Matrix(self.values.T, self.exponent, self.unit)


Recogniser = Callable[[Matrix], Iterator[Proposal]]
"""Proposals for a matrix, most specific first; most matrices get none, at little cost."""


def read(weight: Tensor) -> Matrix | None:
    """The values of a weight in float64; None if nothing can be exact about them.

    >>> read(torch.ones(2, 3)).shape
    (2, 3)
    >>> read(torch.full((2, 2), torch.nan)) is None
    True
    """
    if not isinstance(weight, Tensor):
        raise ConfigError(
            f"recognize takes a tensor, got {type(weight).__name__}",
            hint="for a layer pass layer.weight, for an array torch.as_tensor(array)",
        )
    if weight.dim() != 2 or weight.layout != torch.strided or weight.is_meta:
        what = f"{weight.dim()}-D, {weight.layout}, on {weight.device}"
        raise ConfigError(
            f"recognize takes one matrix with values, got a tensor that is {what}",
            hint=_what_to_pass(weight),
        )
    stored = weight.detach().cpu().resolve_conj().resolve_neg()
    if stored.numel() == 0:
        return None
    if not (stored.is_floating_point() or stored.is_complex()):
        return _integers(stored)
    if stored.dtype not in UNITS or not bool(torch.isfinite(stored).all()):
        return None
    unit = stored_unit(stored)
    values = stored.to(torch.complex128 if stored.is_complex() else torch.float64).numpy()
    if np.iscomplexobj(values) and not values.imag.any():
        values = values.real
    return _scaled(np.ascontiguousarray(values), unit)


def _what_to_pass(weight: Tensor) -> str:
    """How to make a matrix with values of a tensor that is none."""
    if weight.is_meta:
        return "a meta tensor holds no values: load the weight onto the CPU first"
    if weight.layout != torch.strided:
        return "pass weight.to_dense() of a sparse tensor"
    if weight.dim() < 2:
        return "recognize reads no vectors: pass the weight of a layer, not its bias"
    return "pass weight.flatten(1) of a convolution, and each matrix of a stack by itself"


def _integers(stored: Tensor) -> Matrix | None:
    values = stored.to(torch.float64)
    if not torch.equal(values.to(stored.dtype), stored):
        return None
    return _scaled(values.numpy(), UNITS[torch.float64])


def _scaled(values: Array, unit: float) -> Matrix:
    largest = max(float(np.abs(values.real).max()), float(np.abs(values.imag).max()))
    exponent = int(np.frexp(largest)[1]) if largest else 0
    if abs(exponent) <= SAFE_EXPONENT:
        return Matrix(values, 0, unit)
    return Matrix(shifted(values, -exponent), exponent, unit)


def shifted(values: Array, exponent: int) -> Array:
    """``values * 2**exponent``, exact also where ``2**exponent`` is no float.

    >>> float(shifted(np.array(0.75), 1024) > 1e308)
    1.0
    """
    if np.iscomplexobj(values):
        return np.asarray(np.ldexp(values.real, exponent) + 1j * np.ldexp(values.imag, exponent))
    return np.asarray(np.ldexp(values, exponent))


def stored_unit(stored: Tensor) -> float:
    """Unit roundoff of the narrowest dtype that holds all entries.

    A float32 checkpoint of bfloat16 values carries bfloat16's rounding. Values on a few levels of
    one power of two (signs, masks, small integers) say nothing about rounding: they count as exact.

    >>> x = torch.randn(50, 50)
    >>> [stored_unit(t) for t in (x, x.bfloat16().float(), x.sign())] == [2**-24, 2**-8, 2**-53]
    True
    """
    if stored.is_complex():
        return UNITS[stored.dtype]
    unit = UNITS[stored.dtype]
    for dtype in NARROWER.get(stored.dtype, ()):
        if torch.equal(stored.to(dtype).to(stored.dtype), stored):
            unit = max(unit, UNITS[dtype])
    if unit <= UNITS[torch.float32]:
        return unit
    few = all(_on_few_levels(part) for part in (stored[:1], stored))  # most fail on the first row
    return UNITS[torch.float64] if few else unit


def _on_few_levels(stored: Tensor) -> bool:
    wide = stored.double()
    present = wide[wide != 0].abs()
    if not present.numel():
        return True
    levels = wide / 2.0 ** (np.frexp(float(present.min()))[1] - 4)  # the smallest in 8 .. 15
    return torch.equal(levels.round(), levels) and float(levels.abs().max()) <= 16 * FEW_LEVELS

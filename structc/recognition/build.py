"""Factors found as arrays become families."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from structc.families import BlockSparse, Diagonal, Product, Selection, Transform
from structc.families.base import AbstractFamily
from structc.recognition import kinds
from structc.recognition.base import Proposal, shifted

Array = NDArray[Any]
WIDE = torch.float64


def tensor(values: Array) -> Tensor:
    """A tensor of its own memory."""
    return torch.from_numpy(np.array(values, order="C"))


def selection(index: Array, in_features: int) -> list[AbstractFamily]:
    """y[i] = x[index[i]], as no part at all where that is the identity."""
    if len(index) == in_features and np.array_equal(index, np.arange(in_features)):
        return []
    return [Selection(tensor(index.astype(np.int64)), in_features, WIDE)]


def diagonal(scale: Array) -> list[AbstractFamily]:
    """y = scale * x, as no part at all where every scale is one."""
    return [] if np.all(scale == 1) else [Diagonal(tensor(scale))]


def product(parts: Sequence[AbstractFamily]) -> AbstractFamily:
    """The parts one after the other; a single part stands for itself."""
    return parts[0] if len(parts) == 1 else Product(list(parts))


def rescaled(family: AbstractFamily, exponent: int) -> AbstractFamily:
    """``2**exponent`` times a family that is linear in each of its parameters."""
    for parameter in family.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.data = tensor(shifted(parameter.detach().numpy(), exponent))
            return family
    scale = shifted(np.ones(family.out_features), exponent)
    return product([family, *diagonal(scale)])


def inverse(index: Array) -> Array:
    """The inverse of a permutation."""
    back = np.empty_like(index)
    back[index] = np.arange(len(index))
    return back


def is_permutation(index: Array, n: int) -> bool:
    """Whether index holds each of 0 .. n-1 once."""
    return len(index) == n and bool((np.bincount(index, minlength=n) == 1).all())


@dataclass(frozen=True)
class Scrambled:
    """A fixed transform between unknown orders: ``W[i, j] = r[i] * T[rows[i], columns[j]] * s[j]``.

    Attributes:
        kind, size: of T.
        rows, columns: int64, ``(m,)`` and ``(n,)``; no column twice.
        r, s: real or complex, ``(m,)`` and ``(n,)``.
    """

    kind: str
    size: int
    rows: Array
    columns: Array
    r: Array
    s: Array

    def transposed(self) -> Scrambled | None:
        """The same of W^T; None for kinds whose transpose is no kind."""
        other = kinds.transposed(self.kind, self.size)
        if other is None or len(np.unique(self.rows)) < len(self.rows):
            return None
        kind, left, right = other
        r, s = self.s * left[self.columns], self.r * right[self.rows]
        return Scrambled(kind, self.size, self.columns, self.rows, r, s)

    def simplified(self, slack: float) -> Scrambled:
        """Scales that are all equal joined into r, those that are nearly +-1 made so."""
        r, s = self.r, self.s
        r = r.real if np.iscomplexobj(r) and np.abs(r.imag).max() <= slack * np.abs(r).max() else r
        s = s.real if np.iscomplexobj(s) and np.abs(s.imag).max() <= slack * np.abs(s).max() else s
        s_mean, r_mean = s.mean(), r.mean()
        if s_mean and np.abs(s / s_mean - 1).max() <= slack:
            r, r_mean, s = r * s_mean, r_mean * s_mean, np.ones(len(s))
        if r_mean and np.abs(r / r_mean - 1).max() <= slack:
            one = np.all(s == 1)
            r, s = (np.full(len(r), r_mean), s) if one else (np.ones(len(r)), s * r_mean)
        return replace(self, r=_snapped(r, slack), s=_snapped(s, slack))

    def proposal(self, slack: float) -> Proposal:
        """The product of selections, diagonals and the transform, trivial ones left out."""
        this = self.simplified(slack)
        transform = Transform(this.kind, this.size, WIDE)
        inputs, outputs = transform.in_features, transform.out_features
        parts = diagonal(this.s)
        if is_permutation(this.columns, inputs):
            parts += selection(inverse(this.columns), inputs)
        else:
            parts.append(embedding(this.columns, inputs))
        parts += [transform, *selection(this.rows, outputs), *diagonal(this.r)]
        return Proposal(this.name(), product(parts), this.words())

    @property
    def natural(self) -> bool:
        """Whether rows and columns stand in the order of the transform."""
        return bool((np.diff(self.rows) > 0).all() and (np.diff(self.columns) > 0).all())

    def name(self) -> str:
        """``"dct2"`` where the orders are the natural ones, ``"permuted dct2"`` else."""
        return self.kind if self.natural else f"permuted {self.kind}"

    def words(self) -> str:
        """What was found, in a sentence."""
        told = []
        for index, scale, what in ((self.rows, self.r, "rows"), (self.columns, self.s, "columns")):
            if not (np.diff(index) > 0).all():
                told.append(f"permuted {what}")
            elif len(index) != index[-1] + 1:
                told.append(f"a choice of {what}")
            if not np.all(scale == 1):
                told.append(_of_scales(scale, what))
        text = f"the {self.kind} of size {self.size}"
        return f"{text} with {', '.join(told)}" if told else text


def _of_scales(scale: Array, what: str) -> str:
    if np.all(scale == scale[0]):
        return "one scale"
    if np.all(np.abs(np.abs(scale) - 1) < 1e-6):
        return f"{'phases' if np.iscomplexobj(scale) else 'signs'} of {what}"
    return f"scaled {what}"


def _snapped(scale: Array, slack: float) -> Array:
    """Real scales within slack of +-1 become +-1, if all are."""
    if np.iscomplexobj(scale) or np.abs(np.abs(scale) - 1).max() > slack:
        return scale
    return np.sign(scale)


def embedding(columns: Array, size: int) -> AbstractFamily:
    """y[columns[j]] = x[j], zero elsewhere: ``(size, n)``."""
    order = np.argsort(columns)
    starts = np.zeros(size + 1, dtype=np.int64)
    starts[1:] = np.cumsum(np.bincount(columns, minlength=size))
    ones = torch.ones(len(columns), 1, 1, dtype=torch.float64)
    return BlockSparse(ones, tensor(starts), tensor(order.astype(np.int64)), len(columns))

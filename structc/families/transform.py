"""Named transforms: Fourier, cosine, sine, Hartley, Hadamard, Haar; nothing to fit or to store."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Self, final

import torch
from torch import Tensor

from structc import forms
from structc.families.base import AbstractStructured, with_epilogue
from structc.families.fits import analytic
from structc.forms import COMPLEX, TRANSFORMS, Tile
from structc.records import Hyper, Refusal
from structc.spectral_steps import POWERS


@final
class Transform(AbstractStructured):
    """A fixed matrix that a fast algorithm multiplies by.

    Math:    kind "dft", "idft": torch.fft's, complex; "rdft": the real parts of the first n // 2 +
             1 rows of the DFT, then the imaginary parts; "irdft": its left inverse; "hartley":
             cos + sin; "dct1" .. "dst4": scipy.fft's, not normalised; "hadamard": Sylvester's, 1
             and -1; "haar": orthonormal.
    Shapes:  x (..., n);  no factors;  y (..., n); 2 (n // 2 + 1) on the far side of rdft and irdft.
    Cost:    flops = about 5*rows*n*log2(n);  params = 0.
    Errors:  none; other sizes than the kind has are Refusals of fit.
    Source:  Makhoul 1980, A fast cosine transform (dct2, dct3); Van Loan 1992.

    >>> m = Transform("hadamard", 4)
    >>> m(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    tensor([[10., -2., -4.,  0.]])
    """

    name: ClassVar[str] = "transform"
    scales: ClassVar[bool] = False
    like: Tensor

    def __init__(self, kind: str, n: int, dtype: torch.dtype | None = None) -> None:
        step = forms.Transform(kind, n)
        super().__init__(step.in_features, step.out_features)
        self.kind, self.n = kind, n
        self.register_buffer("like", torch.empty(0, dtype=dtype))

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        kind = str(hyper["kind"])
        n = out_features if kind == "irdft" else in_features
        program = Tile((forms.Transform(kind, n),))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        kind = str(hyper["kind"])
        return cls(kind, out_features if kind == "irdft" else in_features, dtype)

    @classmethod
    @analytic
    def fit(cls, weight: Tensor, gram: Tensor | None = None, *, kind: str) -> Self | Refusal:
        """The transform of the weight's size: there is nothing to choose.

        Args:
            weight: ``(out, in)`` of the kind's sizes.
            gram: does not matter.
            kind: one of :data:`structc.forms.TRANSFORMS`.
        """
        m, n = weight.shape
        if kind not in TRANSFORMS:
            known = ", ".join(TRANSFORMS)
            return Refusal("", cls.name, "KIND", f"{kind!r} is none of {known}")
        points = m if kind == "irdft" else n
        step = forms.Transform(kind, points)
        power = points & (points - 1) == 0 or kind not in POWERS
        if (step.out_features, step.in_features) != (m, n) or not power:
            return Refusal("", cls.name, "SIZE", f"there is no {kind} of {m} x {n}")
        if kind in COMPLEX:
            return Refusal("", cls.name, "DTYPE", f"{kind} is complex, the weight is real")
        return cls(kind, points, weight.dtype)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        """The error of a fixed matrix F against one of size 1: sqrt(1 + |F|^2 / (m n))."""
        kind = str(hyper["kind"])
        fixed = matrix(kind, out_features if kind == "irdft" else in_features)
        return math.sqrt(1 + float(fixed.abs().square().mean()))

    def hyper(self) -> Hyper:
        return {"kind": self.kind}

    def factors(self) -> list[Tensor]:
        return []

    def to_dense(self) -> Tensor:
        dense = matrix(self.kind, self.n)
        complex_ = dense.is_complex() and not self.like.is_complex()
        wide = torch.complex128 if self.like.dtype == torch.float64 else torch.complex64
        return dense.to(self.like.device, wide if complex_ else self.like.dtype)


def matrix(kind: str, n: int) -> Tensor:
    """The matrix itself in float64 or complex128, ``(out, in)``, from its formula.

    Angles are reduced as whole numbers, so each entry is right to the last bits at any size.

    >>> matrix("dct2", 2)
    tensor([[ 2.0000,  2.0000],
            [ 1.4142, -1.4142]], dtype=torch.float64)
    """
    return _MATRICES[kind](n)


def _angles(numerator: Tensor, denominator: int) -> Tensor:
    """2 pi * numerator / denominator, with the numerator reduced first."""
    return (numerator % denominator).double() * (2 * math.pi / denominator)


def _grid(n: int, rows: int | None = None) -> tuple[Tensor, Tensor]:
    return torch.arange(n if rows is None else rows)[:, None], torch.arange(n)[None]


def _fourier(n: int, rows: int | None = None) -> Tensor:
    k, j = _grid(n, rows)
    return _angles(k * j, n)


def _dft(n: int) -> Tensor:
    angle = _fourier(n)
    return torch.complex(angle.cos(), -angle.sin())


def _hartley(n: int) -> Tensor:
    angle = _fourier(n)
    return angle.cos() + angle.sin()


def _rdft(n: int) -> Tensor:
    angle = _fourier(n, n // 2 + 1)
    return torch.cat([angle.cos(), -angle.sin()])


def _irdft(n: int) -> Tensor:
    angle = _fourier(n, n // 2 + 1).T
    counts = torch.full((n // 2 + 1,), 2.0, dtype=torch.float64)
    counts[0] = 1
    if n % 2 == 0:
        counts[-1] = 1
    sines = -angle.sin()
    return torch.cat([counts * angle.cos(), counts * sines], 1) / n


def _cosines(number: int) -> Callable[[int], Tensor]:
    def made(n: int) -> Tensor:
        k, j = _grid(n)
        match number:
            case 1:
                dense = 2 * _angles(k * j, 2 * (n - 1)).cos() if n > 1 else torch.full((1, 1), 2.0)
                dense = dense.double()
                if n > 1:
                    dense[:, 0] /= 2
                    dense[:, -1] /= 2
            case 2:
                dense = 2 * _angles(k * (2 * j + 1), 4 * n).cos()
            case 3:
                dense = 2 * _angles(j * (2 * k + 1), 4 * n).cos()
                dense[:, 0] /= 2
            case _:
                dense = 2 * _angles((2 * k + 1) * (2 * j + 1), 8 * n).cos()
        return dense

    return made


def _sines(number: int) -> Callable[[int], Tensor]:
    def made(n: int) -> Tensor:
        k, j = _grid(n)
        match number:
            case 1:
                dense = 2 * _angles((k + 1) * (j + 1), 2 * (n + 1)).sin()
            case 2:
                dense = 2 * _angles((k + 1) * (2 * j + 1), 4 * n).sin()
            case 3:
                dense = 2 * _angles((2 * k + 1) * (j + 1), 4 * n).sin()
                dense[:, -1] /= 2
            case _:
                dense = 2 * _angles((2 * k + 1) * (2 * j + 1), 8 * n).sin()
        return dense

    return made


def _hadamard(n: int) -> Tensor:
    dense = torch.ones(1, 1, dtype=torch.float64)
    while len(dense) < n:
        dense = torch.cat([torch.cat([dense, dense], 1), torch.cat([dense, -dense], 1)])
    return dense


def _haar(n: int) -> Tensor:
    rows = [torch.full((1, n), n**-0.5, dtype=torch.float64)]
    count = 1
    while count < n:
        width = n // count
        wave = torch.ones(width, dtype=torch.float64)
        wave[width // 2 :] = -1
        rows.append(torch.kron(torch.eye(count, dtype=torch.float64), wave * width**-0.5))
        count *= 2
    return torch.cat(rows)


_MATRICES: dict[str, Callable[[int], Tensor]] = {
    "dft": _dft,
    "idft": lambda n: _dft(n).conj().resolve_conj() / n,
    "hartley": _hartley,
    "hadamard": _hadamard,
    "haar": _haar,
    "rdft": _rdft,
    "irdft": _irdft,
    **{f"dct{i}": _cosines(i) for i in (1, 2, 3, 4)},
    **{f"dst{i}": _sines(i) for i in (1, 2, 3, 4)},
}

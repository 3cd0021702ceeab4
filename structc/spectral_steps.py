"""Steps that fast transforms compute: convolutions, small displacement rank, named transforms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from structc.step import Alike, Written


@dataclass(frozen=True)
class Flip(Alike):
    """y[i] = x[n - 1 - i]."""

    n: int
    word: ClassVar[str] = "flip"
    weights: ClassVar[int] = 0


@dataclass(frozen=True)
class Convolve(Written):
    """A linear map that is a convolution: what the FFT is for.

    Math:    y_i = sum_{l < taps} w[l] * x[i + shift - l], where x is zero outside 0 <= j < n, or
             periodic (1). As a matrix: W[i, j] = w[i - j + shift].
    Shapes:  x (..., n); w (taps,); y (..., m).
    Cost:    flops = min(2 m taps, 5 N log2 N + 3 N) a row: directly, or two real FFTs of N points
             (2.5 N log2 N each) and N / 2 complex products; params = taps.
    Source:  Golub and Van Loan, Matrix Computations, 4th ed., 4.7.7 and 4.8.2.

    >>> step = Convolve.circulant(4096)
    >>> str(step), step.fft_size, step.params, step.flops
    ('convolve(4096,4096,4096,0,1)', 4096, 4096, 258048)
    >>> Convolve.toeplitz(300, 200).fft_size  # 499 diagonals
    500
    >>> str(Convolve(1024, 1024, 5, 2, 0))  # a centred filter of five taps
    'convolve(1024,1024,5,2,0)'
    """

    n: int
    m: int
    taps: int
    shift: int
    periodic: int
    word: ClassVar[str] = "convolve"
    weights: ClassVar[int] = 1

    @staticmethod
    def circulant(n: int) -> Convolve:
        """W[i, j] = w[(i - j) mod n]: the taps are the first column."""
        return Convolve(n, n, n, 0, 1)

    @staticmethod
    def toeplitz(n: int, m: int) -> Convolve:
        """W[i, j] = w[i - j + n - 1], (m, n): the first row backwards, then down the column."""
        return Convolve(n, m, n + m - 1, n - 1, 0)

    @property
    def in_features(self) -> int:
        return self.n

    @property
    def out_features(self) -> int:
        return self.m

    @property
    def diagonals(self) -> tuple[int, int]:
        """The least and the largest i - j that a tap stands for; inside W unless periodic."""
        least, most = -self.shift, self.taps - 1 - self.shift
        if self.periodic:
            return least, most
        return max(least, 1 - self.n), min(most, self.m - 1)

    @property
    def fft_size(self) -> int:
        """Points of the FFT: the period where that is fast, else enough that nothing wraps."""
        n, m = self.n, self.m
        if self.periodic and m <= n == fast_size(n):
            return n
        least, most = (1 - n, m - 1) if self.periodic else self.diagonals
        return fast_size(max(n, m, n + most, m - least))

    @property
    def params(self) -> int:
        return self.taps

    @property
    def flops(self) -> int:
        return min(2 * self.m * self.taps, _fft_flops(self.fft_size) + 3 * self.fft_size)


@dataclass(frozen=True)
class Displace(Alike):
    """A matrix of displacement rank r: ``sum_q K(Z_1, w1_q) K(Z_-1, w2_q)^T``.

    K(Z_f, g) has the columns g, Z g, Z^2 g, ... with Z the down shift and f in its corner: a
    circulant for f = 1, a skew-circulant for f = -1.

    Shapes:  x (..., n); w1, w2 (r, n); y (..., n).
    Cost:    flops = (2 r + 2) complex FFTs of n points, about 5 n log2 n each, and 16 r n; params =
             2 r n.
    Source:  Sindhwani et al. 2015, arXiv:1510.01722; Pan 2001, Structured Matrices.
    """

    n: int
    r: int
    word: ClassVar[str] = "displace"
    weights: ClassVar[int] = 2

    @property
    def params(self) -> int:
        return 2 * self.r * self.n

    @property
    def flops(self) -> int:
        return (self.r + 2) * _fft_flops(self.n) + 16 * self.r * self.n


TRANSFORMS = (
    "dft", "idft", "hartley", "hadamard", "haar", "rdft", "irdft",
    "dct1", "dct2", "dct3", "dct4", "dst1", "dst2", "dst3", "dst4",
)  # fmt: skip
POWERS = ("hadamard", "haar")
"""Transforms whose sizes are powers of two."""
COMPLEX = ("dft", "idft")
"""Transforms whose outputs are complex."""


@dataclass(frozen=True)
class Transform(Written):
    """A named transform of n points, one of :data:`TRANSFORMS`; no weights.

    Math:    dft, idft: as torch.fft, complex. rdft: the real parts of the first n // 2 + 1 outputs
             of the dft, then their imaginary parts; irdft maps them back. hartley: sum x_j (cos +
             sin)(2 pi i j / n). dct1 .. dst4: as scipy.fft, not normalised. hadamard: Sylvester's,
             entries 1 and -1; haar: orthonormal.
    Shapes:  x (..., n); y (..., n); 2 (n // 2 + 1) features on the far side of rdft and irdft.
    Cost:    flops = 5 n log2 n at most a row; no params.
    """

    kind: str
    n: int
    word: ClassVar[str] = "transform"
    weights: ClassVar[int] = 0

    @property
    def in_features(self) -> int:
        return 2 * (self.n // 2 + 1) if self.kind == "irdft" else self.n

    @property
    def out_features(self) -> int:
        return 2 * (self.n // 2 + 1) if self.kind == "rdft" else self.n

    @property
    def flops(self) -> int:
        return _fft_flops(self.n)


def _fft_flops(size: int) -> int:
    return round(5 * size * math.log2(max(2, size)))


def fast_size(least: int) -> int:
    """The smallest 2^a 3^b 5^c that is no smaller: sizes at which every FFT library is fast."""
    best = 1 << max(0, least - 1).bit_length()
    five = 1
    while five < best:
        odd = five
        while odd < best:
            best = min(best, odd << max(0, -(-least // odd) - 1).bit_length())
            odd *= 3
        five *= 5
    return best

"""Steps of tile programs: what can be done to the features of one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from structc.spectral_steps import Convolve, Displace, Flip, Transform
from structc.step import Alike, Written

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
"""Elementwise functions that an epilogue may carry; ``gelu`` is the exact one (erf)."""


@dataclass(frozen=True)
class Pattern(Written):
    """Where a factor may be other than zero: ``I_a (x) 1_{b x c} (x) I_d``."""

    a: int
    b: int
    c: int
    d: int
    weights: ClassVar[int] = 1

    @property
    def in_features(self) -> int:
        return self.a * self.c * self.d

    @property
    def out_features(self) -> int:
        return self.a * self.b * self.d

    @property
    def flops(self) -> int:
        return 2 * self.a * self.b * self.c * self.d


@dataclass(frozen=True)
class Block(Pattern):
    """A Kronecker-sparse factor ``I_a (x) 1_{b x c} (x) I_d``: the general block pattern.

    Math:    y[al, be, de] = sum_ga w[al, be, ga, de] * x[al, ga, de].
    Shapes:  x (..., a*c*d);  w (a, b, c, d);  y (..., a*b*d).
    Cost:    flops = 2*a*b*c*d a row; params = a*b*c*d.
    Source:  Gonon et al. 2024, arXiv:2405.15013. A dense factor is ``a = d = 1``.
    """

    word: ClassVar[str] = "block"

    @property
    def params(self) -> int:
        return self.a * self.b * self.c * self.d


@dataclass(frozen=True)
class Shared(Pattern):
    """A Kronecker factor ``I_a (x) w (x) I_d``: one block, used everywhere.

    Math:    y[al, be, de] = sum_ga w[be, ga] * x[al, ga, de].
    Shapes:  x (..., a*c*d);  w (b, c);  y (..., a*b*d).
    Cost:    flops = 2*a*b*c*d a row; params = b*c.
    Source:  Van Loan 2000, The ubiquitous Kronecker product.
    """

    word: ClassVar[str] = "shared"

    @property
    def params(self) -> int:
        return self.b * self.c


@dataclass(frozen=True)
class Repeat(Pattern):
    """``I_a (x)`` one factor: a Kronecker-sparse factor whose a blocks are one.

    Math:    y[al, be, de] = sum_ga w[be, ga, de] * x[al, ga, de].
    Shapes:  x (..., a*c*d);  w (b, c, d);  y (..., a*b*d).
    Cost:    flops = 2*a*b*c*d a row; params = b*c*d.
    Source:  the tied levels of Dao et al. 2019, arXiv:1903.05895.
    """

    word: ClassVar[str] = "repeat"

    @property
    def params(self) -> int:
        return self.b * self.c * self.d


@dataclass(frozen=True)
class Permute(Written):
    """The perfect shuffle that transposes ``(p, q)``: y[j, i] = x[i, j].  x (..., p*q)."""

    p: int
    q: int
    word: ClassVar[str] = "permute"
    weights: ClassVar[int] = 0

    @property
    def in_features(self) -> int:
        return self.p * self.q

    out_features = in_features


@dataclass(frozen=True)
class Bias(Alike):
    """y = x + w, with w (n,)."""

    n: int
    word: ClassVar[str] = "bias"
    weights: ClassVar[int] = 1


@dataclass(frozen=True)
class Act(Alike):
    """y = fn(x), elementwise over n features; fn is one of :data:`ACTIVATIONS`."""

    fn: str
    n: int
    word: ClassVar[str] = "act"
    weights: ClassVar[int] = 0


@dataclass(frozen=True)
class Add(Alike):
    """y = x + z, with z (..., n) input ``index`` of the program; 0 is what it starts from.

    A residual connection.
    """

    n: int
    index: int
    word: ClassVar[str] = "add"
    weights: ClassVar[int] = 0


@dataclass(frozen=True)
class Norm(Alike):
    """Normalisation over the n features of a token.

    Math:    layer: y = (x - mean x) / sqrt(var x + eps) * w1 + w2;  rms: y = x / sqrt(mean x^2 +
             eps) * w1.
    Shapes:  x (..., n);  w1, w2 (n,).
    Source:  Ba et al. 2016, arXiv:1607.06450; Zhang and Sennrich 2019, arXiv:1910.07467.

    ``eps`` is text, so that a program is equal to the one that it was read from.
    """

    n: int
    kind: str
    eps: str
    word: ClassVar[str] = "norm"

    @property
    def weights(self) -> int:
        """Weight and bias, or a weight alone."""
        return 2 if self.kind == "layer" else 1


@dataclass(frozen=True)
class Mul(Alike):
    """y = x * z elementwise, with z (..., n) what slot ``index`` holds: the gate of an MLP."""

    n: int
    index: int
    word: ClassVar[str] = "mul"
    weights: ClassVar[int] = 0


@dataclass(frozen=True)
class Keep(Alike):
    """Slot ``index`` holds x from here on; x goes on unchanged."""

    n: int
    index: int
    word: ClassVar[str] = "keep"
    weights: ClassVar[int] = 0


@dataclass(frozen=True)
class Load(Written):
    """y = z, with z (..., n) what slot ``index`` holds: x is dropped, a second branch begins."""

    n: int
    index: int
    word: ClassVar[str] = "load"
    weights: ClassVar[int] = 0

    @property
    def out_features(self) -> int:
        return self.n


@dataclass(frozen=True)
class Select(Written):
    """y[i] = x[w[i]], with w (m,) of int64: any permutation or choice of the n features."""

    m: int
    n: int
    word: ClassVar[str] = "select"
    weights: ClassVar[int] = 1

    @property
    def in_features(self) -> int:
        return self.n

    @property
    def out_features(self) -> int:
        return self.m


@dataclass(frozen=True)
class Sparse(Written):
    """A block-sparse matrix (m, n): ``nnz`` blocks of (b, c), sorted by row of blocks.

    Math:    y[row of e] += w1[e] x[w3[e] * c : (w3[e] + 1) * c] for e in w2[row] .. w2[row + 1].
    Shapes:  x (..., n); w1 (nnz, b, c), w2 (m / b + 1,) and w3 (nnz,) of int64; y (..., m).
    Cost:    flops = 2*nnz*b*c a row; params = nnz*b*c.
    Source:  the BSR format of scipy.sparse (data, indptr, indices).
    """

    m: int
    n: int
    b: int
    c: int
    nnz: int
    word: ClassVar[str] = "sparse"
    weights: ClassVar[int] = 3

    @property
    def in_features(self) -> int:
        return self.n

    @property
    def out_features(self) -> int:
        return self.m

    @property
    def params(self) -> int:
        return self.nnz * self.b * self.c


NORMS = ("layer", "rms")
SLOTS = 16
"""Inputs and kept values that a program may have together."""
SPECTRAL = (Convolve, Displace, Flip, Transform)
"""Steps that no emitted kernel serves: libraries of transforms do."""
Step = (
    Block | Shared | Repeat | Permute | Bias | Act | Add | Norm | Mul | Keep | Load | Select
    | Sparse | Flip | Convolve | Displace | Transform
)  # fmt: skip
STEPS: dict[str, type[Step]] = {s.word: s for s in Step.__args__}

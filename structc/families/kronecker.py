"""Kronecker sums: few small factors, each used everywhere in the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, balanced, with_epilogue
from structc.families.fits import analytic, gaussian_tail, refuse_grid, refuse_rank
from structc.families.low_rank import leading
from structc.families.solves import (
    RIDGES,
    Factors,
    conjugate,
    damped_inverse,
    damped_solve,
    descend,
)
from structc.forms import Shared, Tile
from structc.records import Hyper, Refusal

FRACTIONS = (0.5, 0.25)
"""Of the dense products: the factors are small, but each is used many times."""
SWEEPS, FEW, LARGE = 10, 1, 2048
"""Sweeps of a fit; one above LARGE x LARGE, where it takes a quarter of a minute."""
JOINT = 1024
"""Unknowns a row up to which a half-sweep is solved exactly."""
TURNS = 4
"""Conjugate-gradient steps of a half-sweep; each lowers the error."""


@final
class Kronecker(AbstractStructured):
    """M = sum_t A_t (x) B_t.

    Math:    Y = sum_t A_t X B_t^T, with x as X (n1, n2) and y as Y (m1, m2).
    Shapes:  x (..., n1*n2);  a (R, m1, n1), held as (m1, n1, R);  b (R, m2, n2);
             y (..., m1*m2).
    Cost:    flops = 2*rows*R*m2*n1*(n2 + m1);  params = R*(m1*n1 + m2*n2).
    Errors:  none; sizes that n1 and m1 do not divide, terms outside 1..min(m1*n1, m2*n2) and
             weights that are not finite are Refusals of fit.
    Source:  Van Loan and Pitsianis 1993 (the rearranged matrix is a sum of R products); weighted by
             the input Gram with alternating least squares in A and B.

    >>> w = torch.kron(torch.randn(3, 2), torch.randn(4, 5))
    >>> m, x = Kronecker.fit(w, in_outer=2, out_outer=3, terms=1), torch.randn(7, 10)
    >>> torch.allclose(m(x), x @ w.T, atol=1e-4)
    True
    """

    name: ClassVar[str] = "kronecker"

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__(a.shape[2] * b.shape[2], a.shape[1] * b.shape[1])
        self.b = nn.Parameter(b)
        self.a = nn.Parameter(a.permute(1, 2, 0).contiguous())  # as its step takes it

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        n, m = in_features, out_features
        if min(n, m) < 1:
            return []
        n1, m1 = (max(d for d in range(1, math.isqrt(s) + 1) if s % d == 0) for s in (n, m))
        if n1 == 1 or m1 == 1:
            return []
        m2, n2, found = m // m1, n // n1, []
        for fraction in FRACTIONS:
            terms = min(int(fraction * m * n / (m2 * n1 * (n2 + m1))), m1 * n1, m2 * n2)
            hyper: Hyper = {"in_outer": n1, "out_outer": m1, "terms": terms}
            if terms >= 1 and terms * (m1 * n1 + m2 * n2) < m * n and hyper not in found:
                found.append(hyper)
        return found

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        n1, m1, terms = hyper["in_outer"], hyper["out_outer"], hyper["terms"]
        n2, m2 = in_features // n1, out_features // m1
        program = Tile((Shared(n1, terms * m2, n2, 1), Shared(1, m1, n1 * terms, m2)))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        n1, m1, terms = hyper["in_outer"], hyper["out_outer"], hyper["terms"]
        return cls(
            torch.empty(terms, m1, n1, dtype=dtype),
            torch.empty(terms, out_features // m1, in_features // n1, dtype=dtype),
        )

    @classmethod
    @analytic
    def fit(
        cls,
        weight: Tensor,
        gram: Tensor | None = None,
        *,
        in_outer: int,
        out_outer: int,
        terms: int,
    ) -> Self | Refusal:
        """The Frobenius optimum, refined on data when there is a Gram; no step raises the error.

        Args:
            weight: ``(m, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``, positive semidefinite; None is the identity.
            in_outer, out_outer: n1 and m1, the sides of each A; must divide n and m.
            terms: R, 1 .. min(m1 * n1, m2 * n2).
        """
        if refusal := refuse_grid(cls.name, weight, in_outer, out_outer):
            return refusal
        m2, n2 = weight.shape[0] // out_outer, weight.shape[1] // in_outer
        most = min(in_outer * out_outer, m2 * n2)
        if refusal := refuse_rank(cls.name, terms, most):
            return refusal
        flat = weight.reshape(out_outer, m2, in_outer, n2).transpose(1, 2).reshape(-1, m2 * n2)
        left, right = leading(flat, None, terms)
        del flat
        a, b = left.mT.reshape(terms, out_outer, in_outer), right.reshape(terms, m2, n2)
        if gram is not None:
            sweeps = _Weighted(weight, gram, in_outer)
            starts = (a, b), _whitened(weight, sweeps.metrics, a, b)
            most = SWEEPS if weight.numel() <= LARGE**2 else FEW
            a, b = descend(sweeps, min(starts, key=sweeps.at), most)
            left, right = balanced(a.reshape(terms, -1).mT, b.reshape(terms, -1))
            a, b = left.mT.reshape(a.shape), right.reshape(b.shape)
        return cls(a, b)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        outer = hyper["in_outer"] * hyper["out_outer"]
        return gaussian_tail(outer, in_features * out_features // outer, hyper["terms"])

    def hyper(self) -> Hyper:
        m1, n1, terms = self.a.shape
        return {"in_outer": n1, "out_outer": m1, "terms": terms}

    def factors(self) -> list[Tensor]:
        return [self.b, self.a]

    def to_dense(self) -> Tensor:
        return _dense(self.a.permute(2, 0, 1), self.b)


def _dense(a: Tensor, b: Tensor) -> Tensor:
    """``sum_t A_t (x) B_t``."""
    (r, m1, n1), (_, m2, n2) = a.shape, b.shape
    products = a.reshape(r, -1).mT @ b.reshape(r, -1)
    return products.reshape(m1, n1, m2, n2).transpose(1, 2).reshape(m1 * m2, n1 * n2)


class _Weighted:
    """Half-sweeps over A and over B in the metric of a Gram.

    Attributes:
        metrics: C1 and C2 of ``C ~ C1 (x) C2``, partial traces. (The nearest product follows the
            few largest eigenvectors and leaves systems a thousand times worse conditioned.)
        pull: on A at the point where the next sweep starts.
    """

    def __init__(self, weight: Tensor, gram: Tensor, n1: int) -> None:
        parts = gram.reshape(n1, len(gram) // n1, n1, -1)
        first = torch.einsum("xyuy->xu", parts)
        self.weight, self.gram = weight, gram
        self.metrics = first, torch.einsum("xyxv->yv", parts) / first.trace()

    def at(self, factors: Factors) -> float:
        """The squared error of these factors, from which the next sweep starts."""
        self.factors, gap = factors, self.weight - _dense(*factors)
        product = gap @ self.gram
        squared = float(gap.mul_(product).sum())
        self.pull = _pulled(product, factors, 0)
        return squared

    def sweep(self) -> Factors:
        """A moved towards the best one for given B, then B for that A."""
        a, b = self.factors
        pair = self._moved((a, b), 0, self.pull), b
        gap = (self.weight - _dense(*pair)) @ self.gram
        return pair[0], self._moved(pair, 1, _pulled(gap, pair, 1))

    def _moved(self, pair: Factors, at: int, pull: Tensor) -> Tensor:
        """One of both factors moved to the best one for the other, or towards it if it is large.

        Were C the Kronecker product C1 (x) C2, its system would be one of two small matrices: the
        preconditioner.
        """
        other = pair[1 - at]
        terms, rows, side = pair[at].shape
        if terms * side <= JOINT:
            system = self._system(other, at)
            change = damped_solve(system, pull.transpose(0, 1).reshape(rows, terms * side).mT).mT
            return pair[at] + change.reshape(rows, terms, side).transpose(0, 1)
        weighed = (other @ self.metrics[1 - at]).flatten(1)
        by_term = damped_inverse(weighed @ other.flatten(1).mT)
        by_column = damped_inverse(self.metrics[at])

        def image(t: Tensor) -> Tensor:
            dense = _dense(t, other) if at == 0 else _dense(other, t)
            return _pulled(dense @ self.gram, pair, at)

        def tame(t: Tensor) -> Tensor:
            return (by_term @ t.flatten(1)).reshape(t.shape) @ by_column

        return conjugate(image, tame, pair[at], pull, (0, 2), TURNS)[0]

    def _system(self, other: Tensor, at: int) -> Tensor:
        """``Z_qt[x, u] = sum_yv C[(x, y), (u, v)] (B_q^T B_t)[y, v]``, or the same for B."""
        n1, terms = len(self.metrics[0]), len(other)
        pairs = self.gram.reshape(n1, -1, n1, len(self.gram) // n1).transpose(1, 2)
        pairs = pairs.reshape(n1 * n1, -1)
        inner = torch.einsum("qsy,tsv->yvqt", other, other).reshape(-1, terms * terms)
        made, side = (pairs if at == 0 else pairs.mT) @ inner, len(self.metrics[at])
        made = made.reshape(side, side, terms, terms).permute(2, 0, 3, 1)
        return made.reshape(terms * side, terms * side)


def _pulled(product: Tensor, pair: Factors, at: int) -> Tensor:
    """What E C says of A, ``Y_q[p, x] = sum_sy (E C)[(p, s), (x, y)] B_q[s, y]``, or of B."""
    (r, m1, n1), (_, m2, n2) = pair[0].shape, pair[1].shape
    flat = product.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)
    if at == 0:
        return (flat @ pair[1].reshape(r, -1).mT).mT.reshape(r, m1, n1)
    return (pair[0].reshape(r, -1) @ flat).reshape(r, m2, n2)


def _whitened(weight: Tensor, metrics: Factors, a: Tensor, b: Tensor) -> Factors:
    """The best A and B, of the shapes of these, where the Gram is the product of two metrics.

    Then the rearranged weight, whitened, is a matrix whose truncated SVD is best.
    """
    (r, m1, n1), (_, m2, n2) = a.shape, b.shape
    (down, up), (left, right) = map(_roots, metrics)
    flat = torch.einsum("psxv,xu->pusv", weight.reshape(m1, m2, n1, n2) @ left, down)
    flat = flat.reshape(m1 * n1, m2 * n2)
    u, v = leading(flat, None, r)
    return u.mT.reshape(a.shape) @ up, v.reshape(b.shape) @ right


def _roots(metric: Tensor) -> Factors:
    """C^(1/2) and its inverse, of what is not negligible."""
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(RIDGES[2] * values[-1]).sqrt()
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT

"""Butterfly: chains of Kronecker-sparse factors, square or not, of any composite sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, with_epilogue
from structc.families.fits import analytic, gaussian_tail, refuse_rank, simulated
from structc.families.solves import conjugate, damped_inverse
from structc.forms import Block, Tile
from structc.records import Hyper, Refusal

LEVELS = 3
FRACTIONS = (0.5, 0.35)
SWEEPS, FEW, LARGE = 4, 2, 2048
"""Sweeps of a refinement; fewer above LARGE x LARGE."""
TURNS = 4
"""Conjugate-gradient steps for one factor; each lowers the error."""
SLAB = 1 << 22
"""Elements of the largest product that these steps hold."""
PROGRESS = 3e-3
SAMPLED = 1 << 15

Pattern = tuple[int, int, int, int]
"""(a, b, c, d): the support ``I_a (x) 1_{b x c} (x) I_d`` of a factor."""


@final
class Butterfly(AbstractStructured):
    """A product of sparse factors, each of which mixes a few features that stand far apart.

    Math:    M = T_1 ... T_L, T_s of support I_a (x) 1_{b x c} (x) I_d with a = k_1 .. k_{s-1},
             b = j_s r, c = k_s r, d = j_{s+1} .. j_L (r is 1 at both ends), n = k_1 .. k_L,
             m = j_1 .. j_L. With L = log2 n, r = 1 and n = m: the class of the FFT.
    Shapes:  x (..., n);  T_s (a, b, c, d);  y (..., m).
    Cost:    flops = 2*rows*params;  params = sum of a*b*c*d.
    Errors:  none; sizes with fewer than L prime factors, a rank that a cut cannot have and weights
             that are not finite are Refusals of fit.
    Source:  Le, Zheng, Riccietti, Gribonval 2024, arXiv:2411.04506 (hierarchical, with
             orthonormal factors); refined on data by linear least squares, a factor at a time.

    Attributes:
        bound: what the relative error of an unweighted fit can be at most, from the singular values
            at the cuts of the weight; at most sqrt(L - 1) times the error of the best butterfly.

    >>> h = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    >>> m = Butterfly.fit(torch.kron(h, torch.kron(h, h)), levels=3, rank=1)  # Hadamard
    >>> bool(m.fit_error < 1e-14), m.form().params
    (True, 48)
    """

    name: ClassVar[str] = "butterfly"
    bound: float = math.nan

    def __init__(self, factors: Sequence[Tensor], rank: int) -> None:
        (_, b, _, d), (a, _, c, _) = factors[0].shape, factors[-1].shape
        super().__init__(a * c, b * d)
        self.rank = rank
        self.chain = nn.ParameterList([nn.Parameter(f) for f in factors])

    @classmethod
    def proposals(cls, in_features: int, out_features: int) -> Sequence[Hyper]:
        n, m, found = in_features, out_features, []
        for fraction in FRACTIONS:
            best: Hyper | None = None
            for rank in range(1, min(n, m) + 1):
                patterns = _patterns(n, m, LEVELS, rank)
                if isinstance(patterns, str) or sum(map(math.prod, patterns)) > fraction * n * m:
                    break
                best = {"levels": LEVELS, "rank": rank}
            if best is not None and best not in found:
                found.append(best)
        return found

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        patterns = _patterns(in_features, out_features, hyper["levels"], hyper["rank"])
        if isinstance(patterns, str):
            raise ValueError(patterns)
        program = Tile(tuple(Block(*p) for p in reversed(patterns)))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        patterns = _patterns(in_features, out_features, hyper["levels"], hyper["rank"])
        if isinstance(patterns, str):
            raise ValueError(patterns)
        return cls([torch.empty(p, dtype=dtype) for p in patterns], hyper["rank"])

    @classmethod
    @analytic
    def fit(
        cls, weight: Tensor, gram: Tensor | None = None, *, levels: int, rank: int
    ) -> Self | Refusal:
        """Members of the class exactly, others within ``bound``; a Gram refines that.

        Args:
            weight: ``(m, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``, positive semidefinite; None is the identity.
            levels: L, the number of factors; n and m must have so many prime factors.
            rank: r, of the blocks at every cut.
        """
        m, n = weight.shape
        if levels < 1 or isinstance(message := _patterns(n, m, levels, 1), str):
            reason = f"{levels} levels: at least one" if levels < 1 else str(message)
            return Refusal("", cls.name, "GRID", reason)
        if refusal := refuse_rank(cls.name, rank, _most(n, m, levels)):
            return refusal
        patterns = _patterns(n, m, levels, rank)
        assert not isinstance(patterns, str)
        chain = _split_all(weight, patterns, rank)
        if gram is not None:
            chain = _refine(weight, gram, chain, rank)
        made = cls(_levelled(chain), rank)
        made.bound = _bound(weight, levels, rank)
        return made

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        """Sampled where it is small; else what each cut keeps, for that is nearly noise again."""
        if in_features * out_features <= SAMPLED:
            return simulated(cls, in_features, out_features, hyper)
        kept, rank = 1.0, hyper["rank"]
        j = radices(out_features, hyper["levels"])
        k = radices(in_features, hyper["levels"])
        for s in range(len(j) - 1):
            rows = j[s] * (rank if s else 1)
            kept *= 1 - gaussian_tail(rows, math.prod(k[s + 1 :]), rank) ** 2
        return math.sqrt(max(0.0, 1 - kept))

    def hyper(self) -> Hyper:
        return {"levels": len(self.chain), "rank": self.rank}

    def factors(self) -> list[Tensor]:
        return list(reversed(list(self.chain)))

    def to_dense(self) -> Tensor:
        left = self.chain[0].new_ones(1, 1, 1, self.out_features)
        for factor, cuts in zip(self.chain, _ranks(len(self.chain), self.rank), strict=True):
            left = _wider(left, _parted(factor, *cuts))
        return left[..., 0, 0]


# ---------------------------------------------------------------------------- patterns


def radices(size: int, levels: int) -> list[int]:
    """A size as a product of so many numbers of about the same size, or fewer numbers.

    >>> radices(384, 3), radices(64, 6), radices(13, 2)
    ([8, 8, 6], [2, 2, 2, 2, 2, 2], [13])
    """
    primes, rest, p = [], size, 2
    while rest > 1:
        if p * p > rest:
            p = rest
        while rest % p == 0:
            primes.append(p)
            rest //= p
        p += 1
    bins = [1] * min(levels, len(primes))
    for prime in reversed(primes):
        bins[bins.index(min(bins))] *= prime
    return sorted(bins, reverse=True)


def _patterns(n: int, m: int, levels: int, rank: int) -> list[Pattern] | str:
    """The patterns of all factors, or why there are none."""
    if levels == 1:
        j, k = [m], [n]
    else:
        j, k = radices(m, levels), radices(n, levels)
    for size, parts in ((m, j), (n, k)):
        if len(parts) < levels:
            return f"{size} has {len(parts)} prime factors, {levels} levels need as many"
    if levels > 1 and not 1 <= rank <= _most(n, m, levels):
        return f"rank {rank} is not in 1..{_most(n, m, levels)}"
    return [
        (
            math.prod(k[:s]),
            j[s] * (rank if s else 1),
            k[s] * (rank if s < levels - 1 else 1),
            math.prod(j[s + 1 :]),
        )
        for s in range(levels)
    ]


def _most(n: int, m: int, levels: int) -> int:
    """The largest rank that a block has at every cut."""
    j, k = radices(m, levels), radices(n, levels)
    cuts = [min(math.prod(j[:s]), math.prod(k[s:])) for s in range(1, levels)]
    return min(cuts, default=1)


# ---------------------------------------------------------------------------- products


def _ranks(levels: int, rank: int) -> list[tuple[int, int]]:
    """The rank before and behind each factor: 1 at both ends."""
    return list(itertools.pairwise([1, *[rank] * (levels - 1), 1]))


def _parted(factor: Tensor, before: int, after: int) -> Tensor:
    """A factor (a, r*j, k*q, d) with the ranks at both of its cuts apart: (a, r, j, k, q, d)."""
    a, b, c, d = factor.shape
    return factor.reshape(a, before, b // before, c // after, after, d)


def _wider(left: Tensor, part: Tensor) -> Tensor:
    """L T: from values (J, a, r, j*d) to (J*j, a*k, q, d)."""
    _, _, j, _, q, d = part.shape
    made = torch.einsum("xarjd,arjkqd->xjakqd", left.unflatten(3, (j, d)), part)
    return made.reshape(len(left) * j, -1, q, d)


def _levelled(chain: Sequence[Tensor]) -> list[Tensor]:
    """Factors of the same product that share its scale evenly."""
    norms = [float(f.norm()) for f in chain]
    level = math.exp(math.fsum(map(math.log, norms)) / len(norms)) if min(norms) > 0 else 0.0
    return [f * (level / norm) if norm > 0 else f for f, norm in zip(chain, norms, strict=True)]


# ---------------------------------------------------------------------------- the fit


def _split_all(weight: Tensor, patterns: Sequence[Pattern], rank: int) -> list[Tensor]:
    """Factor after factor from the left, each by truncated SVDs of disjoint blocks.

    The r columns of a factor that belong to one block are orthonormal, which makes the errors of
    all cuts orthogonal to each other: none is amplified by the factors before it.
    """
    rest, chain = weight[None], []  # values (a, b * d, columns) of the factors still to come
    for (a, b, _, d), (after, *_) in itertools.pairwise(patterns):
        s, columns = after // a, rest.shape[2] // (after // a)
        blocks = rest.reshape(a, b, d, s, columns).permute(0, 3, 2, 1, 4)
        u, size, vh = torch.linalg.svd(blocks, full_matrices=False)
        vh = size[..., :rank, None] * vh[..., :rank, :]
        chain.append(u[..., :rank].permute(0, 3, 1, 4, 2).reshape(a, b, s * rank, d))
        rest = vh.permute(0, 1, 3, 2, 4).reshape(after, rank * d, columns)
    return [*chain, rest[..., None]]


def _bound(weight: Tensor, levels: int, rank: int) -> float:
    """What the cuts of the weight lose: a butterfly has blocks of rank r at each of them.

    The best butterfly loses at least the largest of these, the hierarchical fit at most the root
    of their squares' sum.
    """
    m, n = weight.shape
    j, k = radices(m, levels), radices(n, levels)
    lost = 0.0
    for s in range(1, levels):
        shape = math.prod(j[:s]), math.prod(j[s:]), math.prod(k[:s]), math.prod(k[s:])
        values = torch.linalg.svdvals(weight.reshape(shape).permute(1, 2, 0, 3))
        lost += float(values[..., rank:].square().sum())
    total = float(weight.square().sum())
    return math.sqrt(lost / total) if total > 0 else 0.0


def _refine(weight: Tensor, gram: Tensor, chain: Sequence[Tensor], rank: int) -> list[Tensor]:
    """Sweeps of least squares in one factor at a time, from the right, in the metric of the Gram.

    With M = L T R and T of support I_a (x) 1_{b x c} (x) I_d, the d slices of T write to rows of
    their own. So do the j of b = r j: all of them are problems of their own, in a * r * c unknowns.
    """
    chain, product = list(chain), weight @ gram
    total, error = float((product * weight).sum()), math.inf
    outer, best = _ranks(len(chain), rank), list(chain)
    for _ in range(SWEEPS if weight.numel() <= LARGE**2 else FEW):
        lefts = [weight.new_ones(1, 1, 1, len(weight))]
        for s, factor in enumerate(chain[:-1]):
            lefts.append(_wider(lefts[s], _parted(factor, *outer[s])))
        right, lost = weight.new_ones(len(gram), 1, 1, 1), 0.0
        for s in reversed(range(len(chain))):
            part = _parted(chain[s].clone(), *outer[s])
            lost = _least(part, lefts[s], right, product, gram)
            chain[s] = part.reshape(chain[s].shape)
            if s:  # this factor now belongs to R
                right = _longer(part, right)
        before, error = error, min(error, total + lost)
        if total + lost <= error:
            best = list(chain)
        if error > before * (1 - PROGRESS):
            break
    return best


def _longer(part: Tensor, right: Tensor) -> Tensor:
    """T R: from values (a*k, q, d, K) to (a, r, j*d, k*K)."""
    a, r, j, k, _, d = part.shape
    made = torch.einsum("arjkqd,akqdy->arjdky", part, right.unflatten(0, (a, k)))
    return made.reshape(a, r, j * d, -1)


def _least(part: Tensor, left: Tensor, right: Tensor, product: Tensor, gram: Tensor) -> float:
    """Move a factor towards the least error for given others; what the error loses by it.

    Args:
        part: T (a, r, j, k, q, d), changed in place.
        left: L (J, a, r, j*d), of rows J*j*d.
        right: R (a*k, q, d, K), of columns a*k*K.
        product: W C.
    """
    a, _, j, k, q, d = part.shape
    left, product = left.unflatten(3, (j, d)), product.view(len(left), j, d, a, k, -1)
    lost = 0.0
    for at in range(d):
        across = right[:, :, at]  # (a*k, q, K)
        rows, pulled = left[..., at], product[:, :, at]
        pulled = torch.einsum("xjaky,akqy->xjakq", pulled, across.unflatten(0, (a, k)))
        wanted = torch.einsum("xarj,xjakq->jarkq", rows, pulled).flatten(3)
        metric, some = _metric(across, gram, a), max(1, SLAB // (a * part.shape[1]) ** 2)
        for first in range(0, j, some):
            now = slice(first, first + some)
            inner = torch.einsum("xarj,xbsj->jarbs", rows[..., now], rows[..., now]).flatten(3)
            start = part[:, :, now, ..., at].permute(2, 0, 1, 3, 4).flatten(3)
            found, drop = _slices(inner, metric, wanted[now], start)
            part[:, :, now, ..., at] = found.unflatten(3, (k, q)).permute(1, 2, 0, 3, 4)
            lost += drop
    return lost


def _metric(across: Tensor, gram: Tensor, a: int) -> Tensor:
    """R C R^T for R (A, q, K) of support ``I_A (x) 1``, as (a, c, a*c)."""
    columns, q, size = across.shape
    if q == size == 1:  # the last factor: R is the identity
        return gram.view(a, -1, columns)
    half = (across @ gram.view(columns, size, -1)).view(columns * q, columns, size)
    whole = (half.transpose(0, 1) @ across.mT).transpose(0, 1)
    return whole.reshape(a, -1, columns * q)


def _slices(inner: Tensor, metric: Tensor, wanted: Tensor, t: Tensor) -> tuple[Tensor, float]:
    """Conjugate gradients for a batch of slices, and the sum of ``t S t - 2 t wanted``.

    Args:
        inner: G (j, a, r, a*r).
        metric: X (a, c, a*c).
        wanted: B (j, a, r, c).
        t: the start; ``S t = sum_be G[:, a, :, b] t[:, b] X[b, :, a]`` is what should become B.
    """
    j, a, r, c = t.shape
    some = max(1, SLAB // t.numel())

    def image(t: Tensor) -> Tensor:
        stacked, made = t.transpose(0, 1).reshape(a, j * r, c), torch.empty_like(t)
        for first in range(0, a, some):
            now = slice(first, first + some)
            y = stacked @ metric.view(a, c, a, c)[:, :, now].flatten(2)
            y = y.view(a, j, r, -1, c).permute(1, 3, 0, 2, 4).flatten(2, 3)
            made[:, now] = inner[:, now] @ y
        return made

    each = range(a)
    by_rank = damped_inverse(inner.view(j, a, r, a, r)[:, each, :, each].transpose(0, 1))
    by_column = damped_inverse(metric.view(a, c, a, c)[each, :, each])
    t, residual = conjugate(
        image, lambda x: by_rank @ x @ by_column, t, wanted - image(t), (1, 2, 3), TURNS
    )
    return t, -float((t * (wanted + residual)).sum())

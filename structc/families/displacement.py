"""Low displacement rank: sums of products of circulants and skew-circulants."""

from __future__ import annotations

import math
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from structc.families.base import AbstractStructured, balanced, with_epilogue
from structc.families.circulant import wrapped_sums
from structc.families.diagonal import refuse_rectangular
from structc.families.fits import analytic, refuse_rank, simulated
from structc.families.solves import conjugate
from structc.families.toeplitz import diagonal_sums
from structc.forms import Displace, Tile
from structc.numerics import squared_norm
from structc.records import Hyper, Refusal

SWEEPS, PROGRESS = 12, 3e-3
SAMPLED = 128
STEPS = 4
"""Of conjugate gradients for H in a sweep, where data weigh the columns."""
WORK = 2.0e9
"""Sweeps times rank^2 times n^2 that a fit spends at most; one sweep it always makes."""
PROBES, POWERS = 8, 4
"""Columns beyond the rank, and power iterations, of the randomised range finder."""
FLAT = 1e-13
CHUNK = 256
"""Rows of one FFT: what lies between stays in the caches."""
LARGE = 2048
"""Above, H is that of the displacement: a step of H costs as much as all else."""

Pair = tuple[Tensor, Tensor]


@final
class Displacement(AbstractStructured):
    """A matrix that changes by a matrix of rank r when it is shifted: LDR.

    Math:    M = sum_q K(Z_1, g_q) K(Z_-1, h_q)^T, where K(Z_f, g) has the columns g, Z_f g, ...;
             equivalently M - Z_1 M Z_-1^T = 2 G^T H has rank r. Toeplitz matrices and their
             inverses have r = 2, a product of two of them 4.
    Shapes:  x (..., n);  g (r, n), h (r, n);  y (..., n).
    Cost:    flops = 2 r + 2 complex FFTs of n points a row;  params = 2 r n.
    Errors:  none; a matrix that is not square and a rank outside 1..n are Refusals of fit.
    Source:  Sindhwani et al. 2015, arXiv:1510.01722; Thomas et al. 2018, arXiv:1810.02309. The
             truncated displacement is exact for members, and poor for others: what follows are
             exact half-steps, M being linear in G for a given H and conversely.

    >>> w = torch.linalg.inv(torch.eye(6) + torch.ones(6, 6).triu())  # of a Toeplitz matrix
    >>> m = Displacement.fit(w, rank=2)
    >>> torch.allclose(m.to_dense(), w, atol=1e-5)
    True
    """

    name: ClassVar[str] = "displacement"

    def __init__(self, g: Tensor, h: Tensor) -> None:
        super().__init__(g.shape[1], g.shape[1])
        self.g, self.h = nn.Parameter(g), nn.Parameter(h)

    @classmethod
    def form_of(
        cls, in_features: int, out_features: int, hyper: Hyper, *, bias: bool, activation: str
    ) -> Tile:
        program = Tile((Displace(in_features, hyper["rank"]),))
        return with_epilogue(program, bias=bias, activation=activation)

    @classmethod
    def empty(cls, in_features: int, out_features: int, hyper: Hyper, dtype: torch.dtype) -> Self:
        shape = hyper["rank"], in_features
        return cls(torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype))

    @classmethod
    @analytic
    def fit(cls, weight: Tensor, gram: Tensor | None = None, *, rank: int) -> Self | Refusal:
        """Truncate the displacement, then alternate exact steps; the error never rises.

        Args:
            weight: ``(n, n)``, any floating dtype; fitted in float64, returned in its own.
            gram: ``E[x x^T]``, ``(n, n)``; None is the identity.
            rank: of the displacement, 1 .. n.
        """
        if refusal := refuse_rectangular(cls.name, weight) or refuse_rank(
            cls.name, rank, len(weight)
        ):
            return refusal
        start = _truncated(weight, rank)
        if gram is not None and len(weight) <= LARGE:  # from where the unweighted fit ends
            start = _refined(weight, None, start)
        g, h = _refined(weight, gram, start)
        left, right = balanced(g.mT, h)
        return cls(left.mT, right)

    @classmethod
    def gaussian_error(cls, in_features: int, out_features: int, hyper: Hyper) -> float:
        """Sampled at 128 features at most, with the same share of parameters."""
        small = min(in_features, SAMPLED)
        rank = max(1, round(hyper["rank"] * small / in_features))
        return simulated(cls, small, small, {"rank": rank})

    def hyper(self) -> Hyper:
        return {"rank": len(self.g)}

    def factors(self) -> list[Tensor]:
        return [self.g, self.h]

    def to_dense(self) -> Tensor:
        return sum_of(self.g, self.h)


def krylov(g: Tensor, corner: int) -> Tensor:
    """``K(Z_f, g)``, f being 1 or -1.

    >>> krylov(torch.tensor([1.0, 2.0, 3.0]), -1)
    tensor([[ 1., -3., -2.],
            [ 2.,  1., -3.],
            [ 3.,  2.,  1.]])
    """
    n = len(g)
    at = torch.arange(n, device=g.device)
    turned = g[(at[:, None] - at) % n]
    return turned if corner == 1 else torch.where(at[:, None] >= at, turned, -turned)


def turned_back(g: Tensor, corner: int) -> Tensor:
    """The generator of ``K(Z_f, g)^T``, which is one of its kind: g backwards behind g_0."""
    return torch.cat([g[:1], corner * g[1:].flip(0)])


def times(rows: Tensor, g: Tensor, corner: int) -> Tensor:
    """``K(Z_f, g)`` times each row, by real FFTs, some rows at a time.

    Shapes:  rows (m, n); g (n,); the result (m, n).
    """
    n = len(g)
    size = n if corner == 1 else 2 * n
    spectrum = torch.fft.rfft(g, size)
    made = torch.empty_like(rows)
    for part, into in zip(rows.split(CHUNK), made.split(CHUNK), strict=True):
        y = torch.fft.irfft(torch.fft.rfft(part, size) * spectrum, size)
        into.copy_(y if corner == 1 else y[:, :n] - y[:, n:])
    return made


def sum_of(g: Tensor, h: Tensor) -> Tensor:
    """The matrix of generators g and h, ``(r, n)`` both; differentiable.

    >>> sum_of(torch.eye(3)[:1], torch.eye(3)[:1])
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    parts = [krylov(a, 1) @ krylov(b, -1).mT for a, b in zip(g, h, strict=True)]
    return torch.stack(parts).sum(0)


def _matrix(g: Tensor, h: Tensor) -> Tensor:
    """The same by FFTs: its transpose is K(Z_-1, h) K(Z_1, g)^T, each row times K(Z_1, g)."""
    made = g.new_zeros(g.shape[1], g.shape[1])
    for a, b in zip(g, h, strict=True):
        made += times(krylov(b, -1), a, 1)
    return made.mT


def displaced(w: Tensor) -> Tensor:
    """``W - Z_1 W Z_-1^T``: W less W moved down and right, the last column coming back negated."""
    moved = w.roll((1, 1), (0, 1)).clone()
    moved[:, 0] *= -1
    return w - moved


# ---------------------------------------------------------------------------- the fit


def _truncated(w: Tensor, rank: int) -> Pair:
    """The generators of the best rank-r part of the displacement."""
    u, s, vh = _top(displaced(w) / 2, rank)
    root = s.sqrt()
    return (u * root).mT.contiguous(), root[:, None] * vh


def _top(d: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triples; by a randomised range finder where that is much cheaper."""
    n = len(d)
    if rank + PROBES >= n // 4 or n <= 256:
        u, s, vh = torch.linalg.svd(d)
        return u[:, :rank], s[:rank], vh[:rank]
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(n, rank + PROBES, generator=generator, dtype=d.dtype)
    basis = torch.linalg.qr(d @ probe)[0]
    for _ in range(POWERS):
        basis = torch.linalg.qr(d @ torch.linalg.qr(d.mT @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(basis.mT @ d, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vh[:rank]


def _refined(w: Tensor, c: Tensor | None, start: Pair) -> Pair:
    """Alternate between G and H until a sweep gains little."""
    n, rank = len(w), len(start[0])
    best, error = start, _squared(w, c, start)
    scale = float((w * (w if c is None else w @ c)).sum())
    for _ in range(max(1, min(SWEEPS, int(WORK / (rank * n) ** 2)))):
        if error <= FLAT**2 * scale:
            break
        g = _best_g(w, c, best[1])
        h = best[1]
        if n <= LARGE:
            h = _best_h(w, g) if c is None else _descended_h(w, c, g, h)
        now = _squared(w, c, (g, h))
        if now >= error:
            break
        done = now > error * (1 - PROGRESS)
        best, error = (g, h), now
        if done:
            break
    return best


def _squared(w: Tensor, c: Tensor | None, factors: Pair) -> float:
    return squared_norm(w - _matrix(*factors), c)


def _best_g(w: Tensor, c: Tensor | None, h: Tensor) -> Tensor:
    """The exact minimum over G: the normal equations are circulant, r x r at each frequency.

    With ``S_q = K(Z_-1, h_q)^T``: sum over q' of p_qq' * g_q' = v_q, circular convolutions, where
    p_qq'[s] and v_q[s] are sums over the wrapped diagonals of S_q C S_q'^T and W C S_q^T.
    """
    rank, n = h.shape
    normal = w.new_empty(rank, rank, n)
    wanted = w.new_empty(rank, n)
    wc = w if c is None else w @ c
    for q, left in enumerate(h):
        back = turned_back(left, -1)
        wanted[q] = wrapped_sums(times(wc, back, -1))
        weighed = None if c is None else times(c, back, -1).mT  # C is symmetric
        for p, right in enumerate(h):
            if weighed is None:
                product = times(back[None], right, -1)[0]  # skew-circulant again
                signs = 1 - 2 * torch.arange(n, dtype=w.dtype) / n
                normal[q, p] = n * product * signs
            else:
                normal[q, p] = wrapped_sums(times(weighed, turned_back(right, -1), -1))
    found = _solved(torch.fft.fft(normal).permute(2, 1, 0), torch.fft.fft(wanted).T)
    return torch.fft.ifft(found.T).real.contiguous()


def _best_h(w: Tensor, g: Tensor) -> Tensor:
    """The exact minimum over H for C = I, by the same equations for the transpose, skewed."""
    rank, n = g.shape
    angle = torch.arange(n, dtype=w.dtype) * (math.pi / n)
    turns = torch.polar(torch.ones_like(angle), angle)
    normal = w.new_empty(rank, rank, n)
    wanted = w.new_empty(rank, n)
    signs = 1 - 2 * torch.arange(n, dtype=w.dtype) / n
    for q, left in enumerate(g):
        wanted[q] = _skew_sums(times(w.mT, turned_back(left, 1), 1))
        for p, right in enumerate(g):
            normal[q, p] = n * times(turned_back(right, 1)[None], left, 1)[0] * signs
    spectra = torch.fft.fft(normal * turns).permute(2, 0, 1)
    found = _solved(spectra, torch.fft.fft(wanted * turns).T)
    return (torch.fft.ifft(found.T) / turns).real.contiguous()


def _solved(matrices: Tensor, right: Tensor) -> Tensor:
    """Small systems that may be singular: the solution of least norm."""
    inverse = torch.linalg.pinv(matrices, rtol=FLAT)
    return (inverse @ right[..., None])[..., 0]


def _skew_sums(matrix: Tensor) -> Tensor:
    """Sums over wrapped diagonals, what came around negated: ``<Z_-1^t, matrix>`` for each t."""
    n = len(matrix)
    sums = diagonal_sums(matrix)
    return sums[n - 1 :] - nn.functional.pad(sums[: n - 1], (1, 0))


def _descended_h(w: Tensor, c: Tensor, g: Tensor, h: Tensor) -> Tensor:
    """Conjugate gradients on the least squares in H: each step lowers the weighted error."""

    def apply(step: Tensor) -> Tensor:
        """The normal operator: H to the gradient of its matrix's squared norm in C."""
        return _pulled(g, _matrix(g, step) @ c)

    residual = _pulled(g, (w - _matrix(g, h)) @ c)
    return conjugate(apply, lambda step: step, h, residual, (0, 1), STEPS)[0]


def _pulled(g: Tensor, gap: Tensor) -> Tensor:
    """``t -> <K(Z_1, g_q) (Z_-1^t)^T, gap>`` for each q."""
    return torch.stack([_skew_sums(times(gap.mT, turned_back(row, 1), 1)) for row in g])

"""Polynomial attention with a weight a lag, or with rotations: a convolution a feature."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from structc.attention.base import AbstractMethod, check_qkv
from structc.attention.feature_sums import feature_attention, feature_sums, monomials
from structc.attention.kernels import kernel_for
from structc.attention.polynomial import Polynomial
from structc.attention.toeplitz import toeplitz_times
from structc.errors import ConfigError

SLAB = 1 << 20
"""Numbers that convolutions take at a time."""


@dataclass(frozen=True)
class ToeplitzPolynomial(AbstractMethod):
    """``A_ij ~ e^{t(i - j)} f(scale q_i . k_j)``, f a polynomial; rows are divided by their sums.

    In monomials phi, ``f(s_ij) = sum_a c_a phi_a(q_i) phi_a(k_j)``, so that the weights of a head
    are ``sum_a c_a diag(phi_a(q)) T(e^t) diag(phi_a(k))``: a convolution a feature. With slopes
    alone it is the state of ``Polynomial``, which falls by ``e^{-slope}`` a token, and without
    ``is_causal`` two of them, one from each end.

    Rotations are sums of such products too (:func:`rope_terms`), and so are their powers: one
    convolution for each monomial in ``d + 2 len(frequencies)`` terms. **For rotations alone this is
    the slow way**: ``Polynomial`` on rotated q and k computes the same with fewer features.

    Args:
        degree, bound: of f, as in ``Polynomial``.
        is_causal: whether later keys are hidden.
        slopes: ``t = -slope |i - j|`` (ALiBi), at least 0; one, or one a head.
        lags: t itself as a table, its middle is lag 0, and what is further takes its ends (T5, once
            a bucket is a lag); one row, or one a head, of the same odd length. Not with slopes.
        frequencies: ``(r,)``: q and k come without their rotation; features p and ``p + r`` of
            token i turn by ``i frequencies[p]``. Those from ``2 r`` on do not turn.

    Cost:    slopes: that of ``Polynomial``, twice where it is not causal. Else ``2 D (d_v + 1)``
             transforms of ``n + m`` numbers, ``D = C(terms + degree, degree)``; memory for
             ``SLAB`` numbers at a time, also for a gradient.
    Errors:  of f as in ``Polynomial``. An FFT's error is absolute: rows whose sum is faint beside
             ``|e^t| |phi(k)|`` lose digits. Slopes alone take no FFT.
    Source:  Fastmax, Gerami et al. 2024 (https://arxiv.org/abs/2402.07901); kernels with Toeplitz
             factors by FFT, Luo et al. 2021 (https://arxiv.org/abs/2106.12566); ALiBi, Press et al.
             2022 (https://arxiv.org/abs/2108.12409); rotations, Su et al. 2021
             (https://arxiv.org/abs/2104.09864).

    >>> from structc.attention import exact
    >>> q, k, v = torch.randn(3, 1, 1, 40, 4).unbind(0)
    >>> bias = -0.2 * (torch.arange(79) - 39.0).abs()
    >>> want = exact(q, k, v, bias=bias, scale=0.05)
    >>> by_state = ToeplitzPolynomial(3, slopes=(0.2,), scale=0.05)(q, k, v)
    >>> by_lags = ToeplitzPolynomial(3, lags=(tuple(bias.tolist()),), scale=0.05)(q, k, v)
    >>> [torch.allclose(y, want, atol=1e-2) for y in (by_state, by_lags)]
    [True, True]
    """

    name: ClassVar[str] = "toeplitz_polynomial"

    degree: int
    bound: float = 1.0
    is_causal: bool = False
    slopes: tuple[float, ...] = ()
    lags: tuple[tuple[float, ...], ...] = ()
    frequencies: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self._inner()
        if self.slopes and self.lags:
            raise ConfigError(f"{self.name}: slopes and lags", hint="put both in lags")
        if not all(0 <= s < math.inf for s in self.slopes):
            raise ConfigError(f"{self.name}: slopes {self.slopes} are numbers of at least 0")
        widths = {len(row) for row in self.lags}
        if len(widths) > 1 or any(w % 2 == 0 for w in widths):
            raise ConfigError(f"{self.name}: rows of lags are of one odd length, not {widths}")
        if not all(map(math.isfinite, itertools.chain(self.frequencies, *self.lags))):
            raise ConfigError(f"{self.name}: lags and frequencies are finite numbers")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        """The output; sums of f are no certificate."""
        check_qkv(q, k, v)
        self._check(q)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries, keys = q.to(wide) * self.sigma(q), k.to(wide)
        by_lag = self.lags or self.frequencies
        kernel = kernel_for(self.name, q, k, v)
        if kernel is not None and self._one_state(q, k):
            decay = _slopes(self.slopes, q.device).expand(q.shape[1]) if self.slopes else None
            rule = self._inner().rule()
            return feature_attention(queries, keys, v, rule, decay, kernel=kernel), None
        x = torch.cat([v.to(wide), v.new_ones(*v.shape[:3], 1, dtype=wide)], -1)
        y = (self._convolved if by_lag else self._scanned)(queries, keys, x)
        return (y[..., :-1] / y[..., -1:]).to(q.dtype), None

    def _one_state(self, q: Tensor, k: Tensor) -> bool:
        """Whether it is polynomial attention whose state decays, if at all."""
        if self.lags or self.frequencies:
            return False
        return not self.slopes or (self.is_causal and q.shape[2] <= k.shape[2])

    def _inner(self) -> Polynomial:
        return Polynomial(self.degree, self.bound, self.is_causal, scale=self.scale)

    def _check(self, q: Tensor) -> None:
        given = len(self.slopes or self.lags or (0,))
        if given not in (1, q.shape[1]):
            raise ConfigError(f"{self.name}: t for {given} heads, q has {q.shape[1]}")
        if 2 * len(self.frequencies) > q.shape[-1]:
            raise ConfigError(f"{self.name}: {len(self.frequencies)} frequencies turn twice as "
                              f"many features, q has {q.shape[-1]}")  # fmt: skip

    def _scanned(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """By a state that decays."""
        inner, n, m = self._inner(), q.shape[2], k.shape[2]
        if not self.slopes:
            return inner.sums(q, k, x)
        rule, weights = inner.rule(), inner.weights(q)
        forth, decay = replace(rule, causal=True), q.new_tensor(self.slopes).expand(q.shape[1])
        near = q[:, :, :m] if self.is_causal else F.pad(q[:, :, :m], (0, 0, 0, max(0, m - n)))
        y = feature_sums(near, k, x, forth, weights, decay)
        if not self.is_causal:
            a, b, c = (t.flip(2) for t in (near, k, x))
            own = rule.f((near * k).sum(-1, keepdim=True)) * x  # in both of them
            y = y + feature_sums(a, b, c, forth, weights, decay).flip(2) - own
        if n <= m:
            return y[:, :, :n]
        # past the last key a row's weights fall by one factor, which its sum has too
        ages = torch.arange(m - 1, -1, -1, dtype=q.dtype)
        faded = (-decay[:, None] * ages).exp()[..., None] * x
        past = feature_sums(q[:, :, m:], k, faded, replace(rule, causal=False), weights)
        return torch.cat([y, past], 2)

    def _convolved(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """By a convolution a feature."""
        n, m = q.shape[2], k.shape[2]
        u, w, turns = rope_terms(q, k, self.frequencies)
        t = self._by_lag(n, m)
        base = (t - t.amax(1, keepdim=True)).exp().to(q.dtype)
        chosen, _ = monomials(u.shape[-1], self.degree)
        # all of one length: what is missing picks a column of ones
        at = torch.tensor([(*c, *[u.shape[-1]] * (self.degree - len(c))) for c in chosen])
        parts = [F.pad(t, (0, 1), value=1.0) for t in (u, w, turns)]
        weights = self._inner().weights(u)
        step = max(1, SLAB // max(1, (n + m) * x.shape[0] * x.shape[1] * x.shape[-1]))
        total = x.new_zeros(*q.shape[:3], x.shape[-1])
        for which, factors in zip(at.split(step), weights.split(step), strict=True):
            args = (*parts, base, x, which, factors)
            if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, x)):
                total = total + torch.as_tensor(checkpoint(_some, *args, use_reentrant=False))
            else:
                total = total + _some(*args)
        return total

    def _by_lag(self, n: int, m: int) -> Tensor:
        """t, that of ``i - j`` at ``i - j + m - 1``; float64 ``(H | 1, n + m - 1)``."""
        lag = torch.arange(1 - m, n)
        t = torch.zeros(1, len(lag), dtype=torch.float64)
        if self.slopes:
            t = -torch.tensor(self.slopes, dtype=torch.float64)[:, None] * lag.abs()
        elif self.lags:
            table = torch.tensor(self.lags, dtype=torch.float64)
            middle = table.shape[1] // 2
            t = table[:, (lag + middle).clamp(0, 2 * middle)]
        return t.masked_fill(lag < 0, -math.inf) if self.is_causal else t

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """``e^t f(s)`` with rows that sum to 1."""
        self._check(q)
        n, m = q.shape[2], k.shape[2]
        queries, keys = (rotated(t, self.frequencies) for t in (q * self.sigma(q), k))
        at = torch.arange(n)[:, None] - torch.arange(m) + m - 1
        t = self._by_lag(n, m)[:, at]
        seen = (t - t.amax(-1, keepdim=True)).exp().to(q.dtype)
        weights = self._inner().f(queries @ keys.mT) * seen
        return weights / weights.sum(-1, keepdim=True)

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Of the scans, or of the transforms."""
        if not self.lags and not self.frequencies:
            twice = 1 + bool(self.slopes and not self.is_causal)
            return twice * self._inner().flops(queries, keys, head_dim)
        many = math.comb(head_dim + 2 * len(self.frequencies) + self.degree, self.degree)
        size = float(queries + keys)
        transform = 2.5 * size * max(1, int(size).bit_length() - 1) + 3 * size
        return many * (2 * head_dim + 3) * transform


@functools.lru_cache(maxsize=32)
def _slopes(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    """Copied to a device once, and no inference tensor: gradients may need it."""
    with torch.inference_mode(False):
        return torch.tensor(slopes, dtype=torch.float32, device=device)


def rotated(x: Tensor, frequencies: tuple[float, ...]) -> Tensor:
    """Features p and ``p + r`` of token i turned by ``i frequencies[p]``; others as they are.

    >>> x = torch.tensor([[1.0, 0.0, 5.0], [1.0, 0.0, 5.0]])
    >>> rotated(x, (math.pi / 2,)).round().int().tolist()
    [[1, 0, 5], [0, 1, 5]]
    """
    r = len(frequencies)
    cos, sin = _turns(torch.arange(x.shape[-2]), frequencies, x.dtype)
    a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _turns(at: Tensor, frequencies: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(len(at), r)``; angles of far tokens want float64."""
    angles = at.double()[:, None] * torch.tensor(frequencies, dtype=torch.float64)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_terms(
    q: Tensor, k: Tensor, frequencies: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of rotated q and k as ``s_ij = sum_r u_ir turns_{i - j, r} w_jr``.

    With pairs (a, b) of q and (c, d) of k a frequency gives four terms:
    ``(a c + b d) cos theta (i - j) + (a d - b c) sin theta (i - j)``. A product of terms is a term
    again, so that each monomial of a power is one ``diag(u) T diag(w)``.

    Args:
        q: ``(..., n, d)``; k: ``(..., m, d)``, not rotated.
        frequencies: r of them, as in :class:`ToeplitzPolynomial`.

    Returns:
        u ``(..., n, d + 2 r)``, w ``(..., m, d + 2 r)`` and turns ``(n + m - 1, d + 2 r)``, lag
        ``i - j`` at ``i - j + m - 1``.

    >>> q, k, turning = torch.randn(3, 4), torch.randn(5, 4), (0.3, 0.01)
    >>> u, w, turns = rope_terms(q, k, turning)
    >>> at = torch.arange(3)[:, None] - torch.arange(5) + 4
    >>> want = rotated(q, turning) @ rotated(k, turning).mT
    >>> torch.allclose(torch.einsum("ir,jr,ijr->ij", u, w, turns[at]), want, atol=1e-5)
    True
    """
    r, n, m = len(frequencies), q.shape[-2], k.shape[-2]
    (a, b, rest), (c, d, others) = (
        (t[..., :r], t[..., r : 2 * r], t[..., 2 * r :]) for t in (q, k)
    )
    cos, sin = _turns(torch.arange(1 - m, n), frequencies, q.dtype)
    still = cos.new_ones(len(cos), rest.shape[-1])
    u, w = torch.cat([a, b, a, -b, rest], -1), torch.cat([c, d, d, c, others], -1)
    return u, w, torch.cat([cos, cos, sin, sin, still], -1)


def _some(
    u: Tensor, w: Tensor, turns: Tensor, base: Tensor, x: Tensor, at: Tensor, factors: Tensor
) -> Tensor:
    """``sum_a c_a diag(u^a) T(e^t turns^a) diag(w^a) x`` over some monomials."""
    ahead, lags = _powers(u, at) * factors, base[:, None] * _powers(turns, at).mT
    moved = toeplitz_times(lags, _powers(w, at).mT[..., None] * x[:, :, None], u.shape[2])
    return torch.einsum("bhng,bhgne->bhne", ahead, moved)


def _powers(x: Tensor, at: Tensor) -> Tensor:
    """Products of columns."""
    found = x[..., at[:, 0]]
    for column in at.T[1:]:
        found = found * x[..., column]
    return found

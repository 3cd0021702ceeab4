"""Attention with a polynomial in place of the exponential: linear in the length."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from structc.attention.base import AbstractMethod, causal_mask, check_qkv
from structc.attention.feature_sums import (
    CHUNK,
    Rule,
    feature_attention,
    feature_sums,
    ranks,
    weights_of,
)
from structc.attention.kernels import kernel_for
from structc.attention.stats import HeadStats
from structc.errors import ConfigError
from structc.records import Refusal

WIDE = 2.0
"""Bound past which no polynomial of degree 2 is near the exponential."""
SLACK = 1.25
"""Norms of other inputs may be so much larger than those that were seen."""


@functools.lru_cache(maxsize=64)
def minimax(degree: int, bound: float) -> tuple[tuple[float, ...], float]:
    """The polynomial nearest to ``exp`` on ``[-bound, bound]``, and its largest relative error.

    Remez: ``sum_m a_m x^m e^{-x} - 1`` takes its largest size with alternating signs at
    ``degree + 2`` points.

    >>> coefficients, error = minimax(2, 1.0)
    >>> [round(a, 6) for a in coefficients], round(error, 5)
    ([1.027027, 1.113879, 0.469351], 0.03974)
    """
    count = degree + 2
    points = -bound * np.cos(np.pi * np.arange(count) / (count - 1))
    grid = np.linspace(-bound, bound, 4001)
    error = 0.0
    for _ in range(100):
        signs = (-1.0) ** np.arange(count)
        system = np.column_stack([*(points**m * np.exp(-points) for m in range(degree + 1)), signs])
        solved = np.linalg.solve(system, np.ones(count))
        off = np.polyval(solved[degree::-1], grid) * np.exp(-grid) - 1
        points, largest = _extrema(grid, off, count)
        if largest <= abs(solved[-1]) * (1 + 1e-9) or largest == error:
            break
        error = largest
    return tuple(map(float, solved[:-1])), float(np.abs(off).max())


def _extrema(grid: np.ndarray, off: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """Where each run of one sign is largest."""
    edges = np.flatnonzero(np.diff(np.sign(off)) != 0) + 1
    runs = np.split(np.arange(len(grid)), edges)
    peaks = [run[np.argmax(np.abs(off[run]))] for run in runs]
    while len(peaks) > count:
        peaks.pop(0 if abs(off[peaks[0]]) < abs(off[peaks[-1]]) else -1)
    if len(peaks) < count:
        return np.linspace(grid[0], grid[-1], count), float(np.abs(off).max())
    return grid[peaks], float(np.abs(off[peaks]).max())


@dataclass(frozen=True)
class Polynomial(AbstractMethod):
    """``o_i = sum_j f(s_ij) v_j / sum_j f(s_ij)``, f a polynomial of degree 1 to 4.

    f is the minimax polynomial of ``exp`` on ``[-bound, bound]``: with relative error e < 1 there
    rows are off by at most ``(1 - sqrt(1 - e^2)) / e`` in total variation. Scores past the bound
    have no such promise, and f may be negative there. ``f(s) = phi(q) . phi(k)`` over monomials, so
    keys and values become one matrix; the causal form carries it from chunk to chunk.

    Args:
        degree: of f.
        bound: half-width of the interval of scores.
        is_causal: whether later keys are hidden.
        taylor: ``sum s^p / p!`` instead of the minimax polynomial (Fastmax).
        normalize: subtract the mean over tokens of q and of k and divide by the largest norm,
            as a layer trained with Fastmax does; not causal.
        center: subtract the mean key: exact for softmax, and scores become smaller; not causal.
        dropout: share of the features of degree 2 and more that are dropped, while gradients are
            recorded.

    Cost:    ``4 n D (d_v + 1)`` flops with ``D = C(d + degree, degree)`` features; the causal form
             ``2 n CHUNK (2 d + 1)`` more. Gradients keep q, k and v alone: features and states are
             computed again, a slab at a time.
    Source:  Fastmax, Gerami et al. 2024 (https://arxiv.org/abs/2402.07901); bounded entries: Alman
             and Song 2023 (https://arxiv.org/abs/2302.13214).

    >>> q, k, v = torch.randn(3, 1, 2, 40, 4).unbind(0)
    >>> method = Polynomial(4, 1.0, scale=0.1)
    >>> from structc.attention import exact
    >>> torch.allclose(method(q, k, v), exact(q, k, v, scale=0.1), atol=1e-2)
    True
    """

    name: ClassVar[str] = "polynomial"

    degree: int
    bound: float = 1.0
    is_causal: bool = False
    taylor: bool = False
    normalize: bool = False
    center: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.degree <= 4 or not 0 < self.bound < 20 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"polynomial: degree {self.degree} is 1 to 4, bound {self.bound} above 0 and below "
                f"20, dropout {self.dropout} at least 0 and below 1"
            )
        if self.is_causal and (self.normalize or self.center):
            raise ConfigError("polynomial: a mean over all tokens looks at later ones")

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[Polynomial, ...] | Refusal:
        """Where norms bound the scores, so that each input can be checked."""
        if stats.norms <= WIDE:
            return tuple(
                Polynomial(d, max(stats.norms * SLACK, 1e-3), stats.causal) for d in (1, 2)
            )
        reason = f"norms allow scores of {stats.norms:.2g} (seen: {stats.bound:.2g}), above {WIDE}"
        return Refusal("", cls.name, "BOUND", reason)

    def holds(self, q: Tensor, k: Tensor) -> bool:
        """Whether no score can pass the bound; Fastmax layers are trained as they are."""
        if self.taylor or self.normalize:
            return True
        longest = [float(t.detach().float().norm(dim=-1).max()) for t in (q, k)]
        return abs(self.sigma(q)) * longest[0] * longest[1] <= self.bound * (1 + 1e-6)

    def coefficients(self) -> tuple[float, ...]:
        """Of f, the constant first."""
        if self.taylor:
            return tuple(1 / math.factorial(p) for p in range(self.degree + 1))
        return minimax(self.degree, self.bound)[0]

    def tv_bound(self) -> float:
        """Largest total variation of a row whose scores are inside the bound, at most 1."""
        if self.taylor:
            x = np.linspace(-self.bound, self.bound, 2001)
            e = float(np.abs(np.polyval(self.coefficients()[::-1], x) / np.exp(x) - 1).max())
        else:
            e = minimax(self.degree, self.bound)[1]
        return (1 - math.sqrt(1 - e * e)) / e if 0 < e < 1 else 1.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        """The output; sums of f are no certificate."""
        check_qkv(q, k, v)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries, keys = self._prepared(q.to(wide), k.to(wide))
        weights = self.weights(queries) if self.dropout else None
        kernel = kernel_for(self.name, q, k, v)
        return feature_attention(
            queries, keys, v, self.rule(), weights=weights, kernel=kernel
        ), None

    def sums(self, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        """``f(q k^T) x`` over the keys that each query sees; the scale is in q already."""
        return feature_sums(q, k, x, self.rule(), self.weights(q))

    def rule(self) -> Rule:
        """f, and whether later keys are hidden."""
        return Rule(self.coefficients(), self.is_causal)

    def _prepared(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised as asked for, the scale in q."""
        if self.normalize:
            q, k = (t - t.mean(2, keepdim=True) for t in (q, k))
            q, k = (t / t.norm(dim=-1).amax(2)[..., None, None].clamp(min=1e-12) for t in (q, k))
            return q * (1.0 if self.scale is None else self.scale), k
        if self.center:
            k = k - k.mean(2, keepdim=True)
        return q * self.sigma(q), k

    def weights(self, like: Tensor) -> Tensor:
        """``a_p multinomial`` of each feature, what is dropped at 0."""
        weights = weights_of(self.coefficients(), like.shape[-1]).to(like)
        if self.dropout and torch.is_grad_enabled() and like.requires_grad:
            orders, _ = ranks(like.shape[-1], self.degree)
            high = torch.tensor(orders > 1)
            kept = (torch.rand(len(orders)) >= self.dropout).to(weights) / (1 - self.dropout)
            weights = torch.where(high, weights * kept, weights)
        return weights

    def f(self, scores: Tensor) -> Tensor:
        """The polynomial."""
        return self.rule().f(scores)

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """``f(s)`` with rows that sum to 1."""
        queries, keys = self._prepared(q, k)
        weights = self.f(queries @ keys.mT)
        if self.is_causal:
            weights = weights * causal_mask(q.shape[2], k.shape[2])
        return weights / weights.sum(-1, keepdim=True)

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Of the products with features; in chunks, what meets in full besides."""
        many = math.comb(head_dim + self.degree, self.degree)
        whole = 2.0 * (queries + keys) * many * (head_dim + 1)
        return whole + 2.0 * queries * CHUNK * (2 * head_dim + 1) * self.is_causal

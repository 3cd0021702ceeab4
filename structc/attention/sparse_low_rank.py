"""Exact weights near the query and at the sinks, a polynomial everywhere else, one normaliser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structc.attention.base import AbstractMethod, causal_mask, check_qkv
from structc.attention.kernels import kernel_for
from structc.attention.polynomial import Polynomial
from structc.attention.stats import HeadStats
from structc.errors import ConfigError
from structc.records import Refusal
from structc.softmax import Softmax

CHUNK = 128
"""Queries whose window is computed at a time."""

FLAT = 3.0
"""Size of scores up to which the method is tried."""


@dataclass(frozen=True)
class SparseLowRank(AbstractMethod):
    """``A = exp(S)`` inside a window and at sinks, ``f(S)`` outside; rows are divided once.

    Computed as ``phi(q) phi(k)^T X + (exp(S) - f(S)) X`` with the second product inside the window
    alone, X = [V, 1]. Better than its parts where f fits the scores outside the window, and worse
    where they are far past the bound: judge it by its error.

    Args:
        window, sinks: keys with exact weights, as in ``WindowSinks``.
        degree, bound: of the polynomial outside, as in ``Polynomial``.
        is_causal: whether later keys are hidden.

    Cost:    that of both parts.
    Source:  Scatterbrain, Chen et al. 2021 (https://arxiv.org/abs/2110.15343).

    >>> from structc.attention import exact
    >>> q, k, v = torch.randn(3, 1, 2, 40, 4).unbind(0)
    >>> torch.allclose(SparseLowRank(64)(q, k, v), exact(q, k, v), atol=1e-4)
    True
    """

    name: ClassVar[str] = "sparse_low_rank"

    window: int
    sinks: int = 0
    degree: int = 2
    bound: float = 1.0
    is_causal: bool = False

    def __post_init__(self) -> None:
        if self.window < 1 or self.sinks < 0:
            raise ConfigError(f"sparse_low_rank: window {self.window}, {self.sinks} sinks")
        self._outside()

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[SparseLowRank, ...] | Refusal:
        """A window for what is large, where the rest is flat."""
        if stats.centred > FLAT or stats.bound > FLAT:
            reason = f"scores up to {stats.bound:.2g}, above {FLAT}: no polynomial fits them"
            return Refusal("", cls.name, "BOUND", reason)
        return (SparseLowRank(128, 4, bound=max(stats.bound, 0.1), is_causal=stats.causal),)

    def _outside(self) -> Polynomial:
        return Polynomial(self.degree, self.bound, self.is_causal, scale=self.scale)

    def _rule(self) -> Softmax:
        return Softmax(1.0, causal=self.is_causal, window=self.window, sinks=self.sinks)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        """The output; weights of a polynomial are no certificate."""
        check_qkv(q, k, v)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries, keys = q.to(wide) * self.sigma(q), k.to(wide)
        rule, outside, n, m = self._rule(), self._outside(), q.shape[2], k.shape[2]
        kernel = kernel_for(self.name, q, k, v)
        if kernel is not None:
            done = kernel(queries, keys, v, outside.rule(), self.window, self.sinks)
            if done is not None:
                return torch.as_tensor(done), None
        x = torch.cat([v.to(wide), v.new_ones(*v.shape[:3], 1, dtype=wide)], -1)
        far = outside.sums(queries, keys, x)
        parts = []
        for first in range(0, n, CHUNK):
            last = min(n, first + CHUNK)
            at = torch.cat(
                [torch.arange(a, b) for a, b in rule.spans(first, last, m)] or [torch.arange(0)]
            )
            scores = queries[:, :, first:last] @ keys[:, :, at].mT
            seen = rule.visible(torch.arange(first, last), at)
            assert seen is not None
            # rows are scaled by their largest exponential, the far part too
            alone = self._alone(torch.arange(first, last), m)
            top = _top(scores, seen, alone)
            near = (scores.masked_fill(~seen, -torch.inf) - top).exp()
            share = (-top).exp().masked_fill(alone, 0)
            less = (outside.f(scores) * share).masked_fill(~seen | alone, 0)
            rest = (far[:, :, first:last] * share).masked_fill(alone, 0)
            parts.append((near - less) @ x[:, :, at] + rest)
        y = torch.cat(parts, 2) if parts else far
        return (y[..., :-1] / y[..., -1:]).to(q.dtype), None

    def _alone(self, queries: Tensor, keys: int) -> Tensor:
        """Which queries see all their keys by rule ``(n, 1)``: they need no polynomial."""
        found = queries < self.window + self.sinks
        if not self.is_causal:
            found = found & (queries + self.window >= keys)
        return found[:, None]

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """Both parts with one normaliser."""
        n, m = q.shape[2], k.shape[2]
        scores = self.sigma(q) * (q @ k.mT)
        seen = self._rule().visible(torch.arange(n), torch.arange(m))
        assert seen is not None
        alone = self._alone(torch.arange(n), m)
        top = _top(scores, seen, alone)
        near = (scores.masked_fill(~seen, -torch.inf) - top).exp()
        far = (self._outside().f(scores) * (-top).exp()).masked_fill(alone, 0)
        weights = torch.where(seen, near, far)
        if self.is_causal:
            weights = weights * causal_mask(n, m)
        return weights / weights.sum(-1, keepdim=True)

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Of the window and of the polynomial."""
        reach = min(keys, (1 if self.is_causal else 2) * self.window + self.sinks + CHUNK)
        outside = self._outside().flops(queries, keys, head_dim)
        return 4.0 * queries * reach * head_dim + outside


def _top(scores: Tensor, seen: Tensor, alone: Tensor) -> Tensor:
    """The largest visible score of each row; at least 0 where a polynomial is added."""
    if not scores.shape[-1]:
        return scores.new_zeros(*scores.shape[:3], 1)
    top = scores.detach().masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    return torch.where(alone & top.isfinite(), top, top.clamp(min=0))

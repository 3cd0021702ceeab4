"""A head that averages: every visible key has the same weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structc.attention.base import AbstractMethod, causal_mask, check_qkv
from structc.attention.stats import HeadStats
from structc.records import Refusal

FLAT = 0.5
"""Total variation that a head's scores may allow for the method to be tried on it."""


@dataclass(frozen=True)
class Uniform(AbstractMethod):
    """``o_i`` is the mean of the values that query i sees.

    Where the scores of a row spread by no more than ``2 b`` around their middle, weights are off by
    at most ``tanh(b / 2)`` in total variation.

    Cost:    ``n d`` additions.
    Source:  prefix mean; the bound is that of a perturbed softmax, sharp at two keys.

    >>> k = torch.randn(1, 1, 6, 4)
    >>> torch.allclose(Uniform(is_causal=True)(k, k, k)[:, :, -1], k.mean(2), atol=1e-6)
    True
    """

    name: ClassVar[str] = "uniform"
    certified: ClassVar[bool] = True

    is_causal: bool = False

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[Uniform, ...] | Refusal:
        """Where rows are near constant."""
        tv = math.tanh(stats.spread / 2)
        if tv <= FLAT:
            return (Uniform(is_causal=stats.causal),)
        reason = f"scores spread by +-{stats.spread:.2g} around their middle: TV up to {tv:.2f}"
        return Refusal("", cls.name, "SPREAD", reason)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Means, and ``mean_j s_ij + log(keys)``: the row sums of a constant row."""
        check_qkv(q, k, v)
        n, m = q.shape[2], k.shape[2]
        means, keys = (self._means(t, n) for t in (v, k))
        count = self._counts(n, m).to(keys)
        lse = self.sigma(q) * (q.to(keys.dtype) * keys).sum(-1) + count.log()
        return means.to(q.dtype), lse

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """``1 / keys`` where a key is seen."""
        n, m = q.shape[2], k.shape[2]
        seen = causal_mask(n, m) if self.is_causal else torch.ones(n, m, dtype=torch.bool)
        weights = (seen.double() / self._counts(n, m).double()[:, None]).to(q.dtype)
        return weights.expand(*q.shape[:2], n, m)

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Additions and a product a query."""
        return float((2 * keys + 2 * queries) * head_dim)

    def _means(self, x: Tensor, n: int) -> Tensor:
        m = x.shape[2]
        wide = x if x.dtype == torch.float64 else x.float()
        if not self.is_causal:
            return wide.mean(2, keepdim=True).expand(-1, -1, n, -1)
        sums = wide.cumsum(2)
        if n > m:  # later queries see all keys
            sums = torch.cat([sums, sums[:, :, -1:].expand(-1, -1, n - m, -1)], 2)
        return sums[:, :, :n] / self._counts(n, m).to(wide)[:, None]

    def _counts(self, n: int, m: int) -> Tensor:
        if not self.is_causal:
            return torch.full((n,), float(m))
        return torch.arange(1, n + 1).clamp(max=m).double()

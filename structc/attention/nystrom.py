"""Attention through a few landmarks: Nyström's method for the softmax matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structc.attention.base import AbstractMethod, check_qkv, exact
from structc.attention.stats import HeadStats
from structc.errors import ConfigError
from structc.records import Refusal

NOISE = 1e-3
"""Singular values of the landmarks' own softmax, over the largest, that are left out."""


@dataclass(frozen=True)
class Nystrom(AbstractMethod):
    """``softmax(Q K~^T) pinv(softmax(Q~ K~^T)) softmax(Q~ K^T) V``, landmarks are segment means.

    The pseudo-inverse is LAPACK's, in float64: the usual six Newton steps leave an error of 2.6e-2
    at a condition number of 8e4. Singular values below a thousandth are left out: means of random
    keys have such, and kept they multiply what the means get wrong (512 tokens, 32 landmarks,
    scores of spread 0.1: relative output error 1.5 with them, 0.1 without). Weights may be
    negative and rows need not sum to 1, so there is no certificate; a baseline for the others.

    Args:
        landmarks: segments of queries and of keys.

    Cost:    ``8 n landmarks d`` flops and ``landmarks^3`` for the pseudo-inverse.
    Source:  Nyströmformer, Xiong et al. 2021 (https://arxiv.org/abs/2102.03902).

    >>> q, k, v = torch.randn(3, 1, 2, 50, 8).unbind(0)
    >>> torch.allclose(Nystrom(50)(q, k, v), exact(q, k, v), atol=1e-3)
    True
    """

    name: ClassVar[str] = "nystrom"

    landmarks: int

    def __post_init__(self) -> None:
        if self.landmarks < 1:
            raise ConfigError(f"nystrom: {self.landmarks} landmarks")

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[Nystrom, ...] | Refusal:
        """Where rows are of low rank and all keys are seen."""
        if stats.causal:
            return Refusal("", cls.name, "DIRECTION", "landmarks see all keys: not causal")
        if stats.rank > stats.rows // 2:
            reason = f"rank {stats.rank:.0f} of {stats.rows} sampled rows"
            return Refusal("", cls.name, "RANK", reason)
        return (Nystrom(max(16, 2 * int(stats.rank))),)

    def applies(self, queries: int, keys: int) -> Refusal | None:
        """More landmarks than tokens are no approximation."""
        if self.landmarks <= min(queries, keys):
            return None
        return self.refuse("SIZE", f"{self.landmarks} landmarks of {min(queries, keys)} tokens")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None]:
        """The product, from the right."""
        check_qkv(q, k, v)
        few_q, few_k, inverse = self._landmarks(q, k)
        inner = inverse @ exact(few_q, k, v, scale=self.scale)
        return exact(q, few_k, inner, scale=self.scale), None

    def _landmarks(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        few_q, few_k = (_segment_means(t, min(self.landmarks, t.shape[2])) for t in (q, k))
        core = (self.sigma(q) * (few_q @ few_k.mT)).double().softmax(-1)
        return few_q, few_k, torch.linalg.pinv(core, rtol=NOISE).to(q.dtype)

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """The product of the three factors."""
        few_q, few_k, inverse = self._landmarks(q, k)
        sigma = self.sigma(q)
        left, right = (sigma * (q @ few_k.mT)).softmax(-1), (sigma * (few_q @ k.mT)).softmax(-1)
        return left @ inverse @ right

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Of the three products and the pseudo-inverse."""
        return 4.0 * (queries + keys) * self.landmarks * head_dim + 20.0 * self.landmarks**3


def _segment_means(x: Tensor, many: int) -> Tensor:
    """Means of ``many`` segments as even as the length allows."""
    edges = torch.linspace(0, x.shape[2], many + 1).round().long()
    wide = x if x.dtype == torch.float64 else x.float()
    sums = torch.cat([torch.zeros_like(wide[:, :, :1]), wide.cumsum(2)], 2)[:, :, edges]
    return (sums.diff(dim=2) / edges.diff().to(wide)[:, None]).to(x.dtype)

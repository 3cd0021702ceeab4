"""Blocks of keys that carry most of a head's attention, chosen from the input itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from structc.attention.base import AbstractMethod, check_qkv, exact
from structc.attention.stats import HeadStats
from structc.errors import ConfigError
from structc.records import Refusal

DENSE = 0.5
"""Share of the blocks from which on nothing is saved."""


@dataclass(frozen=True)
class BlockSparse(AbstractMethod):
    """Exact softmax over the blocks of keys whose estimated mass adds up to ``mass``.

    The mass of a block is estimated from means of queries and keys over blocks, or, with
    ``stride`` s, from sums along its antidiagonals: every s-th diagonal of products passes through
    each row and column once. For each block of queries the fewest blocks of keys are kept whose
    estimated softmax reaches ``mass``; the first block and the diagonal always are.

    Args:
        mass: between 0 and 1; 1 keeps every block.
        block_size: queries and keys of a block.
        is_causal: whether later keys are hidden.
        stride: of the antidiagonals, a divisor of ``block_size``; 0 for means.

    Cost:    ``4 rho n^2 d`` flops at density rho, and for the estimate ``2 n^2 d / b^2`` (means) or
             ``2 n^2 d / s``.
    Source:  SpargeAttn, Zhang et al. 2025 (https://arxiv.org/abs/2502.18137); antidiagonals:
             XAttention, Xu et al. 2025 (https://arxiv.org/abs/2503.16428).

    >>> q, k, v = torch.randn(3, 1, 2, 100, 8).unbind(0)
    >>> torch.allclose(BlockSparse(1.0, 16)(q, k, v), exact(q, k, v), atol=1e-5)
    True
    """

    name: ClassVar[str] = "block_sparse"
    certified: ClassVar[bool] = True

    mass: float
    block_size: int = 64
    is_causal: bool = False
    stride: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1 or self.block_size < 1:
            raise ConfigError(f"block_sparse: mass {self.mass} of blocks of {self.block_size}")
        if self.stride and (self.stride < 1 or self.block_size % self.stride):
            raise ConfigError(f"block_sparse: stride {self.stride} does not divide the block")

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[BlockSparse, ...] | Refusal:
        """Where few blocks hold most of each row."""
        share = stats.blocks[0.9]
        if share > DENSE:
            reason = f"{share:.0%} of the blocks hold 90 % of the mass"
            return Refusal("", cls.name, "COVERAGE", reason)
        masses = [mass for mass in (0.8, 0.9, 0.95) if stats.blocks.get(mass, share) <= DENSE]
        return tuple(BlockSparse(m, 64, is_causal=stats.causal, stride=16) for m in masses)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output and row sums over the blocks that are kept."""
        check_qkv(q, k, v)
        return exact(
            q,
            k,
            v,
            is_causal=self.is_causal,
            block_mask=(self.blocks(q, k), self.block_size),
            scale=self.scale,
            return_lse=True,
        )

    @torch.no_grad()
    def blocks(self, q: Tensor, k: Tensor) -> Tensor:
        """Which blocks are kept: boolean ``(B, H, blocks of queries, blocks of keys)``."""
        size, n, m = self.block_size, q.shape[2], k.shape[2]
        rows, columns = -(-n // size), -(-m // size)
        if self.mass == 1:  # an estimate that rounds to all of it is not all
            return self._reached(rows, columns).expand(*q.shape[:2], rows, columns)
        if self.stride:
            mass = self._antidiagonals(q.float(), k.float(), rows, columns)
        else:
            scores = self.sigma(q) * (_means(q, size) @ _means(k, size).mT)
            mass = scores.masked_fill(~self._reached(rows, columns), -torch.inf).softmax(-1)
        order = mass.argsort(-1, descending=True)
        ahead = mass.gather(-1, order).cumsum(-1) - mass.gather(-1, order)
        kept = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, ahead < self.mass)
        kept[..., 0] = True
        diagonal = torch.arange(min(rows, columns))
        kept[..., diagonal, diagonal] = True
        return kept & self._reached(rows, columns)

    def _antidiagonals(self, q: Tensor, k: Tensor, rows: int, columns: int) -> Tensor:
        """Softmax of sums along antidiagonals, added up in each block."""
        size, step = self.block_size, self.stride
        q, k = (
            F.pad(t, (0, 0, 0, many * size - t.shape[2])) for t, many in ((q, rows), (k, columns))
        )
        turned = q.unflatten(2, (-1, step)).flip(3).flatten(3)
        scores = self.sigma(k) / step * (turned @ k.unflatten(2, (-1, step)).flatten(3).mT)
        if self.is_causal:
            i, j = (torch.arange(s) for s in scores.shape[-2:])
            scores = scores.masked_fill(j > i[:, None], -torch.inf)
        per = size // step
        weights = scores.softmax(-1).unflatten(-1, (-1, per)).sum(-1)
        return weights.unflatten(-2, (-1, per)).mean(-2)

    def _reached(self, rows: int, columns: int) -> Tensor:
        if not self.is_causal:
            return torch.ones(rows, columns, dtype=torch.bool)
        return torch.arange(columns)[None] <= torch.arange(rows)[:, None]

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """Softmax of the scores of the blocks that are kept."""
        n, m, size = q.shape[2], k.shape[2], self.block_size
        seen = self.blocks(q, k).repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :n, :m]
        if self.is_causal:
            seen = seen & (torch.arange(m)[None] <= torch.arange(n)[:, None])
        scores = self.sigma(q) * (q @ k.mT)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """If a fifth of the blocks is kept, which only the input tells, and the estimate."""
        share = 0.1 if self.is_causal else 0.2
        per = self.stride or self.block_size**2
        return queries * keys * head_dim * (4 * share + 2 / per)


def _means(x: Tensor, size: int) -> Tensor:
    """Of each block; the last one may be short."""
    wide = x.float()
    whole = x.shape[2] // size * size
    found = wide[:, :, :whole].unflatten(2, (-1, size)).mean(3)
    if whole == x.shape[2]:
        return found
    return torch.cat([found, wide[:, :, whole:].mean(2, keepdim=True)], 2)

"""Attention as a Monarch matrix: two batched softmax factors, found by alternating maximisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from structc.attention.base import AbstractMethod, causal_mask, check_qkv, exact, merge
from structc.attention.kernels import kernel_for
from structc.attention.stats import HeadStats
from structc.errors import ConfigError
from structc.records import Refusal

LEAF = 1024
"""Queries and keys that the causal form computes exactly."""
LEAST = 1e-9
"""Weight that a block of keys counts as having at least."""


@dataclass(frozen=True)
class Monarch(AbstractMethod):
    """``P[(l, j), (k, i)] = L[l, j, k] R[k, j, i]``, query (block l, place j), key (block k, i).

    Both factors are distributions, so P is one. Each step maximises ``<P, S> + H(P)`` over one of
    them in closed form, which is the attention of a few representative queries: R of ``sum_l L q``,
    then L of ``sum_i R k``. The maximum is the logarithm of the row's sum if P is exact, so the gap
    is the row's divergence. Exact for scores ``f(l, j, k) + g(k, j, i)``: grids, periods.

    Causal: by halves. Keys of the first half are all visible to queries of the second, which is the
    full form; both halves go on until they are ``LEAF`` long; parts are merged by their row sums.

    Args:
        block_size: places of a block; the period of the data where it has one, else near sqrt(n).
        num_steps: times that both factors are found.
        is_causal: whether later keys are hidden.
        extra: first tokens that are no part of the grid (a CLS token), exact as keys and queries.

    Cost:    ``(8 (num_steps - 1) + 10) n^1.5 d`` flops with blocks of sqrt(n); causal 1.21 times
             that and ``2 n LEAF d``.
    Source:  MonarchAttention, Yaras et al. 2025 (https://arxiv.org/abs/2505.18698), its formulas.

    >>> row, column = torch.randn(6, 1, 4), torch.randn(1, 5, 4)
    >>> x = torch.cat([row.expand(6, 5, 4), column.expand(6, 5, 4)], -1).reshape(1, 1, 30, 8)
    >>> torch.allclose(Monarch(5, 1)(x, x, x), exact(x, x, x), atol=1e-5)
    True
    """

    name: ClassVar[str] = "monarch"
    certified: ClassVar[bool] = True

    block_size: int
    num_steps: int = 2
    is_causal: bool = False
    extra: int = 0

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.num_steps < 1 or self.extra < 0:
            raise ConfigError(
                f"monarch: block_size {self.block_size}, num_steps {self.num_steps} and extra "
                f"{self.extra} start at 1, 1 and 0"
            )
        if self.is_causal and self.extra:
            raise ConfigError("monarch: extra tokens stand in front of a grid, which is not causal")

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[Monarch, ...] | Refusal:
        """Blocks of the scores' periods, and of about the square root of the length."""
        if stats.causal and stats.length < 4 * LEAF:
            reason = f"{stats.length} keys: its causal form is exact up to {LEAF}, pays later"
            return Refusal("", cls.name, "SHORT", reason)
        near = 1 << round(math.log2(max(4, stats.length)) / 2)
        sizes = dict.fromkeys([*(p for p in stats.periods if p >= 4), near])
        return tuple(Monarch(size, is_causal=stats.causal) for size in sizes)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and of each row ``<p, s> + H(p)``."""
        check_qkv(q, k, v)
        if self.is_causal:
            return self._halves(q, k, v)
        return beside(self.extra, q, k, v, self.scale, self._full)

    def _halves(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n, m = q.shape[2], k.shape[2]
        if n <= LEAF or m <= LEAF:
            return exact(q, k, v, is_causal=True, scale=self.scale, return_lse=True)
        half = min(n, m) // 2
        upper = self._halves(q[:, :, :half], k[:, :, :half], v[:, :, :half])
        lower = self._halves(q[:, :, half:], k[:, :, half:], v[:, :, half:])
        off = self._full(q[:, :, half:], k[:, :, :half], v[:, :, :half])
        below = merge(*lower, *off)
        return torch.cat([upper[0], below[0]], 2), torch.cat([upper[1], below[1]], 2)

    def _full(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(q, k, v, self.block_size)
        parts = Parts(blocks.q, blocks.k, blocks.v, blocks.start(), blocks.shown, blocks.real)
        o, sums = alternate(parts, self.num_steps, self.sigma(q))
        return blocks.back(o), blocks.back(sums[..., None])[..., 0]

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """The product of both factors; merged halves where it is causal."""
        n, m = q.shape[2], k.shape[2]
        eye = torch.eye(m, dtype=q.dtype).expand(*k.shape[:2], m, m)
        if not self.is_causal and not self.extra:
            return self._full(q, k, eye)[0]
        found = self.attend(q, k, eye)[0]
        return found * causal_mask(n, m) if self.is_causal else found

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Of the products of both factors."""
        n, b = max(queries, keys), self.block_size
        full = (
            head_dim
            * n
            * ((4 * self.num_steps + 2) * (b + n / b) - 2 * (self.num_steps - 1) * n / b)
        )
        return 1.21 * full / 2 + 2 * n * LEAF * head_dim if self.is_causal else full


Attend = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""q, k and v to output and row sums."""


def beside(
    extra: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, grid: Attend
) -> tuple[Tensor, Tensor]:
    """The first ``extra`` tokens exactly, as queries and as keys; ``grid`` among the others."""
    if not extra:
        return grid(q, k, v)
    if q.shape[2] <= extra:
        return exact(q, k, v, scale=scale, return_lse=True)
    ahead = exact(q[:, :, :extra], k, v, scale=scale, return_lse=True)
    q = q[:, :, extra:]
    first = exact(q, k[:, :, :extra], v[:, :, :extra], scale=scale, return_lse=True)
    if k.shape[2] <= extra:
        rest = first
    else:
        rest = merge(*first, *grid(q, k[:, :, extra:], v[:, :, extra:]))
    return torch.cat([ahead[0], rest[0]], 2), torch.cat([ahead[1], rest[1]], 2)


class Parts(NamedTuple):
    """What the alternation works on; heads and batch are one dimension N.

    Attributes:
        q: ``(N, places, rows, d)``, queries by place.
        k, v: ``(N, blocks, size, d)``, by block.
        left: ``(N, blocks, places, d)``, the query that stands for a place in a block at first.
        shown: ``(1, blocks, 1, size)`` boolean, keys that are there; None for all.
        real: ``(1, places, rows, 1)``, 1 for queries that are there.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    left: Tensor
    shown: Tensor | None = None
    real: Tensor | float = 1.0


def alternate(parts: Parts, num_steps: int, sigma: float) -> tuple[Tensor, Tensor]:
    """Both factors so many times in turns: output ``(N, places, rows, e)`` and row sums.

    R is the attention of ``left`` inside each block, L that of the queries over the blocks, with
    R's mean keys as keys and R's entropies as biases.
    """
    queries, keys, values, left, shown, real = parts
    kernel = kernel_for(Monarch.name, queries, keys, values)
    done = None if kernel is None else kernel(parts, num_steps, sigma)
    if done is not None:
        return done[0], done[1]
    for step in range(num_steps):
        last = step + 1 == num_steps
        carried = torch.cat([keys, values], -1) if last else keys
        both, lse = exact(left, keys, carried, bias=shown, scale=sigma, return_lse=True)
        means = both[..., : queries.shape[-1]]
        wide = lse.dtype
        entropy = sigma * (left.to(wide) * means.to(wide)).sum(-1) - lse  # sum R log R
        means, entropy = means.transpose(1, 2), entropy.transpose(1, 2)
        if last:
            y = both[..., queries.shape[-1] :].transpose(1, 2)
            return exact(queries, means, y, bias=-entropy[:, :, None], scale=sigma, return_lse=True)
        scores = sigma * (queries @ means.mT).to(wide) - entropy[:, :, None]
        weights = scores.softmax(-1).to(queries.dtype) * real
        total = weights.sum(2).clamp(min=LEAST)[..., None]
        left = (weights.mT @ queries / total).transpose(1, 2)
    raise AssertionError


class _Blocks:
    """q, k and v in blocks; what fills the last ones up is hidden.

    Heads and batch are one dimension. ``q`` is (N, b, blocks, d), by place; ``k`` and ``v`` are
    (N, blocks, b, d), by block.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, size: int) -> None:
        self.heads, self.n, m = q.shape[:2], q.shape[2], k.shape[2]
        size = max(1, min(size, m))
        self.rows, self.columns, self.size = -(-self.n // size), -(-m // size), size
        self.by_block = self._filled(q, self.rows)
        self.q = self.by_block.transpose(1, 2)
        self.k, self.v = self._filled(k, self.columns), self._filled(v, self.columns)
        self.shown: Tensor | None = None
        if self.columns * size > m:
            places = torch.arange(self.columns * size) < m
            self.shown = places.view(1, self.columns, 1, size)
        self.real: Tensor | float = 1.0
        if self.rows * size > self.n:  # (1, b, blocks, 1)
            places = torch.arange(self.rows * size) < self.n
            self.real = places.view(1, self.rows, size, 1).transpose(1, 2).to(q.dtype)

    def _filled(self, x: Tensor, blocks: int) -> Tensor:
        flat = x.flatten(0, 1)
        more = blocks * self.size - flat.shape[1]
        flat = F.pad(flat, (0, 0, 0, more)) if more else flat
        return flat.unflatten(1, (blocks, self.size))

    def start(self) -> Tensor:
        """A query for each block and place: those of the block at the same height."""
        at = torch.arange(self.columns) * self.rows // self.columns
        return self.by_block[:, at]

    def back(self, x: Tensor) -> Tensor:
        """(N, b, blocks, e) as (B, H, n, e)."""
        flat = x.transpose(1, 2).flatten(1, 2)[:, : self.n]
        return flat.unflatten(0, self.heads)

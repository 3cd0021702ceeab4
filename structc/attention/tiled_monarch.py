"""Monarch attention on a grid in tiles: a pair of factors for each two tiles, one joint softmax."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structc.attention.base import AbstractMethod, check_qkv
from structc.attention.monarch import Parts, alternate, beside
from structc.attention.stats import HeadStats
from structc.errors import ConfigError
from structc.records import Refusal

SLAB = 1 << 21
"""Numbers that represent query tiles at a time, where one tile needs no more."""


@dataclass(frozen=True)
class TiledMonarch(AbstractMethod):
    """``P[(a, i, j), (b, k, l)] = L[a, i, j, (b, k)] R[a, b, k, j, l]``, L a softmax over (b, k).

    Tokens are a grid of frames, rows and columns, cut into ``tiles`` bands each way. Query (a, i,
    j) stands in tile a, row i (of all rows of the tile's frames), column j; key (b, k, l) likewise.
    For one query tile this is a Monarch matrix against all rows of all tiles, so one tile is
    ``Monarch(w)`` and tiles of a single token are exact. As there, rows are distributions and the
    row sum is that of the last factor: the gap to the true one is the row's divergence. Exact for
    scores ``f(row, row') + g(column, column')`` of frames alike.

    Smaller tiles make the family larger; they do not always improve a single step.

    Args:
        grid: (rows, columns) or (frames, rows, columns), the last one fastest.
        tiles: bands in each direction; they divide the grid.
        num_steps: times that both factors are found.
        extra: first tokens that are no part of the grid (a CLS token), exact as keys and queries.

    Cost:    ``d n (4 num_steps + 2) (A w' + n / w') `` flops, A tiles of w' columns; memory that of
             one query tile, ``O(n d)``.
    Source:  MonarchAttention, Yaras et al. 2025 (https://arxiv.org/abs/2505.18698), and its tiled
             form for video, MonarchRT 2026; formulas alone.

    >>> from structc.attention import exact
    >>> row, column = torch.randn(6, 1, 4), torch.randn(1, 8, 4)
    >>> x = torch.cat([row.expand(6, 8, 4), column.expand(6, 8, 4)], -1).reshape(1, 1, 48, 8)
    >>> torch.allclose(TiledMonarch((6, 8), (2, 2), 1)(x, x, x), exact(x, x, x), atol=1e-5)
    True
    """

    name: ClassVar[str] = "tiled_monarch"
    certified: ClassVar[bool] = True

    grid: tuple[int, ...]
    tiles: tuple[int, ...]
    num_steps: int = 2
    extra: int = 0

    def __post_init__(self) -> None:
        if len(self.grid) not in (2, 3) or len(self.tiles) != len(self.grid):
            raise ConfigError(
                f"tiled_monarch: grid {self.grid} and tiles {self.tiles} are (rows, columns) or "
                "(frames, rows, columns), both alike"
            )
        if min(self.tiles) < 1 or any(g < 1 or g % t for g, t in zip(self.grid, self.tiles)):
            raise ConfigError(
                f"tiled_monarch: {self.tiles} tiles do not divide a grid of {self.grid}",
                hint="each direction of the grid is a whole number of tiles",
            )
        if self.num_steps < 1 or self.extra < 0:
            raise ConfigError(
                f"tiled_monarch: num_steps {self.num_steps} and extra {self.extra} start at 1 and 0"
            )

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[TiledMonarch, ...] | Refusal:
        """Where the tokens are a square, or one behind a CLS token; other grids are asked for."""
        if stats.causal:
            return Refusal("", cls.name, "DIRECTION", "a grid sees all of itself: not causal")
        for extra in (0, 1):
            side = math.isqrt(max(0, stats.length - extra))
            if side >= 8 and side * side + extra == stats.length:
                sizes = [(1, 1), (2, 2)] if side % 2 == 0 else [(1, 1)]
                return tuple(TiledMonarch((side, side), tiles, extra=extra) for tiles in sizes)
        return Refusal("", cls.name, "GRID", f"{stats.length} tokens are no square")

    @property
    def length(self) -> int:
        """Tokens that the grid and what stands in front of it are."""
        return math.prod(self.grid) + self.extra

    def applies(self, queries: int, keys: int) -> Refusal | None:
        """To the tokens of its grid alone."""
        if queries == keys == self.length:
            return None
        return self.refuse(
            "SIZE",
            f"{queries} queries and {keys} keys: a grid of {self.grid} with {self.extra} tokens in "
            f"front has {self.length}",
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and of each row ``<p, s> + H(p)``."""
        check_qkv(q, k, v)
        refusal = self.applies(q.shape[2], k.shape[2])
        if refusal is not None:
            raise ConfigError(f"tiled_monarch: {refusal.reason}")
        return beside(self.extra, q, k, v, self.scale, self._grid)

    def _grid(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys, values = (self._tiled(t.flatten(0, 1)) for t in (q, k, v))
        tiles = queries.shape[1]
        keys, values = keys.flatten(1, 2), values.flatten(1, 2)  # (N, tiles rows, columns, d)
        each = max(1, SLAB // max(1, keys.numel() + values.numel()))
        found = []
        for some in queries.split(each, 1):  # query tiles know nothing of each other
            by_place = some.transpose(2, 3).flatten(1, 2)  # (N, tiles columns, rows, d)
            left = by_place.transpose(1, 2).repeat(1, tiles, 1, 1)
            o, sums = alternate(Parts(by_place, keys, values, left), self.num_steps, self.sigma(q))
            both = torch.cat([o.to(sums.dtype), sums[..., None]], -1)
            found.append(both.unflatten(1, (some.shape[1], -1)).transpose(2, 3))
        y = self._untiled(torch.cat(found, 1)).unflatten(0, q.shape[:2])
        return y[..., :-1].to(q.dtype), y[..., -1]

    def _cut(self) -> tuple[list[int], list[int]]:
        """Bands and what is in each, frames in front where there are none."""
        ahead = [1] * (3 - len(self.grid))
        bands = [*ahead, *self.tiles]
        return bands, [g // t for g, t in zip([*ahead, *self.grid], bands)]

    def _tiled(self, x: Tensor) -> Tensor:
        """(N, n, e) as (N, tiles, rows of a tile, columns of a tile, e)."""
        (f, h, w), (df, dh, dw) = self._cut()
        y = x.reshape(-1, f, df, h, dh, w, dw, x.shape[-1]).permute(0, 1, 3, 5, 2, 4, 6, 7)
        return y.reshape(-1, f * h * w, df * dh, dw, x.shape[-1])

    def _untiled(self, x: Tensor) -> Tensor:
        """Back in the order of the tokens."""
        (f, h, w), (df, dh, dw) = self._cut()
        y = x.reshape(-1, f, h, w, df, dh, dw, x.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return y.reshape(x.shape[0], -1, x.shape[-1])

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """What comes of values that are a unit matrix."""
        m = k.shape[2]
        return self.attend(q, k, torch.eye(m, dtype=q.dtype).expand(*k.shape[:2], m, m))[0]

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Of the products of both factors."""
        n, tiles, b = max(queries, keys), math.prod(self.tiles), self._cut()[1][2]
        steps = 4 * self.num_steps + 2
        return head_dim * n * (steps * (tiles * b + n / b) - 2 * (self.num_steps - 1) * n / b)

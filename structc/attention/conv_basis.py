"""Causal attention as a few Toeplitz segments, applied by FFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from structc.attention.base import AbstractMethod, check_qkv
from structc.attention.kernels import kernel_for
from structc.attention.stats import HeadStats
from structc.errors import ConfigError
from structc.records import Refusal

SLAB = 1 << 18
"""Numbers that are transformed at a time: they stay in a cache."""
FAINT, FAINTER = 1e-4, 1e-6
"""Row sums, over the largest weight, below which float32, and then float64, are too few."""
WAYS = 16
"""Columns that one step of the search looks at."""
SAMPLES = 2048
"""Pairs of query and key that a basis is held against."""


class Basis(NamedTuple):
    """Columns of scores: in ``[starts[s], starts[s + 1])`` key j of query i scores ``c_s(i - j)``.

    Attributes:
        starts: ``(heads, segments)``, first column of each; ``n`` for a segment that is not there.
        columns: ``(heads, segments, n)``, ``c_s``; lags past the end hold zeros.
    """

    starts: Tensor
    columns: Tensor


@dataclass(frozen=True)
class ConvBasis(AbstractMethod):
    """Scores whose columns fall into ``num_basis`` runs of shifted copies, ``sum conv(b_i, m_i)``.

    Exponentials keep the structure, so softmax times V is a convolution a segment: one FFT of V
    restricted to each, one inverse for all; row sums are running sums. The segments are recovered
    from a few columns by a search for the first one whose first ``lags`` scores differ from those
    of the segment before; each change must show there. Content-dependent columns have no such
    basis: :meth:`residual` tells.

    Args:
        num_basis: most segments.
        lags: scores that are compared.
        change: mean absolute difference of scores that starts a segment.

    Cost:    ``O(num_basis n (d log n + d_v log n))``.
    Errors:  scores off by at most eta change a row by at most ``tanh(eta / 2)`` in total variation.
    Source:  conv basis, Liang et al. 2024 (https://arxiv.org/abs/2405.05219).

    >>> t = torch.randn(64)
    >>> q, k = torch.eye(64)[None, None] * 8, torch.zeros(1, 1, 64, 64)
    >>> for j in range(64):
    ...     k[0, 0, j, j:] = t[: 64 - j]
    >>> method = ConvBasis(1)
    >>> from structc.attention import exact
    >>> torch.allclose(method(q, k, k), exact(q, k, k, is_causal=True), atol=1e-4)
    True
    """

    name: ClassVar[str] = "conv_basis"

    num_basis: int
    lags: int = 16
    change: float = 1e-2

    def __post_init__(self) -> None:
        if self.num_basis < 1 or self.lags < 1 or self.change <= 0:
            raise ConfigError(
                f"conv_basis: num_basis {self.num_basis} and lags {self.lags} start at 1, change "
                f"{self.change} is above 0"
            )

    @property
    def is_causal(self) -> bool:
        """Always: columns start at the diagonal."""
        return True

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[ConvBasis, ...] | Refusal:
        """For causal heads; whether columns are shifted copies, its error tells."""
        if not stats.causal:
            return Refusal("", cls.name, "DIRECTION", "columns start at the diagonal: causal alone")
        return ConvBasis(1), ConvBasis(4)

    def applies(self, queries: int, keys: int) -> Refusal | None:
        """Square alone: columns are counted from the diagonal."""
        if queries == keys:
            return None
        return self.refuse("SIZE", f"{queries} queries and {keys} keys: columns have no diagonal")

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and the row sums of the scores that the basis stands for."""
        check_qkv(q, k, v)
        return self.apply(self.recover(q, k), v)

    def recover(self, q: Tensor, k: Tensor) -> Basis:
        """The segments of every head, from a few columns of its scores.

        Errors: :class:`ConfigError` for lengths that differ.
        """
        n = q.shape[2]
        if k.shape[2] != n:
            raise ConfigError(f"conv_basis: {n} queries and {k.shape[2]} keys; they must agree")
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        queries, keys = (t.flatten(0, 1).to(wide) for t in (q, k))
        heads, lags = queries.shape[0], min(self.lags, n)
        last = n - lags  # the last column with so many scores
        every = torch.arange(heads)
        starts = torch.full((heads, self.num_basis), n)
        columns: list[Tensor] = []
        at, alive = torch.zeros(heads, dtype=torch.long), torch.ones(heads, dtype=torch.bool)
        with torch.no_grad():
            firsts = []
            for s in range(self.num_basis):
                starts[:, s] = torch.where(alive, at, n)
                firsts.append(at)
                head = self._heads(queries, keys, at[:, None], lags)
                found = self._next(queries, keys, at, last, head)
                alive = alive & (found <= last)
                at = torch.where(alive, found, at)
        lag = torch.arange(n)
        for s in range(self.num_basis):  # with a gradient: where they are is fixed
            place = firsts[s]
            scores = self.sigma(q) * torch.einsum("hnd,hd->hn", queries, keys[every, place])
            rows = (lag[None] + place[:, None]).clamp(max=n - 1)
            inside = lag[None] + place[:, None] < n
            columns.append(scores.gather(1, rows).masked_fill(~inside, 0))
        return Basis(starts, torch.stack(columns, 1))

    def _heads(self, q: Tensor, k: Tensor, at: Tensor, lags: int) -> Tensor:
        """The first scores of some columns ``(heads, w)`` of each head: ``(heads, w, lags)``."""
        rows = (at[..., None] + torch.arange(lags)).flatten(1).clamp(max=q.shape[1] - 1)
        some = q.gather(1, rows[..., None].expand(-1, -1, q.shape[-1])).unflatten(1, (-1, lags))
        keys = k.gather(1, at[..., None].expand(-1, -1, k.shape[-1]))
        return self.sigma(q) * torch.einsum("hwtd,hwd->hwt", some, keys)

    def _next(self, q: Tensor, k: Tensor, at: Tensor, last: int, head: Tensor) -> Tensor:
        """First column after ``at`` whose head differs; ``last + 1`` if none does."""
        low, high = at + 1, torch.full_like(at, last + 1)
        share = torch.arange(WAYS) / WAYS
        while bool((low < high).any()):
            # several columns between at a time: fewer steps than by halves, in the same order
            tried = low[:, None] + ((high - low)[:, None] * share).long()
            columns = self._heads(q, k, tried.clamp(max=last), head.shape[2])
            other = (columns - head).abs().mean(2) > self.change
            first = torch.where(other.any(1), other.long().argmax(1), WAYS)
            known = torch.cat([tried, high[:, None]], 1)
            above = known.gather(1, first[:, None])[:, 0]
            below = tried.gather(1, (first - 1).clamp(min=0)[:, None])[:, 0] + 1
            open_ = low < high
            high = torch.where(open_, above, high)
            low = torch.where(open_ & (first > 0), below, torch.where(open_, above, low))
        return low

    def apply(self, basis: Basis, v: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax of the basis times v, and its row sums."""
        kernel = kernel_for(self.name, v, basis.columns)
        found = None if kernel is None else kernel(basis.starts, basis.columns, v)
        if found is not None:
            return found[0], found[1]
        heads, n = basis.columns.shape[0], v.shape[2]
        wide = basis.columns.dtype
        values = v.flatten(0, 1).to(wide)
        x = values.mT  # (h, d, n)
        kernels, top = self._kernels(basis, n)
        size = int(next_fast_len(2 * n - 1, real=True))
        place = torch.arange(n)
        ends = torch.cat([basis.starts[:, 1:], torch.full((heads, 1), n)], 1)
        used = [s for s in range(self.num_basis) if bool((basis.starts[:, s] < n).any())]
        own = (place >= basis.starts[..., None]) & (place < ends[..., None])
        spectra = [torch.fft.rfft(kernels[:, s], size)[:, None] for s in used]

        def convolved(part: Tensor, at: slice) -> Tensor:
            total = None
            for s, spectrum in zip(used, spectra, strict=True):
                some = part if len(used) == 1 else part * own[at, s, None]
                one = torch.fft.rfft(some, size) * spectrum[at]
                total = one if total is None else total + one
            assert total is not None
            return torch.fft.irfft(total, size)[..., :n]

        sums = self._sums(kernels, basis.starts, ends)
        least = float(sums.detach().min()) if sums.numel() else 1.0
        if least < FAINT and wide != torch.float64:  # an FFT's error is absolute: faint rows drown
            o, lse = self.apply(Basis(basis.starts, basis.columns.double()), v.double())
            return o.to(v.dtype), lse.to(wide)
        sums = sums.clamp(min=torch.finfo(wide).tiny)
        share = (1 / sums)[:, None]
        together, rows = max(1, SLAB // (x.shape[1] * size)), max(1, SLAB // size)
        groups = [slice(h, h + together) for h in range(0, heads, together)]
        o = torch.cat(
            [
                torch.cat([convolved(p, at) * share[at] for p in x[at].split(rows, 1)], 1)
                for at in groups
            ]
        ).mT
        lse = sums.log() + top
        if least < FAINTER:
            o, lse = self._faint(basis, values, sums, o, lse)
        return o.unflatten(0, v.shape[:2]).to(v.dtype), lse.unflatten(0, v.shape[:2])

    def _faint(
        self, basis: Basis, values: Tensor, sums: Tensor, o: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Rows whose weights are lost beside those of others, one by one."""
        n = values.shape[1]
        lag = torch.arange(n)
        segment = (lag >= basis.starts[..., None]).sum(1) - 1
        o, lse = o.contiguous(), lse.clone()
        for head, row in (sums < FAINTER).nonzero().tolist():
            scores = basis.columns[head, segment[head, : row + 1], row - lag[: row + 1]]
            total = scores.logsumexp(0)
            weights = (scores - total).exp()
            o = o.index_put(
                (torch.tensor(head), torch.tensor(row)), weights @ values[head, : row + 1]
            )
            lse = lse.index_put((torch.tensor(head), torch.tensor(row)), total)
        return o, lse

    def _sums(self, kernels: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
        """Of each row: ``sum_s sum_{j in s} e^{c_s(i - j)}``, from running sums."""
        n = kernels.shape[-1]
        running = kernels.double().cumsum(-1)
        until = [torch.arange(n) - edge[..., None] for edge in (starts, ends)]
        ahead, behind = (running.gather(2, at.clamp(min=0)).masked_fill(at < 0, 0) for at in until)
        return (ahead - behind).sum(1).to(kernels.dtype)

    def _kernels(self, basis: Basis, n: int) -> tuple[Tensor, Tensor]:
        """Exponentials of the columns where they reach over the largest, and its logarithm."""
        reach = torch.arange(n) < n - basis.starts[..., None]
        scores = basis.columns.masked_fill(~reach, -torch.inf)
        top = scores.detach().flatten(1).amax(1)
        return (scores - top[:, None, None]).exp(), top[:, None]

    def scores(self, basis: Basis, n: int) -> Tensor:
        """The scores ``(heads, n, n)`` that a basis stands for, -inf above the diagonal."""
        lag = torch.arange(n)[:, None] - torch.arange(n)
        segment = (torch.arange(n) >= basis.starts[..., None]).sum(1) - 1
        per_column = basis.columns.gather(1, segment[..., None].expand(-1, -1, n))  # (h, j, lag)
        index = lag.clamp(min=0).T.expand(len(segment), n, n)
        found = per_column.gather(2, index).mT
        return found.masked_fill(lag < 0, -torch.inf)

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """Softmax of the scores of the basis."""
        n = q.shape[2]
        weights = self.scores(self.recover(q, k), n).softmax(-1)
        return weights.unflatten(0, q.shape[:2]).to(q.dtype)

    @torch.no_grad()
    def residual(self, q: Tensor, k: Tensor, *, seed: int = 0) -> Tensor:
        """Largest ``|score - c_s(i - j)|`` of each head over random pairs, ``(B, H)``.

        What recovery alone does not prove; half of it bounds ``atanh`` of the total variation.
        """
        n, basis = q.shape[2], self.recover(q, k)
        generator = torch.Generator().manual_seed(seed)
        i = torch.randint(n, (SAMPLES,), generator=generator)
        j = (torch.rand(SAMPLES, generator=generator) * (i + 1)).long()
        queries, keys = (t.flatten(0, 1).to(basis.columns.dtype) for t in (q, k))
        true = self.sigma(q) * (queries[:, i] * keys[:, j]).sum(-1)
        segment = (j >= basis.starts[..., None]).sum(1) - 1
        every = torch.arange(len(segment))[:, None]
        found = basis.columns[every, segment, (i - j)[None]]
        return (true - found).abs().amax(1).unflatten(0, q.shape[:2])

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Of recovery, the transforms and the products of spectra."""
        size, k = 2 * queries, self.num_basis
        transform = 2.5 * size * max(1, size.bit_length() - 1)
        recover = 2 * k * max(1, queries.bit_length()) * self.lags * head_dim
        return (k + 1) * (head_dim + 1) * transform + 4 * k * size * (head_dim + 1) + recover

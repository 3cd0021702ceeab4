"""Scores that are a value a query, a value a key and a value a lag: one convolution by FFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from structc.attention.base import AbstractMethod, check_qkv
from structc.attention.stats import HeadStats
from structc.attention.toeplitz import diagonal_sums, toeplitz_times
from structc.errors import ConfigError
from structc.records import Refusal

FAINT, FAINTER = 4e-3, 1e-5
"""Row sums, over the product of both norms, below which float32, and then float64, are too few."""
STEPS, NARROW, FLOAT32 = 60, 1e-26, 1e-16
"""Of the fit, at most; and the squared residual, over the first one, that ends it; of float32."""
FLAT = 1e-6
"""Curvature of the normal matrix, its diagonal being 1, that only its null space has."""
FEW = 64
"""Faint rows of a head that float32 has computed one by one: early ones, with few keys."""
SLOPES = 20
"""Steps of the search for a slope."""
SLAB = 1 << 20
"""Weights of faint rows that exist at a time."""
ROWS = 64
"""Queries that a fit is held against."""


class Sums(NamedTuple):
    """A fit of scores, ``r_i + c_j + t_{i - j}``; heads and batch are one dimension, float64.

    Attributes:
        rows, columns: ``(N, n)``.
        lags: ``(N, 2 n - 1)``, that of ``i - j`` at ``i - j + n - 1``; -inf above the diagonal
            where it is causal.
    """

    rows: Tensor
    columns: Tensor
    lags: Tensor


@dataclass(frozen=True)
class RowColumnToeplitz(AbstractMethod):
    """Softmax of the nearest ``r(i) + c(j) + t(i - j)`` to the scores; the rest is dropped.

    A value a query does nothing to a softmax, ``e^c`` weighs keys and values, ``e^t`` is one
    convolution: positional heads, biases by lag and keys that all queries like. Exact where the
    scores are of this form.

    The fit is least squares over every visible score, and no score is computed for it: sums of rows
    and of columns are products with running sums of k and of q, sums of diagonals a correlation by
    FFT, and the normal equations depend on the length alone; 10 to 20 steps of conjugate gradients,
    each a few running sums, solve them. What is free in them, a line that t takes from c, goes
    where both have the least range.

    The fit looks at the scores of all queries: where something is dropped, later tokens move the
    weights of earlier rows, though never beyond the diagonal. Not for training on next tokens.

    An FFT's error is absolute. Rows whose sum is faint beside ``|e^c| |e^t|`` are found by that
    ratio: float32 computes few of them row by row and with many goes on in float64, where what is
    faint still is computed row by row.

    Args:
        is_causal: whether later keys are hidden.

    Cost:    fit: ``4 d + 2`` transforms of 2 n numbers in float64; then ``2 (d_v + 1)``, and as
             many for d more columns where the row sums are asked for. Faint rows ``O(n d_v)`` each.
    Errors:  scores off by at most eta (:meth:`residual`) change a row by at most ``tanh(eta / 2)``
             in total variation; row sums are ``<p, s> + H(p)`` of the true scores, so the gap is
             the divergence.
    Source:  conv basis, Liang et al. 2024 (https://arxiv.org/abs/2405.05219), with r and c added;
             additive least squares.

    >>> from structc.attention import exact
    >>> at = torch.arange(50.0)[:, None] / 8
    >>> q = torch.cat([at.cos(), at.sin(), at.cos() * 0 + 1], -1)[None, None]
    >>> k = torch.cat([at.cos(), at.sin(), torch.randn(50, 1)], -1)[None, None]
    >>> v = torch.randn(1, 1, 50, 4)
    >>> torch.allclose(RowColumnToeplitz()(q, k, v), exact(q, k, v, is_causal=True), atol=1e-4)
    True
    """

    name: ClassVar[str] = "row_column_toeplitz"
    certified: ClassVar[bool] = True

    is_causal: bool = True

    @classmethod
    def proposals(cls, stats: HeadStats) -> tuple[RowColumnToeplitz, ...] | Refusal:
        """Where all keys are seen; what is dropped, its error tells."""
        if stats.causal:
            reason = "its fit looks at later queries: not for a model that must not"
            return Refusal("", cls.name, "DIRECTION", reason)
        return (RowColumnToeplitz(is_causal=False),)

    def applies(self, queries: int, keys: int) -> Refusal | None:
        """Square alone: the fit counts diagonals of a square."""
        if queries == keys:
            return None
        return self.refuse("SIZE", f"{queries} queries and {keys} keys: lags of a square alone")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output alone: row sums of the true scores cost as much again."""
        check_qkv(q, k, v)
        if 0 in (*q.shape[:3], k.shape[2]):
            return super().__call__(q, k, v)
        return self._applied(self.fit(q, k), v)[0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and of each row ``<p, s> + H(p)``, s the true scores."""
        check_qkv(q, k, v)
        fit = self.fit(q, k)
        own = fit.columns.to(v.dtype).unflatten(0, q.shape[:2])[..., None]
        both, sums, lag_means = self._applied(fit, torch.cat([v, k, own], -1))
        o, keys, column = both.split([v.shape[-1], k.shape[-1], 1], -1)
        wide = sums.dtype
        energy = self.sigma(q) * (q.to(wide) * keys.to(wide)).sum(-1)
        return o, energy + sums - column[..., 0].to(wide) - lag_means

    def fit(self, q: Tensor, k: Tensor) -> Sums:
        """The nearest sums of the visible scores of every head."""
        refusal = self.applies(q.shape[2], k.shape[2])
        if refusal is not None:
            raise ConfigError(f"{self.name}: {refusal.reason}")
        n = q.shape[2]
        queries, keys = self.sigma(q) * q.flatten(0, 1).double(), k.flatten(0, 1).double()
        if self.is_causal:
            rows = (queries * keys.cumsum(1)).sum(-1)
            columns = (keys * queries.flip(1).cumsum(1).flip(1)).sum(-1)
        else:
            rows, columns = queries @ keys.sum(1)[..., None], keys @ queries.sum(1)[..., None]
            rows, columns = rows[..., 0], columns[..., 0]
        lags = diagonal_sums(queries, keys, 0 if self.is_causal else 1 - n)
        found = _Nearest.apply(
            torch.cat([rows, columns, lags], 1),
            n,
            self.is_causal,
            NARROW if q.dtype == torch.float64 else FLOAT32,
        )
        r, c, t = found.split([n, n, found.shape[1] - 2 * n], 1)
        first = 0 if self.is_causal else 1 - n
        place, lag = (torch.arange(a, n, dtype=torch.float64) for a in (0, first))
        slope = _slope(c.detach(), t.detach(), place, lag)
        r, c, t = r - slope * place, c + slope * place, t + slope * lag
        if self.is_causal:
            t = torch.cat([t.new_full((len(t), n - 1), -torch.inf), t], 1)
        return Sums(r, c, t)

    def _applied(self, fit: Sums, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Softmax of ``c + t`` times v; of each row its row sum and its mean of t."""
        n, wide = v.shape[2], torch.float64 if v.dtype == torch.float64 else torch.float32
        found = _convolved(fit, v.flatten(0, 1), n, wide, FAINT)
        if found is None:
            found = _convolved(fit, v.flatten(0, 1), n, torch.float64, FAINTER)
        assert found is not None
        heads = v.shape[:2]
        o, sums, means = (t.to(wide).unflatten(0, heads) for t in found)
        return o.to(v.dtype), sums, means

    def scores(self, fit: Sums) -> Tensor:
        """The scores ``(N, n, n)`` that a fit stands for."""
        n = fit.rows.shape[1]
        at = torch.arange(n)[:, None] - torch.arange(n) + n - 1
        return fit.rows[..., None] + fit.columns[:, None] + fit.lags[:, at]

    def _matrix(self, q: Tensor, k: Tensor) -> Tensor:
        """Softmax of the scores of the fit."""
        return self.scores(self.fit(q, k)).softmax(-1).unflatten(0, q.shape[:2]).to(q.dtype)

    @torch.no_grad()
    def residual(self, q: Tensor, k: Tensor) -> Tensor:
        """Largest ``|s - r - c - t|`` of each head on sampled queries, ``(B, H)``."""
        n, fit = q.shape[2], self.fit(q, k)
        at = torch.linspace(n - 1, 0, min(ROWS, n)).round().long().unique()
        true = self.sigma(q) * (q[:, :, at].flatten(0, 1).double() @ k.flatten(0, 1).double().mT)
        lag = at[:, None] - torch.arange(n)
        found = fit.rows[:, at, None] + fit.columns[:, None] + fit.lags[:, lag + n - 1]
        off = (true - found).abs()
        off = off.masked_fill(lag < 0, 0) if self.is_causal else off
        return off.flatten(1).amax(1).unflatten(0, q.shape[:2])

    def flops(self, queries: int, keys: int, head_dim: int) -> float:
        """Of the transforms, products of spectra among them."""
        size = 2.0 * queries
        transform = 2.5 * size * max(1, int(size).bit_length() - 1) + 3 * size
        return (4 * head_dim + 4) * transform


def _slope(c: Tensor, t: Tensor, place: Tensor, lag: Tensor) -> Tensor:
    """The line with which the larger range of c and of t is least: the sum is convex in it.

    Bisection on the sign of its derivative, which is the distance of the two ends of that range.
    """
    ranges = [x.amax(1, keepdim=True) - x.amin(1, keepdim=True) for x in (c, t)]
    # steeper, and the line alone has more range than there is without one
    high = 4 * torch.maximum(*ranges) / max(1, len(place) - 1)
    low = -high
    for _ in range(SLOPES):
        slope = (low + high) / 2
        (in_c, rise_c), (in_t, rise_t) = _spread(c, slope, place), _spread(t, slope, lag)
        up = torch.where(in_c > in_t, rise_c, rise_t) > 0
        low, high = torch.where(up, low, slope), torch.where(up, slope, high)
    return (low + high) / 2


def _spread(x: Tensor, slope: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Range of ``x + slope place``, and how it grows with the slope."""
    tilted = torch.addcmul(x, slope, place)
    (top, first), (bottom, last) = tilted.max(1, keepdim=True), tilted.min(1, keepdim=True)
    return top - bottom, place[first] - place[last]


def _convolved(
    fit: Sums, v: Tensor, n: int, wide: torch.dtype, faint: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Output, row sums and means of t; None if float32 has too few digits for a row."""
    top_c, top_t = (x.detach().amax(1, keepdim=True) for x in (fit.columns, fit.lags))
    c, t = (fit.columns - top_c).exp().to(wide), (fit.lags - top_t).exp().to(wide)
    values = v.to(wide)
    x = torch.cat([values, torch.ones_like(values[..., :1])], -1) * c[..., None]
    y = toeplitz_times(t, x, n)
    seen = fit.lags > -torch.inf
    moved = torch.where(seen, (fit.lags - top_t).masked_fill(~seen, 0).to(wide) * t, 0)
    mean = toeplitz_times(moved, c[..., None], n)[..., 0]
    sums = y[..., -1]
    limit = faint * t.detach().norm(dim=1) * c.detach().norm(dim=1)
    lost = ~(sums.detach() > limit[:, None])
    if wide != torch.float64 and int(lost.sum()) > FEW * len(lost):
        return None
    sums = sums.masked_fill(lost, 1)
    o, lse, mean = y[..., :-1] / sums[..., None], sums.log() + top_c + top_t, mean / sums + top_t
    for head in lost.any(1).nonzero().flatten().tolist():
        for at in lost[head].nonzero().flatten().split(max(1, SLAB // n)):
            reach = n if bool(seen[head, 0]) else int(at[-1]) + 1  # causal: early rows see few keys
            lags = fit.lags[head, at[:, None] - torch.arange(reach) + n - 1]
            scores = fit.columns[head, :reach] + lags
            total = scores.logsumexp(1)
            weights = (scores - total[:, None]).exp()
            row = (torch.tensor(head), at)
            o = o.index_put(row, weights.to(wide) @ values[head, :reach])
            lse = lse.index_put(row, total)
            mean = mean.index_put(row, (weights * lags.masked_fill(lags == -torch.inf, 0)).sum(1))
    return o, lse, mean


class _Nearest(torch.autograd.Function):
    """``b --> x`` with ``M x = b``, M the normal matrix of r, c and t; it is its own adjoint.

    Conjugate gradients on M with a unit diagonal. What b and gradients of a softmax have along the
    null space is 0, and so is what this gives.
    """

    @staticmethod
    def forward(ctx: Any, b: Tensor, n: int, causal: bool, narrow: float) -> Tensor:
        ctx.rest = n, causal, narrow
        scale = _counts(n, causal, b.device).rsqrt()
        left = b * scale
        x, along = torch.zeros_like(left), left
        size = left.square().sum(1, keepdim=True)
        first = size
        for _ in range(STEPS):
            if not bool((size > narrow * first).any()):
                break
            pushed = scale * _normal(scale * along, n, causal)
            bend, length = (
                (along * pushed).sum(1, keepdim=True),
                along.square().sum(1, keepdim=True),
            )
            able = bend > FLAT * length  # else rounding alone is left, along the null space
            step = torch.where(able, size / bend, 0)
            x, left = x + step * along, left - step * pushed
            new = left.square().sum(1, keepdim=True)
            along = left + torch.where(able, new / size, 0) * along
            size = torch.where(able, new, 0)
        return x * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _Nearest.apply(grads[0], *ctx.rest), None, None, None


def _counts(n: int, causal: bool, device: torch.device) -> Tensor:
    """Visible scores of each query, each key and each lag: the diagonal of M."""
    up = torch.arange(1.0, n + 1, dtype=torch.float64, device=device)
    if causal:
        return torch.cat([up, up.flip(0), up.flip(0)])
    return torch.cat([torch.full_like(up, float(n)).repeat(2), up, up[:-1].flip(0)])


def _normal(x: Tensor, n: int, causal: bool) -> Tensor:
    """M x by running sums: each unknown counts with those that it shares scores with."""
    r, c, t = x.split([n, n, x.shape[1] - 2 * n], 1)
    if causal:
        columns, lags = c.cumsum(1), t.cumsum(1)
        rows = r.flip(1).cumsum(1).flip(1)
        others = [columns + lags, rows + lags.flip(1), rows + columns.flip(1)]
    else:
        lags, rows, columns = _windows(t, n), _prefixes(r), _prefixes(c).flip(1)
        all_c, all_r = c.sum(1, keepdim=True), r.sum(1, keepdim=True)
        others = [all_c + lags, all_r + lags.flip(1), rows + columns]
    return _counts(n, causal, x.device) * x + torch.cat(others, 1)


def _windows(x: Tensor, n: int) -> Tensor:
    """Sums of n neighbours."""
    running = F.pad(x.cumsum(1), (1, 0))
    return running[:, n:] - running[:, :-n]


def _prefixes(x: Tensor) -> Tensor:
    """Sums of n neighbours of n numbers with n - 1 zeros on both sides."""
    running = x.cumsum(1)
    return torch.cat([running, running[:, -1:] - running[:, :-1]], 1)

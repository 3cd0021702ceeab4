"""What calibration data say of one head: which method might compute it, and which cannot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

WINDOWS: tuple[tuple[int, int], ...] = tuple(
    (window, sinks) for window in (32, 64, 128, 256, 512, 1024) for sinks in (0, 4, 16)
)
"""Windows and sinks whose mass is measured."""
BLOCK = 64
"""Keys of a block whose mass is measured."""
COVERED = (0.9, 0.95, 0.98)
"""Shares of a row's mass that blocks are counted for."""
PEAK = 0.2
"""Autocorrelation from which on a peak is a period."""
ENERGY = 0.01
"""Relative error that is left where a rank is counted."""


@dataclass(frozen=True)
class HeadStats:
    """Numbers of one head over sampled queries; of several inputs the mean, bounds the largest.

    Attributes:
        length: keys of the longest input.
        causal: whether later keys are hidden.
        bound: largest score by size.
        norms: ``scale max |q| max |k|``: what no score passes.
        centred: largest half-spread of a row's scores: what is left of them once a row's shift,
            which softmax does not see, is gone.
        spread: mean half-spread of a row's scores.
        entropy: mean of a row's entropy over the logarithm of its keys.
        kept: mean mass inside a window with sinks.
        blocks: share of the blocks that hold a share of each row's mass, at best.
        rank: of the sampled rows of the attention matrix, at 1 % relative error.
        rows: queries that were sampled.
        periods: distances between keys at which the mean score has peaks, the highest first.
        recall: mean mass on the token behind the last occurrence of the query's own, on repeated
            random tokens: an induction head's score; NaN where no such input could be made.
    """

    length: int
    causal: bool
    bound: float
    norms: float
    centred: float
    spread: float
    entropy: float
    kept: Mapping[tuple[int, int], float]
    blocks: Mapping[float, float]
    rank: float
    rows: int
    periods: tuple[int, ...] = ()
    recall: float = math.nan

    def window(self, mass: float) -> tuple[int, int] | None:
        """The cheapest window with sinks that keeps so much mass; None if none does."""
        able = [w for w, kept in self.kept.items() if kept >= mass]
        return min(able, key=sum) if able else None


@dataclass
class StatsSum:
    """Statistics of all heads of an attention, pooled over inputs."""

    parts: list[list[HeadStats]] = field(default_factory=list)

    def add(self, q: Tensor, k: Tensor, *, scale: float, is_causal: bool, rows: int = 96) -> None:
        """Look at one input: ``q`` and ``k`` ``(B, H, n, d)``, a head of keys for each."""
        for b in range(q.shape[0]):
            self.parts.append(
                [_stats(q[b, h], k[b, h], scale, is_causal, rows) for h in range(q.shape[1])]
            )

    def pooled(self) -> list[HeadStats]:
        """One for each head."""
        return [_pool(list(same)) for same in zip(*self.parts, strict=True)]


def _stats(q: Tensor, k: Tensor, scale: float, causal: bool, rows: int) -> HeadStats:
    n, m = len(q), len(k)
    at = torch.linspace(n - 1, 0, min(rows, n)).round().long().unique()
    norms = scale * float(q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max())
    scores = scale * (q[at].float() @ k.float().mT)
    key = torch.arange(m)
    seen = key <= at[:, None] if causal else torch.ones(len(at), m, dtype=torch.bool)
    count = seen.sum(1)
    high = scores.masked_fill(~seen, -torch.inf).amax(1)
    low = scores.masked_fill(~seen, torch.inf).amin(1)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(1)
    entropy = -torch.special.xlogy(weights, weights).sum(1)
    many = count > 1
    share = (entropy[many] / count[many].log()).mean() if bool(many.any()) else torch.tensor(1.0)
    return HeadStats(
        length=m,
        causal=causal,
        bound=float(scores.masked_fill(~seen, 0).abs().max()),
        norms=norms,
        centred=float((high - low).max()) / 2,
        spread=float((high - low).mean()) / 2,
        entropy=float(share),
        kept={w: _kept(weights, at, key, w, causal) for w in WINDOWS if w[0] < m},
        blocks={mass: _blocks(weights, count, mass) for mass in COVERED},
        rank=float(_rank(weights)),
        rows=len(at),
        periods=_periods(scores, at, seen),
    )


def _kept(weights: Tensor, at: Tensor, key: Tensor, window: tuple[int, int], causal: bool) -> float:
    size, sinks = window
    inside = key > at[:, None] - size
    if not causal:
        inside &= key < at[:, None] + size
    return float((weights * (inside | (key < sinks))).sum(1).mean())


def _blocks(weights: Tensor, count: Tensor, mass: float) -> float:
    """Fewest blocks of keys that hold so much of each row, over the blocks that it sees."""
    columns = -(-weights.shape[1] // BLOCK)
    padded = torch.nn.functional.pad(weights, (0, columns * BLOCK - weights.shape[1]))
    per = padded.unflatten(1, (columns, BLOCK)).sum(2).sort(1, descending=True).values
    needed = ((per.cumsum(1) - per) < mass).sum(1)
    return float((needed / (count / BLOCK).ceil()).clamp(max=1).mean())


def _rank(weights: Tensor) -> int:
    wide = weights.double()
    squares = torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0)  # ascending
    left = squares.cumsum(0).sqrt()
    return int((left > ENERGY * left[-1]).sum())


def _periods(scores: Tensor, at: Tensor, seen: Tensor, most: int = 2) -> tuple[int, ...]:
    """Peaks of the autocorrelation of the mean score by distance."""
    n = scores.shape[1]
    lag = (at[:, None] - torch.arange(n)).clamp(min=0)
    behind = seen & (torch.arange(n) <= at[:, None])
    total, count = torch.zeros(n), torch.zeros(n)
    total.scatter_add_(0, lag[behind], scores[behind])
    count.scatter_add_(0, lag[behind], torch.ones(int(behind.sum())))
    half = max(1, n // 2)
    profile = (total / count.clamp(min=1))[:half]
    profile = profile - profile.mean()
    spectrum = torch.fft.rfft(profile, 2 * half).abs() ** 2
    same = torch.fft.irfft(spectrum, 2 * half)[: half // 2]
    if len(same) < 4 or float(same[0]) <= 0:
        return ()
    same = same / same[0]
    middle = same[2:-1]
    peaks = (middle > same[1:-2]) & (middle >= same[3:]) & (middle > PEAK)
    return tuple(
        (middle * peaks)
        .sort(descending=True)
        .indices[: min(most, int(peaks.sum()))]
        .add(2)
        .tolist()
    )


def _pool(same: list[HeadStats]) -> HeadStats:
    """Means over inputs; the largest of what bounds something."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    longest = max(same, key=lambda s: s.length)
    windows = set.intersection(*(set(s.kept) for s in same))
    return HeadStats(
        length=longest.length,
        causal=longest.causal,
        bound=max(s.bound for s in same),
        norms=max(s.norms for s in same),
        centred=max(s.centred for s in same),
        spread=mean([s.spread for s in same]),
        entropy=mean([s.entropy for s in same]),
        kept={w: mean([s.kept[w] for s in same]) for w in WINDOWS if w in windows},
        blocks={mass: mean([s.blocks[mass] for s in same]) for mass in COVERED},
        rank=max(s.rank for s in same),
        rows=longest.rows,
        periods=longest.periods,
    )


def recall_scores(q: Tensor, k: Tensor, *, scale: float, is_causal: bool, half: int) -> Tensor:
    """Induction score of each head on ``half`` tokens written twice: ``(H,)``.

    Query ``half + i`` holds the token of key ``i``; a head that recalls looks at key ``i + 1``,
    what came behind it.

    Source:  Olsson et al. 2022, In-context Learning and Induction Heads
             (https://arxiv.org/abs/2209.11895).
    """
    at = torch.arange(half, 2 * half - 1)
    scores = scale * (q[:, :, at].float() @ k.float().mT)
    if is_causal:
        scores = scores.masked_fill(torch.arange(k.shape[2]) > at[:, None], -torch.inf)
    behind = (at - half + 1)[None, None, :, None].expand(*scores.shape[:2], -1, 1)
    found: Tensor = scores.softmax(-1).gather(3, behind).mean((0, 2, 3))
    return found

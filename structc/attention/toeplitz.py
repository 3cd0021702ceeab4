"""Products with Toeplitz matrices by FFT, for the methods that need them."""

from __future__ import annotations

import torch
from scipy.fft import next_fast_len
from torch import Tensor

SLAB = 1 << 17
"""Numbers that are transformed at a time."""


def toeplitz_times(lags: Tensor, x: Tensor, queries: int) -> Tensor:
    """``y_i = sum_j lags[i - j + m - 1] x_j``, a value for each lag as in ``exact``'s bias.

    Args:
        lags: ``(..., queries + m - 1)``; what is causal has zeros in front.
        x: ``(..., m, e)``, of the same leading sizes.
        queries: rows of y, ``(..., queries, e)``.

    Cost:    ``2 e + 1`` transforms of ``queries + m - 1`` numbers.
    Errors:  absolute, rounding times ``|lags| |x|``: rows that are faint beside others drown.

    >>> lags, x = torch.randn(7), torch.randn(3, 2)
    >>> at = torch.arange(5)[:, None] - torch.arange(3) + 2
    >>> torch.allclose(toeplitz_times(lags, x, 5), lags[at] @ x, atol=1e-5)
    True
    """
    m = x.shape[-2]
    size = int(next_fast_len(queries + m - 1, real=True))  # what wraps around is not read
    spectrum = torch.fft.rfft(lags, size)[..., None, :]
    rows = max(1, SLAB // max(1, size * (x.numel() // max(1, m * x.shape[-1]))))
    found = [
        torch.fft.irfft(torch.fft.rfft(part, size) * spectrum, size)[..., m - 1 : m - 1 + queries]
        for part in x.mT.split(rows, -2)
    ]
    return torch.cat(found, -2).mT


def diagonal_sums(q: Tensor, k: Tensor, first: int) -> Tensor:
    """``sum_{i - j = l} q_i . k_j`` of the lags ``first <= l < n``, ``(..., n - first)``.

    Square: q and k are ``(..., n, d)``. Lags below ``first`` are left out.

    >>> q, k = torch.randn(2, 6, 3).unbind(0)
    >>> torch.allclose(diagonal_sums(q, k, 0)[2], (q @ k.mT).diagonal(-2).sum(), atol=1e-5)
    True
    """
    n = q.shape[-2]
    size = int(next_fast_len(2 * n - 1, real=True))
    rows = max(1, SLAB // max(1, size * (q.numel() // max(1, n * q.shape[-1]))))
    total = None
    for a, b in zip(q.mT.split(rows, -2), k.mT.split(rows, -2), strict=True):
        some = (torch.fft.rfft(a, size) * torch.fft.rfft(b, size).conj()).sum(-2)
        total = some if total is None else total + some
    assert total is not None
    sums = torch.fft.irfft(total, size)
    ahead = sums[..., size + first :] if first else sums[..., :0]
    return torch.cat([ahead, sums[..., :n]], -1)

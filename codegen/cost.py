"""The roofline: what a form should take, from its flops, its bytes and two peaks.

Deterministic: for the same form and peaks it gives the same milliseconds. It serves effort
``none`` and targets that are not here, and prunes configurations before they are timed.
"""

from __future__ import annotations

import torch

from structc.codegen.peaks import Peaks, known
from structc.forms import SPECTRAL, Form, PackedDense, Pattern, Sparse

CALL_MS = 0.004
"""What one operator call costs before any arithmetic."""
DENSE_EFFICIENCY = 0.9
SPECTRAL_EFFICIENCY = 0.08
"""Of the peak of a matrix product: an FFT shuffles as much as it multiplies."""


def predict_ms(form: Form, rows: int, dtype: torch.dtype, peaks: Peaks | None = None) -> float:
    """Roofline latency of one call, in milliseconds.

    max(flops / peak, bytes / bandwidth) + a call's overhead, where narrow blocks and few rows
    lower the share of the peak that is reached.
    """
    peaks = peaks or known()
    arithmetic = sum(
        2e-6 * rows * work / (peaks.of(dtype) * share) for work, share in _work(form, rows)
    )
    size = dtype.itemsize
    moved = size * (form.params + rows * (form.in_features + form.out_features))
    return CALL_MS + max(arithmetic, moved * 1e-6 / peaks.gb_per_s)


def _work(form: Form, rows: int) -> list[tuple[int, float]]:
    """(multiply-adds a row, share of the peak) of each factor."""
    if isinstance(form, PackedDense):
        return [(form.params, DENSE_EFFICIENCY * _fill(rows))]
    products = [s for s in form.steps if isinstance(s, (Pattern, Sparse))]
    others = [s.flops // 2 for s in form.steps if isinstance(s, SPECTRAL)]
    fill = _fill(rows)
    return [
        *((s.flops // 2, _share(s) * fill) for s in products),
        *((work, SPECTRAL_EFFICIENCY) for work in others),
    ]


def _share(block: Pattern | Sparse) -> float:
    """Blocks of 64 and wider run like dense ones; thin ones lose to loads and calls."""
    thin = min(block.b, block.c)
    return DENSE_EFFICIENCY * thin / (thin + 6)


def _fill(rows: int) -> float:
    """A few rows do not fill the registers of a matrix product."""
    return min(1.0, (rows + 2) / 10)

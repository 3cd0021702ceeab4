"""The roofline: what a form should take, from its flops, its bytes and two peaks.

Deterministic: for the same target and form it gives the same milliseconds. It serves effort
``none`` and targets that are not here, and prunes configurations before they are timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from structc import hardware
from structc.forms import Block, Form, PackedDense

CALL_MS = 0.004
"""What one operator call costs before any arithmetic."""
DENSE_EFFICIENCY = 0.9
FLOPS_PER_CYCLE = {"avx512f": 64, "avx2": 32, "asimd": 16}
"""Of one core in float32: two fused multiply-adds over a vector register (one on asimd)."""
CLOCK_GHZ = 2.0
CORE_GB_PER_S = 12.0


@dataclass(frozen=True)
class Peaks:
    """What a machine can do over all threads: ``gflops`` in float32, ``gb_per_s`` from memory."""

    gflops: float
    gb_per_s: float


def default_peaks(target: hardware.Target | None = None) -> Peaks:
    """Peaks by instruction set and threads: no measurement, the same on every run."""
    target = target or hardware.target()
    lanes = next((FLOPS_PER_CYCLE[i] for i in target.isa if i in FLOPS_PER_CYCLE), 8)
    threads = max(1, min(target.threads, target.cores))
    return Peaks(lanes * CLOCK_GHZ * threads, CORE_GB_PER_S * threads)


def predict_ms(form: Form, rows: int, dtype: torch.dtype, peaks: Peaks | None = None) -> float:
    """Roofline latency of one call, in milliseconds.

    max(flops / peak, bytes / bandwidth) + a call's overhead, where narrow blocks and few rows
    lower the share of the peak that is reached.
    """
    peaks = peaks or default_peaks()
    speed = 1.0 if dtype in (torch.float32, torch.float64) else 2.0
    arithmetic = sum(
        2e-6 * rows * work / (peaks.gflops * speed * share) for work, share in _work(form, rows)
    )
    size = dtype.itemsize
    moved = size * (form.params + rows * (form.in_features + form.out_features))
    return CALL_MS + max(arithmetic, moved * 1e-6 / peaks.gb_per_s)


def _work(form: Form, rows: int) -> list[tuple[int, float]]:
    """(multiply-adds a row, share of the peak) of each factor."""
    if isinstance(form, PackedDense):
        return [(form.params, DENSE_EFFICIENCY * _fill(rows))]
    blocks = [s for s in form.steps if isinstance(s, Block)]
    return [(b.a * b.b * b.c * b.d, _share(b) * _fill(rows)) for b in blocks]


def _share(block: Block) -> float:
    """Blocks of 64 and wider run like dense ones; thin ones lose to loads and calls."""
    thin = min(block.b, block.c)
    return DENSE_EFFICIENCY * thin / (thin + 6)


def _fill(rows: int) -> float:
    """A few rows do not fill the registers of a matrix product."""
    return min(1.0, (rows + 2) / 10)

"""Timing on a GPU: ways to run one call, the fastest first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Way = TypeVar("Way")
WARM, ROUNDS, TOGETHER = 3, 20, 5
"""Calls before the clock runs; samples of each way; calls of a sample."""


def seconds(call: Callable[[], object]) -> float:
    """Of one call, by the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(TOGETHER):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / TOGETHER


def ordered(
    ways: Sequence[Way],
    call: Callable[[Way], object],
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> list[Way]:
    """Ways by the median of interleaved samples; one that fails comes last.

    Args:
        ways: what is compared.
        call: runs one.
        clock: seconds of a call; the GPU's own without. Where there is no GPU, and no clock, the
            order stays.
    """
    if clock is None:
        if not torch.cuda.is_available():
            return list(ways)
        clock = seconds
    samples: dict[int, list[float]] = {at: [] for at in range(len(ways))}
    for at, way in enumerate(ways):
        try:
            for _ in range(WARM):
                call(way)
        except Exception:  # it is tried again, and recorded, when its turn comes
            del samples[at]
    for _ in range(ROUNDS):
        for at, found in samples.items():
            found.append(clock(lambda at=at: call(ways[at])))  # type: ignore[misc]
    able = sorted(samples, key=lambda at: statistics.median(samples[at]))
    return [ways[at] for at in [*able, *(a for a in range(len(ways)) if a not in samples)]]

"""The one timer: interleaved rounds, lower quartile and spread.

On a machine that others use too, a preempted barrier adds a scheduler's quantum to a call of
microseconds. So candidates take turns, a round in which the first callable jumped is thrown away,
and the lower quartile is kept, never the mean.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from structc.records import Timed

JUMP = 1.5
"""A round counts as disturbed when the first callable takes this much longer than its best."""


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 9,
    min_sample_ms: float = 1.0,
    warmup: int = 2,
    seconds: float = math.inf,
) -> dict[str, Timed]:
    """Time callables in turns.

    Args:
        calls: what to time; the first one is the yardstick that detects disturbed rounds.
        rounds: rounds to keep; at most twice as many are run.
        min_sample_ms: calls shorter than this are repeated inside one sample.
        warmup: untimed calls of each before the first round.
        seconds: after so long no round begins, once there are three.

    Returns:
        Lower quartile, median and spread for each name, in milliseconds a call.
    """
    names = list(calls)
    repeats = {}
    for name in names:
        for _ in range(warmup):
            calls[name]()
        once = _sample(calls[name], 1)
        if once < min_sample_ms:  # one alone may be disturbed
            once = min(once, _sample(calls[name], 1), _sample(calls[name], 1))
        repeats[name] = max(1, min(1000, int(min_sample_ms / max(once, 1e-4))))
    samples: dict[str, list[float]] = {name: [] for name in names}
    kept: list[int] = []
    start = time.perf_counter()
    for turn in range(2 * rounds):
        for name in names:
            samples[name].append(_sample(calls[name], repeats[name]))
        best = min(samples[names[0]])
        kept = [i for i, t in enumerate(samples[names[0]]) if t <= JUMP * best]
        late = turn >= 2 and time.perf_counter() - start > seconds
        if late or (turn + 1 >= rounds and len(kept) >= rounds):
            break
    return {name: summarise([samples[name][i] for i in kept]) for name in names}


def summarise(samples_ms: list[float]) -> Timed:
    """Quartiles of samples.

    >>> summarise([4.0, 1.0, 2.0, 3.0])
    Timed(latency_ms=2.0, median_ms=3.0, spread=1.0, rounds=4)
    """
    ordered = sorted(samples_ms)
    n = len(ordered)
    low, mid, high = ordered[n // 4], ordered[n // 2], ordered[min(n - 1, (3 * n) // 4)]
    return Timed(low, mid, (high - low) / low if low > 0 else 0.0, n)


def _sample(call: Callable[[], object], repeats: int) -> float:
    """Milliseconds a call: the best of up to eight parts, so one preemption spoils no sample."""
    best, left = math.inf, repeats
    while left > 0:
        part = min(left, -(-repeats // 8))
        start = time.perf_counter()
        for _ in range(part):
            call()
        best = min(best, (time.perf_counter() - start) / part)
        left -= part
    return best * 1e3

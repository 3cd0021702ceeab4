"""Timing versions of a model against each other, for the commands that do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from structc.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from structc.records import Call, Timed
    from structc.sources import Source


def example_of(source: Source) -> Call:
    """The example call of a source, or of its model."""
    from structc.inputs import example_call

    example = example_call(source.model, source.example_inputs)
    if example is None:
        raise ConfigError("the model brings no example inputs")
    return example


def pair(source: Source, fast: nn.Module) -> dict[str, Callable[[], object]]:
    """The original and the compiled model."""
    from structc.passes.verify import caller

    example = example_of(source)
    return {"eager": caller(source.model, example), "structc": caller(fast, example)}


def timed_rows(calls: Mapping[str, Callable[[], object]], rounds: int) -> list[dict[str, Any]]:
    """Every version, fastest first, with its speed against eager."""
    from structc.timing import interleaved

    timed: dict[str, Timed] = interleaved(calls, rounds=rounds, min_sample_ms=5.0)
    eager = timed["eager"].latency_ms
    return [
        {
            "name": name,
            "latency_ms": t.latency_ms,
            "median_ms": t.median_ms,
            "spread": t.spread,
            "rounds": t.rounds,
            "speedup_over_eager": eager / t.latency_ms if t.latency_ms > 0 else 1.0,
        }
        for name, t in sorted(timed.items(), key=lambda item: item[1].latency_ms)
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as people read them."""
    wide = max(len(r["name"]) for r in rows)
    head = f"  {'':<{wide}}  {'ms':>10}  {'median':>10}  {'spread':>7}  {'x eager':>8}"
    return [head] + [
        f"  {r['name']:<{wide}}  {r['latency_ms']:>10.4g}  {r['median_ms']:>10.4g}"
        f"  {r['spread']:>6.0%}  {r['speedup_over_eager']:>8.2f}"
        for r in rows
    ]

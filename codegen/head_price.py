"""What attention methods cost on this machine, against the exact kernel, at several lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from structc import attend
from structc.attention.base import AbstractMethod
from structc.attention.by_head import HeadGroup, by_head, method_text
from structc.attention_records import AttentionCase
from structc.codegen import autotune
from structc.codegen.measure import ROUNDS
from structc.codegen.tuning_db import Key, Row, TuningDb
from structc.records import Refusal
from structc.softmax import Softmax
from structc.timing import interleaved

SHORTEST = 256
"""Least length that is timed."""
WORTH = 0.9
"""A method takes at most this share of the exact kernel's time, or is not used."""


@dataclass(frozen=True)
class HeadPrice:
    """Milliseconds of all heads of a case by a method and by the exact kernel.

    Attributes:
        method_ms, exact_ms, spread: at the case's length, timed in turns.
        least: the length from which on the method is faster.
    """

    method_ms: float
    exact_ms: float
    spread: float
    least: int

    @property
    def speedup(self) -> float:
        """``exact_ms / method_ms``."""
        return self.exact_ms / self.method_ms


def price_methods(
    case: AttentionCase,
    methods: Sequence[AbstractMethod],
    *,
    effort: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[AbstractMethod, HeadPrice | Refusal]:
    """The time of each method on all heads of a case, at its length and at shorter ones.

    Args:
        effort: as for :func:`structc.codegen.autotune.price`; with ``"none"`` all is refused.
    """
    found: dict[AbstractMethod, HeadPrice | Refusal] = {}
    for at, method in enumerate(methods):
        if progress is not None:
            progress(method_text(method), at, len(methods))
        found[method] = _price(case, method, effort)
    return found


def _price(case: AttentionCase, method: AbstractMethod, effort: str) -> HeadPrice | Refusal:
    best: HeadPrice | None = None
    length = case.keys
    while length >= min(SHORTEST, case.keys):
        refused = method.applies(length, length)
        row = refused or _timed(replace(case, queries=length, keys=length), method, effort)
        if isinstance(row, Refusal):
            return best or row
        if row.latency_ms > WORTH * row.baseline_ms:
            reason = f"{row.latency_ms:.3g} ms, the exact kernel takes {row.baseline_ms:.3g} ms"
            return best or Refusal(
                "", method.name, "NOT_FASTER", f"{method_text(method)}: {reason}"
            )
        whole = best or HeadPrice(row.latency_ms, row.baseline_ms, row.spread, length)
        best = replace(whole, least=length)
        length //= 2
    assert best is not None
    return best


def tuning_key(case: AttentionCase, method: AbstractMethod) -> Key:
    """What the measurement of a method is stored under."""
    sizes = (case.batch, case.heads, case.kv_heads, case.queries, case.head_dim, case.value_dim)
    form = f"head {method_text(method)} of {case.form} {' '.join(map(str, sizes))}"
    return autotune.key_here(form, case.batch * case.queries, case.dtype)


def _timed(case: AttentionCase, method: AbstractMethod, effort: str) -> Row | Refusal:
    key, db = tuning_key(case, method), TuningDb()
    known = (
        None if effort == "none" else db.chosen(key, "quick" if effort == "recorded" else effort)
    )
    if known is not None:
        return known
    if effort in ("none", "recorded"):
        reason = "it was not timed on this machine, and nothing is timed now"
        return Refusal("", method.name, "BUDGET", reason)
    row = _measured(case, method, effort)
    db.put(key, [row])
    return row


def _measured(case: AttentionCase, method: AbstractMethod, effort: str) -> Row:
    generator = torch.Generator().manual_seed(1)

    def noise(heads: int, width: int) -> torch.Tensor:
        shape = (case.batch, case.queries, heads, width)
        return torch.randn(shape, generator=generator, device="cpu").to(case.dtype).transpose(1, 2)

    q = noise(case.heads, case.head_dim) * 0.1  # scores inside every method's bound
    k, v = noise(case.kv_heads, case.head_dim), noise(case.kv_heads, case.value_dim)
    form = Softmax.parse(case.form)
    own = replace(method, scale=form.scale)
    group = str(HeadGroup(own, tuple(range(case.heads)), 0, case.queries))
    with torch.inference_mode():
        timed = interleaved(
            {
                "exact": lambda: attend.attention(q, k, v, form),
                "method": lambda: by_head(q, k, v, None, form, group),
            },
            rounds=ROUNDS[effort],
            min_sample_ms=2.0,
        )
    return Row(
        "by_head",
        {},
        latency_ms=timed["method"].latency_ms,
        baseline_ms=timed["exact"].latency_ms,
        baseline="attention",
        spread=timed["method"].spread,
        effort=effort,
    )

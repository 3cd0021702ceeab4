"""What one attention costs on this machine: the emitted kernel against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from structc import attend
from structc.attention_records import AttentionCase
from structc.codegen import attention, autotune
from structc.codegen.measure import ROUNDS
from structc.codegen.tuning_db import Key, Row, TuningDb
from structc.numerics import relative_error, tolerance
from structc.records import Price, Refusal, Timed
from structc.softmax import Extras, Softmax, softmax_reference
from structc.timing import interleaved

CHECKED = 64
"""Queries that are held against the reference before anything is timed."""
Call = Callable[[], object]


def price(
    cases: Sequence[AttentionCase],
    *,
    effort: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[AttentionCase, Price | Refusal]:
    """The fastest way to compute each case, against the way of its graph.

    Kernels: ``"structc"``, the emitted one; ``"torch"``, PyTorch's operator without a mask, where
    that computes the same. The baseline is what the graph does: PyTorch's operator with the mask,
    or products and softmax spelled out.

    Args:
        effort: as for :func:`structc.codegen.autotune.price`; with ``"none"`` all is refused.
    """
    found: dict[AttentionCase, Price | Refusal] = {}
    unique = list(dict.fromkeys(cases))
    for done, case in enumerate(unique, 1):
        found[case] = _price(case, effort)
        if progress is not None:
            progress(case.form, done, len(unique))
    return found


def _price(case: AttentionCase, effort: str) -> Price | Refusal:
    untimed = _refuse("BUDGET", "it was not timed on this machine, and nothing is timed now")
    if effort == "none":
        return untimed
    key, db = tuning_key(case), TuningDb()
    known = db.chosen(key, "quick" if effort == "recorded" else effort)
    if known is not None:
        return _from_row(case, known)
    if effort == "recorded":
        return untimed
    rows = _measured(case, effort)
    if isinstance(rows, Refusal):
        return rows
    db.put(key, rows)
    return _from_row(case, next(r for r in rows if r.effort))


def tuning_key(case: AttentionCase) -> Key:
    """What the measurements of a case are stored under."""
    sizes = (case.batch, case.heads, case.kv_heads, case.queries, case.keys)
    words = [case.form, *map(str, sizes), str(case.head_dim), str(case.value_dim)]
    flags: tuple[object, ...] = (
        case.mask,
        case.mask_shape,
        case.padded,
        case.sink,
        case.masked,
        case.repeated,
        case.fused,
    )
    flags += (f"lags {case.lags}",) if case.lags else ()
    form = f"attention {' '.join(words)} {' '.join(map(str, flags))} {case.torch_causal}"
    return autotune.key_here(form, case.batch * case.queries, case.dtype)


def _measured(case: AttentionCase, effort: str) -> list[Row] | Refusal:
    """A row for each way that may replace the graph's; the fastest carries the effort."""
    form = Softmax.parse(case.form)
    (q, k, v), extras, full = _sample(case, form)
    calls: dict[str, Call] = {"graph": _graph(case, form, q, k, v, full)}
    kernel = attend.kernel_for("cpu", case.dtype)
    if kernel is not None:
        failed = _check(q, k, v, form, extras)
        if failed is not None:
            return failed
        calls["structc"] = lambda: attend.attention(q, k, v, form, extras)
    if case.torch_causal is not None and (case.masked or not case.fused):
        calls["torch"] = lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=bool(case.torch_causal), scale=form.scale, enable_gqa=True
        )
    if len(calls) == 1:
        made = attention.make(case.dtype)
        return made if isinstance(made, Refusal) else _refuse("UNSERVED", "no kernel serves it")
    with torch.inference_mode():
        timed = interleaved(calls, rounds=ROUNDS[effort], min_sample_ms=2.0)
    best = min((n for n in calls if n != "graph"), key=lambda n: timed[n].latency_ms)
    return [
        _row(name, timed[name], timed["graph"], case, effort if name == best else "")
        for name in calls
        if name != "graph"
    ]


def _row(name: str, timed: Timed, base: Timed, case: AttentionCase, effort: str) -> Row:
    return Row(
        "attention" if name == "structc" else "sdpa",
        {},
        latency_ms=timed.latency_ms,
        baseline_ms=base.latency_ms,
        baseline="sdpa" if case.fused else "products and softmax",
        spread=timed.spread,
        effort=effort,
    )


def _from_row(case: AttentionCase, row: Row) -> Price:
    return Price(
        case.form,
        case.batch * case.queries,
        row.latency_ms,
        row.baseline_ms,
        "structc" if row.kernel == "attention" else "torch",
        {},
        row.baseline,
        row.spread,
        "measured",
    )


def _sample(
    case: AttentionCase, form: Softmax
) -> tuple[tuple[Tensor, Tensor, Tensor], Extras, Tensor | None]:
    """Inputs of the case, laid out as projections leave them, and the mask that the graph makes."""
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(case.dtype)

    b, n, m = case.batch, case.queries, case.keys
    q = noise(b, n, case.heads, case.head_dim).transpose(1, 2)
    k = noise(b, m, case.kv_heads, case.head_dim).transpose(1, 2)
    v = noise(b, m, case.kv_heads, case.value_dim).transpose(1, 2)
    bias = None
    if case.mask:
        shape = tuple(
            min(s, w) for s, w in zip(case.mask_shape, (b, case.heads, n, m), strict=True)
        )
        lower = torch.arange(m)[None] <= torch.arange(n)[:, None] + max(0, m - n)
        bias = lower.expand(shape) if shape[-2:] == (n, m) else torch.ones(shape).bool()
        bias = bias if case.mask == "bool" else torch.zeros(shape).masked_fill(~bias, -1e38)
        bias = bias if case.mask == "bool" else bias.to(case.dtype)
    lags = noise(case.lags, n + m - 1) if case.lags else None
    keys = None
    if case.padded:  # every second sequence is half as long
        ends = torch.tensor([m if at % 2 == 0 else -(-m // 2) for at in range(b)])
        keys = torch.arange(m)[None] < ends[:, None]
    sink = torch.zeros(case.heads) if case.sink else None
    seen = form.visible(torch.arange(n), torch.arange(m))
    full = bias if not case.masked or seen is None else seen[None, None]
    if case.masked and keys is not None:
        full = keys[:, None, None] if full is None else full & keys[:, None, None]
        full = full.expand(b, 1, n, m)
    if lags is not None:  # the graph's is one value a pair
        each = lags[:, torch.arange(n)[:, None] - torch.arange(m) + m - 1][None]
        full = each if full is None else each.masked_fill(~full, -1e38)
    return (q, k, v), Extras(bias=bias, lags=lags, keys=keys, sink=sink), full


def _graph(
    case: AttentionCase,
    form: Softmax,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    full: Tensor | None,
) -> Call:
    """What the graph does."""
    group = case.heads // case.kv_heads if case.repeated or not case.fused else 1
    if full is None and case.masked:
        full = torch.ones(1, 1, case.queries, case.keys, dtype=torch.bool)
    causal = bool(case.torch_causal) and not case.masked

    def wide(t: Tensor) -> Tensor:
        if group == 1:
            return t
        return t[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)

    if case.fused:
        return lambda: F.scaled_dot_product_attention(
            q,
            wide(k),
            wide(v),
            attn_mask=full,
            is_causal=causal,
            scale=form.scale,
            enable_gqa=not case.repeated and case.heads != case.kv_heads,
        )
    added = None
    if full is not None:
        floating = full.is_floating_point()
        added = full if floating else torch.zeros(full.shape).masked_fill(~full, -1e38).to(q.dtype)

    def spelled() -> Tensor:
        scores = q @ wide(k).mT * form.scale
        if form.softcap:
            scores = torch.tanh(scores / form.softcap) * form.softcap
        scores = scores if added is None else scores + added
        return scores.softmax(-1) @ wide(v)

    return spelled


def _check(q: Tensor, k: Tensor, v: Tensor, form: Softmax, extras: Extras) -> Refusal | None:
    """The last queries of the first two sequences, one of them padded, in float64."""
    first, some = max(0, q.shape[2] - CHECKED), slice(2)
    got, _ = attend.attention(q, k, v, form, extras)
    bias, lags, keys, _, sink = extras
    if bias is not None:
        bias = bias[some] if bias.shape[2] == 1 else bias[some, :, first:]
    keys = None if keys is None else keys[some]
    few = Extras(bias=bias, lags=None if lags is None else lags[:, first:], keys=keys, sink=sink)
    rule = replace(form, offset=form.offset + first)
    wide = (q[some, :, first:].double(), k[some].double(), v[some].double())
    want, _ = softmax_reference(*wide, rule, few)
    error = relative_error(got[some, :, first:], want)
    if error <= max(tolerance(q.dtype), 1e-5):
        return None
    return _refuse("WRONG", f"relative error {error:.1e} against the reference")


def _refuse(code: str, reason: str) -> Refusal:
    return Refusal("", "attention", code, reason)

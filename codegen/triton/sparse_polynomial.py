"""Exact weights in a window and at sinks, a polynomial everywhere else, as one Triton kernel.

Keys that no query of a tile sees in its window come from the states of
:mod:`structc.codegen.triton.polynomial`, sinks left out of them; those around the window are met as
scores, each with its exponential or its polynomial. A row starts at its far part with a largest
score of 0, and goes on as an online softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structc.attention.feature_sums import Rule
from structc.codegen.triton import load, polynomial
from structc.codegen.triton.aot import Job
from structc.codegen.triton.attempt import Attempts
from structc.codegen.triton.config import Config
from structc.codegen.triton.device import name_here
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.polynomial_source import SOURCE as STATES
from structc.codegen.triton.spilled import usable
from structc.codegen.triton.tile import DTYPES
from structc.records import Refusal

POINTERS = ("q", "k", "v", "places", "weights", "f", "state", "mass", "o")
LENGTHS = (
    "heads", "queries", "keys", "chunk", "chunks", "count", "d", "e", "window", "sinks",
)  # fmt: skip
SOURCE = (
    STATES
    + '''

@triton.jit(do_not_specialize=["heads", "queries", "keys", "chunk", "chunks", "count", "window",
                               "sinks"])
def sparse_polynomial(q, k, v, places, weights, f, state, mass, o,
                      qb, qh, qn, kb, kh, kn, vb, vh, vn,
                      heads, queries, keys, chunk, chunks, count, d, e, window, sinks,
                      BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WD: tl.constexpr,
                      WIDE: tl.constexpr, DEGREE: tl.constexpr, CAUSAL: tl.constexpr,
                      DOT: tl.constexpr, TF32: tl.constexpr):
    """exp of scores in the window and at sinks, f of all others"""
    tiles = tl.cdiv(queries, BM)
    pid = tl.program_id(0)
    one = (pid // tiles).to(tl.int64)
    first = pid % tiles * BM
    i = first + tl.arange(0, BM)
    r = tl.arange(0, WD)
    c = tl.arange(0, WIDE)
    q += one // heads * qb + one % heads * qh
    k += one // heads * kb + one % heads * kh
    v += one // heads * vb + one % heads * vh
    low = tl.minimum(tl.maximum(0, first - window + 1) // chunk, chunks)
    last = tl.minimum(first + BM, queries)
    high = chunks
    end = tl.minimum(keys, last)
    alone = i < window + sinks
    if not CAUSAL:
        high = tl.cdiv(tl.maximum(last - 1 + window, tl.minimum(sinks, keys)), chunk)
        high = tl.maximum(low, tl.minimum(high, chunks))
        end = tl.minimum(keys, high * chunk)
        alone = alone & (i + window >= keys)
    sums = tl.zeros((BM, WIDE), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    base = one * (chunks + 1) * count
    if (low > 0) | (high < chunks):
        for start in range(0, count, BK):
            m = start + tl.arange(0, BK)
            found = monomials(q, i, qn, i < queries, places, m, count, d, -1, DEGREE)
            found *= tl.load(weights + m, mask=m < count, other=0.0)[None, :]
            at = base + low.to(tl.int64) * count
            far = tile(state + at * e, m[:, None], c[None, :], e, count, e)
            own = tl.load(mass + at + m, mask=m < count, other=0.0)
            if not CAUSAL:
                at = base + chunks.to(tl.int64) * count
                far += tile(state + at * e, m[:, None], c[None, :], e, count, e)
                own += tl.load(mass + at + m, mask=m < count, other=0.0)
                at = base + high.to(tl.int64) * count
                far -= tile(state + at * e, m[:, None], c[None, :], e, count, e)
                own -= tl.load(mass + at + m, mask=m < count, other=0.0)
            sums += times(found, far, DOT, TF32)
            total += tl.sum(found * own[None, :], 1)
    sums = tl.where(alone[:, None], 0.0, sums)
    total = tl.where(alone, 0.0, total)
    top = tl.where(alone, float("-inf"), 0.0)
    left = tile(q, i[:, None], r[None, :], qn, queries, d)
    ahead = tl.minimum(tl.minimum(sinks, keys), low * chunk)
    sunk = tl.cdiv(ahead, BN)
    near = tl.cdiv(tl.maximum(end - low * chunk, 0), BN)
    for turn in range(sunk + near):
        start = tl.where(turn < sunk, turn * BN, low * chunk + (turn - sunk) * BN)
        j = start + tl.arange(0, BN)
        right = tile(k, j[None, :], r[:, None], kn, keys, d)
        s = times(left, right, DOT, TF32)
        lag = i[:, None] - j[None, :]
        exact = lag < window
        seen = (j < tl.where(turn < sunk, ahead, end))[None, :]
        if CAUSAL:
            seen = seen & (lag >= 0)
        else:
            exact = exact & (lag > -window)
        exact = exact | (j < sinks)[None, :]
        loud = tl.where(seen & exact, s, float("-inf"))
        above = tl.maximum(top, tl.max(loud, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)
        p = tl.where(exact, tl.exp(loud - safe[:, None]),
                     value_of(f, s, DEGREE) * tl.exp(-tl.maximum(safe, 0.0))[:, None])
        p = tl.where(seen, p, 0.0)
        less = tl.exp(top - safe)
        total = total * less + tl.sum(p, 1)
        value = tile(v, j[:, None], c[None, :], vn, keys, e)
        sums = sums * less[:, None] + times(p, value, DOT, TF32)
        top = above
    row = one * queries + i
    inside = (i < queries)[:, None] & (c < e)[None, :]
    tl.store(o + row[:, None] * e + c[None, :], (sums / total[:, None]).to(o.dtype.element_ty),
             mask=inside)
'''
)
CONFIGS = polynomial.CONFIGS


def apply(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, weights: Tensor, window: int, sinks: int
) -> Tensor | None:
    """The output ``(B, H, n, e)``; None for what is not served. The scale is in q already."""
    module = load.module_of(SOURCE)
    if isinstance(module, Refusal) or not polynomial.serves(q, k, v):
        return None
    given = polynomial.given_of(q, k, rule, weights, None)
    chunk = polynomial.chunk_of(len(weights), k.shape[2], True)
    o = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    q, k, v = (polynomial.side(t) for t in (q, k, v))
    # what stands behind a window is a difference of two states: they are kept in float32
    before = polynomial.states(k, v, given._replace(chunk=chunk), skip=sinks, kept=torch.float32)
    if before is None:
        return None
    tensors = [q, k, v, given.places, given.weights, given.f, *before, o]
    strides = [t.stride(at) for t in (q, k, v) for at in range(3)]
    numbers = [
        q.shape[1], q.shape[2], k.shape[2], chunk, before[0].shape[2] - 1, len(weights), q.shape[3],
        v.shape[3], window, sinks,
    ]  # fmt: skip
    sizes = {"DEGREE": rule.degree, "CAUSAL": rule.causal, "WD": polynomial.wide(q.shape[3]),
             "WIDE": polynomial.wide(v.shape[3])}  # fmt: skip

    def call(config: Config) -> bool:
        grid = (-(-q.shape[2] // config.bm) * q.shape[0] * q.shape[1],)
        module.sparse_polynomial[grid](
            *tensors, *strides, *numbers, **config.constexprs(("BM", "BN", "BK")), **sizes,
            DOT=polynomial.product_of(q.dtype), TF32=polynomial.ten_bits(q.dtype),
            num_warps=config.warps, num_stages=config.stages, **load.FUSED,
        )  # fmt: skip
        return True

    key = (q.dtype, *sizes.values())
    if key not in _tried:
        width = max(sizes["WD"], sizes["WIDE"])
        some = usable("sparse_polynomial", width, CONFIGS, DTYPES[q.dtype], name_here())
        _tried[key] = Attempts(f"sparse_polynomial in {q.dtype}, {sizes}", some)
    with torch.cuda.device_of(q):
        return o if _tried[key].run(call) else None


_tried: dict[tuple[Any, ...], Attempts[Config]] = {}


def entries(dtype: torch.dtype, targets: Sequence[str], every: bool) -> list[Entry]:
    """The kernel for each target, for ``structc bench triton``: heads of 64, degree 2."""
    word, path = DTYPES[dtype], str(load.write(SOURCE))
    kinds = {"places": "*i32", **dict.fromkeys(("weights", "f", "state", "mass"), "*fp32")}
    arguments = {name: kinds.get(name, f"*{word}") for name in POINTERS}
    arguments |= {f"{t}{s}": "stride" for t in "qkv" for s in "bhn"}
    arguments |= {n: "stride" if n in "de" else "i32" for n in LENGTHS}
    sizes: dict[str, Any] = {"DEGREE": 2, "CAUSAL": True, "WD": 64, "WIDE": 64}
    sizes |= polynomial.words(dtype)
    return [
        Entry(
            "window + polynomial 2, heads of 64", "sparse_polynomial 64", "sparse_polynomial",
            config, at == 0,
            Job(path, "sparse_polynomial", arguments,
                sizes | config.constexprs(("BM", "BN", "BK")), word, config.warps, config.stages,
                target),
            None,
        )
        for target in targets
        for at, config in enumerate(
            usable("sparse_polynomial", 64, CONFIGS, word, target)[: None if every else 1]
        )
    ]  # fmt: skip

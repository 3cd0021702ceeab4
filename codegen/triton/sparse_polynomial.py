"""Exact weights in a window and at sinks, a polynomial everywhere else, as one Triton kernel.

Keys that no query of a tile sees in its window come from the states of
:mod:`structc.codegen.triton.polynomial`, sinks left out of them; those around the window are met as
scores, each with its exponential or its polynomial. A row starts at its far part with a largest
score of 0, and goes on as an online softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from structc.attention.feature_sums import Rule
from structc.codegen.triton import method_kernel, polynomial
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.method_kernel import MethodKernel, serves, side, wide
from structc.codegen.triton.polynomial_source import SOURCE as STATES

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
    q = head_of(q, one, heads, qb, qh)
    k = head_of(k, one, heads, kb, kh)
    v = head_of(v, one, heads, vb, vh)
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
KERNEL = MethodKernel(
    "sparse_polynomial",
    SOURCE,
    polynomial.CONFIGS,
    ("BM", "BN", "BK"),
    {
        "q": "", "k": "", "v": "", "places": "i32", "weights": "fp32", "f": "fp32",
        "state": "fp32", "mass": "fp32", "o": "",
    },
    ("q", "k", "v"),
    ("heads", "queries", "keys", "chunk", "chunks", "count", "d", "e", "window", "sinks"),
    single=True,
)  # fmt: skip


def apply(q: Tensor, k: Tensor, v: Tensor, rule: Rule, window: int, sinks: int) -> Tensor | None:
    """The output ``(B, H, n, e)``; None for what is not served. The scale is in q already.

    Args:
        q, k: rounded to v's dtype here.
    """
    if not serves(polynomial.WIDEST, q, k, v):
        return None
    q, k, v = side(q.to(v.dtype)), side(k.to(v.dtype)), side(v)
    (b, h, n, d), m, e = q.shape, k.shape[2], v.shape[3]
    given = polynomial.given_of(q, k, rule, None)
    chunk = polynomial.chunk_of(given.many, m, True)
    o = torch.empty(b, h, n, e, dtype=q.dtype, device=q.device)
    # what stands behind a window is a difference of two states: they are kept in float32
    before = polynomial.states(
        polynomial.WHOLE_STATES, k, v, given._replace(chunk=chunk), skip=sinks
    )
    if before is None:
        return None
    done = KERNEL.run(
        [q, k, v, given.places, given.weights, given.f, *before, o], [q, k, v],
        [h, n, m, chunk, before[0].shape[2] - 1, given.many, d, e, window, sinks],
        lambda c: -(-n // c.bm) * b * h, q,
        DEGREE=rule.degree, CAUSAL=rule.causal, WD=wide(d), WIDE=wide(e),
    )  # fmt: skip
    return o if done else None


def entries(dtype: torch.dtype, targets: Sequence[str], every: bool) -> list[Entry]:
    """For ``structc bench triton``."""
    q, k, v = torch.empty(3, 1, 8, 4096, 64, dtype=dtype, device="meta").unbind(0)
    rule = Rule((1.0, 1.0, 0.5), causal=True)
    return method_kernel.entries(
        "window + polynomial 2, heads of 64", lambda: apply(q, k, v, rule, 256, 4), targets, every
    )

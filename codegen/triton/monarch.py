"""Monarch attention on three Triton kernels: the factors of :mod:`structc.attention.monarch`.

R is an online softmax that also keeps the entropy: with ``h = sum_i p_i s_i`` beside the row sum,
``sum R log R = h - lse``, and mean keys and mean values come of the same pass. L's scores are
``sigma q . mean - entropy``. What stands for a place in a block is a mean of queries by L's
columns, whose row sums are found first: blocks come in tiles, and there may be any number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structc.attention.monarch import LEAST, Parts
from structc.codegen.triton import method_kernel
from structc.codegen.triton.config import Config
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.method_kernel import START, MethodKernel, side, wide
from structc.codegen.triton.tile import DTYPES

WIDEST = 128
"""Numbers of a head."""
CONFIGS = (
    Config(64, 64, 1, 4, 2), Config(64, 32, 1, 4, 2), Config(32, 64, 1, 4, 2),
    Config(32, 32, 1, 4, 2), Config(32, 32, 1, 4, 1), Config(16, 32, 1, 4, 1),
    Config(32, 16, 1, 4, 1), Config(16, 16, 1, 8, 1), Config(16, 16, 1, 4, 1),
)  # fmt: skip
"""Queries and keys of a tile, warps, stages."""
SOURCE = (
    START
    + f'''

@triton.jit(do_not_specialize=["blocks", "places", "size", "sigma"])
def monarch_right(left, k, v, shown, means, y, entropy, kb, kh, kn, vb, vh, vn,
                  blocks, places, size, d, e, sigma, BM: tl.constexpr, BN: tl.constexpr,
                  WD: tl.constexpr, WIDE: tl.constexpr, SHOWN: tl.constexpr, LAST: tl.constexpr,
                  DOT: tl.constexpr, TF32: tl.constexpr):
    """of each block the mean keys and values that a place's query sees, and sum R log R"""
    tiles = tl.cdiv(places, BM)
    pid = tl.program_id(0)
    own = (pid // tiles).to(tl.int64)
    one = own // blocks
    block = own % blocks
    i = pid % tiles * BM + tl.arange(0, BM)
    r = tl.arange(0, WD)
    c = tl.arange(0, WIDE)
    k += one * kb + block * kh
    v += one * vb + block * vh
    query = tile(left + own * places * d, i[:, None], r[None, :], d, places, d)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    spread = tl.zeros((BM,), tl.float32)
    mean = tl.zeros((BM, WD), tl.float32)
    sums = tl.zeros((BM, WIDE), tl.float32)
    for start in range(0, size, BN):
        j = start + tl.arange(0, BN)
        key = tile(k, j[:, None], r[None, :], kn, size, d)
        s = times(query, tl.trans(key), DOT, TF32) * sigma
        seen = j < size
        if SHOWN:
            seen = seen & (tl.load(shown + block * size + j, mask=seen, other=0) != 0)
        loud = tl.where(seen[None, :], s, float("-inf"))
        above = tl.maximum(top, tl.max(loud, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp(loud - safe[:, None])
        less = tl.exp(top - safe)
        total = total * less + tl.sum(p, 1)
        spread = spread * less + tl.sum(p * s, 1)
        mean = mean * less[:, None] + times(p, key, DOT, TF32)
        if LAST:
            value = tile(v, j[:, None], c[None, :], vn, size, e)
            sums = sums * less[:, None] + times(p, value, DOT, TF32)
        top = above
    none = total == 0.0
    share = 1.0 / tl.where(none, 1.0, total)
    found = spread * share - top - tl.log(tl.where(none, 1.0, total))
    there = i < places
    row = own * places + i
    tl.store(entropy + row, tl.where(none, float("inf"), found), mask=there)
    tl.store(means + row[:, None] * d + r[None, :],
             (mean * share[:, None]).to(means.dtype.element_ty),
             mask=there[:, None] & (r < d)[None, :])
    if LAST:
        tl.store(y + row[:, None] * e + c[None, :], (sums * share[:, None]).to(y.dtype.element_ty),
                 mask=there[:, None] & (c < e)[None, :])


@triton.jit(do_not_specialize=["blocks", "places", "rows", "sigma"])
def monarch_middle(q, means, entropy, lse, real, left, qb, qh, qn, blocks, places, rows, d, sigma,
                   BM: tl.constexpr, BN: tl.constexpr, WD: tl.constexpr, REAL: tl.constexpr,
                   DOT: tl.constexpr, TF32: tl.constexpr):
    """of each block and place the mean of queries by their weights on the block"""
    tiles = tl.cdiv(blocks, BN)
    pid = tl.program_id(0)
    own = (pid // tiles).to(tl.int64)
    one = own // places
    place = own % places
    b = pid % tiles * BN + tl.arange(0, BN)
    r = tl.arange(0, WD)
    q += one * qb + place * qh
    base = one * blocks * places + place
    key = tile(means + base * d, b[:, None], r[None, :], places * d, blocks, d)
    at = base + b.to(tl.int64) * places
    bias = tl.load(entropy + at, mask=b < blocks, other=float("inf"))
    found = tl.zeros((BN, WD), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        query = tile(q, i[:, None], r[None, :], qn, rows, d)
        there = i < rows
        own_sum = tl.load(lse + own * rows + i, mask=there, other=0.0)
        if REAL:
            there = there & (tl.load(real + place * rows + i, mask=there, other=0) != 0)
        s = times(query, tl.trans(key), DOT, TF32) * sigma - bias[None, :]
        p = tl.where(there[:, None], tl.exp(s - own_sum[:, None]), 0.0)
        total += tl.sum(p, 0)
        found += times(tl.trans(p), query, DOT, TF32)
    found = found / tl.maximum(total, {LEAST!r})[:, None]
    tl.store(left + at[:, None] * d + r[None, :], found.to(left.dtype.element_ty),
             mask=(b < blocks)[:, None] & (r < d)[None, :])


@triton.jit(do_not_specialize=["blocks", "places", "rows", "sigma"])
def monarch_left(q, means, y, entropy, o, lse, qb, qh, qn, ob, oh, on,
                 blocks, places, rows, d, e, sigma, BM: tl.constexpr, BN: tl.constexpr,
                 WD: tl.constexpr, WIDE: tl.constexpr, LAST: tl.constexpr, DOT: tl.constexpr,
                 TF32: tl.constexpr):
    """the attention of a place's queries over the blocks, entropies as biases, and row sums;
    row sums alone but for the last time"""
    tiles = tl.cdiv(rows, BM)
    pid = tl.program_id(0)
    own = (pid // tiles).to(tl.int64)
    one = own // places
    place = own % places
    i = pid % tiles * BM + tl.arange(0, BM)
    r = tl.arange(0, WD)
    c = tl.arange(0, WIDE)
    query = tile(q + one * qb + place * qh, i[:, None], r[None, :], qn, rows, d)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, WIDE), tl.float32)
    base = one * blocks * places + place
    for start in range(0, blocks, BN):
        b = start + tl.arange(0, BN)
        key = tile(means + base * d, b[None, :], r[:, None], places * d, blocks, d)
        at = base + b.to(tl.int64) * places
        s = times(query, key, DOT, TF32) * sigma
        s -= tl.load(entropy + at, mask=b < blocks, other=float("inf"))[None, :]
        above = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp(s - safe[:, None])
        less = tl.exp(top - safe)
        total = total * less + tl.sum(p, 1)
        if LAST:
            value = tile(y + base * e, b[:, None], c[None, :], places * e, blocks, e)
            sums = sums * less[:, None] + times(p, value, DOT, TF32)
        top = above
    row = own * rows + i
    tl.store(lse + row, top + tl.log(total), mask=i < rows)
    if LAST:
        at = one * ob + place * oh + i.to(tl.int64)[:, None] * on + c[None, :]
        tl.store(o + at, (sums / total[:, None]).to(o.dtype.element_ty),
                 mask=(i < rows)[:, None] & (c < e)[None, :])
'''
)


_PLACE = {"q": "", "means": "", "entropy": "fp32"}
RIGHT = MethodKernel(
    "monarch_right", SOURCE, CONFIGS, ("BM", "BN"),
    {"left": "", "k": "", "v": "", "shown": "u8", "means": "", "y": "", "entropy": "fp32"},
    ("k", "v"), ("blocks", "places", "size", "d", "e", "sigma"),
)  # fmt: skip
MIDDLE = MethodKernel(
    "monarch_middle", SOURCE, CONFIGS, ("BM", "BN"),
    _PLACE | {"lse": "fp32", "real": "u8", "left": ""},
    ("q",), ("blocks", "places", "rows", "d", "sigma"),
)  # fmt: skip
LEFT = MethodKernel(
    "monarch_left", SOURCE, CONFIGS, ("BM", "BN"),
    {"q": "", "means": "", "y": "", "entropy": "fp32", "o": "", "lse": "fp32"},
    ("q", "o"), ("blocks", "places", "rows", "d", "e", "sigma"),
)  # fmt: skip
KERNELS = (RIGHT, MIDDLE, LEFT)


def apply(parts: Parts, num_steps: int, sigma: float) -> tuple[Tensor, Tensor] | None:
    """Output ``(N, places, rows, e)`` and row sums; None for what is not served."""
    q, k, v, left, shown, real = parts
    many, places, rows, d = q.shape
    blocks, size, e = k.shape[1], k.shape[2], v.shape[3]
    same = q.dtype == k.dtype == v.dtype and q.dtype in DTYPES
    if not same or max(d, e) > WIDEST:
        return None
    q, k, v, left = (*map(side, (q, k, v)), left.contiguous())
    means, y = (q.new_empty(many, blocks, places, width) for width in (d, e))
    entropy = torch.empty(many, blocks, places, dtype=torch.float32, device=q.device)
    lse = torch.empty(many, places, rows, dtype=torch.float32, device=q.device)
    o = q.new_empty(many, rows, places, e).transpose(1, 2)  # as tokens lie
    seen = _flags(entropy, shown, (blocks, size))
    there = _flags(entropy, real if isinstance(real, Tensor) else None, (places, rows))
    inside, sizes = {"WD": wide(d), "WIDE": wide(e)}, [blocks, places, rows, d]
    for turn in range(num_steps):
        last = turn + 1 == num_steps
        done = RIGHT.run(
            [left, k, v, seen, means, y, entropy], [k, v],
            [blocks, places, size, d, e, float(sigma)],
            lambda c: many * blocks * -(-places // c.bm), q,
            **inside, SHOWN=shown is not None, LAST=last,
        ) and LEFT.run(
            [q, means, y, entropy, o, lse], [q, o], [*sizes, e, float(sigma)],
            lambda c: many * places * -(-rows // c.bm), q, **inside, LAST=last,
        )  # fmt: skip
        if done and not last:
            left = torch.empty_like(means)
            done = MIDDLE.run(
                [q, means, entropy, lse, there, left], [q], [*sizes, float(sigma)],
                lambda c: many * places * -(-blocks // c.bn), q,
                WD=inside["WD"], REAL=isinstance(real, Tensor),
            )  # fmt: skip
        if not done:
            return None
    return o, lse


def _flags(like: Tensor, given: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """What is the same for all heads, as bytes; nobody reads what stands for nothing."""
    if given is None:
        return like.view(torch.uint8)
    return (given != 0).reshape(shape).to(torch.uint8).contiguous()


def entries(dtype: torch.dtype, targets: Sequence[str], every: bool) -> list[Entry]:
    """For ``structc bench triton``: 64 blocks of 64, heads of 64."""
    given: Any = torch.empty(5, 8, 64, 64, 64, dtype=dtype, device="meta")
    q, k, v, left, _ = given.unbind(0)
    return method_kernel.entries(
        "Monarch attention 64x64, heads of 64", lambda: apply(Parts(q, k, v, left), 2, 0.125),
        targets, every,
    )  # fmt: skip

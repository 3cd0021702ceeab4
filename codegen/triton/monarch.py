"""Monarch attention as three Triton kernels: the factors of :mod:`structc.attention.monarch`.

R is an online softmax that also keeps the entropy: with ``h = sum_i p_i s_i`` beside the row sum,
``sum R log R = h - lse``, and mean keys and mean values come of the same pass. L's scores are
``sigma q . mean - entropy``. What stands for a place in a block is a mean of queries by L's
columns; all blocks of a place are one tile there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structc.attention.monarch import LEAST, Parts
from structc.codegen.triton import load
from structc.codegen.triton.aot import Job
from structc.codegen.triton.attempt import Attempts
from structc.codegen.triton.config import DOT, Config, power_above
from structc.codegen.triton.device import name_here
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.pieces import HEAD
from structc.codegen.triton.spilled import usable
from structc.codegen.triton.tile import DTYPES, dot_dtype
from structc.records import Refusal

WIDEST = 128
"""Numbers of a head."""
MOST = 256
"""Blocks of keys, where queries are averaged."""
CONFIGS = (
    Config(64, 64, 1, 4, 2), Config(64, 32, 1, 4, 2), Config(32, 64, 1, 4, 2),
    Config(32, 32, 1, 4, 2), Config(32, 32, 1, 4, 1), Config(16, 32, 1, 4, 1),
    Config(32, 16, 1, 4, 1), Config(16, 16, 1, 16, 1), Config(16, 16, 1, 8, 1),
    Config(16, 16, 1, 4, 1),
)  # fmt: skip
"""Queries and keys of a tile, warps, stages."""
POINTERS = {
    "right": ("left", "k", "v", "shown", "means", "y", "entropy"),
    "middle": ("q", "means", "entropy", "real", "left"),
    "left": ("q", "means", "y", "entropy", "o", "lse"),
}
STRIDES = {"right": ("k", "v"), "middle": ("q",), "left": ("q", "o")}
LENGTHS = {
    "right": ("blocks", "places", "size", "d", "e"),
    "middle": ("blocks", "places", "rows", "d"),
    "left": ("blocks", "places", "rows", "d", "e"),
}
SOURCE = (
    HEAD
    + f'''

@triton.jit
def times(a, b, DOT: tl.constexpr):
    """a product of matrices"""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=SINGLE)


@triton.jit
def tile(x, rows, columns, step, length, width):
    """a tile of a tensor, rows and columns shaped as they lie in it; 0 outside"""
    at = rows.to(tl.int64) * step + columns
    return tl.load(x + at, mask=(rows < length) & (columns < width), other=0.0)


@triton.jit(do_not_specialize=["blocks", "places", "size", "sigma"])
def monarch_right(left, k, v, shown, means, y, entropy, kb, kh, kn, vb, vh, vn,
                  blocks, places, size, d, e, sigma, BM: tl.constexpr, BN: tl.constexpr,
                  WD: tl.constexpr, WIDE: tl.constexpr, SHOWN: tl.constexpr, LAST: tl.constexpr,
                  DOT: tl.constexpr):
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
        s = times(query, tl.trans(key), DOT) * sigma
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
        mean = mean * less[:, None] + times(p, key, DOT)
        if LAST:
            value = tile(v, j[:, None], c[None, :], vn, size, e)
            sums = sums * less[:, None] + times(p, value, DOT)
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
def monarch_middle(q, means, entropy, real, left, qb, qh, qn, blocks, places, rows, d, sigma,
                   BM: tl.constexpr, BN: tl.constexpr, WD: tl.constexpr, REAL: tl.constexpr,
                   DOT: tl.constexpr):
    """of each block and place the mean of queries by their weights on the block"""
    own = tl.program_id(0).to(tl.int64)
    one = own // places
    place = own % places
    b = tl.arange(0, BN)
    r = tl.arange(0, WD)
    q += one * qb + place * qh
    at = one * blocks * places + place + b.to(tl.int64) * places
    key = tl.load(means + at[None, :] * d + r[:, None],
                  mask=(b < blocks)[None, :] & (r < d)[:, None], other=0.0)
    bias = tl.load(entropy + at, mask=b < blocks, other=float("inf"))
    found = tl.zeros((BN, WD), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, rows, BM):
        i = start + tl.arange(0, BM)
        query = tile(q, i[:, None], r[None, :], qn, rows, d)
        s = times(query, key, DOT) * sigma - bias[None, :]
        p = tl.exp(s - tl.max(s, 1)[:, None])
        there = i < rows
        if REAL:
            there = there & (tl.load(real + place * rows + i, mask=there, other=0) != 0)
        p = tl.where(there[:, None], p / tl.sum(p, 1)[:, None], 0.0)
        total += tl.sum(p, 0)
        found += times(tl.trans(p), query, DOT)
    found = found / tl.maximum(total, {LEAST!r})[:, None]
    tl.store(left + at[:, None] * d + r[None, :], found.to(left.dtype.element_ty),
             mask=(b < blocks)[:, None] & (r < d)[None, :])


@triton.jit(do_not_specialize=["blocks", "places", "rows", "sigma"])
def monarch_left(q, means, y, entropy, o, lse, qb, qh, qn, ob, oh, on,
                 blocks, places, rows, d, e, sigma, BM: tl.constexpr, BN: tl.constexpr,
                 WD: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr):
    """the attention of a place's queries over the blocks, entropies as biases, and row sums"""
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
        s = times(query, key, DOT) * sigma
        s -= tl.load(entropy + at, mask=b < blocks, other=float("inf"))[None, :]
        above = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp(s - safe[:, None])
        less = tl.exp(top - safe)
        total = total * less + tl.sum(p, 1)
        value = tile(y + base * e, b[:, None], c[None, :], places * e, blocks, e)
        sums = sums * less[:, None] + times(p, value, DOT)
        top = above
    row = own * rows + i
    tl.store(lse + row, top + tl.log(total), mask=i < rows)
    at = one * ob + place * oh + i.to(tl.int64)[:, None] * on + c[None, :]
    tl.store(o + at, (sums / total[:, None]).to(o.dtype.element_ty),
             mask=(i < rows)[:, None] & (c < e)[None, :])
'''
)


def apply(parts: Parts, num_steps: int, sigma: float) -> tuple[Tensor, Tensor] | None:
    """Output ``(N, places, rows, e)`` and row sums; None for what is not served."""
    q, k, v, left, shown, real = parts
    many, places, rows, d = q.shape
    blocks, size, e = k.shape[1], k.shape[2], v.shape[3]
    same = q.dtype == k.dtype == v.dtype and q.dtype in DTYPES
    if not same or max(d, e) > WIDEST or (num_steps > 1 and blocks > MOST):
        return None
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    left, means = left.contiguous(), q.new_empty(many, blocks, places, d)
    y = q.new_empty(many, blocks, places, e)
    entropy = torch.empty(many, blocks, places, dtype=torch.float32, device=q.device)
    seen = entropy if shown is None else _flags(shown, (blocks, size))
    there = _flags(real, (places, rows)) if isinstance(real, Tensor) else entropy
    wide = {"WD": _wide(d), "WIDE": _wide(e)}
    for step in range(num_steps):
        flags = {"SHOWN": shown is not None, "LAST": step + 1 == num_steps}
        inputs = [left, k, v, seen, means, y, entropy, *_strides(k, v), blocks, places, size, d, e]
        if not _launch("right", inputs, q, sigma, many * blocks, places, wide | flags):
            return None
        if flags["LAST"]:
            break
        left = torch.empty_like(means)
        inputs = [q, means, entropy, there, left, *_strides(q), blocks, places, rows, d]
        sizes = {"WD": wide["WD"], "REAL": isinstance(real, Tensor), "BN": _wide(blocks)}
        if not _launch("middle", inputs, q, sigma, many * places, 1, sizes):
            return None
    o = q.new_empty(many, rows, places, e).transpose(1, 2)  # as tokens lie
    lse = torch.empty(many, places, rows, dtype=torch.float32, device=q.device)
    inputs = [q, means, y, entropy, o, lse, *_strides(q, o), blocks, places, rows, d, e]
    return (o, lse) if _launch("left", inputs, q, sigma, many * places, rows, wide) else None


def _flags(given: Tensor, shape: tuple[int, int]) -> Tensor:
    """What is the same for all heads, as bytes."""
    return (given != 0).reshape(shape).to(torch.uint8).contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [t.stride(at) for t in tensors for at in range(3)]


def _wide(d: int) -> int:
    return max(DOT, power_above(d))


def _launch(
    kernel: str,
    inputs: list[Any],
    like: Tensor,
    sigma: float,
    many: int,
    length: int,
    sizes: dict[str, Any],
) -> bool:
    """Run a kernel with the first config that it runs with; False if there is none."""
    module = load.module_of(SOURCE)
    if isinstance(module, Refusal):
        return False

    def call(config: Config) -> bool:
        tiles = config.constexprs(("BM", "BN")) | sizes
        grid = (many * (1 if kernel == "middle" else -(-length // config.bm)),)
        getattr(module, f"monarch_{kernel}")[grid](
            *inputs, float(sigma), **tiles, DOT=dot_dtype(like.dtype), num_warps=config.warps,
            num_stages=config.stages, **load.FUSED,
        )  # fmt: skip
        return True

    key = (kernel, like.dtype, *sorted(sizes.items()))
    if key not in _tried:
        width = max(v for k, v in sizes.items() if k in ("WD", "WIDE"))
        some = usable(f"monarch_{kernel}", width, CONFIGS, DTYPES[like.dtype], name_here())
        _tried[key] = Attempts(f"monarch_{kernel} in {like.dtype}, {sizes}", some)
    with torch.cuda.device_of(like):
        return bool(_tried[key].run(call))


_tried: dict[tuple[Any, ...], Attempts[Config]] = {}


def arguments(kernel: str, word: str) -> dict[str, str]:
    """What a call passes, as Triton spells types."""
    kinds = {"shown": "*u8", "real": "*u8", "entropy": "*fp32", "lse": "*fp32"}
    found = {name: kinds.get(name, f"*{word}") for name in POINTERS[kernel]}
    found |= {f"{t}{s}": "stride" for t in STRIDES[kernel] for s in "bhn"}
    found |= {n: "stride" if n in "de" else "i32" for n in LENGTHS[kernel]}
    return found | {"sigma": "fp32"}


def entries(dtype: torch.dtype, targets: Sequence[str], every: bool) -> list[Entry]:
    """The kernels for each target, for ``structc bench triton``: 64 blocks of 64, heads of 64."""
    word, path = DTYPES[dtype], str(load.write(SOURCE))
    wide = {"WD": 64, "WIDE": 64}
    sizes: dict[str, dict[str, Any]] = {
        "right": wide | {"SHOWN": False, "LAST": True},
        "middle": {"WD": 64, "REAL": False, "BN": 64},
        "left": wide,
    }
    return [
        Entry(
            "Monarch attention 64x64, heads of 64", f"monarch_{kernel} 64", f"monarch_{kernel}",
            config, at == 0,
            Job(path, f"monarch_{kernel}", arguments(kernel, word),
                config.constexprs(("BM", "BN")) | own, word, config.warps, config.stages, target),
            None,
        )
        for kernel, own in sizes.items()
        for target in targets
        for at, config in enumerate(
            usable(f"monarch_{kernel}", 64, CONFIGS, word, target)[: None if every else 1]
        )
    ]  # fmt: skip

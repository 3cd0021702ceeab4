"""Attention of a conv basis as one Triton kernel: scores are looked up by lag, not computed.

One program takes a tile of queries of one head and goes over tiles of keys up to the diagonal. The
score of query i and key j is ``columns[segment of j, i - j]``; everything else is the online
softmax of :mod:`structc.codegen.triton.softmax`, so rows that are faint beside others are as exact
as they are, which an FFT's are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from structc.codegen.triton import method_kernel
from structc.codegen.triton.config import Config
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.method_kernel import START, MethodKernel, wide
from structc.codegen.triton.tile import DTYPES

CHEAP = 16
"""How much cheaper a flop of matrix units is than an FFT's; assumed."""
WIDEST = 256
"""Numbers of a value."""
SOURCE = (
    START
    + '''

@triton.jit(do_not_specialize=["segments", "n"])
def conv_basis(starts, columns, v, o, lse, segments, n, d,
               BM: tl.constexpr, BN: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr,
               TF32: tl.constexpr):
    """softmax of columns[segment of j, i - j] over j <= i, times v, and its row sums"""
    tiles = tl.cdiv(n, BM)
    pid = tl.program_id(0)
    head = (pid // tiles).to(tl.int64)
    first = (tiles - 1 - pid % tiles) * BM
    m = first + tl.arange(0, BM)
    e = tl.arange(0, WIDE)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, WIDE), tl.float32)
    for start in range(0, tl.minimum(first + BM, n), BN):
        j = start + tl.arange(0, BN)
        own = tl.zeros((BN,), tl.int64) - 1
        for segment in range(segments):
            own += (tl.load(starts + head * segments + segment) <= j).to(tl.int64)
        lag = m[:, None] - j[None, :]
        seen = (lag >= 0) & (m < n)[:, None]
        place = ((head * segments + own) * n)[None, :] + lag
        s = tl.load(columns + place, mask=seen, other=float("-inf"))
        above = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp(s - safe[:, None])
        less = tl.exp(top - safe)
        total = total * less + tl.sum(p, 1)
        value = tile(v + head * n * d, j[:, None], e[None, :], d, n, d)
        sums = sums * less[:, None] + times(p, value, DOT, TF32)
        top = above
    some = tl.where(total == 0.0, 1.0, total)
    at = (head * n + m)[:, None] * d + e[None, :]
    inside = (m < n)[:, None] & (e < d)[None, :]
    tl.store(o + at, (sums / some[:, None]).to(o.dtype.element_ty), mask=inside)
    tl.store(lse + head * n + m, top + tl.log(some), mask=m < n)
'''
)


KERNEL = MethodKernel(
    "conv_basis",
    SOURCE,
    (
        Config(64, 64, 1, 8, 2), Config(64, 64, 1, 4, 2), Config(64, 32, 1, 4, 2),
        Config(32, 64, 1, 4, 2), Config(32, 32, 1, 4, 2), Config(32, 32, 1, 4, 1),
        Config(16, 32, 1, 4, 1), Config(16, 16, 1, 4, 1),
    ),
    ("BM", "BN"),
    {"starts": "i64", "columns": "fp32", "v": "", "o": "", "lse": "fp32"},
    (),
    ("segments", "n", "d"),
)  # fmt: skip
"""Tiles are of queries and keys."""


def pays(n: int, segments: int) -> bool:
    """Whether ``n^2 d`` flops of matrix units cost less than ``10 (s + 1) n log2 n d`` of FFTs.

    >>> pays(2048, 1), pays(8192, 1), pays(8192, 4)
    (True, False, True)
    """
    return n <= CHEAP * 10 * (segments + 1) * math.log2(max(2, n))


def apply(starts: Tensor, columns: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """Softmax of a basis times v, and its row sums; None where the FFT is the better way.

    Args:
        starts, columns: of :class:`structc.attention.conv_basis.Basis`, float32.
        v: ``(B, H, n, d)``.
    """
    b, h, n, d = v.shape
    served = d <= WIDEST and v.dtype in DTYPES and columns.dtype == torch.float32
    if not served or not pays(n, starts.shape[1]):
        return None
    value, o = v.contiguous(), v.new_empty(b, h, n, d)
    lse = torch.empty(b, h, n, dtype=torch.float32, device=v.device)
    done = KERNEL.run(
        [starts.contiguous(), columns.contiguous(), value, o, lse], [], [starts.shape[1], n, d],
        lambda c: -(-n // c.bm) * b * h, v, WIDE=wide(d),
    )  # fmt: skip
    return (o, lse) if done else None


def entries(dtype: torch.dtype, targets: Sequence[str], every: bool) -> list[Entry]:
    """For ``structc bench triton``."""
    starts = torch.empty(8, 2, dtype=torch.int64, device="meta")
    columns = torch.empty(8, 2, 2048, device="meta")
    v = torch.empty(1, 8, 2048, 64, dtype=dtype, device="meta")
    return method_kernel.entries(
        "conv basis, values of 64", lambda: apply(starts, columns, v), targets, every
    )

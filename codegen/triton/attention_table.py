"""Attention kernels for ``structc bench triton``: what is compiled, and the model's times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from structc.codegen.triton import load
from structc.codegen.triton.aot import Job
from structc.codegen.triton.attention import KERNELS, configs, key_of
from structc.codegen.triton.config import Config
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.predict import CACHED, LAUNCH, SEEN
from structc.codegen.triton.softmax import LENGTHS, Shape, emit, slab_of
from structc.codegen.triton.targets import TARGETS, GpuTarget
from structc.codegen.triton.tile import DTYPES
from structc.softmax import Softmax

LENGTH, HEADS, BATCH = 4096, 32, 2
"""Queries and keys, heads and sequences of a case."""
_TYPES = {"lse": "*fp32", "dots": "*fp32", "shown": "*u8", "blocks": "*u8", "lags": "*fp32"}
CASES = {
    "causal, heads of 64": Shape(Softmax(0.125, causal=True), 64, 64),
    "causal, heads of 128": Shape(Softmax(0.088, causal=True), 128, 128),
    "window 256, sinks, 64": Shape(
        Softmax(0.125, causal=True, window=256, sinks=4), 64, 64, sink=True
    ),
    "blocks of 64, 64": Shape(Softmax(0.125, block_q=64, block_k=64), 64, 64, blocks=True),
    "Toeplitz bias, padding, 64": Shape(Softmax(0.125), 64, 64, lags=True, shown=True),
    "bias, softcap 50, 64": Shape(Softmax(0.125, softcap=50.0), 64, 64, bias="float"),
}
"""By name what is compiled; ``LENGTH`` queries and keys."""


@dataclass(frozen=True)
class AttentionWork:
    """What one kernel does for all heads.

    Attributes:
        flops: of its products, in whole tiles of keys.
        memory: bytes of each tensor once.
        loads: bytes that programs load and store.
    """

    flops: int
    memory: int
    loads: int


def work(
    kernel: str, shape: Shape, config: Config, queries: int, keys: int, heads: int, size: int
) -> AttentionWork:
    """Count a kernel's work, without extras' own bytes.

    A query tile meets the keys that the rule lets one of its queries see, in tiles: forward two
    products with them, the gradient of q three, that of k and v four.

    >>> full = work("forward", Shape(Softmax(1.0), 64, 64), Config(64, 64, 1, 4, 2), 512, 512, 1, 2)
    >>> full.flops == 4 * 512 * 512 * 64
    True
    """
    d, e = shape.wide
    pairs = tiles = 0
    for first in range(0, queries, config.bm):
        last = min(queries, first + config.bm)
        for low, high in shape.form.spans(first, last, keys):
            some = -(-high // config.bn) - low // config.bn
            tiles += some
            pairs += some * config.bm * config.bn
    factors = {"forward": d + e, "queries": 2 * d + e, "keys": 2 * (d + e)}[kernel]
    own = size * (queries * (d + e) + keys * (d + e)) + 8 * queries
    side = config.bm if kernel == "keys" else config.bn
    return AttentionWork(
        heads * 2 * pairs * factors,
        heads * (own + (size * keys * (d + e) if kernel == "keys" else size * queries * e)),
        heads * (size * tiles * side * (d + e) + own),
    )


def seconds(found: AttentionWork, target: GpuTarget, dtype: str) -> float:
    """The model's time, as in :mod:`structc.codegen.triton.predict`."""
    parts = [
        found.flops / target.products(dtype),
        found.memory / target.bandwidth,
        found.loads / (CACHED * target.bandwidth),
    ]
    return LAUNCH + max(parts) + SEEN * (sum(parts) - max(parts))


def arguments(kernel: str, shape: Shape, dtype: str) -> dict[str, str]:
    """What a call passes, as Triton spells types."""
    pointers = {name: _TYPES.get(name, f"*{dtype}") for name in shape.tensors(kernel)}
    strides = dict.fromkeys(shape.strides(kernel), "stride")
    return {**pointers, **strides, **dict.fromkeys(LENGTHS, "i32")}


def entries(dtype: torch.dtype, targets: Sequence[str], every: bool) -> list[Entry]:
    """The kernels of all cases for each target; with all their configs, or the default."""
    word, size, found = DTYPES[dtype], dtype.itemsize, []
    for name, case in CASES.items():
        shape = replace(case, slab=slab_of(dtype, max(case.wide)))
        path = str(load.write(emit(shape)))
        for target in (TARGETS[t] for t in targets):
            for kernel in KERNELS:
                some = configs(kernel, shape, target, dtype, LENGTH, LENGTH)
                for at, config in enumerate(some if every else some[:1]):
                    job = Job(
                        path, f"attention_{kernel}", arguments(kernel, shape, word),
                        {"BM": config.bm, "BN": config.bn}, word, config.warps, config.stages,
                        target.name,
                    )  # fmt: skip
                    done = work(kernel, shape, config, LENGTH, LENGTH, HEADS * BATCH, size)
                    time = seconds(done, target, word)
                    found.append(
                        Entry(name, key_of(kernel, shape), kernel, config, at == 0, job, time)
                    )
    return found

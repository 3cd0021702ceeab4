"""Kernels of stages entry by entry: strided factors with small blocks, selections, shuffles."""

from __future__ import annotations

from collections.abc import Iterator

from structc.codegen.program import Stage
from structc.codegen.triton.panel import several, several_kernel
from structc.codegen.triton.pieces import Kernel, Way, extras, head, own_tile, said, source, tail


def _strided(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    b, c, d = stage.block.b, stage.block.c, stage.block.d
    yield from _started(kernel, stage, width)
    yield "    sums = tl.zeros((BM, BN), tl.float32)"
    yield f"    a = group // {b}"
    yield f"    for k in range({c}):"
    yield f"        feature = {source(stage, width, f'(a * {c} + k) * {d} + n')}"
    yield "        left = tl.load(x + lines + feature[None, :], mask=inside, other=0.0)"
    yield f"        at = (group.to(tl.int64) * {c} + k) * {d} + n"
    yield f"        right = tl.load(w + at, mask=n < {d}, other=0.0)"
    yield "        sums += left.to(tl.float32) * right.to(tl.float32)[None, :]"
    yield f"    out = (group * {d} + n)[None, :]"
    yield from _stored(stage)


def _listed(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    yield from _started(kernel, stage, width)
    yield f"    feature = tl.load(place + n, mask=n < {stage.out}, other=0)"
    yield from _moved(stage)


def _move(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    yield from _started(kernel, stage, width)
    yield f"    feature = {source(stage, width, 'n')}"
    yield from _moved(stage)


def _moved(stage: Stage) -> Iterator[str]:
    yield "    sums = tl.load(x + lines + feature[None, :], mask=inside, other=0.0).to(tl.float32)"
    yield "    out = n[None, :]"
    yield from _stored(stage)


def _started(kernel: Kernel, stage: Stage, width: int) -> Iterator[str]:
    yield from head(kernel, said(stage, width))
    yield from own_tile(kernel, stage, width)


def _stored(stage: Stage) -> Iterator[str]:
    yield f"    spot = m.to(tl.int64)[:, None] * {stage.out} + out"
    yield from tail(stage)


def _kernel(at: int, stage: Stage) -> Kernel:
    block, factors = stage.block, {"strided": ("w",), "listed": ("place",)}
    groups, outputs = (block.a * block.b, block.d) if stage.kind == "strided" else (1, stage.out)
    pointers = ("x", *factors.get(stage.kind, ()), *extras(stage), "y")
    return Kernel(f"stage{at}_{stage.kind}", pointers, groups, outputs, ("BM", "BN"))


WAYS = {
    "strided": {
        "strided": Way(_kernel, _strided),
        "batch": Way(lambda at, stage: several_kernel(f"stage{at}_batch", stage), several),
    },
    "listed": {"listed": Way(_kernel, _listed)},
    "shuffle": {"shuffle": Way(_kernel, _move)},
    "move": {"move": Way(_kernel, _move)},
}

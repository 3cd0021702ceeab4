"""Kernels of block factors and of sparse blocks: tiles, one row, and few rows.

A tile of outputs loops over the columns of its block. With few rows there are too few tiles for a
GPU: ``split`` shares the columns among several programs and ``join`` adds their sums up, in order,
so that results do not change from run to run. One row is a product with a vector (``row``): no
matrix units, every weight read once. A factor whose output is shuffled takes several blocks at a
time, so that what it stores lies side by side, and so does one whose numbers are strided: what it
loads does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from structc.codegen.program import Program, Stage
from structc.codegen.triton.pieces import (
    TILE,
    Kernel,
    Way,
    extras,
    head,
    own_tile,
    product,
    said,
    source,
    tail,
)


def _loop(
    stage: Stage, feature: str, factor: str, tf32: bool, span: str | None = None
) -> Iterator[str]:
    """The loop over columns of a block: sums of products."""
    b, c = stage.block.b, stage.block.c
    yield f"for start in range({span or f'0, {c}'}, BK):"
    yield "    k = start + tl.arange(0, BK)"
    yield f"    feature = {feature}"
    yield f"    some = (k < {c})[None, :]"
    yield "    left = tl.load(x + lines + feature[None, :], mask=live & some, other=0.0)"
    yield f"    at = ({factor} * {b} + n).to(tl.int64)[None, :] * {c} + k[:, None]"
    yield f"    wide = (n < {b})[None, :] & (k < {c})[:, None]"
    yield "    right = tl.load(w + at, mask=wide, other=0.0)"
    yield f"    sums = {product('left', 'right', 'sums', tf32)}"


def _panel(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    b, c = stage.block.b, stage.block.c
    yield from head(kernel, said(stage, width))
    yield from own_tile(kernel, stage, width)
    yield "    sums = tl.zeros((BM, BN), tl.float32)"
    feature = source(stage, width, f"group * {c} + k")
    yield from (f"    {line}" for line in _loop(stage, feature, "group", tf32))
    yield f"    out = (group * {b} + n)[None, :]"
    yield from _stored(stage)


def _sparse(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    b, c = stage.block.b, stage.block.c
    yield from head(kernel, said(stage, width))
    yield from own_tile(kernel, stage, width)
    yield "    sums = tl.zeros((BM, BN), tl.float32)"
    yield "    last = tl.load(first + group + 1)"
    yield "    for e in range(tl.load(first + group), last):"
    yield f"        column = tl.load(place + e) * {c}"
    yield from (f"        {line}" for line in _loop(stage, "column + k", "e", tf32))
    yield f"    out = (group * {b} + n)[None, :]"
    yield from _stored(stage)


def _row(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    a, b, c = stage.block.a, stage.block.b, stage.block.c
    yield from head(kernel, f"one row, {said(stage, width)}")
    yield f"    tiles = tl.cdiv({b}, BN)"
    yield "    pid = tl.program_id(0)"
    yield f"    m = pid // ({a} * tiles)"
    yield f"    group = pid // tiles % {a}"
    yield "    n = pid % tiles * BN + tl.arange(0, BN)"
    yield "    sums = tl.zeros((BN, BK), tl.float32)"
    yield f"    for start in range(0, {c}, BK):"
    yield "        k = start + tl.arange(0, BK)"
    yield f"        feature = {source(stage, width, f'group * {c} + k')}"
    yield f"        left = tl.load(x + m.to(tl.int64) * {width} + feature, mask=k < {c}, other=0.0)"
    yield f"        at = (group * {b} + n).to(tl.int64)[:, None] * {c} + k[None, :]"
    yield f"        wide = (n < {b})[:, None] & (k < {c})[None, :]"
    yield "        right = tl.load(w + at, mask=wide, other=0.0)"
    yield "        sums += left.to(tl.float32)[None, :] * right.to(tl.float32)"
    yield "    sums = tl.sum(sums, 1)"
    yield f"    out = group * {b} + n"
    yield f"    inside = n < {b}"
    yield f"    spot = m.to(tl.int64) * {stage.out} + out"
    yield from tail(stage)


def _split(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    b, c = stage.block.b, stage.block.c
    yield from head(kernel, f"a share of the columns, {said(stage, width)}")
    yield from own_tile(kernel, stage, width, split=True)
    yield f"    many = tl.cdiv(tl.cdiv({c}, BK), SPLIT) * BK"
    yield "    sums = tl.zeros((BM, BN), tl.float32)"
    feature = source(stage, width, f"group * {c} + k")
    span = f"share * many, tl.minimum((share + 1) * many, {c})"
    yield from (f"    {line}" for line in _loop(stage, feature, "group", tf32, span))
    yield "    line = share.to(tl.int64) * rows + m[:, None]"
    yield f"    spot = line * {stage.out} + (group * {b} + n)[None, :]"
    yield "    tl.store(part + spot, sums, mask=inside)"


def _join(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    yield from head(kernel, f"the shares' sums, {stage.out} features")
    yield from own_tile(kernel, stage, stage.out)
    yield "    out = n[None, :]"
    yield "    spot = lines + out"
    yield "    sums = tl.zeros((BM, BN), tl.float32)"
    yield "    for share in tl.static_range(SPLIT):"
    yield f"        line = tl.cast(rows, tl.int64) * share * {stage.out}"
    yield "        sums += tl.load(part + line + spot, mask=inside, other=0.0)"
    yield from tail(stage)


def several(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    """Several blocks at a time: those whose output is shuffled, or whose numbers are strided."""
    a, b, d = stage.block.a, stage.block.b, stage.block.d
    yield from head(kernel, said(stage, width))
    yield f"    tiles = tl.cdiv({b}, BN)"
    yield f"    parts = tl.cdiv({a * d}, BG)"
    if not kernel.called:
        yield "    pid = tl.program_id(0)"
    yield "    m = pid // (parts * tiles) * BM + tl.arange(0, BM)"
    yield "    block = pid // tiles % parts * BG + tl.arange(0, BG)[:, None, None]"
    yield "    n = (pid % tiles * BN + tl.arange(0, BN))[None, None, :]"
    yield "    line = m.to(tl.int64)[None, :, None]"
    yield f"    live = (m < rows)[None, :, None] & (block < {a * d})"
    yield "    sums = tl.zeros((BG, BM, BN), tl.float32)"
    yield from blocks_loop(stage, width, "w", "n", f"(n < {b})", tf32)
    out = f"block * {b} + n" if d == 1 else f"((block // {d}) * {b} + n) * {d} + block % {d}"
    yield f"    out = {f'n * {a} + block' if stage.turns else out}"
    yield f"    inside = live & (n < {b})"
    yield f"    spot = line * {stage.out} + out"
    yield from tail(stage)


def turned(program: Program) -> Program:
    """The program with shuffles in the store of the factor in front, where its blocks allow that.

    >>> from structc.codegen.program import stages_of
    >>> from structc.forms import Tile
    >>> import torch
    >>> form = Tile.parse("block(4,16,16,1) permute(4,16) block(8,6,8,1)")
    >>> [s.kind for s in turned(stages_of(form, torch.float16, folds=True)).stages]
    ['turned', 'panel']
    """
    done: list[Stage] = []
    for stage in program.stages:
        last = done[-1] if done and stage.reads is None and stage.blocks else None
        fits = last is not None and last.kind == "panel" and last.bare
        if last is not None and fits and last.block.a == stage.blocks:
            done[-1] = replace(last, kind="turned", turns=stage.blocks)
            stage = replace(stage, blocks=0)
        done.append(stage)
    return replace(program, stages=tuple(done))


def blocks_loop(
    stage: Stage, width: int, weight: str, row: str, own: str, tf32: bool
) -> Iterator[str]:
    """Sums (blocks, rows, outputs) of several blocks at a time, each with its own columns.

    Args:
        stage, width: the factor and what it reads.
        weight: name of its tensor.
        row, own: which outputs of each block, and whether they are there, ``(1, 1, outputs)``.
        tf32: as for :func:`structc.codegen.triton.emit.emit`.
    """
    a, b, c, d = stage.block.a, stage.block.b, stage.block.c, stage.block.d
    yield f"    for start in range(0, {c}, BK):"
    yield "        k = start + tl.arange(0, BK)"
    own_columns = f"block * {c} + k[None, None, :]"
    at = f"(block.to(tl.int64) * {b} + {row}) * {c} + k[None, :, None]"
    if d > 1:
        own_columns = f"((block // {d}) * {c} + k[None, None, :]) * {d} + block % {d}"
        at = f"(((block // {d}).to(tl.int64) * {b} + {row}) * {c} + k[None, :, None]) * {d}"
        at += f" + block % {d}"
    yield f"        feature = {source(stage, width, own_columns)}"
    yield f"        some = live & (k < {c})[None, None, :]"
    yield f"        left = tl.load(x + line * {width} + feature, mask=some, other=0.0)"
    yield f"        at = {at}"
    yield f"        wide = (block < {a * d}) & {own} & (k < {c})[None, :, None]"
    yield f"        right = tl.load({weight} + at, mask=wide, other=0.0)"
    yield f"        sums = {product('left', 'right', 'sums', tf32)}"


def _stored(stage: Stage) -> Iterator[str]:
    yield f"    spot = m.to(tl.int64)[:, None] * {stage.out} + out"
    yield from tail(stage)


def _kernel(at: int, stage: Stage) -> Kernel:
    pointers = ("x", "w", *extras(stage), "y")
    return Kernel(f"stage{at}_panel", pointers, stage.block.a, stage.block.b)


def _row_kernel(at: int, stage: Stage) -> Kernel:
    pointers = ("x", "w", *extras(stage), "y")
    return Kernel(f"stage{at}_row", pointers, stage.block.a, stage.block.b, ("BN", "BK"))


def _split_kernel(at: int, stage: Stage) -> Kernel:
    pointers, sizes = ("x", "w", "part"), (*TILE, "SPLIT")
    return Kernel(f"stage{at}_split", pointers, stage.block.a, stage.block.b, sizes, shares=True)


def _join_kernel(at: int, stage: Stage) -> Kernel:
    pointers = ("part", *extras(stage), "y")
    return Kernel(f"stage{at}_join", pointers, 1, stage.out, ("BM", "BN", "SPLIT"))


def _turned_kernel(at: int, stage: Stage) -> Kernel:
    return several_kernel(f"stage{at}_turned", stage)


def several_kernel(name: str, stage: Stage) -> Kernel:
    """Of :func:`several`."""
    pointers, sizes = ("x", "w", *extras(stage), "y"), (*TILE, "BG")
    return Kernel(name, pointers, stage.block.a * stage.block.d, stage.block.b, sizes)


def _sparse_kernel(at: int, stage: Stage) -> Kernel:
    b = stage.block.b
    pointers = ("x", "w", "first", "place", *extras(stage), "y")
    return Kernel(f"stage{at}_sparse", pointers, stage.out // max(1, b), b)


WAYS = {
    "panel": {
        "panel": Way(_kernel, _panel),
        "row": Way(_row_kernel, _row),
        "split": Way(_split_kernel, _split),
        "join": Way(_join_kernel, _join),
    },
    "turned": {"turned": Way(_turned_kernel, several)},
    "sparse": {"sparse": Way(_sparse_kernel, _sparse)},
}

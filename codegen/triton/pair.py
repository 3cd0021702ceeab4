"""Two factors in one kernel: what the first gives stays on chip.

A program is sliced backwards by output block: it computes those rows of the first factor that its
output blocks read, for all input blocks at a time (one product of matrices with the blocks as
batch), turns them in registers, and multiplies them by the second factor. Nothing is computed twice
and no permuted copy reaches memory.

    pair        block(I,b,c) shuffled into block(L,d,R I): Monarch
    bottleneck  block(G,R,c) block(G,d,R): low rank, by blocks too
    coupled     block(I,R,c), a diagonal for each pair of blocks, block(L,d,R): BLAST
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from structc.codegen.program import Program, Stage
from structc.codegen.triton.config import DOT, power_above
from structc.codegen.triton.panel import blocks_loop
from structc.codegen.triton.pieces import (
    TILE,
    Kernel,
    Way,
    extras,
    head,
    product,
    said,
    source,
    tail,
)

WIDEST = 1 << 15
"""Numbers between two factors that a row may have: more have no room on chip."""


@dataclass(frozen=True)
class Middle:
    """What lies between two factors, in powers of two.

    Attributes:
        blocks: of the first factor.
        rank: features from each of them that an output block reads.
        wide_blocks, wide_rank: the powers of two that hold them.
        least: output blocks that a program takes at least: a product has 16 columns.
    """

    blocks: int
    rank: int
    wide_blocks: int
    wide_rank: int
    least: int


def middle_of(stage: Stage) -> Middle:
    """Of a stage with an inner one.

    >>> from structc.forms import Block
    >>> first = Stage("panel", Block(4, 16, 16, 1), 64)
    >>> middle_of(Stage("pair", Block(8, 6, 8, 1), 48, inner=(first,)))
    Middle(blocks=4, rank=2, wide_blocks=8, wide_rank=2, least=8)
    """
    first = stage.inner[0].block
    blocks = 1 if stage.kind == "bottleneck" else first.a
    rank = stage.block.c // blocks if stage.kind == "pair" else stage.block.c
    wide_rank = power_above(rank) if stage.kind == "pair" else max(DOT, power_above(rank))
    wide_blocks = power_above(blocks)
    if stage.kind == "pair":
        wide_blocks = max(wide_blocks, DOT // wide_rank)
    return Middle(blocks, rank, wide_blocks, wide_rank, max(1, DOT // wide_rank))


def fused(program: Program) -> Program:
    """The program with neighbouring factors as one stage wherever one kernel holds what is between.

    >>> from structc.codegen.program import stages_of
    >>> from structc.forms import Tile
    >>> import torch
    >>> form = Tile.parse("block(4,16,16,1) permute(4,16) block(8,6,8,1)")
    >>> [s.kind for s in fused(stages_of(form, torch.float16, folds=True)).stages]
    ['pair']
    """
    done: list[Stage] = []
    rest = list(program.stages)
    while rest:
        found = next((f for f in (_coupled(rest), _two(rest)) if f is not None), None)
        done.append(rest[0] if found is None else found)
        rest = rest[1 if found is None else len(found.inner) + 1 :]
    return replace(program, stages=tuple(done))


def _two(stages: list[Stage]) -> Stage | None:
    if len(stages) < 2 or not _follows(*stages[:2]):
        return None
    first, second = stages[:2]
    one, two = first.block, second.block
    if first.kind != "panel" or second.kind != "panel":
        return None
    if second.blocks == one.a > 1 and two.c % one.a == 0:
        return _made("pair", second, first)
    if not second.blocks and one.a == two.a:
        return _made("bottleneck", second, first)
    return None


def _coupled(stages: list[Stage]) -> Stage | None:
    if len(stages) < 3 or not (_follows(*stages[:2]) and _follows(*stages[1:3])):
        return None
    first, mixed, second = stages[:3]
    one, two, three = first.block, mixed.block, second.block
    kinds = (first.kind, mixed.kind, second.kind) == ("panel", "strided", "panel")
    if not kinds or mixed.blocks or second.blocks:
        return None
    if (two.a, two.c, two.d) != (1, one.a, one.b) or (three.a, three.c) != (two.b, two.d):
        return None
    return _made("coupled", second, first, mixed)


def _follows(first: Stage, second: Stage) -> bool:
    """Whether nothing but the second reads the first."""
    return first.bare and second.reads is None


def _made(kind: str, last: Stage, *inner: Stage) -> Stage | None:
    made = replace(last, kind=kind, inner=inner, reads=inner[0].reads, blocks=inner[0].blocks)
    found = middle_of(made)
    held = found.wide_blocks * found.wide_rank * found.least
    return made if held <= WIDEST else None


# ---------------------------------------------------------------------------- sources


def _pair(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    first, (groups, d, c) = stage.inner[0], (stage.block.a, stage.block.b, stage.block.c)
    mid = middle_of(stage)
    wide, rank = mid.wide_blocks, mid.wide_rank
    yield from head(kernel, said(stage, width))
    yield f"    parts = tl.cdiv({groups}, BG)"
    yield "    pid = tl.program_id(0)"
    yield "    m = pid // parts * BM + tl.arange(0, BM)"
    yield "    group = (pid % parts * BG + tl.arange(0, BG))[:, None, None]"
    yield f"    block = tl.arange(0, {wide})[:, None, None]"
    yield "    line = m.to(tl.int64)[None, :, None]"
    yield f"    live = (m < rows)[None, :, None] & (block < {mid.blocks})"
    yield "    # outputs of each first block that these output blocks read"
    yield f"    j = tl.arange(0, BG * {rank})"
    yield f"    row = (pid % parts * BG + j // {rank}) * {mid.rank} + j % {rank}"
    yield f"    own = ((j % {rank} < {mid.rank}) & (row < {first.block.b}))[None, None, :]"
    yield "    row = row[None, None, :]"
    yield f"    sums = tl.zeros(({wide}, BM, BG * {rank}), tl.float32)"
    yield from blocks_loop(first, width, "w0", "row", "own", tf32)
    yield f"    middle = tl.reshape(sums.to(DOT), ({wide}, BM, BG, {rank}))"
    yield f"    middle = tl.reshape(tl.permute(middle, (2, 1, 3, 0)), (BG, BM, {rank * wide}))"
    yield f"    k = tl.arange(0, {rank * wide})[None, :, None]"
    yield f"    column = k // {wide} * {mid.blocks} + k % {wide}"
    used = f"(k // {wide} < {mid.rank}) & (k % {wide} < {mid.blocks})"
    yield f"    used = {used} & (group < {groups})"
    yield f"    for start in range(0, {d}, BN):"
    yield "        n = (start + tl.arange(0, BN))[None, None, :]"
    yield f"        at = (group.to(tl.int64) * {d} + n) * {c} + column"
    yield f"        right = tl.load(w + at, mask=used & (n < {d}), other=0.0)"
    yield f"        made = {product('middle', 'right', '', tf32)}"
    yield f"        out = group * {d} + n"
    yield f"        inside = (m < rows)[None, :, None] & (group < {groups}) & (n < {d})"
    yield f"        spot = line * {stage.out} + out"
    yield from tail(stage, "        ", "made")


def _bottleneck(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    first, mid = stage.inner[0].block, middle_of(stage)
    yield from head(kernel, said(stage, width))
    yield "    pid = tl.program_id(0)"
    yield f"    m = pid // {kernel.groups} * BM + tl.arange(0, BM)"
    yield f"    group = pid % {kernel.groups}"
    yield f"    lines = m.to(tl.int64)[:, None] * {width}"
    yield "    live = (m < rows)[:, None]"
    yield f"    r = tl.arange(0, {mid.wide_rank})"
    yield f"    sums = tl.zeros((BM, {mid.wide_rank}), tl.float32)"
    yield f"    for start in range(0, {first.c}, BK):"
    yield "        k = start + tl.arange(0, BK)"
    yield f"        feature = {source(stage.inner[0], width, f'group * {first.c} + k')}"
    yield f"        some = live & (k < {first.c})[None, :]"
    yield "        left = tl.load(x + lines + feature[None, :], mask=some, other=0.0)"
    yield f"        at = (group * {first.b} + r).to(tl.int64)[None, :] * {first.c} + k[:, None]"
    yield f"        wide = (r < {first.b})[None, :] & (k < {first.c})[:, None]"
    yield "        right = tl.load(w0 + at, mask=wide, other=0.0)"
    yield f"        sums = {product('left', 'right', 'sums', tf32)}"
    yield "    middle = sums.to(DOT)"
    yield from _second(stage, mid.rank, "    ", tf32)


def _coupled_lines(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    first, groups, mid = stage.inner[0], stage.block.a, middle_of(stage)
    yield from head(kernel, said(stage, width))
    yield "    m = tl.program_id(0) * BM + tl.arange(0, BM)"
    yield f"    block = tl.arange(0, {mid.wide_blocks})[:, None, None]"
    yield "    line = m.to(tl.int64)[None, :, None]"
    yield f"    live = (m < rows)[None, :, None] & (block < {mid.blocks})"
    yield f"    r = tl.arange(0, {mid.wide_rank})"
    yield f"    own = (r < {mid.rank})[None, None, :]"
    yield f"    sums = tl.zeros(({mid.wide_blocks}, BM, {mid.wide_rank}), tl.float32)"
    yield from blocks_loop(first, width, "w0", "r[None, None, :]", "own", tf32)
    yield "    live = (m < rows)[:, None]"
    yield f"    for group in range({groups}):"
    yield f"        cell = (group * {mid.blocks} + block) * {mid.rank} + r[None, None, :]"
    yield f"        shares = tl.load(w1 + cell, mask=(block < {mid.blocks}) & own, other=0.0)"
    yield "        middle = tl.sum(sums * shares.to(tl.float32), 0).to(DOT)"
    yield from _second(stage, mid.rank, "        ", tf32)


def _second(stage: Stage, rank: int, indent: str, tf32: bool) -> Iterator[str]:
    """The second product of a group: tiles of outputs, one behind the other."""
    d = stage.block.b
    yield f"{indent}for start in range(0, {d}, BN):"
    indent += "    "
    yield f"{indent}n = start + tl.arange(0, BN)"
    yield f"{indent}at = (group * {d} + n).to(tl.int64)[None, :] * {rank} + r[:, None]"
    yield f"{indent}wide = (n < {d})[None, :] & (r < {rank})[:, None]"
    yield f"{indent}right = tl.load(w + at, mask=wide, other=0.0)"
    yield f"{indent}made = {product('middle', 'right', '', tf32)}"
    yield f"{indent}out = (group * {d} + n)[None, :]"
    yield f"{indent}inside = live & (n < {d})[None, :]"
    yield f"{indent}spot = m.to(tl.int64)[:, None] * {stage.out} + out"
    yield from tail(stage, indent, "made")


def _kernel(at: int, stage: Stage) -> Kernel:
    factors = [f"w{i}" for i in range(len(stage.inner))]
    pointers = ("x", *factors, "w", *extras(stage), "y")
    groups = 1 if stage.kind == "coupled" else stage.block.a
    sizes = (*TILE, "BG") if stage.kind == "pair" else TILE
    return Kernel(f"stage{at}_{stage.kind}", pointers, groups, 1, sizes)


WAYS = {
    "pair": {"pair": Way(_kernel, _pair)},
    "bottleneck": {"bottleneck": Way(_kernel, _bottleneck)},
    "coupled": {"coupled": Way(_kernel, _coupled_lines)},
}

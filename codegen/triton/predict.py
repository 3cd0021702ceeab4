"""The cost model of Triton kernels: a prediction from a GPU's published peaks, never a timing.

What a stage does is counted (flops, bytes, programs); the tests hold the counts against what the
interpreter sees its kernels load, store and multiply. What a GPU makes of them is a model:

    time = launch + the longest, and a tenth of the others, of
               flops / peak / share,          share: of multiprocessors that have a program
               bytes / bandwidth,             each tensor once
               loads / L2 bandwidth / share,  all that programs ask for
               latency of loops behind one another.

It ranks configs where no GPU is there to time them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from structc.codegen.program import Stage
from structc.codegen.triton.chain import members, sizes_of
from structc.codegen.triton.config import PRODUCTS, Config, configs, multiplies
from structc.codegen.triton.emit import kernels
from structc.codegen.triton.fft import factors_of, step_of
from structc.codegen.triton.pair import middle_of
from structc.codegen.triton.spilled import spilled
from structc.codegen.triton.targets import GpuTarget
from structc.forms import Block

BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
LAUNCH = 3e-6
"""Seconds before a kernel does anything; assumed, as the next two."""
LATENCY = 0.6e-6
"""Seconds from a load to its use."""
CACHED = 3.0
"""How much more than memory the L2 cache gives."""
SEEN = 0.1
"""Share of what goes on beside the longest part that is not hidden by it; assumed."""
SPARE = 48
"""Registers of a thread beside its sums."""
ROW = 1024
"""Points of transforms that a program holds of several rows together; a longer one is alone."""
SECTOR = 32
"""Bytes that a cache hands out together."""


@dataclass(frozen=True)
class Work:
    """What one stage does at so many rows.

    Attributes:
        flops: of its products, without those of empty lanes.
        done: by matrix units, with them.
        plain: by other units, with them.
        memory: bytes of each tensor once: what no cache saves.
        loads: bytes that programs load and store, from caches too, with those of empty lanes.
        wasted: more bytes that come along with loads of single numbers, in sectors.
        programs: that the product is cut into.
        turns: of each program's loop.
        launches: kernels.
    """

    flops: int
    done: int
    plain: int
    memory: int
    loads: int
    wasted: int
    programs: int
    turns: int
    launches: int


def work(stage: Stage, width: int, rows: int, config: Config, size: int) -> Work:
    """Count a stage's work.

    Args:
        stage, width: as :func:`structc.codegen.triton.emit.widths` pairs them.
        rows: of the call.
        config: of its product.
        size: bytes of an element.
    """
    run, extra = kernels(0, stage, config), (stage.mul is not None) + (stage.add is not None)
    programs = run[0].grid(rows, config)
    tiles = -(-rows // config.bm) if stage.kind == "chain" else programs
    loop = _LOOPS.get(stage.kind, _moves)(stage, config, tiles)
    params = sum(math.prod((b.a, b.b, b.c, b.d)) for b in _factors(stage))
    bias = sum(s.out for s in (*stage.inner, stage) if s.bias is not None)
    read = width if stage.kind != "listed" else stage.out
    groups = run[0].groups
    places = {"listed": stage.out, "sparse": groups + 1 + stage.block.d}.get(stage.kind, 0)
    out = rows * stage.out * (1 + extra)
    tables = 0 if stage.convolution is None else 16 * stage.convolution.fft_size  # of float32
    memory = size * (rows * read + params + out + bias) + 8 * places + tables
    outputs = loop.outputs * (1 + extra) + (loop.outputs // max(1, config.bm) if bias else 0)
    loads = size * (loop.inputs + outputs) + loop.tables
    if run[0].shares:
        shares = 4 * config.split * rows * stage.out
        memory += 2 * shares
        loads += shares + (4 - size) * loop.outputs + size * rows * stage.out * (2 + extra)
    if stage.norm is not None:
        memory += size * (2 * rows * stage.out + stage.norm[0].weights * stage.out)
        loads += 2 * size * rows * stage.out
    single = loop.left if stage.blocks else 0
    wasted = single * (SECTOR - size) + loop.alone * max(0, SECTOR - loop.run * size) // loop.run
    turns = loop.turns * -(-tiles // max(1, programs))
    return Work(
        2 * rows * params, loop.done, loop.plain, memory, loads, wasted, programs, turns, len(run)
    )


@dataclass(frozen=True)
class _Loop:
    """Numbers of all programs together: loaded, of those the ones of x, stored; flops; turns of
    one; bytes of tables; numbers that lie in runs of so many."""

    inputs: int
    left: int
    outputs: int
    done: int = 0
    plain: int = 0
    turns: int = 1
    tables: int = 0
    alone: int = 0
    run: int = 1


def _factors(stage: Stage) -> list[Block]:
    kinds = (*PRODUCTS, "strided")
    return [s.block for s in (*stage.inner, stage) if s.kind in kinds and s.kind != "convolve"]


def _panel(stage: Stage, config: Config, programs: int) -> _Loop:
    turns = -(-stage.block.c // config.bk)
    if config.bm == 1:
        each = config.bk * (config.bn + 1)
        plain = 2 * programs * turns * config.bk * config.bn
        left = programs * turns * config.bk
        return _Loop(programs * turns * each, left, programs * config.bn, 0, plain, turns)
    return _tiles(config, programs, programs // config.split * turns, -(-turns // config.split))


def _tiles(config: Config, programs: int, every: int, turns: int) -> _Loop:
    left, right = config.bm * config.bk, config.bk * config.bn
    done = 2 * every * config.bm * config.bn * config.bk
    outputs = programs * config.bm * config.bn
    return _Loop(every * (left + right), every * left, outputs, done, 0, turns)


def _sparse(stage: Stage, config: Config, programs: int) -> _Loop:
    """A program takes the blocks of its row; block.d are in all."""
    groups = stage.out // max(1, stage.block.b)
    every = programs // max(1, groups) * stage.block.d * -(-stage.block.c // config.bk)
    return _tiles(config, programs, every, -(-every // max(1, programs)))


def _turned(stage: Stage, config: Config, programs: int) -> _Loop:
    turns = -(-stage.block.c // config.bk)
    one = _tiles(config, programs, programs * turns, turns)
    g = config.groups
    return _Loop(g * one.inputs, g * one.left, g * one.outputs, g * one.done, 0, turns,
                 alone=g * (one.inputs + one.outputs) if stage.block.d > 1 else 0,
                 run=min(g, stage.block.d))  # fmt: skip


def _two(stage: Stage, config: Config, programs: int) -> _Loop:
    """Two factors with what is between on chip."""
    mid, first, last = middle_of(stage), stage.inner[0].block, stage.block
    turns, tiles = -(-first.c // config.bk), -(-last.b // config.bn)
    groups = last.a if stage.kind == "coupled" else config.groups
    rank = mid.wide_rank * (config.groups if stage.kind == "pair" else 1)
    depth = mid.wide_rank * (mid.wide_blocks if stage.kind == "pair" else 1)
    left = turns * mid.wide_blocks * config.bm * config.bk
    right = turns * mid.wide_blocks * config.bk * rank
    second = tiles * groups * depth * config.bn
    outputs = tiles * groups * config.bm * config.bn
    done = 2 * (left * rank + outputs * depth)
    plain = 0
    if stage.kind == "coupled":
        shares = groups * mid.wide_blocks * mid.wide_rank
        second, plain = second + shares, 2 * shares * config.bm
    inputs = programs * (left + right + second)
    turns += groups * tiles
    return _Loop(inputs, programs * left, programs * outputs, programs * done, programs * plain,
                 turns)  # fmt: skip


def _chain(stage: Stage, config: Config, programs: int) -> _Loop:
    """Its factors over all rows; a program's tiles of rows follow each other."""
    total = _Loop(0, 0, 0, turns=0)
    for part in members(stage):
        b, c, groups = sizes_of(part)
        own = replace(config, bn=min(b, config.bn), bk=min(c, config.bk),
                      groups=min(groups, config.groups))  # fmt: skip
        tiles = -(-part.block.a * part.block.d // own.groups) * -(-part.block.b // own.bn)
        one = _turned(part, own, programs * tiles)
        total = _Loop(
            total.inputs + one.inputs, total.left + one.left, total.outputs + one.outputs,
            total.done + one.done, 0, total.turns + tiles * one.turns, 0,
            total.alone + one.alone, max(total.run, one.run),
        )  # fmt: skip
    return total


def _convolve(stage: Stage, config: Config, programs: int) -> _Loop:
    """Two products of real numbers at each end, four for every other factor each way."""
    found = factors_of(step_of(stage))
    assert found is not None
    points = config.bm * math.prod(found.wide)
    ends, inner = 4 * found.wide[0], 8 * sum(found.wide[1:])
    read = config.bm * stage.block.c
    twiddles = 4 * (len(found.own) - 1) + 2
    tables = 4 * programs * (twiddles * points + 2 * sum(n * n for n in found.wide))
    return _Loop(programs * read, programs * read, programs * config.bm * stage.out,
                 2 * programs * points * (ends + inner), 0, 1, tables)  # fmt: skip


def _strided(stage: Stage, config: Config, programs: int) -> _Loop:
    if multiplies(stage, config):
        return _turned(stage, config, programs)
    tile, c = config.bm * config.bn, stage.block.c
    every = programs * c
    inputs = every * (tile + config.bn)
    return _Loop(inputs, every * tile, programs * tile, 0, 2 * every * tile, c)


def _moves(stage: Stage, config: Config, programs: int) -> _Loop:
    tile = programs * config.bm * config.bn
    return _Loop(tile, tile, tile)


_LOOPS = {
    "panel": _panel,
    "sparse": _sparse,
    "turned": _turned,
    "pair": _two,
    "bottleneck": _two,
    "coupled": _two,
    "strided": _strided,
    "convolve": _convolve,
    "chain": _chain,
}
"""How programs of a kind go on; the others copy."""


def roofline(flops: int, memory: int, target: GpuTarget, dtype: str) -> float:
    """Seconds that a GPU's published peaks allow at best: the longer of products and memory.

    >>> from structc.codegen.triton.targets import target_of
    >>> dense = roofline(2 * 4096**3, 3 * 2 * 4096**2, target_of("cuda:90"), "bf16")
    >>> f"{1e6 * dense:.0f} us"
    '139 us'
    """
    return max(flops / target.products(dtype), memory / target.bandwidth)


@dataclass(frozen=True)
class Prediction:
    """What the model says of one stage; nothing was timed.

    Attributes:
        seconds: of a call.
        bound: what takes that long: ``"products"``, ``"memory"``, ``"cache"`` or ``"latency"``.
        occupancy: programs that a multiprocessor holds at a time.
        shared: bytes of shared memory of a program, about.
        registers: of a thread, about.
    """

    seconds: float
    bound: str
    occupancy: int
    shared: int
    registers: int


def predict(
    stage: Stage, width: int, rows: int, config: Config, dtype: str, target: GpuTarget
) -> Prediction | None:
    """The model's time of a stage; None where the target has no room for the config.

    Args:
        stage, width, rows, config: as in :func:`work`.
        dtype: of :data:`BYTES`; ``"tf32"`` is float32 with rounded factors.
        target: the GPU.
    """
    size = BYTES[dtype]
    done = work(stage, width, rows, config, size)
    shared, numbers = _room(stage, config, size, target, done.turns)
    registers = numbers // (config.warps * target.warp) + SPARE
    if shared > target.shared or registers > target.registers:
        return None
    held = min(
        target.warps // config.warps,
        target.file // (registers * config.warps * target.warp),
        target.shared // shared if shared else target.warps,
    )
    if not held:
        return None
    full = -(-done.programs // target.units) * target.units
    share = done.programs / full if done.programs else 1.0
    waves = -(-done.programs // (target.units * held))
    products = done.done / target.products(dtype) + done.plain / target.flops["fp32"]
    parts = {
        "products": products / share,
        "memory": done.memory / target.bandwidth,
        "cache": (done.loads + done.wasted) / (CACHED * target.bandwidth) / share,
        "latency": waves * done.turns * LATENCY / config.stages,
    }
    bound = max(parts, key=lambda name: parts[name])
    seconds = parts[bound] + (sum(parts.values()) - parts[bound]) * SEEN
    return Prediction(done.launches * LAUNCH + seconds, bound, held, shared, registers)


def _room(
    stage: Stage, config: Config, size: int, target: GpuTarget, turns: int
) -> tuple[int, int]:
    """Bytes of shared memory and numbers in registers that a program takes, about."""
    if stage.kind == "convolve":
        found = factors_of(step_of(stage))
        assert found is not None
        points = config.bm * math.prod(found.wide)
        if found.size > target.points or (config.bm > 1 and points > ROW):
            return target.shared + 1, points
        return 2 * size * points, 12 * points
    if not multiplies(stage, config) or config.bm == 1:
        return 0, config.bm * config.bn * (config.bk if stage.kind == "panel" else 1)
    buffers = max(1, config.stages - target.early) if turns > 1 else 1
    blocks, rank = config.groups, config.bn
    sums = config.groups * config.bm * config.bn
    if stage.inner and stage.kind != "chain":
        mid = middle_of(stage)
        blocks = 1 if stage.kind == "bottleneck" else mid.wide_blocks
        rank = mid.wide_rank * config.groups
        depth = mid.wide_rank * (mid.wide_blocks if stage.kind == "pair" else 1)
        middle = config.groups * config.bm * depth
        tile = config.groups * config.bn * max(depth, config.bm)
        sums = max(blocks * config.bm * rank, sums + middle * size // 4)
        if stage.kind == "coupled":  # their products with the diagonals
            sums += blocks * config.bm * rank
        second = int(1.25 * size * (middle + tile))
    else:
        second = 0
    return max(buffers * blocks * (config.bm + rank) * config.bk * size, second), sums


def key_of(stage: Stage) -> str:
    """What :mod:`structc.codegen.triton.spilled` knows a stage by."""
    found = factors_of(step_of(stage)) if stage.kind == "convolve" else None
    return stage.kind if found is None else f"{stage.kind} {found.size}"


def ranked(
    stage: Stage, width: int, rows: int, dtype: str, target: GpuTarget
) -> list[tuple[Config, Prediction]]:
    """Configs that the target has room for, the one that is predicted fastest first.

    Those that are known to spill are left out: another plan, or a library, does without.
    """
    key = key_of(stage)
    some = [c for c in configs(stage, rows) if not spilled(key, c, dtype, target.name)]
    found = [(c, predict(stage, width, rows, c, dtype, target)) for c in some]
    able = [(c, p) for c, p in found if p is not None]
    return sorted(able, key=lambda pair: pair[1].seconds)

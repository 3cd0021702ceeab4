"""The cost model of Triton kernels: a prediction from a GPU's published peaks, never a timing.

What a stage does is counted (flops, bytes, programs); the tests hold the counts against what the
interpreter sees its kernels load, store and multiply. What a GPU makes of them is a model:

    time = launch + the longest of
               flops / peak / share,          share: of multiprocessors that have a program
               bytes / bandwidth,             each tensor once
               loads / L2 bandwidth / share,  all that programs ask for
               latency of loops behind one another.

It ranks configs where no GPU is there to time them.
"""

from __future__ import annotations

from dataclasses import dataclass

from structc.codegen.program import Program, Stage
from structc.codegen.triton.config import PRODUCTS, Config, configs, default
from structc.codegen.triton.emit import kernels, widths
from structc.codegen.triton.targets import GpuTarget

BYTES = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2}
LAUNCH = 3e-6
"""Seconds before a kernel does anything; assumed, as the next two."""
LATENCY = 0.6e-6
"""Seconds from a load to its use."""
CACHED = 3.0
"""How much more than memory the L2 cache gives."""
SPARE = 48
"""Registers of a thread beside its sums."""


@dataclass(frozen=True)
class Work:
    """What one stage does at so many rows.

    Attributes:
        flops: of its products, without those of empty lanes.
        done: with them.
        memory: bytes of each tensor once: what no cache saves.
        loads: bytes that programs load and store, from caches too, with those of empty lanes.
        programs: that the product is cut into.
        turns: of each program's loop.
    """

    flops: int
    done: int
    memory: int
    loads: int
    programs: int
    turns: int


def work(stage: Stage, width: int, rows: int, config: Config, size: int) -> Work:
    """Count a stage's work.

    Args:
        stage, width: as :func:`structc.codegen.triton.emit.widths` pairs them.
        rows: of the call.
        config: of its product.
        size: bytes of an element.
    """
    block, kernel = stage.block, kernels(0, stage, width)[0]
    programs = kernel.grid(rows, config.bm, config.bn)
    product = stage.kind in PRODUCTS
    factor = product or stage.kind == "strided"
    params = block.a * block.b * block.c * block.d if factor else 0
    turns = -(-block.c // config.bk) if product else block.c if factor else 1
    every = programs * turns
    extras = [s for s in (stage.mul, stage.add) if s is not None]
    bias = 0 if stage.bias is None else stage.out
    out = rows * stage.out * (1 + len(extras))
    read = width if stage.kind != "listed" else stage.out
    places = {"listed": stage.out, "sparse": kernel.groups + 1 + block.d}.get(stage.kind, 0)
    memory = size * (rows * read + params + out + bias) + 8 * places
    if stage.kind == "sparse":  # a program takes the blocks of its row, block.d are in all
        every = programs // max(1, kernel.groups) * block.d * turns
        turns = -(-every // max(1, programs))
    depth = config.bk if product else 1
    tile = config.bm * depth + depth * config.bn if product else config.bm * config.bn
    finish = config.bm * config.bn * (1 + len(extras)) + (config.bn if bias else 0)
    loads = size * (every * tile + programs * finish)
    done = 2 * every * config.bm * config.bn * depth if factor else 0
    if stage.norm is not None:
        memory += size * (2 * rows * stage.out + stage.norm[0].weights * stage.out)
        loads += 2 * size * rows * stage.out
    return Work(2 * rows * params, done, memory, loads, programs, turns)


def counted(program: Program, rows: int, size: int) -> list[Work]:
    """The work of a program's stages under their default configs.

    >>> from structc.codegen.program import stages_of
    >>> import torch
    >>> from structc.forms import Tile
    >>> form = Tile.parse("block(32,32,128,1) permute(32,32) block(32,128,32,1)")
    >>> found = counted(stages_of(form, torch.bfloat16, folds=True), 4096, 2)
    >>> sum(w.memory for w in found)  # x, the middle twice, y, two factors
    84410368
    """
    return [
        work(stage, width, rows, default(stage, rows), size)
        for stage, width in zip(program.stages, widths(program), strict=True)
    ]


def roofline(flops: int, memory: int, target: GpuTarget, dtype: str) -> float:
    """Seconds that a GPU's published peaks allow at best: the longer of products and memory.

    >>> from structc.codegen.triton.targets import target_of
    >>> dense = roofline(2 * 4096**3, 3 * 2 * 4096**2, target_of("cuda:90"), "bf16")
    >>> f"{1e6 * dense:.0f} us"
    '139 us'
    """
    return max(flops / target.flops[dtype], memory / target.bandwidth)


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
    size, product = BYTES[dtype], stage.kind in PRODUCTS
    done = work(stage, width, rows, config, size)
    buffers = max(1, config.stages - target.early) if done.turns > 1 else 1
    shared = buffers * (config.bm + config.bn) * config.bk * size if product else 0
    registers = config.bm * config.bn // (config.warps * target.warp) + SPARE
    if shared > target.shared or registers > target.registers:
        return None
    held = min(
        target.warps // config.warps,
        target.file // (registers * config.warps * target.warp),
        target.shared // shared if shared else target.warps,
    )
    if not held:
        return None
    peak = target.flops[dtype if product else "fp32"]
    full = -(-done.programs // target.units) * target.units
    share = done.programs / full if done.programs else 1.0
    waves = -(-done.programs // (target.units * held))
    parts = {
        "products": done.done / peak / share,
        "memory": done.memory / target.bandwidth,
        "cache": done.loads / (CACHED * target.bandwidth) / share,
        "latency": waves * done.turns * LATENCY / config.stages,
    }
    bound = max(parts, key=lambda name: parts[name])
    calls = 1 if stage.norm is None else 2
    return Prediction(calls * LAUNCH + parts[bound], bound, held, shared, registers)


def ranked(
    stage: Stage, width: int, rows: int, dtype: str, target: GpuTarget
) -> list[tuple[Config, Prediction]]:
    """Configs that the target has room for, the one that is predicted fastest first."""
    found = [(c, predict(stage, width, rows, c, dtype, target)) for c in configs(stage, rows)]
    able = [(c, p) for c, p in found if p is not None]
    return sorted(able, key=lambda pair: pair[1].seconds)

"""Many factors in one kernel: butterflies, and products of block factors with small blocks.

A program takes all factors of some rows in turn. What lies between them it keeps in memory of its
own, two numbers a feature, which a cache holds: no launch and no pass over all rows for a factor. A
barrier stands between factors, each of which is a function like a kernel's, several blocks at a
time, told its tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from structc.codegen.program import Program, Stage
from structc.codegen.triton.config import DOT, power_above
from structc.codegen.triton.panel import several, several_kernel
from structc.codegen.triton.pieces import TILE, Kernel, Way, extras, said


def members(stage: Stage) -> tuple[Stage, ...]:
    """The factors of a chain, its last one with what follows it."""
    return (*stage.inner, replace(stage, kind="panel", inner=()))


def chained(program: Program) -> Program:
    """The program with factors that follow each other in one kernel.

    >>> from structc.codegen.program import stages_of
    >>> from structc.forms import Tile
    >>> import torch
    >>> form = Tile.parse("block(16,16,16,1) block(4,16,16,4) block(1,16,16,16)")
    >>> [(s.kind, len(s.inner)) for s in chained(stages_of(form, torch.float16)).stages]
    [('chain', 2)]
    """
    done: list[Stage] = []
    for stage in program.stages:
        last = done[-1] if done and stage.reads is None else None
        factor = stage.kind in ("panel", "strided")
        if (
            last is not None
            and factor
            and last.kind in ("panel", "strided", "chain")
            and _open(last)
        ):
            front = members(last) if last.kind == "chain" else (last,)
            done[-1] = replace(stage, kind="chain", inner=front, reads=last.reads)
        else:
            done.append(stage)
    return replace(program, stages=tuple(done))


def _open(stage: Stage) -> bool:
    """Whether what follows a factor is done in its function, before the next one."""
    return not stage.whole and stage.keeps is None


def sizes_of(stage: Stage) -> tuple[int, int, int]:
    """The outputs, columns and blocks of a member in powers of two: no tile has more."""
    b, c = stage.block.b, stage.block.c
    every = stage.block.a * stage.block.d
    return max(DOT, power_above(b)), max(DOT, power_above(c)), power_above(every)


def _lines(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    parts = members(stage)
    widths = [width, *(s.out for s in parts)]
    for at, part in enumerate(parts):
        yield from several(_part(kernel, at, part), part, widths[at], tf32)
        yield from ("", "")
    yield '@triton.jit(do_not_specialize=["rows"])'
    yield f"def {kernel.name}({', '.join(kernel.pointers)}, rows,"
    sizes = ", ".join(f"{n}: tl.constexpr" for n in (*kernel.sizes, "DOT"))
    yield f"{' ' * (len(kernel.name) + 5)}{sizes}):"
    yield f'    """{len(parts)} factors, {said(stage, width)}"""'
    for at, part in enumerate(parts):
        for name, most in zip(("BN", "BK", "BG"), sizes_of(part), strict=True):
            yield f"    {name}{at}: tl.constexpr = {name} if {name} < {most} else {most}"
        yield (
            f"    many{at} = tl.cdiv({part.block.b}, BN{at}) * "
            f"tl.cdiv({part.block.a * part.block.d}, BG{at})"
        )
    most = kernel.holds
    yield f"    held += tl.program_id(0).to(tl.int64) * (2 * BM * {most})"
    yield "    for tile in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):"
    yield "        before = tl.cast(tile, tl.int64) * BM"
    for at, part in enumerate(parts):
        left = "x" if at == 0 else _held(at - 1, most, widths[at])
        right = "y" if at + 1 == len(parts) else _held(at, most, part.out)
        own = _part(kernel, at, part)
        given = [{"x": left, "y": right}.get(n) or _named(n, at, parts) for n in own.pointers]
        yield f"        for turn in range(many{at}):"
        yield f"            {own.name}({', '.join(given)}, rows, tile * many{at} + turn,"
        indent = " " * (len(own.name) + 13)
        yield f"{indent}BM, BN{at}, BK{at}, BG{at}, DOT)"
        yield "        tl.debug_barrier()"


def _held(at: int, most: int, width: int) -> str:
    """Where a member's output is, counted from the first row of all."""
    half = f"held + BM * {most}" if at % 2 else "held"
    return f"{half} - before * {width}"


def _named(name: str, at: int, parts: tuple[Stage, ...]) -> str:
    return name if at + 1 == len(parts) else f"{name}{at}"


def _part(kernel: Kernel, at: int, part: Stage) -> Kernel:
    return replace(several_kernel(f"{kernel.name}{at}", part), called=True)


def _kernel(at: int, stage: Stage) -> Kernel:
    inner = [f"{name}{i}" for i, s in enumerate(stage.inner) for name in ("w", *extras(s))]
    pointers = ("x", *inner, "w", *extras(stage), "held", "y")
    sizes = (*TILE, "BG")
    return Kernel(f"stage{at}_chain", pointers, 1, 1, sizes, holds=max(s.out for s in stage.inner))


WAYS = {"chain": {"chain": Way(_kernel, _lines)}}

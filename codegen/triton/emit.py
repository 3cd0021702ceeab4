"""The emitter: from a program's stages to one readable Triton source.

Each stage is one kernel over tiles of rows and outputs, or has several ways for different numbers
of rows (``panel.py``). Shuffles are index arithmetic of the load behind them or of the store in
front; sizes stand as numbers, and what follows a product (bias, activation, gate, residual) is done
to the sums before they are stored. A normalisation is a kernel of its own over whole rows.

Offsets are 64 bits wide: rows times features may be more than 2^31.
"""

from __future__ import annotations

from collections.abc import Iterator

from structc.codegen.program import Program, Stage
from structc.codegen.triton import chain, fft, pair, panel, plain
from structc.codegen.triton.config import Config, power_above
from structc.codegen.triton.pieces import HEAD, Kernel, head

WAYS = {**panel.WAYS, **pair.WAYS, **plain.WAYS, **fft.WAYS, **chain.WAYS}
"""For each kind of stage the kernels that there are for it, by name."""


def emit(program: Program, *, tf32: bool = False) -> str:
    """The source of all stages.

    Args:
        program: with its shuffles folded.
        tf32: whether float32 products may round their factors to 10 bits.
    """
    parts = [HEAD]
    for at, (stage, width) in enumerate(zip(program.stages, widths(program), strict=True)):
        for way in WAYS[stage.kind].values():
            kernel = way.kernel(at, stage)
            parts.append("\n".join(way.lines(kernel, stage, width, tf32)) + "\n")
        if stage.norm is not None:
            parts.append("\n".join(_norm_lines(_norm(at, stage), stage)) + "\n")
    return "\n\n".join(parts)


def kernels(at: int, stage: Stage, config: Config) -> tuple[Kernel, ...]:
    """The functions that a stage runs under a config, in order."""
    ways = WAYS[stage.kind]
    if "row" in ways and config.bm == 1:
        names: tuple[str, ...] = ("row",)
    elif "batch" in ways and config.bk > 1:
        names = ("batch",)
    elif "split" in ways and config.split > 1:
        names = ("split", "join")
    else:
        names = (next(iter(ways)),)
    found = tuple(ways[name].kernel(at, stage) for name in names)
    return found if stage.norm is None else (*found, _norm(at, stage))


def own_config(kernel: Kernel, stage: Stage, config: Config) -> Config:
    """A normalisation takes a row at a time, whatever the product before takes."""
    if kernel.kind == "norm":
        return Config(1, power_above(stage.out), 1, config.warps, 1)
    if kernel.kind == "join":
        outputs = min(1024, power_above(stage.out))
        return Config(1, outputs, 1, max(1, outputs // 256), 1, split=config.split)
    return config


def widths(program: Program) -> list[int]:
    """Features that each stage reads."""
    slots, n = dict(enumerate(program.inputs)), program.inputs[0]
    found = []
    for stage in program.stages:
        n = slots[stage.reads] if stage.reads is not None else n
        found.append(n)
        n = stage.out
        if stage.keeps is not None:
            slots[stage.keeps] = n
    return found


# ---------------------------------------------------------------------------- normalisation


def _norm(at: int, stage: Stage) -> Kernel:
    assert stage.norm is not None
    gains = ("gain", "shift")[: stage.norm[0].weights]
    return Kernel(f"stage{at}_norm", ("y", *gains), 1, 1, ("BM", "BN"))


def _norm_lines(kernel: Kernel, stage: Stage) -> Iterator[str]:
    assert stage.norm is not None
    norm, n = stage.norm[0], stage.out
    layer = norm.kind == "layer"
    yield from head(kernel, f"{norm.kind} normalisation of {n} features, in place")
    yield "    m = tl.program_id(0) * BM + tl.arange(0, BM)"
    yield "    n = tl.arange(0, BN)"
    yield f"    inside = (m < rows)[:, None] & (n < {n})[None, :]"
    yield f"    line = y + m.to(tl.int64)[:, None] * {n} + n[None, :]"
    yield "    value = tl.load(line, mask=inside, other=0.0).to(tl.float32)"
    if layer:
        yield f"    value = value - (tl.sum(value, 1) / {n})[:, None]"
        yield "    value = tl.where(inside, value, 0.0)"
    yield f"    size = tl.sum(value * value, 1) / {n}"
    yield f"    value = value * tl.rsqrt(size + {float(norm.eps)!r})[:, None]"
    yield f"    value = value * tl.load(gain + n, mask=n < {n}, other=0.0).to(tl.float32)[None, :]"
    if layer:
        yield f"    value += tl.load(shift + n, mask=n < {n}, other=0.0).to(tl.float32)[None, :]"
    yield "    tl.store(line, value.to(y.dtype.element_ty), mask=inside)"

"""The emitter: from a program's stages to one readable Triton source.

Each stage is one kernel over tiles of rows and outputs. Shuffles are index arithmetic of the load
behind them, sizes stand as numbers, and what follows a product (bias, activation, gate, residual)
is done to the sums before they are stored. A normalisation is a kernel of its own over whole rows.

Offsets are 64 bits wide: rows times features may be more than 2^31.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from structc.codegen.program import Program, Stage

ACTIVATIONS = {
    "relu": "tl.maximum({0}, 0.0)",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "gelu_tanh": "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",
    "silu": "{0} * tl.sigmoid({0})",
}
"""What follows sums, elementwise; tanh z is ``2 sigmoid(2 z) - 1``."""
SIZES = "BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr"
HEAD = "import triton\nimport triton.language as tl\n"


@dataclass(frozen=True)
class Kernel:
    """One function of a source.

    Attributes:
        name: of the function.
        pointers: its tensors in order: ``x``, ``y`` and what the stage needs besides.
        groups, outputs: an output is one of ``outputs`` of one of ``groups``; tiles of outputs
            stay within a group.
    """

    name: str
    pointers: tuple[str, ...]
    groups: int
    outputs: int

    def arguments(self, dtype: str) -> dict[str, str]:
        """What a call passes, as Triton spells types."""
        whole = dict.fromkeys(("first", "place"), "*i64")
        return {**{n: whole.get(n, f"*{dtype}") for n in self.pointers}, "rows": "i32"}

    def grid(self, rows: int, bm: int, bn: int) -> int:
        """Programs of a call."""
        return -(-rows // bm) * self.groups * -(-self.outputs // bn)


def emit(program: Program, *, tf32: bool = False) -> str:
    """The source of all stages.

    Args:
        program: with its shuffles folded.
        tf32: whether float32 products may round their factors to 10 bits.
    """
    parts = [HEAD]
    for at, (stage, width) in enumerate(zip(program.stages, widths(program), strict=True)):
        parts.append("\n".join(_stage(stage, width, kernels(at, stage, width)[0], tf32)) + "\n")
        if stage.norm is not None:
            parts.append(_norm(at, stage))
    return "\n\n".join(parts)


def kernels(at: int, stage: Stage, width: int) -> tuple[Kernel, ...]:
    """The functions of a stage, in the order in which they run."""
    block = stage.block
    more = [n for n, given in (("bias", stage.bias), ("mul", stage.mul), ("add", stage.add))
            if given is not None]  # fmt: skip
    factors = {"panel": ["w"], "strided": ["w"], "sparse": ["w", "first", "place"],
               "listed": ["place"]}  # fmt: skip
    pointers = ("x", *factors.get(stage.kind, []), *more, "y")
    groups, outputs = {
        "panel": (block.a, block.b),
        "strided": (block.a * block.b, block.d),
        "sparse": (stage.out // max(1, block.b), block.b),
    }.get(stage.kind, (1, stage.out))
    first = Kernel(f"stage{at}_{stage.kind}", pointers, groups, outputs)
    if stage.norm is None:
        return (first,)
    gains = ("gain", "shift")[: stage.norm[0].weights]
    return (first, Kernel(f"stage{at}_norm", ("y", *gains), 1, 1))


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


# ---------------------------------------------------------------------------- stages


def _stage(stage: Stage, width: int, kernel: Kernel, tf32: bool) -> Iterator[str]:
    block, out = stage.block, stage.out
    yield "@triton.jit"
    given = ", ".join(kernel.pointers)
    yield f"def {kernel.name}({given}, rows,"
    yield f"{' ' * (len(kernel.name) + 5)}{SIZES}):"
    words = [str(block) if stage.kind in ("panel", "strided") else stage.kind, stage.tail]
    words += [f"input shuffled by {stage.blocks}"] if stage.blocks else []
    yield f'    """{", ".join(filter(None, words))}: {width} -> {out} features"""'
    yield f"    tiles = tl.cdiv({kernel.outputs}, BN)"
    yield "    pid = tl.program_id(0)"
    yield f"    m = pid // ({kernel.groups} * tiles) * BM + tl.arange(0, BM)"
    yield f"    group = pid // tiles % {kernel.groups}"
    yield "    n = pid % tiles * BN + tl.arange(0, BN)"
    yield f"    lines = m.to(tl.int64)[:, None] * {width}"
    yield "    live = (m < rows)[:, None]"
    yield f"    inside = live & (n < {kernel.outputs})[None, :]"
    yield from _KINDS[stage.kind](stage, width, tf32)
    yield f"    spot = m.to(tl.int64)[:, None] * {out} + out[None, :]"
    yield from _tail(stage)
    yield "    tl.store(y + spot, sums.to(y.dtype.element_ty), mask=inside)"


def _source(stage: Stage, width: int, feature: str) -> str:
    """Where a feature of the input stands: a shuffle of p blocks is ``(f % p) q + f // p``."""
    if not stage.blocks:
        return feature
    return f"({feature}) % {stage.blocks} * {width // stage.blocks} + ({feature}) // {stage.blocks}"


def _products(stage: Stage, feature: str, factor: str, tf32: bool) -> Iterator[str]:
    """The loop over columns of a block: sums of products in float32; float32 factors whole, or
    rounded to 10 bits."""
    b, c = stage.block.b, stage.block.c
    precision = "tf32" if tf32 else "ieee"
    product = f'tl.dot(left.to(DOT), right.to(DOT), sums, input_precision="{precision}")'
    yield f"for start in range(0, {c}, BK):"
    yield "    k = start + tl.arange(0, BK)"
    yield f"    feature = {feature}"
    yield f"    some = (k < {c})[None, :]"
    yield "    left = tl.load(x + lines + feature[None, :], mask=live & some, other=0.0)"
    yield f"    at = ({factor} * {b} + n).to(tl.int64)[None, :] * {c} + k[:, None]"
    yield f"    wide = (n < {b})[None, :] & (k < {c})[:, None]"
    yield "    right = tl.load(w + at, mask=wide, other=0.0)"
    yield f"    sums = {product}"


def _panel(stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    b, c = stage.block.b, stage.block.c
    yield "    sums = tl.zeros((BM, BN), tl.float32)"
    feature = _source(stage, width, f"group * {c} + k")
    yield from (f"    {line}" for line in _products(stage, feature, "group", tf32))
    yield f"    out = group * {b} + n"


def _strided(stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    b, c, d = stage.block.b, stage.block.c, stage.block.d
    yield "    sums = tl.zeros((BM, BN), tl.float32)"
    yield f"    a = group // {b}"
    yield f"    for k in range({c}):"
    yield f"        feature = {_source(stage, width, f'(a * {c} + k) * {d} + n')}"
    yield "        left = tl.load(x + lines + feature[None, :], mask=inside, other=0.0)"
    yield f"        at = (group.to(tl.int64) * {c} + k) * {d} + n"
    yield f"        right = tl.load(w + at, mask=n < {d}, other=0.0)"
    yield "        sums += left.to(tl.float32) * right.to(tl.float32)[None, :]"
    yield f"    out = group * {d} + n"


def _sparse(stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    b, c = stage.block.b, stage.block.c
    yield "    sums = tl.zeros((BM, BN), tl.float32)"
    yield "    last = tl.load(first + group + 1)"
    yield "    for e in range(tl.load(first + group), last):"
    yield f"        column = tl.load(place + e) * {c}"
    yield from (f"        {line}" for line in _products(stage, "column + k", "e", tf32))
    yield f"    out = group * {b} + n"


def _listed(stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    yield f"    feature = tl.load(place + n, mask=n < {stage.out}, other=0)"
    yield from _moved()


def _move(stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    yield f"    feature = {_source(stage, width, 'n')}"
    yield from _moved()


def _moved() -> Iterator[str]:
    yield "    sums = tl.load(x + lines + feature[None, :], mask=inside, other=0.0).to(tl.float32)"
    yield "    out = n"


_KINDS = {
    "panel": _panel,
    "strided": _strided,
    "sparse": _sparse,
    "listed": _listed,
    "shuffle": _move,
    "move": _move,
}
"""For each kind of stage what makes its sums and says where they go."""


def _tail(stage: Stage) -> Iterator[str]:
    if stage.bias is not None:
        yield f"    more = tl.load(bias + out, mask=out < {stage.out}, other=0.0)"
        yield "    sums += more.to(tl.float32)[None, :]"
    if stage.act:
        yield f"    sums = {ACTIVATIONS[stage.act].format('sums')}"
    for name, slot, sign in (("mul", stage.mul, "*"), ("add", stage.add, "+")):
        if slot is not None:
            yield f"    more = tl.load({name} + spot, mask=inside, other=0.0)"
            yield f"    sums = sums {sign} more.to(tl.float32)"


def _norm(at: int, stage: Stage) -> str:
    assert stage.norm is not None
    norm, n = stage.norm[0], stage.out
    layer = norm.kind == "layer"
    gains = "gain, shift" if layer else "gain"
    yield_ = [
        "@triton.jit",
        f"def stage{at}_norm(y, {gains}, rows,",
        f"{' ' * 16}{SIZES}):",
        f'    """{norm.kind} normalisation of {n} features, in place"""',
        "    m = tl.program_id(0) * BM + tl.arange(0, BM)",
        "    n = tl.arange(0, BN)",
        f"    inside = (m < rows)[:, None] & (n < {n})[None, :]",
        f"    line = y + m.to(tl.int64)[:, None] * {n} + n[None, :]",
        "    value = tl.load(line, mask=inside, other=0.0).to(tl.float32)",
    ]
    if layer:
        yield_ += [
            f"    value = value - (tl.sum(value, 1) / {n})[:, None]",
            "    value = tl.where(inside, value, 0.0)",
        ]
    yield_ += [
        f"    size = tl.sum(value * value, 1) / {n}",
        f"    value = value * tl.rsqrt(size + {float(norm.eps)!r})[:, None]",
        f"    value = value * tl.load(gain + n, mask=n < {n}, other=0.0).to(tl.float32)[None, :]",
    ]
    if layer:
        yield_ += [
            f"    value += tl.load(shift + n, mask=n < {n}, other=0.0).to(tl.float32)[None, :]"
        ]
    yield_ += ["    tl.store(line, value.to(y.dtype.element_ty), mask=inside)"]
    return "\n".join(yield_) + "\n"

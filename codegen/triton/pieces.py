"""What the kernels of a tile program share: their functions' data, and lines of their source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from structc.codegen.program import Stage
from structc.codegen.triton.config import Config

ACTIVATIONS = {
    "relu": "tl.maximum({0}, 0.0)",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    "gelu_tanh": "{0} * tl.sigmoid(1.5957691216057308 * ({0} + 0.044715 * {0} * {0} * {0}))",
    "silu": "{0} * tl.sigmoid({0})",
}
"""What follows sums, elementwise; tanh z is ``2 sigmoid(2 z) - 1``."""
PROGRAMS = 256
"""Of a call whose programs keep what lies between factors: a cache holds that of so many."""
HEAD = """import triton
import triton.language as tl

SINGLE: tl.constexpr = tl.constexpr("ieee" if triton.knobs.runtime.interpret else "bf16x6")
"""
"""Of every source: how float32 factors are multiplied. Each is a sum of three bfloat16 numbers, and
the six largest products of those are taken: the error is that of float32 sums (0.6 to 1.3e-7 of the
norm at 64 to 4096 terms; of plain float32 products it is 1.4 to 2.6e-7), and matrix units do it."""
TILE = ("BM", "BN", "BK")
"""Compile-time sizes of a tile; ``DOT`` is every kernel's last."""
_TYPES = {"first": "*i64", "place": "*i64", "part": "*fp32", "turns": "*fp32", "gate": "*fp32"}


@dataclass(frozen=True)
class Kernel:
    """One function of a source.

    Attributes:
        name: of the function.
        pointers: its tensors in order: ``x``, ``y`` and what the stage needs besides.
        groups, outputs: an output is one of ``outputs`` of one of ``groups``; tiles of outputs
            stay within a group. What one program takes whole does not count.
        sizes: its compile-time arguments apart from ``DOT``.
        shares: whether several programs share the columns of an output.
        holds: features that a program keeps of each of its rows, twice, while it runs; it then
            takes several tiles of rows, one after the other.
        called: whether another kernel calls it and tells it its tile, ``pid``.
    """

    name: str
    pointers: tuple[str, ...]
    groups: int
    outputs: int
    sizes: tuple[str, ...] = TILE
    shares: bool = False
    holds: int = 0
    called: bool = False

    @property
    def kind(self) -> str:
        """``"panel"``, ``"norm"``, ...: what the function's name ends in."""
        return self.name.rpartition("_")[2]

    def arguments(self, dtype: str) -> dict[str, str]:
        """What a call passes, as Triton spells types."""
        return {**{n: _TYPES.get(n, f"*{dtype}") for n in self.pointers}, "rows": "i32"}

    def grid(self, rows: int, config: Config) -> int:
        """Programs of a call."""
        if self.holds:
            return min(PROGRAMS, -(-rows // config.bm))
        groups = -(-self.groups // config.groups) if "BG" in self.sizes else self.groups
        split = config.split if self.shares else 1
        return -(-rows // config.bm) * groups * -(-self.outputs // config.bn) * split


@dataclass(frozen=True)
class Way:
    """One kernel that a kind of stage has.

    Attributes:
        kernel: ``(number of the stage, stage)`` to its data.
        lines: ``(kernel, stage, width, tf32)`` to its source.
    """

    kernel: Callable[[int, Stage], Kernel]
    lines: Callable[[Kernel, Stage, int, bool], Iterator[str]]


def head(kernel: Kernel, text: str) -> Iterator[str]:
    """The function's first lines."""
    yield "@triton.jit" if kernel.called else '@triton.jit(do_not_specialize=["rows"])'
    more = "rows, pid," if kernel.called else "rows,"
    yield f"def {kernel.name}({', '.join(kernel.pointers)}, {more}"
    sizes = ", ".join(f"{n}: tl.constexpr" for n in (*kernel.sizes, "DOT"))
    yield f"{' ' * (len(kernel.name) + 5)}{sizes}):"
    yield f'    """{text}"""'


def said(stage: Stage, width: int) -> str:
    """What a stage does, for people."""
    factors = [s.block for s in (*stage.inner, stage)]
    known = stage.kind in ("panel", "strided") or stage.inner
    words = [" ".join(map(str, factors)) if known else stage.kind, stage.tail]
    words += [f"input shuffled by {stage.blocks}"] if stage.blocks else []
    words += [f"output shuffled by {stage.turns}"] if stage.turns else []
    return f"{', '.join(filter(None, words))}: {width} -> {stage.out} features"


def own_tile(kernel: Kernel, stage: Stage, width: int, *, split: bool = False) -> Iterator[str]:
    """Which rows and outputs are this program's."""
    yield f"    tiles = tl.cdiv({kernel.outputs}, BN)"
    yield "    pid = tl.program_id(0)"
    if split:
        yield "    share = pid % SPLIT"
        yield "    pid = pid // SPLIT"
    yield f"    m = pid // ({kernel.groups} * tiles) * BM + tl.arange(0, BM)"
    yield f"    group = pid // tiles % {kernel.groups}"
    yield "    n = pid % tiles * BN + tl.arange(0, BN)"
    yield f"    lines = m.to(tl.int64)[:, None] * {width}"
    yield "    live = (m < rows)[:, None]"
    yield f"    inside = live & (n < {kernel.outputs})[None, :]"


def source(stage: Stage, width: int, feature: str) -> str:
    """Where a feature of the input stands: a shuffle of p blocks is ``(f % p) q + f // p``."""
    if not stage.blocks:
        return feature
    return f"({feature}) % {stage.blocks} * {width // stage.blocks} + ({feature}) // {stage.blocks}"


def product(left: str, right: str, sums: str, tf32: bool) -> str:
    """``sums + left right`` in float32; float32 factors whole, or rounded to 10 bits."""
    precision = '"tf32"' if tf32 else "SINGLE"
    given = f"{left}.to(DOT), {right}.to(DOT), {sums}".removesuffix(", ")
    return f"tl.dot({given}, input_precision={precision})"


def tail(stage: Stage, indent: str = "    ", sums: str = "sums") -> Iterator[str]:
    """What follows the sums, and the store; ``out`` are features, ``spot`` where they go."""
    if stage.bias is not None:
        yield f"{indent}more = tl.load(bias + out, mask=out < {stage.out}, other=0.0)"
        yield f"{indent}{sums} += more.to(tl.float32)"
    if stage.act:
        yield f"{indent}{sums} = {ACTIVATIONS[stage.act].format(sums)}"
    for name, slot, sign in (("mul", stage.mul, "*"), ("add", stage.add, "+")):
        if slot is not None:
            yield f"{indent}more = tl.load({name} + spot, mask=inside, other=0.0)"
            yield f"{indent}{sums} = {sums} {sign} more.to(tl.float32)"
    yield f"{indent}tl.store(y + spot, {sums}.to(y.dtype.element_ty), mask=inside)"


def extras(stage: Stage) -> tuple[str, ...]:
    """The tensors of what follows the sums."""
    given = (("bias", stage.bias), ("mul", stage.mul), ("add", stage.add))
    return tuple(name for name, there in given if there is not None)

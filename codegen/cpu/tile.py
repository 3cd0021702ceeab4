"""A tile program bound to its emitted library: packing, the call, and the self-test at load."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structc import ops
from structc.codegen.cpu import build
from structc.codegen.cpu.emit import Program, Spec, analyse, emit
from structc.forms import Act, Bias, Block, Permute, Tile
from structc.numerics import relative_error
from structc.records import Refusal

PACK = 16
"""Panels are multiples of this many columns."""
CONFIG_RANGES: dict[str, tuple[int, int]] = {
    "tile": (1, 4096),
    "panel1": (PACK, 4096),
    "panel2": (PACK, 4096),
    "split": (0, 1),
}
DEFAULT: dict[str, int | str] = {
    "layout": "token",
    "tile": 64,
    "panel1": 48,
    "panel2": 48,
    "split": 0,
}
"""What a config leaves out."""

# Called through ctypes with pointers: as fast a call as an operator of the stable C++ interface
# (both near 2 us with the allocation of y), while the library needs no PyTorch header and builds
# in a third of the time.
_ARGUMENTS: list[Any] = [ctypes.c_void_p] * 5 + [ctypes.c_int64, ctypes.c_void_p]


class Prepared:
    """Packed copies of the weights at one place of a program, one for each layer that runs it.

    :func:`structc.ops.derived` owns the copies; this remembers where they are, because asking it
    costs a microsecond a weight, as much as a small product.
    """

    def __init__(self, tag: str, pack: Callable[[Tensor], Tensor]) -> None:
        self.tag, self.pack = tag, pack
        self._known: dict[int, tuple[weakref.ref[Tensor], int, int, Tensor, int]] = {}

    def address(self, weight: Tensor) -> tuple[int, Tensor]:
        """Where the copy of a weight lies, and the copy, which the caller keeps alive."""
        if weight.is_inference():  # has no version: packed for this call alone
            packed = self.pack(weight)
            return packed.data_ptr(), packed
        known = self._known.get(id(weight))
        if (
            known is not None
            and known[0]() is weight
            and known[1] == weight._version
            and known[2] == weight.data_ptr()
        ):
            return known[4], known[3]
        packed = ops.derived(weight, self.tag, self.pack)
        name, table = id(weight), self._known
        gone = weakref.ref(weight, lambda _: table.pop(name, None))
        table[name] = (gone, weight._version, weight.data_ptr(), packed, packed.data_ptr())
        return packed.data_ptr(), packed


@dataclass(frozen=True, eq=False)
class TileKernel:
    """``(x (rows, in_features), weights) -> (rows, out_features)``, float32.

    Weights are those of the program in its order.
    """

    label: str
    form: Tile
    program: Program
    function: Callable[..., int]
    sizes: ctypes.Array[ctypes.c_int64]
    prepared: tuple[Prepared, ...]

    def __call__(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        for w in weights:
            if w.dtype != torch.float32 or w.device.type != "cpu":
                return ops.tile_reference(x, weights, str(self.form))
        y = x.new_empty((x.shape[0], self.program.out_features))
        self.into(x, weights, y)
        return y

    def into(self, x: Tensor, weights: Sequence[Tensor], y: Tensor) -> None:
        """Write the product to ``y``, contiguous; all of it is written."""
        ready = [p.address(w) for p, w in zip(self.prepared, weights, strict=True)]
        at = [address for address, _ in ready]
        bias = at.pop() if self.program.bias else 0
        second = at[1] if len(at) == 2 else 0
        failed = self.function(
            x.data_ptr(), at[0], second, bias, y.data_ptr(), x.shape[0], self.sizes
        )
        if failed:
            raise RuntimeError(f"emitted kernel {self.label} for {self.form} failed ({failed})")


def make(
    form: Tile, config: Mapping[str, int | str], *, transposed: bool = False
) -> TileKernel | Refusal:
    """Build, or find built, the kernel of a program with a config.

    Args:
        form: the program.
        config: fields of :data:`DEFAULT`; what is left out is taken from there.
        transposed: whether the weight of a one-block program is stored (in, out).
    """
    full = complete(config)
    if isinstance(full, Refusal):
        return full
    layout = str(full["layout"])
    program = analyse(form, layout)
    if isinstance(program, Refusal):
        return program
    library = _checked(program.spec(layout))
    return (
        library if isinstance(library, Refusal) else _bind(form, program, full, library, transposed)
    )


def complete(config: Mapping[str, int | str]) -> dict[str, int | str] | Refusal:
    """The config with defaults filled in, or why it makes no sense (it may come from a file)."""
    unknown = set(config) - set(DEFAULT)
    full = {**DEFAULT, **config}
    if unknown or full["layout"] not in ("token", "feature"):
        return Refusal("", "tile", "CONFIG", f"not a kernel configuration: {dict(config)}")
    for name, (low, high) in CONFIG_RANGES.items():
        value = full[name]
        if type(value) is not int or not low <= value <= high:
            return Refusal("", "tile", "CONFIG", f"{name} = {value!r} is not in {low}..{high}")
    if full["panel1"] % PACK or full["panel2"] % PACK:
        return Refusal("", "tile", "CONFIG", f"panels must be multiples of {PACK}")
    return full


def _bind(
    form: Tile,
    program: Program,
    config: Mapping[str, int | str],
    function: Callable[..., int],
    transposed: bool = False,
) -> TileKernel:
    first, second = program.first, program.second
    last = second or Block(1, 1, 1, 1)
    knobs = [int(config[k]) for k in ("tile", "panel1", "panel2", "split")]
    numbers = [first.a, first.b, first.c, last.a, last.b, last.c, *knobs]
    label = f"tile[{config['layout']},{config['tile']}]"
    prepared = _packs(program, config, transposed)
    sizes = (ctypes.c_int64 * len(numbers))(*numbers)
    return TileKernel(label, form, program, function, sizes, prepared)


def _packs(
    program: Program, config: Mapping[str, int | str], transposed: bool
) -> tuple[Prepared, ...]:
    """How each weight of a program is prepared, once."""
    first, second = program.first, program.second
    if config["layout"] == "feature":
        made = [_stored((b.a, b.b, b.c), transposed) for b in (first, second) if b is not None]
    elif second is None:
        made = [_panels((first.a, first.b, first.c), int(config["panel2"]), transposed=transposed)]
    else:
        parts, order = (second.a, first.a) if program.permuted else (1, 1)
        made = [
            _panels((first.a, first.b, first.c), int(config["panel1"]), parts=parts),
            _panels((second.a, second.b, second.c), int(config["panel2"]), order=order),
        ]
    if program.bias:
        made.append(_stored((program.out_features,)))
    return tuple(made)


def _stored(shape: tuple[int, ...], transposed: bool = False) -> Prepared:
    def keep(weight: Tensor) -> Tensor:
        return (weight.t() if transposed else weight).reshape(shape).contiguous()

    return Prepared(f"stored{shape}{transposed}", keep)


def _panels(
    shape: tuple[int, int, int],
    width: int,
    *,
    parts: int = 1,
    order: int = 1,
    transposed: bool = False,
) -> Prepared:
    """Pack (a, b, c): blocks cut into ``parts``, columns of panels contiguous, (c, panel) each.

    ``order`` > 1 brings the inputs of the second factor, stored (rho, kappa), to (kappa, rho).
    """

    def pack(weight: Tensor) -> Tensor:
        a, b, c = shape
        w = (weight.t() if transposed else weight).reshape(a, b, c)
        if order > 1:
            w = w.unflatten(2, (c // order, order)).transpose(2, 3).flatten(2)
        w = w.reshape(a * parts, b // parts, c).transpose(1, 2)
        edges = panel_edges(b // parts, width)
        padded = w.new_zeros(a * parts, c, edges[-1])
        padded[:, :, : b // parts] = w
        cut = [padded[:, :, i:j].flatten(1) for i, j in itertools.pairwise(edges)]
        return torch.cat(cut, dim=1).contiguous()

    return Prepared(f"panels{shape}{width},{parts},{order},{transposed}", pack)


def panel_edges(columns: int, width: int) -> list[int]:
    """Where panels start, and the padded end; the rule of ``panels.h``.

    >>> panel_edges(153, 64)
    [0, 64, 112, 160]
    """
    units = -(-columns // PACK)
    count = -(-units // (width // PACK))
    base, extra = divmod(units, count)
    return [PACK * (p * base + min(p, extra)) for p in range(count + 1)]


# ---------------------------------------------------------------------------- self-test


def _checked(spec: Spec) -> Callable[..., int] | Refusal:
    """The library's entry point, after it has matched a float64 reference once."""
    library = build.load(spec.name, emit(spec))
    if isinstance(library, Refusal):
        return library
    function = library.structc_run
    if not getattr(library, "structc_tested", False):
        function.argtypes, function.restype = _ARGUMENTS, ctypes.c_int32
        failed = _self_test(spec, function)
        if failed is not None:
            return failed
        library.structc_tested = True  # type: ignore[attr-defined]
    return function


def _self_test(spec: Spec, function: Callable[..., int]) -> Refusal | None:
    form = sample_form(spec)
    program = analyse(form, spec.layout)
    assert isinstance(program, Program)
    kernel = _bind(form, program, {**DEFAULT, "layout": spec.layout, "tile": 32}, function)
    x, weights = sample(form, rows=37)
    y = x.new_full((37, form.out_features), float("nan"))
    try:
        kernel.into(x, weights, y)
    except RuntimeError as e:
        return Refusal("", "tile", "SELF_TEST", f"{spec.name}: {e}")
    error = relative_error(
        y, ops.tile_reference(x.double(), [w.double() for w in weights], str(form))
    )
    if error > 1e-5:
        return Refusal(
            "", "tile", "SELF_TEST", f"{spec.name}: error {error:.1e} against the reference"
        )
    return None


def sample_form(spec: Spec) -> Tile:
    """Small odd sizes: every edge of the kernel is exercised."""
    if spec.factors == 1:
        steps: tuple[Block | Permute | Bias | Act, ...] = (Block(3, 21, 13, 1),)
    elif spec.permuted:
        steps = (Block(3, 10, 7, 1), Permute(3, 10), Block(2, 19, 15, 1))
    else:
        steps = (Block(3, 10, 7, 1), Block(2, 19, 15, 1))
    n = steps[-1].out_features
    tail: tuple[Bias | Act, ...] = (Bias(n),) if spec.bias else ()
    if spec.act:
        tail = (*tail, Act(spec.act, n))
    return Tile((*steps, *tail))


def sample(form: Tile, rows: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Seeded input and weights of a program, scaled so that activations see both of their ends."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:  # whatever the caller's default dtype and device are
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    x = noise(rows, form.in_features)
    weights = []
    for step in form.steps:
        if isinstance(step, Block):
            w = noise(step.a, step.b, step.c, step.d)
            weights.append(w * (1.5 / step.c**0.5))
        elif isinstance(step, Bias):
            weights.append(noise(step.n))
    return x, weights

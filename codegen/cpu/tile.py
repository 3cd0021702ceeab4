"""A tile program bound to its emitted library: packing, the call, and the self-test at load."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structc import ops
from structc.codegen.cpu import build
from structc.codegen.cpu.emit import Spec, emit, spec_of
from structc.codegen.cpu.pack import PACK, Prepared, parts_of, prepared, vector_copy
from structc.codegen.cpu.program import Program, analyse
from structc.forms import NORMS, Act, Add, Bias, Block, Norm, Permute, Step, Tile
from structc.numerics import relative_error
from structc.records import Refusal

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative error of a self-test that is still rounding."""
VECTORS = 4
"""Pointers of one stage: packed factor, bias, gain and shift."""
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
_ARGUMENTS: list[Any] = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_void_p]


@dataclass(frozen=True, eq=False)
class TileKernel:
    """``(x (rows, in_features), weights, others) -> (rows, out_features)``.

    Weights are those of the program in its order, others its inputs from 1 on.
    """

    label: str
    form: Tile
    dtype: torch.dtype
    program: Program
    function: Callable[..., int]
    sizes: ctypes.Array[ctypes.c_int64]
    places: tuple[tuple[int, Prepared, tuple[int, ...]], ...]
    """Where each packed copy goes among the pointers, how it is made, and of which weights."""
    streams: type[ctypes.Array[ctypes.c_void_p]]
    vectors: type[ctypes.Array[ctypes.c_void_p]]
    """Arrays of pointers to the inputs, and to the vectors of all stages."""

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor] = ()
    ) -> Tensor:
        for w in (*weights, *others):
            if w.dtype != self.dtype or w.device.type != "cpu":
                return ops.tile_reference(x, weights, str(self.form), others)
        y = x.new_empty((x.shape[0], self.program.out_features))
        self.into(x, weights, y, others)
        return y

    def into(
        self, x: Tensor, weights: Sequence[Tensor], y: Tensor, others: Sequence[Tensor] = ()
    ) -> None:
        """Write the product to ``y``, contiguous; all of it is written."""
        pointers = self.vectors()
        alive = []  # a copy that was made for this call alone
        for at, copy, sources in self.places:
            pointers[at], packed = copy.address([weights[i] for i in sources])
            alive.append(packed)
        streams = self.streams(x.data_ptr(), *map(Tensor.data_ptr, others))
        failed = self.function(streams, pointers, y.data_ptr(), x.shape[0], self.sizes)
        if failed:
            raise RuntimeError(f"emitted kernel {self.label} for {self.form} failed ({failed})")


def make(
    form: Tile,
    config: Mapping[str, int | str],
    *,
    dtype: torch.dtype = torch.float32,
    transposed: bool = False,
) -> TileKernel | Refusal:
    """Build, or find built, the kernel of a program with a config.

    Args:
        form: the program.
        config: fields of :data:`DEFAULT`; what is left out is taken from there.
        dtype: of inputs, weights and outputs; sums are float32.
        transposed: whether the weight of a one-block program is stored (in, out).
    """
    full = complete(config)
    if isinstance(full, Refusal):
        return full
    layout = str(full["layout"])
    program = analyse(form, layout, dtype)
    if isinstance(program, Refusal):
        return program
    library = _checked(spec_of(program, layout, dtype))
    if isinstance(library, Refusal):
        return library
    return _bind(form, program, full, library, dtype, transposed)


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
    dtype: torch.dtype,
    transposed: bool = False,
) -> TileKernel:
    stages, layout = program.stages, str(config["layout"])
    widths = [int(config["panel1"])] * (len(stages) - 1) + [int(config["panel2"])]
    numbers = [int(config["tile"]), int(config["split"])]
    for at, stage in enumerate(stages):
        b = stage.block
        behind = at + 1 < len(stages) and stages[at + 1].shuffled
        numbers += [b.a, b.b, b.c, b.d, widths[at], parts_of(program, at), int(behind)]
        numbers += [-1 if stage.add is None else stage.add, _float_bits(stage.norm)]
    label = f"tile[{layout},{config['tile']}]"
    sizes = (ctypes.c_int64 * len(numbers))(*numbers)
    places = _places(form, program, layout, dtype, widths, transposed)
    streams = ctypes.c_void_p * len(form.input_features)
    vectors = ctypes.c_void_p * (VECTORS * len(stages))
    return TileKernel(label, form, dtype, program, function, sizes, places, streams, vectors)


def _places(
    form: Tile,
    program: Program,
    layout: str,
    dtype: torch.dtype,
    widths: Sequence[int],
    transposed: bool,
) -> tuple[tuple[int, Prepared, tuple[int, ...]], ...]:
    blocks = [step for step in form.steps if isinstance(step, Block)]
    copies = prepared(program, blocks, layout, dtype, widths, transposed=transposed)
    of_block: list[int] = []
    places: list[tuple[int, Prepared, tuple[int, ...]]] = []
    weight = stage = 0  # of the step that comes next; the stage that its vectors belong to
    ends = [s.sources[-1] for s in program.stages]
    for step in form.steps:
        if isinstance(step, Block):
            of_block.append(weight)
            stage = next(at for at, end in enumerate(ends) if len(of_block) - 1 <= end)
        slots = {Bias: (1,), Norm: (2, 3)}.get(type(step), ())
        for slot, at in zip(slots, range(step.weights), strict=False):
            copy = vector_copy(step.out_features)
            places.append((VECTORS * stage + slot, copy, (weight + at,)))
        weight += step.weights
    for at, (copy, sources) in enumerate(copies):
        places.append((VECTORS * at, copy, tuple(of_block[i] for i in sources)))
    return tuple(places)


def _float_bits(norm: Norm | None) -> int:
    """The bits of eps, for sizes are whole numbers."""
    bits: int = struct.unpack("<i", struct.pack("<f", 0.0 if norm is None else float(norm.eps)))[0]
    return bits


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
    config = {**DEFAULT, "layout": spec.layout, "tile": 32}
    for form in dict.fromkeys([sample_form(spec), sample_form(spec, shuffles=True)]):
        program = analyse(form, spec.layout, spec.dtype)
        assert isinstance(program, Program) and spec_of(program, spec.layout, spec.dtype) == spec
        kernel = _bind(form, program, config, function, spec.dtype)
        (x, *others), weights = sample(form, rows=37, dtype=spec.dtype)
        y = x.new_full((37, form.out_features), float("nan"))
        try:
            kernel.into(x, weights, y, others)
        except RuntimeError as e:
            return Refusal("", "tile", "SELF_TEST", f"{spec.name}: {e}")
        wide, more = [w.double() for w in weights], [o.double() for o in others]
        error = relative_error(y, ops.tile_reference(x.double(), wide, str(form), more))
        if not error <= TOLERANCE[spec.dtype]:
            reason = f"{spec.name}: error {error:.1e} against the reference"
            return Refusal("", "tile", "SELF_TEST", reason)
    return None


WIDTH = 420
"""Features between the factors of samples: 3 x 140, 2 x 210, 70 x 6 and 84 x 5 of them."""


def sample_form(spec: Spec, *, shuffles: bool = False) -> Tile:
    """Odd sizes that no two factors of can be merged: every edge of the kernel is exercised.

    Args:
        spec: of the library.
        shuffles: whether shuffles stand where they can.
    """
    steps: list[Step] = []
    for at, word in enumerate(spec.stages):
        kind, *tail = word.split("+")
        first, last = at == 0, at == len(spec.stages) - 1
        before = steps[-1] if steps else None
        if kind == "strided":
            d = 70 if at % 2 == 0 else 84
            block = Block(1, 3 if last else WIDTH // d, 3 if first else WIDTH // d, d)
        else:
            a = 3 if at % 2 == 0 else 2
            thin = 14 if spec.dtype == torch.bfloat16 else 13
            block = Block(a, 19 if last else WIDTH // a, thin if first else WIDTH // a, 1)
            if shuffles and isinstance(before, Block) and before.d == 1:
                steps.append(Permute(before.a, before.b))
        steps.append(block)
        n = block.out_features
        rows = spec.rows[at].split("+") if spec.rows else []
        steps += [Bias(n)] if "bias" in tail else []
        steps += [Act(t, n) for t in tail if t != "bias"]
        steps += [Add(n, 1 + at)] if "add" in rows else []
        steps += [Norm(n, kind, "1e-5") for kind in NORMS if kind in rows]
    return Tile(tuple(steps))


def sample(
    form: Tile, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """Seeded inputs and weights of a program, scaled so that activations see both of their ends."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:  # whatever the caller's default dtype and device are
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    inputs = [noise(rows, n) for n in form.input_features]
    weights: list[Tensor] = []
    for step in form.steps:
        if isinstance(step, Block):
            w = noise(step.a, step.b, step.c, step.d)
            weights.append(w * (1.5 / step.c**0.5))
        else:
            weights += [noise(step.out_features) for _ in range(step.weights)]
    return inputs, weights

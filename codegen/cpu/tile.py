"""A tile program bound to its emitted library: packing, the call, and the self-test at load."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structc import reference
from structc.codegen.cpu import build
from structc.codegen.cpu.emit import Spec, emit, spec_of
from structc.codegen.cpu.pack import PACK, VECTORS, Copies, Copy, Place, prepared
from structc.codegen.cpu.samples import sample, sample_form
from structc.codegen.cpu.served import analyse
from structc.codegen.program import Program, Stage
from structc.forms import Select, Sparse, Step, Tile
from structc.numerics import relative_error
from structc.records import Refusal

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative error of a self-test that is still rounding."""
CONFIG_RANGES: dict[str, tuple[int, int]] = {
    "tile": (1, 4096),
    "panel": (PACK, 4096),
    "split": (0, 1),
}
DEFAULT: dict[str, int | str] = {"tile": 64, "panel": 64, "split": 0}
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
    copies: Copies
    streams: type[ctypes.Array[ctypes.c_void_p]]
    """Of pointers to the inputs."""

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor] = ()
    ) -> Tensor:
        known = self.copies.of(weights)
        if known is None or any(o.dtype != self.dtype or o.device.type != "cpu" for o in others):
            return reference.tile_reference(x, weights, str(self.form), others)
        y = x.new_empty((x.shape[0], self.program.out_features))
        self._run(x, known, y, others)
        return y

    def into(
        self, x: Tensor, weights: Sequence[Tensor], y: Tensor, others: Sequence[Tensor] = ()
    ) -> None:
        """Write the product to ``y``, contiguous; all of it is written."""
        known = self.copies.of(weights)
        assert known is not None
        self._run(x, known, y, others)

    def _run(self, x: Tensor, known: Copy, y: Tensor, others: Sequence[Tensor]) -> None:
        streams = self.streams(x.data_ptr(), *map(Tensor.data_ptr, others))
        failed = self.function(streams, known.pointers, y.data_ptr(), x.shape[0], self.sizes)
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
    program = analyse(form, dtype)
    if isinstance(program, Refusal):
        return program
    library = _checked(spec_of(program, dtype))
    if isinstance(library, Refusal):
        return library
    return _bind(form, program, full, library, dtype, transposed)


def complete(config: Mapping[str, int | str]) -> dict[str, int | str] | Refusal:
    """The config with defaults filled in, or why it makes no sense (it may come from a file)."""
    unknown = set(config) - set(DEFAULT)
    full = {**DEFAULT, **config}
    if unknown:
        return Refusal("", "tile", "CONFIG", f"not a kernel configuration: {dict(config)}")
    for name, (low, high) in CONFIG_RANGES.items():
        value = full[name]
        if type(value) is not int or not low <= value <= high:
            return Refusal("", "tile", "CONFIG", f"{name} = {value!r} is not in {low}..{high}")
    if int(full["panel"]) % PACK:
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
    panel = int(config["panel"])
    numbers = [int(config["tile"]), int(config["split"]), len(program.inputs), *program.inputs]
    places: list[Place] = []
    for at, stage in enumerate(program.stages):
        b = stage.block
        numbers += [b.a, b.b, b.c, b.d, stage.run if stage.kind == "shuffle" else panel]
        slots = (stage.reads, stage.keeps, stage.mul, stage.add)
        numbers += [stage.blocks, *(-1 if s is None else s for s in slots)]
        numbers += [stage.out, _float_bits(stage)]
        for place, copy, sources in prepared(stage, dtype, panel, transposed=transposed):
            places.append((VECTORS * at + place, copy, sources))
    label = f"tile[{config['tile']}]"
    sizes = (ctypes.c_int64 * len(numbers))(*numbers)
    dtypes = [d for step in form.steps for d in _dtypes(step, dtype)]
    copies = Copies(places, VECTORS * len(program.stages), dtypes)
    streams = ctypes.c_void_p * len(program.inputs)
    return TileKernel(label, form, dtype, program, function, sizes, copies, streams)


def _dtypes(step: Step, dtype: torch.dtype) -> list[torch.dtype]:
    """Of a step's weights: places are whole numbers."""
    floating = {Select: 0, Sparse: 1}.get(type(step), step.weights)
    return [dtype] * floating + [torch.int64] * (step.weights - floating)


def _float_bits(stage: Stage) -> int:
    """The bits of eps, for sizes are whole numbers."""
    eps = 0.0 if stage.norm is None else float(stage.norm[0].eps)
    bits: int = struct.unpack("<i", struct.pack("<f", eps))[0]
    return bits


# ---------------------------------------------------------------------------- self-test


def _checked(spec: Spec) -> Callable[..., int] | Refusal:
    """The library's entry point, after it has matched a float64 reference once on this machine."""
    library = build.load(spec.name, emit(spec))
    if isinstance(library, Refusal):
        return library
    function = library.structc_run
    if not getattr(library, "structc_tested", False):
        function.argtypes, function.restype = _ARGUMENTS, ctypes.c_int32
        failed = build.tested(library, lambda: _self_test(spec, function))
        if failed is not None:
            return failed
        library.structc_tested = True  # type: ignore[attr-defined]
    return function


def _self_test(spec: Spec, function: Callable[..., int]) -> Refusal | None:
    config = {**DEFAULT, "tile": 32}
    for form in dict.fromkeys([sample_form(spec), sample_form(spec, shuffles=True)]):
        program = None if form is None else analyse(form, spec.dtype)
        if not isinstance(program, Program) or spec_of(program, spec.dtype) != spec:
            return Refusal("", "tile", "UNSERVED", f"{spec.name}: nothing to test it on")
        assert form is not None
        kernel = _bind(form, program, config, function, spec.dtype)
        (x, *others), weights = sample(form, rows=37, dtype=spec.dtype)
        y = x.new_full((37, form.out_features), float("nan"))
        try:
            kernel.into(x, weights, y, others)
        except RuntimeError as e:
            return Refusal("", "tile", "SELF_TEST", f"{spec.name}: {e}")
        wide, more = [_double(w) for w in weights], [o.double() for o in others]
        error = relative_error(y, reference.tile_reference(x.double(), wide, str(form), more))
        if not error <= TOLERANCE[spec.dtype]:
            reason = f"{spec.name}: error {error:.1e} against the reference"
            return Refusal("", "tile", "SELF_TEST", reason)
    return None


def _double(w: Tensor) -> Tensor:
    return w.double() if w.is_floating_point() else w

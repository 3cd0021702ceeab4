"""``structc::tile`` and ``structc::dense`` on a GPU: kernels found when a call needs them.

The first call with so many rows (powers of two) takes the plan that a bundle brought, or else the
one that the cost model ranks first. Nothing is timed here.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from structc import ops
from structc.codegen.program import Program
from structc.codegen.triton import load
from structc.codegen.triton.attempt import Attempts, Tuned
from structc.codegen.triton.calls import dense_program
from structc.codegen.triton.config import power_above
from structc.codegen.triton.device import running
from structc.codegen.triton.plan import Plan, plans, room
from structc.codegen.triton.targets import GpuTarget
from structc.codegen.triton.tile import DTYPES, TritonTile, analyse, make, rounds
from structc.forms import Tile
from structc.records import Refusal
from structc.reference import tile_reference

MANY = 3
"""Plans of each variant that are tried before the reference."""
LARGEST = 1 << 16
"""Rows that have a plan of their own; calls above take that one's."""
_log = logging.getLogger("structc")


@dataclass(frozen=True, eq=False)
class Served:
    """The kernel of a program for any number of rows.

    Attributes:
        form, program: the tile program and its stages.
        dtype: of inputs and weights.
        target: the GPU that plans are ranked for.
        tuned: plans by rows, the best first, instead of the ranked ones.
    """

    form: Tile
    program: Program
    dtype: torch.dtype
    target: GpuTarget
    tuned: Mapping[int, Tuned[Plan]] = field(default_factory=dict)
    found: dict[tuple[int, bool], Attempts[TritonTile]] = field(default_factory=dict)

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor] = ()
    ) -> Tensor:
        elsewhere = {str(t.device) for t in (*weights, *others) if t.device != x.device}
        if elsewhere:
            raise RuntimeError(f"structc::tile: x is on {x.device}, others on {elsewhere}")
        if any(w.is_complex() for w in weights):  # kernels are of real numbers
            return tile_reference(x, weights, str(self.form), others).contiguous()
        attempts = self.attempts(x.shape[0])
        with torch.cuda.device_of(x):  # Triton launches on the current one
            tuned = self.tuned.get(bucket_of(x.shape[0]))
            if tuned is not None:
                tuned.settle(attempts, lambda kernel: kernel(x, weights, others))
            y = attempts.run(lambda kernel: kernel(x, weights, others))
        if y is None:
            return tile_reference(x, weights, str(self.form), others).contiguous()
        return y

    def attempts(self, rows: int) -> Attempts[TritonTile]:
        """The kernels for so many rows, the best first."""
        bucket, tf32 = bucket_of(rows), rounds(self.dtype)
        if (bucket, tf32) not in self.found:
            some = self.plans(bucket, tf32)
            ways = [make(self.form, self.dtype, plan, tf32=tf32) for plan in some]
            able = [way for way in ways if not isinstance(way, Refusal)]
            self.found[bucket, tf32] = Attempts(f"{self.form} in {self.dtype}", able)
        return self.found[bucket, tf32]

    def plans(self, bucket: int, tf32: bool = False) -> Sequence[Plan]:
        """Ways to run so many rows, the best first: tuned ones, or as predicted."""
        word = "tf32" if tf32 else DTYPES[self.dtype]
        ranked = plans(self.program, bucket, word, self.target, many=MANY)
        own = self.tuned[bucket].ways if bucket in self.tuned else ()
        return [*own, *(plan for plan in ranked if str(plan) not in map(str, own))]


TUNED: dict[tuple[str, torch.dtype], dict[int, Tuned[Plan]]] = {}
"""By program and dtype, then by rows."""


def bucket_of(rows: int) -> int:
    """The number of rows whose plan serves a call.

    >>> bucket_of(100), bucket_of(1 << 20)
    (128, 65536)
    """
    return min(LARGEST, power_above(rows))


def serve(form: Tile, dtype: torch.dtype) -> Served | Refusal:
    """The kernel of a program on this process's GPU, or why there is none.

    >>> serve(Tile.parse("block(1,4,4,1)"), torch.float64).reason
    'kernels are fp32, fp16, bf16'
    """
    if load.version() is None:
        return Refusal("", "triton", "NO_TRITON", "triton is not installed")
    target = running()
    if isinstance(target, Refusal):
        return target
    program = analyse(form, dtype)
    if isinstance(program, Refusal):
        return program
    none = room(program, 1, DTYPES[dtype], target)
    if none is not None:
        return none
    load.warn_untested()
    return Served(form, program, dtype, target, TUNED.get((str(form), dtype), {}))


def kernel_of(key: Hashable) -> ops.Kernel | None:
    """What an operator asks for that finds nothing attached; None: its reference runs."""
    assert isinstance(key, tuple)
    kind, _, *rest = key
    return _tile_kernel(*rest) if kind == "tile" else _dense_kernel(*rest)


def _tile_kernel(program: str, dtype: torch.dtype) -> ops.Kernel | None:
    made = serve(Tile.parse(program), dtype)
    if isinstance(made, Refusal):
        _log.info("%s in %s runs on the reference: %s", program, dtype, made.reason)
        return None
    return made


def _dense_kernel(
    n: int, m: int, act: str, dtype: torch.dtype, transposed: bool
) -> ops.Kernel | None:
    """With an activation, which a vendor's product leaves to a pass of its own; else None."""
    if not act:
        return None
    made = [_tile_kernel(dense_program(n, m, act, bias), dtype) for bias in (False, True)]
    if made[0] is None or made[1] is None:
        return None
    bare, biased = made[0], made[1]

    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        tag = f"triton dense {transposed}"  # one weight may be used both ways
        factor = ops.derived(weights[:1], tag, lambda w: _factor(w[0], transposed))
        return (biased if len(weights) > 1 else bare)(x, [factor, *weights[1:]])

    return run


def _factor(weight: Tensor, transposed: bool) -> Tensor:
    """(1, m, n, 1), in memory by output."""
    return (weight.t() if transposed else weight).contiguous()[None, ..., None]

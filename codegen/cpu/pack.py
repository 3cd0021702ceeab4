"""How the weights of a program are laid out for its kernel, once, and where the copies lie."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structc import ops
from structc.codegen.cpu.program import Program, Stage, product
from structc.forms import Block

PACK = 16
"""Panels are multiples of this many columns."""


class Prepared:
    """Packed copies of weights at one place of a program, one for each layer that runs it.

    :func:`structc.ops.derived` owns the copies; this remembers where they are, because asking it
    costs a microsecond a weight, as much as a small product.
    """

    def __init__(self, tag: str, pack: Callable[[Sequence[Tensor]], Tensor]) -> None:
        self.tag, self.pack = tag, pack
        self._known: dict[int, _Copy] = {}

    def address(self, weights: Sequence[Tensor]) -> tuple[int, Tensor]:
        """Where the copy of some weights lies, and the copy, which the caller keeps alive."""
        name = id(weights[0])
        known = self._known.get(name)
        if known is not None and known.is_of(weights):
            return known.address, known.packed
        packed = ops.derived(weights, self.tag, self.pack)
        if not any(w.is_inference() for w in weights):  # those have no version, and no copy is kept
            table = self._known
            stamps = [
                (weakref.ref(w, lambda _: table.pop(name, None)), w._version, w.data_ptr())
                for w in weights
            ]
            table[name] = _Copy(tuple(stamps), packed, packed.data_ptr())
        return packed.data_ptr(), packed


@dataclass(frozen=True, eq=False)
class _Copy:
    stamps: tuple[tuple[weakref.ref[Tensor], int, int], ...]
    packed: Tensor
    address: int

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        for weight, (reference, version, pointer) in zip(weights, self.stamps, strict=True):
            if reference() is not weight or version != weight._version:
                return False
            if pointer != weight.data_ptr():
                return False
        return True


def prepared(
    program: Program,
    blocks: Sequence[Block],
    layout: str,
    dtype: torch.dtype,
    panels: Sequence[int],
    *,
    transposed: bool = False,
) -> list[tuple[Prepared, tuple[int, ...]]]:
    """For each stage how its factor is packed, and of which of the program's blocks.

    Args:
        program: as analysed.
        blocks: the program's own block factors, before any were merged.
        layout, dtype: of the kernel.
        panels: width of panels for each stage.
        transposed: whether the weight of a one-block program is stored (in, out).
    """
    made = []
    for at, stage in enumerate(program.stages):
        before = program.stages[at - 1] if at else None
        parts = parts_of(program, at)
        order = before.block.a if before is not None and stage.shuffled else 1
        own = [blocks[i] for i in stage.sources]
        if layout == "feature":
            packed = _stored(stage, own, transposed)
        elif stage.block.d > 1:
            packed = _wide(stage, own)
        else:
            packed = _panels(stage, own, panels[at], parts, order, dtype, transposed)
        made.append((packed, stage.sources))
    return made


def parts_of(program: Program, at: int) -> int:
    """Into how many parts each block's output is cut: one for each group behind a shuffle."""
    following = program.stages[at + 1] if at + 1 < len(program.stages) else None
    return following.block.a if following is not None and following.shuffled else 1


def vector_copy(width: int) -> Prepared:
    """A bias, gain or shift as the kernels read it: float32."""
    return Prepared(f"vector{width}", lambda w: w[0].float().reshape(width).contiguous())


def _joined(stage: Stage, own: Sequence[Block], weights: Sequence[Tensor], flip: bool) -> Tensor:
    """(a, b, c, d), of one factor or of several that were merged."""
    if flip:
        weights = [w.t() for w in weights]
    shape = (stage.block.a, stage.block.b, stage.block.c, stage.block.d)
    if len(own) == 1:
        return weights[0].reshape(shape)
    wide = product(list(own), [w.double() for w in weights])
    return wide.to(weights[0].dtype).reshape(shape)


def _stored(stage: Stage, own: Sequence[Block], flip: bool) -> Prepared:
    def keep(weights: Sequence[Tensor]) -> Tensor:
        return _joined(stage, own, weights, flip).permute(0, 3, 1, 2).contiguous()

    return Prepared(f"stored{stage.block}{own}{flip}", keep)


def _wide(stage: Stage, own: Sequence[Block]) -> Prepared:
    def keep(weights: Sequence[Tensor]) -> Tensor:
        return _joined(stage, own, weights, False).float().contiguous()

    return Prepared(f"wide{stage.block}{own}", keep)


def _panels(
    stage: Stage,
    own: Sequence[Block],
    width: int,
    parts: int,
    order: int,
    dtype: torch.dtype,
    flip: bool,
) -> Prepared:
    """Pack (a, b, c): blocks cut into ``parts``, columns of panels contiguous, (c, panel) each.

    ``order`` > 1 brings the inputs of a factor behind a shuffle, stored (rho, kappa), to (kappa,
    rho). In bfloat16 pairs of rows are interleaved: (c / 2, panel, 2).
    """
    a, b, c = stage.block.a, stage.block.b, stage.block.c

    def pack(weights: Sequence[Tensor]) -> Tensor:
        w = _joined(stage, own, weights, flip).reshape(a, b, c)
        if order > 1:
            w = w.unflatten(2, (c // order, order)).transpose(2, 3).flatten(2)
        w = w.reshape(a * parts, b // parts, c).transpose(1, 2)
        edges = panel_edges(b // parts, width)
        padded = w.new_zeros(a * parts, c, edges[-1])
        padded[:, :, : b // parts] = w
        cut = [padded[:, :, i:j] for i, j in itertools.pairwise(edges)]
        if dtype == torch.bfloat16:
            cut = [p.unflatten(1, (c // 2, 2)).transpose(2, 3) for p in cut]
        return torch.cat([p.flatten(1) for p in cut], dim=1).contiguous()

    return Prepared(f"panels{stage.block}{own}{width},{parts},{order},{dtype},{flip}", pack)


def panel_edges(columns: int, width: int) -> list[int]:
    """Where panels start, and the padded end; the rule of ``token.h``.

    >>> panel_edges(153, 64)
    [0, 64, 112, 160]
    """
    units = -(-columns // PACK)
    count = -(-units // (width // PACK))
    base, extra = divmod(units, count)
    return [PACK * (p * base + min(p, extra)) for p in range(count + 1)]

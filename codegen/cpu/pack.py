"""How the weights of a program are laid out for its kernel, once, and where the copies lie."""

from __future__ import annotations

import ctypes
import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from structc import ops
from structc.codegen.program import DEPTH, Stage, full, product
from structc.forms import Block

PACK = 16
"""Panels are multiples of this many columns."""
WEIGHT, BIAS, GAIN, SHIFT, INDEX = range(5)
"""Places of a stage's vectors."""
VECTORS = 5


@dataclass(frozen=True)
class Prepared:
    """How weights are laid out for one place of a program.

    Attributes:
        tag: what tells the layout from others of the same weights.
        pack: makes it.
    """

    tag: str
    pack: Callable[[Sequence[Tensor]], Tensor]


Place = tuple[int, Prepared, tuple[int, ...]]
"""Where a packed copy goes among the pointers, how it is made, and of which weights."""


class Copies:
    """Pointers to the packed weights of each layer that runs a kernel.

    :func:`structc.ops.derived` owns the copies; this remembers where they are, because asking it
    costs a microsecond a weight, as much as a small product.
    """

    def __init__(
        self, places: Sequence[Place], pointers: int, dtypes: Sequence[torch.dtype]
    ) -> None:
        self._places, self._dtypes = tuple(places), tuple(dtypes)
        self._array = ctypes.c_void_p * pointers
        self._known: dict[int, Copy] = {}

    def of(self, weights: Sequence[Tensor]) -> Copy | None:
        """The copies of some weights, which the caller keeps alive while it uses them.

        None if the kernel is not for weights like these.
        """
        name = id(weights[0]) if weights else 0
        known = self._known.get(name)
        return known if known is not None and known.is_of(weights) else self._made(name, weights)

    def _made(self, name: int, weights: Sequence[Tensor]) -> Copy | None:
        for weight, dtype in zip(weights, self._dtypes, strict=True):
            if weight.dtype != dtype or weight.device.type != "cpu":
                return None
        pointers, packed = self._array(), []
        for at, prepared, sources in self._places:
            packed.append(ops.derived([weights[i] for i in sources], prepared.tag, prepared.pack))
            pointers[at] = packed[-1].data_ptr()
        if any(w.is_inference() for w in weights):  # those have no version: for this call alone
            return Copy((), pointers, tuple(packed))
        table = self._known
        stamps = [
            (weakref.ref(w, lambda _: table.pop(name, None)), w._version, w.data_ptr())
            for w in weights
        ]
        held = tuple(
            w.detach() for w in weights
        )  # no other storage comes to lie at their addresses
        table[name] = made = Copy(tuple(stamps), pointers, (*packed, *held))
        return made


@dataclass(frozen=True, eq=False)
class Copy:
    """Packed copies of the weights of one layer, and what tells that they are of those."""

    stamps: tuple[tuple[weakref.ref[Tensor], int, int], ...]
    pointers: ctypes.Array[ctypes.c_void_p]
    alive: tuple[Tensor, ...]

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        for weight, (reference, version, pointer) in zip(weights, self.stamps, strict=True):
            if reference() is not weight or version != weight._version:
                return False
            if pointer != weight.data_ptr():
                return False
        return True


def prepared(
    stage: Stage, dtype: torch.dtype, panel: int, *, transposed: bool = False
) -> list[Place]:
    """For each vector that a stage reads: its place, how it is made, and of which weights.

    Args:
        stage: as analysed.
        dtype: of the kernel.
        panel: width of panels.
        transposed: whether the weight of a one-block program is stored (in, out).
    """
    made: list[Place] = []
    first, *others = stage.weights or (0,)
    match stage.kind:
        case "panel":
            made.append((WEIGHT, _panels(stage, panel, dtype, transposed), stage.weights))
        case "strided" | "woven":
            made.append((WEIGHT, _wide(stage), stage.weights))
        case "sparse":
            values, rows = first, others[0]
            made.append((WEIGHT, _sparse(stage.block, panel, dtype), (values, rows)))
            made.append((INDEX, _places(stage), tuple(others)))
        case "listed":
            made.append((INDEX, _listed(stage.block), (first,)))
    if stage.bias is not None:
        made.append((BIAS, _vector(stage.out), (stage.bias,)))
    if stage.norm is not None:
        norm, at = stage.norm
        for place, weight in zip((GAIN, SHIFT), range(at, at + norm.weights), strict=False):
            made.append((place, _vector(stage.out), (weight,)))
    return made


def _vector(width: int) -> Prepared:
    """A bias, gain or shift as the kernels read it: float32."""
    return Prepared(f"vector{width}", lambda w: w[0].float().reshape(width).contiguous())


def _joined(stage: Stage, weights: Sequence[Tensor], flip: bool) -> Tensor:
    """(a, b, c, d), of one factor or of several that were merged."""
    if flip:
        weights = [w.t() for w in weights]
    shape = (stage.block.a, stage.block.b, stage.block.c, stage.block.d)
    if len(stage.parts) == 1:
        return full(stage.parts[0], weights[0]).reshape(shape)
    wide = product(stage.parts, [w.double() for w in weights])
    return wide.to(weights[0].dtype).reshape(shape)


def _wide(stage: Stage) -> Prepared:
    def keep(weights: Sequence[Tensor]) -> Tensor:
        if stage.kind == "woven":  # blocks (a, b, c) beside each other become vectors along a
            b, c, a = stage.block.b, stage.block.c, stage.block.d
            whole = full(stage.parts[0], weights[0]).reshape(a, b, c)
            return whole.permute(1, 2, 0).float().contiguous()
        return _joined(stage, weights, False).float().contiguous()

    return Prepared(f"wide{stage.kind}{stage.block}{stage.parts}", keep)


def _panels(stage: Stage, width: int, dtype: torch.dtype, flip: bool) -> Prepared:
    """Pack (a, b, c): columns of panels contiguous, (c, panel) each.

    Behind a shuffle of p blocks the inputs of a block, stored (c / p, p), come to (p, c / p). In
    bfloat16 pairs of rows are interleaved, (c / 2, panel, 2), c filled up to whole steps.
    """
    a, b, c = stage.block.a, stage.block.b, stage.block.c
    p = stage.blocks or stage.ordered
    runs = stage.blocks or 1

    def pack(weights: Sequence[Tensor]) -> Tensor:
        w = _joined(stage, weights, flip).reshape(a, b, c)
        if p > 1:
            w = w.unflatten(2, (c // p, p)).transpose(2, 3).flatten(2)
        if dtype == torch.bfloat16:
            w = _filled(w.unflatten(2, (runs, c // runs))).flatten(2)
        return torch.cat(_cut(w, width), dim=1).contiguous()

    return Prepared(f"panels{stage.block}{stage.parts}{width},{p},{runs},{dtype},{flip}", pack)


def _sparse(block: Block, width: int, dtype: torch.dtype) -> Prepared:
    """Pack (nnz, b, c): the blocks of each row of blocks as one (count * c, b), cut into panels."""

    def pack(weights: Sequence[Tensor]) -> Tensor:
        w, rows = weights
        if w.shape != (block.d, block.b, block.c):
            raise IndexError(f"block-sparse values are {tuple(w.shape)}, not {block.d} blocks")
        w = _filled(w) if dtype == torch.bfloat16 else w
        edges = rows.tolist()
        parts = [
            panel.flatten()
            for begin, end in itertools.pairwise(edges)
            for panel in _cut(w[begin:end].permute(1, 0, 2).flatten(1)[None], width)
        ]
        return torch.cat(parts).contiguous()

    return Prepared(f"sparse{block}{width},{dtype}", pack)


def _places(stage: Stage) -> Prepared:
    """Where the blocks of each row begin, then the first input of each block.

    Checked here, once, because a kernel reads where they say.
    """
    b, c, count = stage.block.b, stage.block.c, stage.block.d

    def pack(weights: Sequence[Tensor]) -> Tensor:
        rows, columns = (w.long().contiguous() for w in weights)
        whole = rows.shape == (stage.out // b + 1,) and columns.shape == (count,)
        if not whole or rows[0] != 0 or rows[-1] != count or bool((rows.diff() < 0).any()):
            raise IndexError(f"block-sparse rows do not hold {count} blocks of {stage.out} outputs")
        _in_range(columns, stage.run, "block-sparse columns")
        return torch.cat([rows, columns * c])

    return Prepared(f"places{stage.block}{stage.out},{stage.run}", pack)


def _listed(block: Block) -> Prepared:
    def pack(weights: Sequence[Tensor]) -> Tensor:
        index = weights[0].long().contiguous()
        if index.shape != (block.b,):
            raise IndexError(f"a selection of {block.b} features got {tuple(index.shape)} places")
        _in_range(index, block.c, "selected features")
        return index

    return Prepared(f"listed{block}", pack)


def _in_range(index: Tensor, size: int, what: str) -> None:
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise IndexError(f"{what} are not all in 0..{size - 1}")


def _filled(w: Tensor) -> Tensor:
    """The last dimension filled up with zeros to whole steps of a bfloat16 product."""
    return F.pad(w, (0, -w.shape[-1] % DEPTH))


def _cut(w: Tensor, width: int) -> list[Tensor]:
    """(a, b, c) transposed and cut into panels of columns, each (a, c * panel)."""
    a, b, c = w.shape
    edges = panel_edges(b, width)
    padded = w.new_zeros(a, c, edges[-1])
    padded[:, :, :b] = w.transpose(1, 2)
    cut = [padded[:, :, i:j] for i, j in itertools.pairwise(edges)]
    if w.dtype == torch.bfloat16:
        cut = [p.unflatten(1, (c // 2, 2)).transpose(2, 3) for p in cut]
    return [p.flatten(1) for p in cut]


def panel_edges(columns: int, width: int) -> list[int]:
    """Where panels start, and the padded end; the rule of ``tile.h``.

    >>> panel_edges(153, 64)
    [0, 64, 112, 160]
    """
    units = -(-columns // PACK)
    count = -(-units // (width // PACK))
    base, extra = divmod(units, count)
    return [PACK * (p * base + min(p, extra)) for p in range(count + 1)]

"""Biases that depend on the lag of a query and a key alone: proven, and computed once a lag.

T5 and ALiBi give every pair (i, j) a number that is a function of ``i - j``, and graphs compute it
for all pairs. That function is read off the graph: where ``c (i - j) + const`` enters, a vector of
all lags may stand, and what follows is done to it instead, with the same operators on the same
numbers. The n x n tensor is then never made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from structc.passes.masks import Reading
from structc.passes.predicates import (
    HIDES,
    Added,
    All,
    AtMost,
    Line,
    Seen,
    dtype_of,
    is_one,
    never,
    number_of,
    seen_of,
    shape_of,
)
from structc.passes.writes import storage_of

aten = torch.ops.aten
Call = Callable[..., Any]
_SOME = 11
"""Lags that a formula is tried on."""


@dataclass(frozen=True)
class Lag:
    """``factor (i - j) + const`` of all lags, along one dimension."""

    factor: int
    const: int
    size: bool
    rank: int
    keys: int
    """The dimension of keys, from the right."""
    dtype: torch.dtype


@dataclass(frozen=True)
class Kept:
    """A tensor of the graph that no lag enters."""

    node: Node


@dataclass(frozen=True)
class Made:
    """An operator of others."""

    op: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


Formula = Lag | Kept | Made


@dataclass(frozen=True)
class ByLag:
    """A bias ``(H or 1, n_q + n_k - 1)`` and what it hides.

    Attributes:
        formula: of its values.
        seen: where they count.
        value: what stands elsewhere, ``inf`` if nothing does.
        rank: dimensions that the bias has in the graph.
        heads: with a value of their own.
    """

    formula: Formula
    seen: Seen
    value: float
    rank: int
    heads: int = 0


_SAME = (
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.expand.default,
)
_EACH = {
    getattr(getattr(aten, name), kind)
    for name, kinds in {
        "add": "Tensor Scalar", "sub": "Tensor Scalar", "rsub": "Tensor Scalar",
        "mul": "Tensor Scalar", "div": "Tensor Scalar Tensor_mode Scalar_mode",
        "floor_divide": "default", "remainder": "Tensor Scalar", "neg": "default",
        "abs": "default", "sign": "default", "floor": "default", "ceil": "default",
        "log": "default", "log2": "default", "log1p": "default", "exp": "default",
        "sqrt": "default", "rsqrt": "default", "reciprocal": "default", "tanh": "default",
        "sigmoid": "default", "pow": "Tensor_Scalar Tensor_Tensor Scalar",
        "min": "other", "max": "other", "minimum": "default", "maximum": "default",
        "clamp": "default", "clamp_min": "default", "clamp_max": "default",
        "where": "self ScalarOther ScalarSelf Scalar", "masked_fill": "Scalar Tensor",
        "gt": "Tensor Scalar", "ge": "Tensor Scalar", "lt": "Tensor Scalar",
        "le": "Tensor Scalar", "eq": "Tensor Scalar", "ne": "Tensor Scalar",
        "logical_and": "default", "logical_or": "default", "logical_not": "default",
        "bitwise_and": "Tensor", "bitwise_or": "Tensor", "bitwise_not": "default",
        "__and__": "Tensor", "__or__": "Tensor", "full_like": "default",
        "zeros_like": "default", "ones_like": "default", "to": "dtype device dtype_layout",
        "_to_copy": "default",
    }.items()
    for kind in kinds.split()
}  # fmt: skip
"""What is done to each entry by itself."""


def by_lag(node: Node, read: Reading) -> ByLag | None:
    """The bias by lag behind what is added to scores, if the graph proves that it is one.

    rewrite:       f(i - j) for all i, j  -->  f(lag) for all lags
    Sound because: every operator on the way treats entries one by one (or looks them up in a
        table), and all that tells entries apart enters as ``c (i - j) + const``, proven from
        ``arange`` on: equal lags meet equal numbers.
    Skips when:    anything else comes in along queries or keys, or it differs within the batch.
    """
    found = _parted(node, read)
    return replace(found, heads=_heads(found)) if found is not None and _heads(found) else None


def _parted(node: Any, read: Reading) -> ByLag | None:
    """A bias apart from the mask that it was joined with."""
    target, args = node.target, node.args
    if node.op != "call_function":
        return None
    if target in _SAME and len(shape_of(args[0]) or ()) == len(shape_of(node) or ()):
        return _parted(args[0], read)
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        return _chosen(read(args[0]), args[1], args[2], read) or _chosen(
            read(args[0]), args[2], args[1], read, flipped=True
        )
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return _chosen(read(args[1]), args[0], args[2], read, flipped=True)
    if target is aten.add.Tensor and node.kwargs.get("alpha", 1) == 1:
        for bias, mask in (args[:2], args[1::-1]):
            hides = read(mask)
            inner = _parted(bias, read) if isinstance(hides, Added) else None
            if isinstance(hides, Added) and inner is not None:
                value = max(hides.value, inner.value) if inner.value < 0 else hides.value
                return ByLag(inner.formula, All((inner.seen, hides.seen)), value, inner.rank)
    formula = _Proof(read).of(node, -2, -1)
    return (
        None if formula is None else ByLag(formula, All(()), torch.inf, len(shape_of(node) or ()))
    )


def _chosen(
    cond: Any, bias: Any, other: Any, read: Reading, *, flipped: bool = False
) -> ByLag | None:
    """The bias where the condition holds (or does not, if flipped), else what hides."""
    seen, low = seen_of(cond), number_of(read(other))
    if seen is None or low is None or low > HIDES or not isinstance(bias, Node):
        return None
    inner = _parted(bias, read)
    if inner is None:
        return None
    value = max(low, inner.value) if inner.value < 0 else low
    shown = All((inner.seen, never(seen) if flipped else seen))
    return ByLag(inner.formula, shown, value, inner.rank)


class _Proof:
    """A formula for each node of a bias, whose queries and keys are two given dimensions."""

    def __init__(self, read: Reading) -> None:
        self.read = read
        self.found: dict[tuple[Node, int, int], Formula | None] = {}

    def of(self, node: Node, q: int, k: int) -> Formula | None:
        key = (node, q, k)
        if key not in self.found:
            self.found[key] = None
            self.found[key] = self._of(node, q, k)
        return self.found[key]

    def _of(self, node: Any, q: int, k: int) -> Formula | None:
        shape, dtype = shape_of(node), dtype_of(node)
        if shape is None or dtype is None or storage_of(node) in self.read.written:
            return None
        if all(is_one(shape[d]) for d in (q, k) if -d <= len(shape)):
            return Kept(node)
        value = self.read(node)
        if isinstance(value, Line) and dict(value.coefs).keys() == {q, k}:
            c = dict(value.coefs)
            if c[q] == -c[k]:
                return Lag(c[q], value.const, value.size, len(shape), k, dtype)
        if isinstance(value, AtMost) and dict(value.line.coefs).keys() == {q, k}:
            c = dict(value.line.coefs)
            if c[q] == -c[k]:
                lag = Lag(c[q], value.line.const, False, len(shape), k, torch.int64)
                return Made(aten.le.Scalar, (lag, 0))
        number = number_of(value)
        if number is not None:
            return Made(aten.full.default, ([1] * len(shape), number), (("dtype", dtype),))
        return self._made(node, q, k, shape)

    def _made(self, node: Any, q: int, k: int, shape: tuple[Any, ...]) -> Formula | None:
        target, args = node.target, node.args
        if target is aten.add_.Tensor:
            target = aten.add.Tensor
        if target in _EACH:
            return self._each(target, node, q, k)
        if target in _SAME:  # broadcast where it is used
            inner = self.of(args[0], q, k)
            for _ in range(len(shape) - len(shape_of(args[0]) or ())):
                inner = None if inner is None else Made(aten.unsqueeze.default, (inner, 0))
            return inner
        if target is aten.slice.Tensor:
            whole = [*map(str, shape)] == [*map(str, shape_of(args[0]) or ())]
            return self.of(args[0], q, k) if whole else None
        if target in (aten.embedding.default, aten.index.Tensor):
            return self._looked_up(node, q, k)
        return self._moved(node, q, k, len(shape))

    def _each(self, target: Any, node: Any, q: int, k: int) -> Formula | None:
        given: list[Any] = []
        for arg in node.args:
            if isinstance(arg, Node):
                arg = self.of(arg, q, k)
                if arg is None:
                    return None
            given.append(arg)
        if any(isinstance(v, Node) for v in node.kwargs.values()):
            return None
        return Made(target, tuple(given), tuple(node.kwargs.items()))

    def _looked_up(self, node: Any, q: int, k: int) -> Formula | None:
        """Rows of a table: what is behind the index are the table's further dimensions."""
        table, index = node.args[:2]
        if node.target is aten.index.Tensor:
            if len(index) != 1 or not isinstance(index[0], Node):
                return None
            index = index[0]
            if dtype_of(index) == torch.bool:
                return None
        behind = len(shape_of(table) or ()) - 1
        if max(q, k) + behind >= 0:
            return None
        inner = self.of(index, q + behind, k + behind)
        if inner is None:
            return None
        if node.target is aten.index.Tensor:
            return Made(node.target, (Kept(table), [inner]))
        return Made(node.target, (Kept(table), inner))

    def _moved(self, node: Any, q: int, k: int, rank: int) -> Formula | None:
        target, args = node.target, node.args
        if target is aten.permute.default:
            order = [d % rank - rank for d in args[1]]
            inner = self.of(args[0], order[q], order[k])
        elif target is aten.transpose.int:
            swap = {args[1] % rank: args[2] % rank, args[2] % rank: args[1] % rank}
            inner = self.of(args[0], *(swap.get(d + rank, d + rank) - rank for d in (q, k)))
        elif target is aten.unsqueeze.default:
            new = args[1] % rank - rank
            if new in (q, k):
                return None
            inner = self.of(args[0], *(d + 1 if d < new else d for d in (q, k)))
        else:
            return None
        return None if inner is None else Made(target, (inner, *args[1:]))


# ---------------------------------------------------------------------------- computing it


def computed(found: ByLag, lags: Any, call: Call, get: Callable[[Node], Any]) -> Any:
    """The bias of each lag, ``(H or 1, lags)``.

    Args:
        lags: the vector of ``i - j``, ascending: entries stand as the operator reads them.
        call: ``call(op, *args, **kwargs)`` applies an operator, or puts it into a graph.
        get: a node's tensor, or its node in that graph.
    """
    value = call(aten.select.int, _four(found, lags, call, get), 0, 0)
    return call(aten.select.int, value, 1, 0)


def _four(found: ByLag, lags: Any, call: Call, get: Callable[[Node], Any]) -> Any:
    """The same as (1, H or 1, 1, lags)."""
    made: dict[int, Any] = {}

    def of(part: Any) -> Any:
        if isinstance(part, list):
            return [of(p) for p in part]
        if not isinstance(part, (Lag, Kept, Made)):
            return part
        if id(part) not in made:
            made[id(part)] = one(part)
        return made[id(part)]

    def one(part: Formula) -> Any:
        if isinstance(part, Kept):
            return get(part.node)
        if isinstance(part, Made):
            return call(part.op, *map(of, part.args), **dict(part.kwargs))
        line = call(aten.add.Scalar, call(aten.mul.Scalar, lags, part.factor), part.const)
        line = call(aten.abs.default, line) if part.size else line
        line = call(aten.to.dtype, line, part.dtype)
        for _ in range(part.rank + part.keys):
            line = call(aten.unsqueeze.default, line, 0)
        for _ in range(-part.keys - 1):
            line = call(aten.unsqueeze.default, line, -1)
        return line

    value = of(found.formula)
    for _ in range(4 - found.rank):
        value = call(aten.unsqueeze.default, value, 0)
    return value


def _heads(found: ByLag) -> int:
    """How many heads have a value of their own; 0 if sequences or queries have."""

    def empty(node: Node) -> Tensor:
        sizes = [_hint(s) for s in shape_of(node) or ()]
        return torch.empty(sizes, dtype=dtype_of(node), device="meta")

    def call(op: Any, *args: Any, **kwargs: Any) -> Any:
        placed = "device" in kwargs or op is aten.full.default
        return op(*args, **{**kwargs, **({"device": "meta"} if placed else {})})

    lags = torch.empty(_SOME, dtype=torch.int64, device="meta")
    shape = tuple(_four(found, lags, call, empty).shape)
    return shape[1] if len(shape) == 4 and shape[::2] == (1, 1) and shape[3] == _SOME else 0


def _hint(size: Any) -> int:
    return int(getattr(getattr(size, "node", None), "hint", size))

"""What operators on indices do: ranges, shapes, sums, copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from structc.passes.predicates import (
    HIDES,
    Added,
    All,
    Entries,
    Line,
    Number,
    Reader,
    Value,
    always,
    dtype_of,
    is_one,
    is_seen,
    moves,
    never,
    number_of,
    seen_of,
    shape_of,
    shifted,
)

aten = torch.ops.aten
Rule = Callable[[Any, Reader], Value]
_WIDER = (torch.int64, torch.int32)
"""Whole numbers stay apart in these, if they come from no wider ones."""


def _arange(node: Any, read: Reader) -> Value:
    args = node.args
    start = 0 if len(args) == 1 else args[0]
    step = args[2] if len(args) > 2 else 1
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    return Line(((-1, step),), start)


def _same(node: Any, read: Reader) -> Value:
    """Copies, casts, expansions: an index from the right means what it meant."""
    value, dtype = read(node.args[0]), dtype_of(node)
    if isinstance(value, Line) and dtype == torch.bool:
        return None
    if isinstance(value, Entries) and dtype != value.source.meta["val"].dtype:
        wider = dtype in _WIDER and value.source.meta["val"].dtype.itemsize <= dtype.itemsize
        return value if wider else None
    if is_seen(value) and dtype != torch.bool:
        return Number(value)
    if isinstance(value, Number) and dtype == torch.bool:
        return value.seen
    if isinstance(value, Added) and dtype == torch.bool:
        return never(value.seen)  # true where something is added
    if isinstance(value, Added) and dtype is not None and not dtype.is_floating_point:
        return None
    return value


def _repeat(node: Any, read: Reader) -> Value:
    """Along dimensions of size 1, or once: as an expansion."""
    shape, times = shape_of(node.args[0]), node.args[1]
    if shape is None or not isinstance(times, (list, tuple)):
        return None
    own = zip(shape, times[len(times) - len(shape) :], strict=True)
    return _same(node, read) if all(is_one(size) or is_one(t) for size, t in own) else None


def _unsqueeze(node: Any, read: Reader) -> Value:
    shape = shape_of(node.args[0])
    at = node.args[1] if len(node.args) > 1 else None
    if shape is None or not isinstance(at, int):
        return None
    rank = len(shape)
    place = at + rank + 1 if at < 0 else at
    return moves(read(node.args[0]), lambda d: d - 1 if d < place - rank else d)


def _view(node: Any, read: Reader) -> Value:
    """Dimensions of size 1 that come or go."""
    before, after = shape_of(node.args[0]), shape_of(node)
    if before is None or after is None:
        return None
    old = [d for d in range(-len(before), 0) if not is_one(before[d])]
    new = [d for d in range(-len(after), 0) if not is_one(after[d])]
    if [str(before[d]) for d in old] != [str(after[d]) for d in new]:
        return None
    places = dict(zip(old, new, strict=True))
    return moves(read(node.args[0]), lambda d: places.get(d))


def _transpose(node: Any, read: Reader) -> Value:
    shape, (_, a, b) = shape_of(node.args[0]), node.args
    if shape is None or not isinstance(a, int) or not isinstance(b, int):
        return None
    first, second = (d - len(shape) if d >= 0 else d for d in (a, b))
    places = {first: second, second: first}
    return moves(read(node.args[0]), lambda d: places.get(d, d))


def _permute(node: Any, read: Reader) -> Value:
    order = node.args[1]
    rank = len(order)
    places = {d % rank - rank: at - rank for at, d in enumerate(order)}
    return moves(read(node.args[0]), lambda d: places.get(d))


def _slice(node: Any, read: Reader) -> Value:
    """From a start that is a number on; a tensor that is sliced is another tensor."""
    value, shape = read(node.args[0]), shape_of(node.args[0])
    given: list[Any] = [0, 0, None, 1]
    given[: len(node.args) - 1] = node.args[1:]
    dim, start, _, step = given
    start = 0 if start is None else start
    if shape is None or not isinstance(dim, int) or step != 1:
        return None
    if start == 0 and [*map(str, shape)] == [*map(str, shape_of(node) or ())]:
        return value
    if not isinstance(start, int) or start < 0:
        return None
    return shifted(value, dim if dim < 0 else dim - len(shape), start)


def _sum(sign: int) -> Callable[[Any, Reader], Value]:
    def rule(node: Any, read: Reader) -> Value:
        a, b = (read(x) for x in node.args[:2])
        if node.kwargs.get("alpha", 1) != 1:
            return None
        if isinstance(a, Line) and isinstance(b, Line) and not (a.size or b.size):
            return a.plus(b, sign)
        if isinstance(a, Added) and isinstance(b, Added) and sign > 0:
            return Added(All((a.seen, b.seen)), max(a.value, b.value))
        return _one_minus(a, b) if sign < 0 else None

    return rule


def _rsub(node: Any, read: Reader) -> Value:
    a, b = (read(x) for x in node.args[:2])
    if isinstance(a, Line) and isinstance(b, Line) and not (a.size or b.size):
        return b.plus(a, -1)
    return _one_minus(b, a)


def _one_minus(a: Value, b: Value) -> Value:
    one = a == 1.0 if isinstance(a, float) else a == Line((), 1)
    return Number(never(b.seen)) if one and isinstance(b, Number) else None


def _diff(node: Any, read: Reader) -> Value:
    """Differences of neighbours along the last dimension, the first one to what stands before."""
    value, before = read(node.args[0]), read((*node.args, None, None, None)[3])
    if node.args[1:3] not in ((1, -1), (1,)) or len(node.args) > 4 or node.kwargs:
        return None
    if not isinstance(value, Line) or not isinstance(before, Line) or value.size or before.size:
        return None
    step = dict(value.coefs).get(-1, 0)
    first = Line(tuple((d, c) for d, c in value.coefs if d != -1), value.const)
    return Line((), step) if first.plus(before, -1) == Line((), step) else None


def _cumsum(node: Any, read: Reader) -> Value:
    """Of zeros."""
    value = read(node.args[0])
    seen = seen_of(value)
    zero = value == Line((), 0) or (seen is not None and always(never(seen)))
    return Line((), 0) if zero else None


def _index(node: Any, read: Reader) -> Value:
    """Entries of an index tensor at places that are indices themselves."""
    value, places = read(node.args[0]), node.args[1]
    shape = shape_of(node.args[0])
    if isinstance(value, Entries):
        return _entries_at(value, places, read)
    if not isinstance(value, Line) or value.size or shape is None or len(places) != len(shape):
        return None
    if not all(isinstance(place, Node) for place in places):
        return None  # a dimension that stays moves those of the places
    found = Line((), value.const)
    for dim, c in value.coefs:
        place = read(places[dim])
        if not isinstance(place, Line) or place.size or place.const < 0:
            return None
        if any(step < 0 for _, step in place.coefs):
            return None
        found = found.plus(place.times(c))
    return found


def _entries_at(value: Entries, places: Any, read: Reader) -> Value:
    """Those of a tensor, each dimension by an index of its own: where they stand then."""
    found: list[int | None] = []
    if len(places) != len(value.places) or value.places != (*range(-len(places), 0),):
        return None
    for place in places:
        line = read(place) if isinstance(place, Node) else None
        if not isinstance(line, Line) or line.size or line.const or len(line.coefs) != 1:
            return None
        ((dim, step),) = line.coefs
        if step != 1:
            return None
        found.append(dim)
    return Entries(value.source, tuple(found)) if len(set(found)) == len(found) else None


def _product(node: Any, read: Reader) -> Value:
    a, b = (read(x) for x in node.args[:2])
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Line) and isinstance(other, Line) and not other.coefs and not one.size:
            return one.times(other.const)
        number = number_of(other)
        if isinstance(one, Number) and number is not None and number <= HIDES:
            return Added(never(one.seen), number)
    yes, no = (seen_of(x) if is_seen(x) else None for x in (a, b))
    return None if yes is None or no is None else All((yes, no))


def _abs(node: Any, read: Reader) -> Value:
    value = read(node.args[0])
    return replace(value, size=True) if isinstance(value, Line) else None


def _rules() -> Mapping[Any, Rule]:
    table: dict[Any, Rule] = {
        aten.arange.default: _arange,
        aten.arange.start: _arange,
        aten.arange.start_step: _arange,
        aten.unsqueeze.default: _unsqueeze,
        aten.slice.Tensor: _slice,
        aten.transpose.int: _transpose,
        aten.permute.default: _permute,
        aten.repeat.default: _repeat,
        aten.rsub.Scalar: _rsub,
        aten.rsub.Tensor: _rsub,
        aten.abs.default: _abs,
        aten.diff.default: _diff,
        aten.cumsum.default: _cumsum,
        aten.index.Tensor: _index,
    }
    for op in (
        aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default,
        aten.clone.default, aten.contiguous.default, aten.expand.default, aten.detach_.default,
        aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default,
    ):  # fmt: skip
        table[op] = _same
    for op in (
        aten.view.default,
        aten.reshape.default,
        aten.squeeze.dim,
        aten._unsafe_view.default,
    ):
        table[op] = _view
    for op in (aten.add.Tensor, aten.add.Scalar, aten.add_.Tensor):
        table[op] = _sum(1)
    for op in (aten.sub.Tensor, aten.sub.Scalar):
        table[op] = _sum(-1)
    for op in (aten.mul.Tensor, aten.mul.Scalar):
        table[op] = _product
    return table


INDEX_RULES = _rules()
"""For each operator what it makes of what is known of its arguments."""

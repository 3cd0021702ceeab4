"""What a mask in a graph hides, proven from how the graph computes it.

An export writes every mask out: ``arange``, comparisons, ``and``, ``where``. These are read as
statements about the indices of a query i and a key j, ``a i + b j + c <= 0``, and as tensors that
nothing is known of. Nothing is concluded from values at some lengths: a window that is longer than
an example looks causal there, and so may what depends on the data.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from structc.passes.predicates import (
    Added,
    All,
    AtMost,
    Given,
    Line,
    Number,
    Seen,
    Some,
    Value,
    always,
    holds,
    is_one,
    moves,
    never,
    seen_without_units,
    without_units,
)
from structc.passes.writes import storage_of, written_to

aten = torch.ops.aten
HIDES = -1e30
"""What is added to hide a key is below this."""


def read(node: Any, known: dict[Node, Value]) -> Value:
    """What is known of a node's value; a number stands for a tensor that is it everywhere."""
    if isinstance(node, (bool, int)):
        return Line((), int(node))
    if isinstance(node, float):
        return node
    if not isinstance(node, Node):
        return None
    if node not in known:
        known[node] = None  # a cycle cannot be; an exception would leave it unknown
        found = _step(node, known)
        if found is None and _dtype(node) == torch.bool:
            found = Given(node)
        known[node] = _settled(found, _dtype(node), _shape(node))
    return known[node]


_WHOLE = (torch.int64, torch.int32, torch.float64, torch.float32)
"""Dtypes in which indices do not wrap or round."""


def _settled(value: Value, dtype: torch.dtype | None, shape: tuple[Any, ...] | None) -> Value:
    """A value in its node's dtype."""
    if isinstance(value, Line):
        if value.coefs and dtype is not None and dtype not in _WHOLE:
            return None
        return without_units(value, shape)
    if isinstance(value, (AtMost, All, Some, Given)):
        seen = seen_without_units(value, shape)
        return seen if dtype in (None, torch.bool) else Number(seen)
    if isinstance(value, Number):
        return Number(seen_without_units(value.seen, shape))
    if isinstance(value, Added):
        return Added(seen_without_units(value.seen, shape), value.value)
    return value


def seen_by(node: Node) -> tuple[Seen, float] | None:
    """Which keys a mask shows, and what it adds to the others (``-inf`` if boolean).

    None if it is no mask, or not known to be one. What something writes to in place is only known
    as the tensor that it is: an export does not turn writes into values.
    """
    written = written_to(node.graph)
    known: dict[Node, Value] = {}
    if written:
        for one in node.graph.nodes:
            if storage_of(one) in written:
                known[one] = Given(one) if _dtype(one) == torch.bool else None
    value = read(node, known)
    if isinstance(value, (AtMost, All, Some, Given)):
        return value, float("-inf")
    return (value.seen, value.value) if isinstance(value, Added) else None


# ---------------------------------------------------------------------------- operators


def _step(node: Any, known: dict[Node, Value]) -> Value:
    rule = _RULES.get(node.target) if node.op == "call_function" else None
    return None if rule is None else rule(node, known)


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _shape(node: Any) -> tuple[Any, ...] | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _arange(node: Any, known: dict[Node, Value]) -> Value:
    args = node.args
    start = 0 if len(args) == 1 else args[0]
    step = args[2] if len(args) > 2 else 1
    if not isinstance(start, int) or not isinstance(step, int):
        return None
    return Line(((-1, step),), start)


def _same(node: Any, known: dict[Node, Value]) -> Value:
    """Copies, casts, expansions: an index from the right means what it meant."""
    value, dtype = read(node.args[0], known), _dtype(node)
    if isinstance(value, Line) and dtype == torch.bool:
        return None
    if isinstance(value, (AtMost, All, Some, Given)) and dtype != torch.bool:
        return Number(value)
    if isinstance(value, Number) and dtype == torch.bool:
        return value.seen
    if isinstance(value, Added) and dtype is not None and not dtype.is_floating_point:
        return None
    return value


def _unsqueeze(node: Any, known: dict[Node, Value]) -> Value:
    shape = _shape(node.args[0])
    at = node.args[1] if len(node.args) > 1 else None
    if shape is None or not isinstance(at, int):
        return None
    rank = len(shape)
    place = at + rank + 1 if at < 0 else at
    return moves(read(node.args[0], known), lambda d: d - 1 if d < place - rank else d)


def _view(node: Any, known: dict[Node, Value]) -> Value:
    """Dimensions of size 1 that come or go."""
    before, after = _shape(node.args[0]), _shape(node)
    if before is None or after is None:
        return None
    old = [d for d in range(-len(before), 0) if not is_one(before[d])]
    new = [d for d in range(-len(after), 0) if not is_one(after[d])]
    if [str(before[d]) for d in old] != [str(after[d]) for d in new]:
        return None
    places = dict(zip(old, new, strict=True))
    return moves(read(node.args[0], known), lambda d: places.get(d))


def _transpose(node: Any, known: dict[Node, Value]) -> Value:
    shape, (_, a, b) = _shape(node.args[0]), node.args
    if shape is None or not isinstance(a, int) or not isinstance(b, int):
        return None
    first, second = (d - len(shape) if d >= 0 else d for d in (a, b))
    places = {first: second, second: first}
    return moves(read(node.args[0], known), lambda d: places.get(d, d))


def _slice(node: Any, known: dict[Node, Value]) -> Value:
    value, shape = read(node.args[0], known), _shape(node.args[0])
    if value is None or shape is None or isinstance(value, Given):
        return None
    given: list[Any] = [0, 0, None, 1]
    given[: len(node.args) - 1] = node.args[1:]
    dim, start, _, step = given
    if not isinstance(dim, int) or start not in (0, None) or step != 1:
        return None
    return value


def _sum(sign: int) -> Callable[[Any, dict[Node, Value]], Value]:
    def rule(node: Any, known: dict[Node, Value]) -> Value:
        a, b = (read(x, known) for x in node.args[:2])
        if node.kwargs.get("alpha", 1) != 1:
            return None
        if isinstance(a, Line) and isinstance(b, Line) and not (a.size or b.size):
            return a.plus(b, sign)
        if isinstance(a, Added) and isinstance(b, Added) and sign > 0:
            return Added(All((a.seen, b.seen)), max(a.value, b.value))
        return _one_minus(a, b) if sign < 0 else None

    return rule


def _rsub(node: Any, known: dict[Node, Value]) -> Value:
    a, b = (read(x, known) for x in node.args[:2])
    if isinstance(a, Line) and isinstance(b, Line) and not (a.size or b.size):
        return b.plus(a, -1)
    return _one_minus(b, a)


def _one_minus(a: Value, b: Value) -> Value:
    one = a == 1.0 if isinstance(a, float) else a == Line((), 1)
    return Number(never(b.seen)) if one and isinstance(b, Number) else None


def _diff(node: Any, known: dict[Node, Value]) -> Value:
    """Differences of neighbours along the last dimension, the first one to what stands before."""
    value, before = read(node.args[0], known), read((*node.args, None, None, None)[3], known)
    if node.args[1:3] not in ((1, -1), (1,)) or len(node.args) > 4 or node.kwargs:
        return None
    if not isinstance(value, Line) or not isinstance(before, Line) or value.size or before.size:
        return None
    step = dict(value.coefs).get(-1, 0)
    first = Line(tuple((d, c) for d, c in value.coefs if d != -1), value.const)
    return Line((), step) if first.plus(before, -1) == Line((), step) else None


def _cumsum(node: Any, known: dict[Node, Value]) -> Value:
    """Of zeros."""
    value = read(node.args[0], known)
    seen = _seen(value)
    zero = value == Line((), 0) or (seen is not None and always(never(seen)))
    return Line((), 0) if zero else None


def _index(node: Any, known: dict[Node, Value]) -> Value:
    """Entries of an index tensor at places that are indices themselves."""
    value, places = read(node.args[0], known), node.args[1]
    shape = _shape(node.args[0])
    if not isinstance(value, Line) or value.size or shape is None or len(places) != len(shape):
        return None
    if not all(isinstance(place, Node) for place in places):
        return None  # a dimension that stays moves those of the places
    found = Line((), value.const)
    for dim, c in value.coefs:
        place = read(places[dim], known)
        if not isinstance(place, Line) or place.size or place.const < 0:
            return None
        if any(step < 0 for _, step in place.coefs):
            return None
        found = found.plus(place.times(c))
    return found


def _product(node: Any, known: dict[Node, Value]) -> Value:
    a, b = (read(x, known) for x in node.args[:2])
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Line) and isinstance(other, Line) and not other.coefs and not one.size:
            return one.times(other.const)
        number = _number(other)
        if isinstance(one, Number) and number is not None and number <= HIDES:
            return Added(never(one.seen), number)
    seen = (AtMost, All, Some, Given)
    if isinstance(a, seen) and isinstance(b, seen):
        return All((a, b))
    return None


def _number(value: Value) -> float | None:
    if isinstance(value, float):
        return value
    return float(value.const) if isinstance(value, Line) and not value.coefs else None


def _compare(less: bool, strict: bool) -> Callable[[Any, dict[Node, Value]], Value]:
    def rule(node: Any, known: dict[Node, Value]) -> Value:
        a, b = (read(x, known) for x in node.args[:2])
        if not isinstance(a, Line) or not isinstance(b, Line):
            return None
        low, high = (a, b) if less else (b, a)
        gap = Line((), int(strict))
        if high.size and low.size:
            return None
        if high.size:  # |x| >= c
            plain = replace(high, size=False)
            sides = low.plus(plain, -1), low.plus(plain)
            return Some(tuple(holds(side.plus(gap)) for side in sides))
        if low.size:  # |x| <= c
            plain = replace(low, size=False)
            sides = plain.plus(high, -1), plain.times(-1).plus(high, -1)
            return All(tuple(holds(side.plus(gap)) for side in sides))
        return holds(low.plus(high, -1).plus(gap))

    return rule


def _equal(node: Any, known: dict[Node, Value]) -> Value:
    a, b = (read(x, known) for x in node.args[:2])
    if isinstance(a, Line) and isinstance(b, Line) and not (a.size or b.size):
        return All((holds(a.plus(b, -1)), holds(b.plus(a, -1))))
    if isinstance(a, Number) and isinstance(b, Line) and not b.coefs and b.const in (0, 1):
        return a.seen if b.const else never(a.seen)
    return None


def _both(kind: type[All] | type[Some]) -> Callable[[Any, dict[Node, Value]], Value]:
    def rule(node: Any, known: dict[Node, Value]) -> Value:
        a, b = (_seen(read(x, known)) for x in node.args[:2])
        return None if a is None or b is None else kind((a, b))

    return rule


def _seen(value: Value) -> Seen | None:
    """A boolean value; the constants True and False too."""
    if isinstance(value, (AtMost, All, Some, Given)):
        return value
    if isinstance(value, Line) and not value.coefs and value.const in (0, 1):
        return All(()) if value.const else Some(())
    return None


def _not(node: Any, known: dict[Node, Value]) -> Value:
    value = _seen(read(node.args[0], known))
    return None if value is None else never(value)


def _abs(node: Any, known: dict[Node, Value]) -> Value:
    value = read(node.args[0], known)
    return replace(value, size=True) if isinstance(value, Line) else None


def _filled(at: int | None, value: float | None = None) -> Callable[[Node, Any], Value]:
    """A tensor that is one number everywhere; booleans as always or never."""

    def rule(node: Any, known: dict[Node, Value]) -> Value:
        number = node.args[at] if at is not None and len(node.args) > at else value
        if not isinstance(number, (bool, int, float)):
            return None
        if _dtype(node) == torch.bool:
            return All(()) if number else Some(())
        return Line((), int(number)) if number == 0 or number == 1 else float(number)

    return rule


def _triangle(upper: bool) -> Callable[[Any, dict[Node, Value]], Value]:
    """Zeros below or above a diagonal."""

    def rule(node: Any, known: dict[Node, Value]) -> Value:
        value = read(node.args[0], known)
        k = node.args[1] if len(node.args) > 1 else 0
        if not isinstance(k, int):
            return None
        kept = AtMost(Line(((-2, 1), (-1, -1)), k) if upper else Line(((-2, -1), (-1, 1)), -k))
        seen, number = _seen(value), _number(value)
        if _dtype(node) == torch.bool:
            return None if seen is None else All((seen, kept))
        if number is not None and number <= HIDES:
            return Added(never(kept), number)
        if number == 1.0:
            return Number(kept)
        return Number(All((value.seen, kept))) if isinstance(value, Number) else None

    return rule


def _where(node: Any, known: dict[Node, Value]) -> Value:
    cond, a, b = (read(x, known) for x in node.args[:3])
    seen = _seen(cond)
    return None if seen is None else _chosen(seen, a, b)


def _masked_fill(node: Any, known: dict[Node, Value]) -> Value:
    base, cond, value = (read(x, known) for x in node.args[:3])
    seen = _seen(cond)
    return None if seen is None else _chosen(seen, value, base)


def _chosen(cond: Seen, a: Value, b: Value) -> Value:
    """a where cond, else b."""
    left, right = _number(a), _number(b)
    if left == 0 and right is not None and right <= HIDES:
        return Added(cond, right)
    if right == 0 and left is not None and left <= HIDES:
        return Added(never(cond), left)
    if isinstance(b, Added) and left is not None and left <= HIDES:
        return Added(All((b.seen, never(cond))), max(left, b.value))
    yes, no = _seen(a), _seen(b)
    if yes is not None and no is not None:
        return Some((All((cond, yes)), All((never(cond), no))))
    return None


_Rule = Callable[[Any, dict[Node, Value]], Value]


def _rules() -> Mapping[Any, _Rule]:
    table: dict[Any, _Rule] = {
        aten.arange.default: _arange,
        aten.arange.start: _arange,
        aten.arange.start_step: _arange,
        aten.unsqueeze.default: _unsqueeze,
        aten.slice.Tensor: _slice,
        aten.transpose.int: _transpose,
        aten.rsub.Scalar: _rsub,
        aten.rsub.Tensor: _rsub,
        aten.eq.Tensor: _equal,
        aten.eq.Scalar: _equal,
        aten.ne.Tensor: lambda n, k: _negated(_equal(n, k)),
        aten.ne.Scalar: lambda n, k: _negated(_equal(n, k)),
        aten.abs.default: _abs,
        aten.diff.default: _diff,
        aten.cumsum.default: _cumsum,
        aten.index.Tensor: _index,
        aten.tril.default: _triangle(False),
        aten.triu.default: _triangle(True),
        aten.where.self: _where,
        aten.where.ScalarOther: _where,
        aten.where.ScalarSelf: _where,
        aten.where.Scalar: _where,
        aten.masked_fill.Scalar: _masked_fill,
        aten.masked_fill.Tensor: _masked_fill,
        aten.scalar_tensor.default: _filled(0),
        aten.full.default: _filled(1),
        aten.full_like.default: _filled(1),
        aten.new_full.default: _filled(2),
        aten.ones.default: _filled(None, 1.0),
        aten.ones_like.default: _filled(None, 1.0),
        aten.new_ones.default: _filled(None, 1.0),
        aten.zeros.default: _filled(None, 0.0),
        aten.zeros_like.default: _filled(None, 0.0),
        aten.new_zeros.default: _filled(None, 0.0),
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
    for op in (aten.add.Tensor, aten.add.Scalar):
        table[op] = _sum(1)
    for op in (aten.sub.Tensor, aten.sub.Scalar):
        table[op] = _sum(-1)
    for op in (aten.mul.Tensor, aten.mul.Scalar):
        table[op] = _product
    for name, less, strict in (("le", 1, 0), ("lt", 1, 1), ("ge", 0, 0), ("gt", 0, 1)):
        for kind in ("Tensor", "Scalar"):
            table[getattr(getattr(aten, name), kind)] = _compare(bool(less), bool(strict))
    for op in (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default):
        table[op] = _both(All)
    for op in (aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default):
        table[op] = _both(Some)
    table |= {operator.and_: _both(All), operator.or_: _both(Some)}
    for op in (aten.bitwise_not.default, aten.logical_not.default):
        table[op] = _not
    return table


def _negated(value: Value) -> Value:
    return never(value) if isinstance(value, (AtMost, All, Some, Given)) else None


_RULES = _rules()

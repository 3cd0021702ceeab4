"""What comparisons, logic, triangles and choices say of the keys that are seen."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from structc.passes.index_rules import Rule
from structc.passes.predicates import (
    HIDES,
    Added,
    All,
    AtMost,
    Entries,
    Line,
    Number,
    Reader,
    Same,
    Seen,
    Some,
    Value,
    dtype_of,
    holds,
    is_seen,
    never,
    number_of,
    seen_of,
)

aten = torch.ops.aten


def _compare(less: bool, strict: bool) -> Callable[[Any, Reader], Value]:
    def rule(node: Any, read: Reader) -> Value:
        a, b = (read(x) for x in node.args[:2])
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


def _equal(node: Any, read: Reader) -> Value:
    a, b = (read(x) for x in node.args[:2])
    if isinstance(a, Line) and isinstance(b, Line) and not (a.size or b.size):
        return All((holds(a.plus(b, -1)), holds(b.plus(a, -1))))
    if isinstance(a, Entries) and isinstance(b, Entries) and a.source is b.source:
        return Same(a, b)
    if isinstance(a, Number) and isinstance(b, Line) and not b.coefs and b.const in (0, 1):
        return a.seen if b.const else never(a.seen)
    return None


def _negated(value: Value) -> Value:
    return never(value) if is_seen(value) else None


def _both(kind: type[All] | type[Some]) -> Callable[[Any, Reader], Value]:
    def rule(node: Any, read: Reader) -> Value:
        a, b = (seen_of(read(x)) for x in node.args[:2])
        return None if a is None or b is None else kind((a, b))

    return rule


def _not(node: Any, read: Reader) -> Value:
    value = seen_of(read(node.args[0]))
    return None if value is None else never(value)


def _filled(at: int | None, value: float | None = None) -> Callable[[Node, Any], Value]:
    """A tensor that is one number everywhere; booleans as always or never."""

    def rule(node: Any, read: Reader) -> Value:
        number = node.args[at] if at is not None and len(node.args) > at else value
        if not isinstance(number, (bool, int, float)):
            return None
        if dtype_of(node) == torch.bool:
            return All(()) if number else Some(())
        return Line((), int(number)) if number == 0 or number == 1 else float(number)

    return rule


def _triangle(upper: bool) -> Callable[[Any, Reader], Value]:
    """Zeros below or above a diagonal."""

    def rule(node: Any, read: Reader) -> Value:
        value = read(node.args[0])
        k = node.args[1] if len(node.args) > 1 else 0
        if not isinstance(k, int):
            return None
        kept = AtMost(Line(((-2, 1), (-1, -1)), k) if upper else Line(((-2, -1), (-1, 1)), -k))
        seen, number = seen_of(value), number_of(value)
        if dtype_of(node) == torch.bool:
            return None if seen is None else All((seen, kept))
        if number is not None and number <= HIDES:
            return Added(never(kept), number)
        if number == 1.0:
            return Number(kept)
        return Number(All((value.seen, kept))) if isinstance(value, Number) else None

    return rule


def _where(node: Any, read: Reader) -> Value:
    cond, a, b = (read(x) for x in node.args[:3])
    seen = seen_of(cond)
    return None if seen is None else _chosen(seen, a, b)


def _masked_fill(node: Any, read: Reader) -> Value:
    base, cond, value = (read(x) for x in node.args[:3])
    seen = seen_of(cond)
    return None if seen is None else _chosen(seen, value, base)


def _chosen(cond: Seen, a: Value, b: Value) -> Value:
    """a where cond, else b."""
    left, right = number_of(a), number_of(b)
    if left == 0 and right is not None and right <= HIDES:
        return Added(cond, right)
    if right == 0 and left is not None and left <= HIDES:
        return Added(never(cond), left)
    if isinstance(b, Added) and left is not None and left <= HIDES:
        return Added(All((b.seen, never(cond))), max(left, b.value))
    yes, no = seen_of(a), seen_of(b)
    if yes is not None and no is not None:
        return Some((All((cond, yes)), All((never(cond), no))))
    return None


def _rules() -> Mapping[Any, Rule]:
    table: dict[Any, Rule] = {
        aten.eq.Tensor: _equal,
        aten.eq.Scalar: _equal,
        aten.ne.Tensor: lambda n, k: _negated(_equal(n, k)),
        aten.ne.Scalar: lambda n, k: _negated(_equal(n, k)),
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


SEEN_RULES = _rules()
"""For each operator what it makes of what is known of its arguments."""

"""Statements about the indices of a query and a key: what masks are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True)
class Line:
    """``sum_d coefs[d] index_d + const``; dimensions are counted from the right: -1, -2, ..."""

    coefs: tuple[tuple[int, int], ...]
    const: int
    size: bool = False
    """Whether it is taken in absolute value."""

    def plus(self, other: Line, sign: int = 1) -> Line:
        """The sum, or the difference."""
        total = dict(self.coefs)
        for dim, c in other.coefs:
            total[dim] = total.get(dim, 0) + sign * c
        kept = tuple(sorted((d, c) for d, c in total.items() if c))
        return Line(kept, self.const + sign * other.const)

    def moved(self, to: Callable[[int], int]) -> Line:
        """With other dimensions."""
        return replace(self, coefs=tuple(sorted((to(d), c) for d, c in self.coefs)))

    def times(self, factor: int) -> Line:
        return Line(tuple((d, factor * c) for d, c in self.coefs if factor), factor * self.const)


@dataclass(frozen=True)
class AtMost:
    """``line <= 0``."""

    line: Line


@dataclass(frozen=True)
class All:
    """Every part holds; of none, always."""

    parts: tuple[Seen, ...]


@dataclass(frozen=True)
class Some:
    """Some part holds; of none, never."""

    parts: tuple[Seen, ...]


@dataclass(frozen=True)
class Given:
    """A boolean tensor of which nothing is known, or its negation."""

    node: Node
    flipped: bool = False


@dataclass(frozen=True)
class Entries:
    """Those of a tensor of whole numbers of which nothing is known, its dimensions moved.

    Attributes:
        source: the tensor.
        places: where each of its dimensions stands now, None for one of size 1.
    """

    source: Node
    places: tuple[int | None, ...]


@dataclass(frozen=True)
class Same:
    """One tensor has the same entry at two places (two tokens of one document), or has not."""

    a: Entries
    b: Entries
    flipped: bool = False


Seen = AtMost | All | Some | Given | Same


@dataclass(frozen=True)
class Number:
    """1 where it holds, else 0, as a number."""

    seen: Seen


@dataclass(frozen=True)
class Added:
    """0 where a key is seen, else a value that hides it."""

    seen: Seen
    value: float


Value = Line | Entries | AtMost | All | Some | Given | Same | Number | Added | float | None
Reader = Callable[[Any], Value]
"""What is known of a node, or of a number that stands for a tensor that is it everywhere."""
HIDES = -1e30
"""What is added to hide a key is below this."""


def never(seen: Seen) -> Seen:
    """The negation."""
    match seen:
        case AtMost(line):
            return AtMost(line.times(-1).plus(Line((), 1)))
        case All(parts):
            return Some(tuple(map(never, parts)))
        case Some(parts):
            return All(tuple(map(never, parts)))
        case Given(node, flipped):
            return Given(node, not flipped)
        case Same():
            return replace(seen, flipped=not seen.flipped)


def always(seen: Seen) -> bool:
    """Whether it holds for all indices, as far as its parts say."""
    match seen:
        case All(parts):
            return all(map(always, parts))
        case Some(parts):
            return any(map(always, parts))
    return False


def holds(line: Line) -> Seen:
    """``line <= 0``, or what that is for all indices, which are 0 and more."""
    if line.const <= 0 and all(c < 0 for _, c in line.coefs):
        return All(())
    if line.const > 0 and all(c > 0 for _, c in line.coefs):
        return Some(())
    return AtMost(line)


def is_one(size: Any) -> bool:
    """Whether a size is 1 for sure."""
    return isinstance(size, int) and size == 1


def seen_without_units(seen: Seen, shape: tuple[Any, ...] | None) -> Seen:
    """:func:`without_units` of every line."""
    match seen:
        case AtMost(line):
            return holds(without_units(line, shape))
        case All(parts) | Some(parts):
            return type(seen)(tuple(seen_without_units(p, shape) for p in parts))
    return seen


def without_units(line: Line, shape: tuple[Any, ...] | None) -> Line:
    """An index along a dimension of size 1 is 0, also where that is expanded later."""
    sizes = dict(zip(range(-len(shape or ()), 0), shape or (), strict=True))
    return replace(line, coefs=tuple((d, c) for d, c in line.coefs if not is_one(sizes.get(d))))


def moves(value: Value, to: Callable[[int], int | None]) -> Value:
    """A value whose dimensions stand elsewhere; unknown if one of them is gone."""

    def line(at: Line) -> Line | None:
        found = [to(d) for d, _ in at.coefs]
        return None if None in found else at.moved(lambda d: to(d) or 0)

    def entries(at: Entries) -> Entries | None:
        found = tuple(None if d is None else to(d) for d in at.places)
        lost = any(d is not None and f is None for d, f in zip(at.places, found, strict=True))
        return None if lost else Entries(at.source, found)

    return mapped(value, line, entries)


def shifted(value: Value, dim: int, start: int) -> Value:
    """A value from an index on: what was at ``start`` is at 0."""
    if start == 0:
        return mapped(value, lambda at: at, lambda at: at)

    def line(at: Line) -> Line:
        return replace(at, const=at.const + start * dict(at.coefs).get(dim, 0))

    return mapped(value, line, lambda at: None if dim in at.places else at)


def mapped(
    value: Value,
    of_line: Callable[[Line], Line | None],
    of_entries: Callable[[Entries], Entries | None],
) -> Value:
    """A value with another index; unknown where a part of it then is."""
    match value:
        case Line():
            return of_line(value)
        case Entries():
            return of_entries(value)
        case AtMost(line):
            found = of_line(line)
            return None if found is None else AtMost(found)
        case Same(a, b, flipped):
            one, other = of_entries(a), of_entries(b)
            return None if one is None or other is None else Same(one, other, flipped)
        case All(parts) | Some(parts):
            several = [mapped(p, of_line, of_entries) for p in parts]
            if any(p is None for p in several):
                return None
            return type(value)(tuple(several))  # type: ignore[arg-type]
        case Number(seen):
            moved = mapped(seen, of_line, of_entries)
            return None if moved is None else Number(moved)  # type: ignore[arg-type]
        case Added(seen, low):
            moved = mapped(seen, of_line, of_entries)
            return None if moved is None else Added(moved, low)  # type: ignore[arg-type]
        case Given():
            return None  # it is its node that is meant: another shape is another node
    return value


def on_units(value: Value, shape: tuple[Any, ...] | None) -> bool:
    """Whether entries are told apart along a dimension of size 1, where all indices are 0."""
    sizes = dict(zip(range(-len(shape or ()), 0), shape or (), strict=True))
    match value:
        case Entries():
            return any(d is not None and is_one(sizes.get(d)) for d in value.places)
        case Same(a, b):
            return on_units(a, shape) or on_units(b, shape)
        case All(parts) | Some(parts):
            return any(on_units(p, shape) for p in parts)
        case Number(seen) | Added(seen, _):
            return on_units(seen, shape)
    return False


def number_of(value: Value) -> float | None:
    """The number that a tensor is everywhere."""
    if isinstance(value, float):
        return value
    return float(value.const) if isinstance(value, Line) and not value.coefs else None


def seen_of(value: Value) -> Seen | None:
    """A boolean value; the constants True and False too."""
    if isinstance(value, (AtMost, All, Some, Given, Same)):
        return value
    if isinstance(value, Line) and not value.coefs and value.const in (0, 1):
        return All(()) if value.const else Some(())
    return None


def is_seen(value: Value) -> TypeGuard[Seen]:
    """Whether it is a statement on indices."""
    return isinstance(value, (AtMost, All, Some, Given, Same))


def dtype_of(node: Any) -> torch.dtype | None:
    """Of a node's tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """Of a node's tensor; None if it is none."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None

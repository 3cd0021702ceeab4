"""Statements about the indices of a query and a key: what masks are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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


Seen = AtMost | All | Some | Given


@dataclass(frozen=True)
class Number:
    """1 where it holds, else 0, as a number."""

    seen: Seen


@dataclass(frozen=True)
class Added:
    """0 where a key is seen, else a value that hides it."""

    seen: Seen
    value: float


Value = Line | AtMost | All | Some | Given | Number | Added | float | None


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
    match value:
        case Line():
            found = [to(d) for d, _ in value.coefs]
            return None if None in found else value.moved(lambda d: to(d) or 0)
        case AtMost(line):
            moved = moves(line, to)
            return AtMost(moved) if isinstance(moved, Line) else None
        case All(parts) | Some(parts):
            several = [moves(p, to) for p in parts]
            if any(p is None for p in several):
                return None
            return type(value)(tuple(several))  # type: ignore[arg-type]
        case Number(seen):
            moved = moves(seen, to)
            return None if moved is None else Number(moved)  # type: ignore[arg-type]
        case Added(seen, low):
            moved = moves(seen, to)
            return None if moved is None else Added(moved, low)  # type: ignore[arg-type]
        case Given():
            return None  # it is its node that is meant: another shape is another node
    return value

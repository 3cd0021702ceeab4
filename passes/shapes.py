"""What export assumed about sizes while it traced: its guards, as ranges of single symbols.

A model may ask ``if x.shape[1] % 4 == 0`` and take one way; its graph is that way alone. Guards of
one symbol become the range around the example in which they hold. Those of several that do not
always hold fix the symbols that they name, so that the graph runs where it was seen to be right.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
from torch.utils._sympy.functions import Mod, PythonMod
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

log = logging.getLogger("structc.shapes")

UNBOUNDED = 2**31 - 1
STEPS = 512
"""So many sizes around the example's are tried where a guard does not hold for all."""
LARGE = 60
"""Operations of a guard above which factors are not worth their time: windows make such."""
Ranges = Mapping[str, tuple[int, int]]


def facts_of(sizes: Iterable[Any]) -> list[Any]:
    """The guards that hold for some symbolic sizes of an exported program, as sympy relations."""
    environments = {id(e): e for s in sizes if (e := getattr(s.node, "shape_env", None))}
    return [e.replace(g.expr) for e in environments.values() for g in e.guards]


def holds_at(facts: Iterable[Any], sizes: Mapping[str, int]) -> bool:
    """Whether no fact is known to be false at some sizes."""
    return all(_at(fact, sizes) != sympy.false for fact in facts)


def narrow(facts: Iterable[Any], ranges: Ranges, home: Mapping[str, int]) -> Ranges:
    """Ranges inside the given ones in which all facts hold together.

    Args:
        facts: relations between symbols.
        ranges: by the names of symbols; what a fact says about others is not asked.
        home: sizes at which the facts hold.
    """
    found = dict(ranges)
    for fact in sorted(set(facts), key=lambda f: (len(f.free_symbols), f.count_ops(), str(f))):
        fixed = {name: low for name, (low, high) in found.items() if low == high}
        left = _at(fact, fixed)
        names = sorted(s.name for s in left.free_symbols if s.name in found)
        if not names or _always(left, found):
            continue
        if len(left.free_symbols) == 1:
            found[names[0]] = _around(left, names[0], found, home[names[0]])
        else:
            found.update({name: (home[name], home[name]) for name in names})
        log.info("%s: sizes narrowed to %s", left, {name: found[name] for name in names})
    return found


def _at(fact: Any, sizes: Mapping[str, int]) -> Any:
    return fact.xreplace(
        {s: sympy.Integer(sizes[s.name]) for s in fact.free_symbols if s.name in sizes}
    )


def _around(fact: Any, name: str, ranges: Ranges, home: int) -> tuple[int, int]:
    """The sizes next to the example's, in one piece, at which a fact of one symbol holds."""
    low, high = ranges[name]
    start = min(max(home, low), high)  # a batch of one was traced as two
    if _at(fact, {name: start}) != sympy.true:
        return home, home
    first = last = start
    while first > max(low, start - STEPS) and _at(fact, {name: first - 1}) == sympy.true:
        first -= 1
    if _always(fact, {name: (start, high)}):
        return first, high
    while last < min(high, start + STEPS) and _at(fact, {name: last + 1}) == sympy.true:
        last += 1
    return first, last


def _always(fact: Any, ranges: Ranges) -> bool:
    """Whether a fact can be shown to hold everywhere in some ranges."""
    if fact in (sympy.true, sympy.false):
        return bool(fact)
    try:
        if _known(fact, ranges):
            return True
        if fact.count_ops() > LARGE:
            return False
        fact = fact.replace(
            lambda e: isinstance(e, (Mod, PythonMod)),
            lambda e: e.args[0] if _smaller(e.args[0], e.args[1], ranges) else e,
        )
        if not isinstance(fact, sympy.core.relational.Relational):
            return bool(fact == sympy.true)
        # as one product: bounds of a * b - a say little, those of a * (b - 1) everything
        gap = sympy.factor(sympy.expand(fact.lhs - fact.rhs))
        return _known(fact, ranges) or _known(fact.func(gap, 0), ranges)
    except Exception as e:  # what sympy cannot handle is not known to hold
        log.info("cannot bound %s: %s", fact, e)
        return False


def _smaller(part: Any, whole: Any, ranges: Ranges) -> bool:
    """Whether ``0 <= part < whole``, so that a remainder is the part itself."""
    gap = sympy.factor(sympy.expand(whole - part))
    return _known(sympy.Ge(part, 0), ranges) and _known(sympy.Gt(gap, 0), ranges)


def _known(fact: Any, ranges: Ranges) -> bool:
    if fact in (sympy.true, sympy.false):
        return bool(fact)
    bounds: dict[Any, Any] = {
        s: ValueRanges(ranges[s.name][0], _infinite(ranges[s.name][1]))
        for s in fact.free_symbols
        if s.name in ranges
    }
    if len(bounds) < len(fact.free_symbols):
        return False
    return bool(bound_sympy(fact, bounds).lower == sympy.true)


def _infinite(high: int) -> Any:
    return int_oo if high >= UNBOUNDED else high

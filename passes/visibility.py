"""From what a mask shows to the rule of a form: causal, window, sinks, keys that are padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Node

from structc.passes.predicates import All, AtMost, Given, Line, Same, Seen, Some

_LAG = ((-2, -1), (-1, 1))
"""Coefficients of j - i."""
_BACK = ((-2, 1), (-1, -1))
"""Coefficients of i - j."""


@dataclass(frozen=True)
class Rule:
    """What is seen: as :class:`structc.softmax.Softmax` has it, and what is left over.

    Attributes:
        upper: query i sees keys ``j <= i + upper``, or all if None.
        lower: query i sees keys ``j >= i - lower``, or all if None, ``sinks`` first ones besides.
        keys: boolean tensors that show keys to all queries of a sequence alike.
        documents: whether keys are seen from tokens with the same number alone, only the whole mask
            says which.
        rest: whether something else hides keys too, which only the whole mask says.
        nothing: whether no key is ever seen.
    """

    upper: int | None = None
    lower: int | None = None
    sinks: int = 0
    keys: tuple[Given, ...] = ()
    documents: bool = False
    rest: bool = False
    nothing: bool = False

    @property
    def full(self) -> bool:
        """Whether every key is seen."""
        return self == Rule()

    def fields(self) -> dict[str, int | bool] | None:
        """``causal``, ``offset``, ``window``, ``sinks``; None where no form says that.

        ``i - lower <= j <= i + upper`` is a causal mask shifted by ``upper`` with a window of
        ``upper + lower + 1``.
        """
        if self.upper is None:
            return {} if self.lower is None else None
        found: dict[str, int | bool] = {"causal": True, "offset": self.upper}
        if self.lower is not None:
            window = self.upper + self.lower + 1
            if window < 1:
                return None
            found |= {"window": window, "sinks": self.sinks}
        return found

    def alive(self, square: bool) -> bool:
        """Whether every query is sure to see a key, with at least one there."""
        if self.keys or self.rest or self.nothing or (self.upper or 0) < 0:
            return False
        if self.documents:  # the same token is of the same document
            return square and (self.lower is None or self.lower >= 0)
        if self.lower is None or self.sinks > 0:
            return True
        return square and self.upper is not None and self.lower >= 0

    def __str__(self) -> str:
        words = [] if self.full else ["nothing"] if self.nothing else []
        if self.upper is not None:
            words.append("causal" if self.upper == 0 else f"up to {self.upper:+d}")
        if self.lower is not None:
            words.append(f"window {self.lower + 1}")
        words += [f"{self.sinks} sinks"] if self.sinks else []
        words += ["padding"] if self.keys else []
        words += ["documents"] if self.documents else []
        words += ["data_dependent"] if self.rest else []
        return ", ".join(words) or "all_true"


def rule_of(seen: Seen) -> Rule:
    """The rule behind what is seen; what is not understood is left to the mask itself."""
    found = Rule()
    for part in _parts(seen):
        match part:
            case AtMost(Line(coefs, const)) if coefs == _LAG:
                upper = -const if found.upper is None else min(found.upper, -const)
                found = replace(found, upper=upper)
            case AtMost(Line(coefs, const)) if coefs == _BACK and found.lower is None:
                found = replace(found, lower=-const)
            case Some(()):
                found = replace(found, nothing=True)
            case Some((a, b)) if found.lower is None and _sunk(a, b) is not None:
                lower, sinks = _sunk(a, b) or (0, 0)
                found = replace(found, lower=lower, sinks=sinks)
            case Given(node) if _same_for_all_queries(node):
                found = replace(found, keys=(*found.keys, part))
            case Same(a, b, False) if _turned(a.places) == b.places:
                found = replace(found, documents=True)
            case _:
                found = replace(found, rest=True)
    return found


def _turned(places: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """With queries for keys: what must be the same at i and j is the same where they are one."""
    return tuple({-1: -2, -2: -1}.get(p, p) if p is not None else None for p in places)


def _parts(seen: Seen) -> Iterator[Seen]:
    """What must hold together, without what always holds; sums of one part are that part."""
    if isinstance(seen, All):
        for part in seen.parts:
            yield from _parts(part)
    elif isinstance(seen, Some):
        kept = tuple(p for p in map(_simple, seen.parts) if p != Some(()))
        if not any(p == All(()) for p in kept):
            yield kept[0] if len(kept) == 1 else Some(kept)
    else:
        yield seen


def _simple(seen: Seen) -> Seen:
    """Without parts that always hold, if it is a conjunction."""
    if not isinstance(seen, All):
        return seen
    kept = tuple(_parts(seen))
    return kept[0] if len(kept) == 1 else All(kept)


def _sunk(a: Seen, b: Seen) -> tuple[int, int] | None:
    """``j >= i - lower or j < sinks``, in either order."""
    for window, first in ((a, b), (b, a)):
        if isinstance(window, AtMost) and isinstance(first, AtMost):
            (back, c), (only, s) = (
                (window.line.coefs, window.line.const),
                (first.line.coefs, first.line.const),
            )
            if back == _BACK and only == ((-1, 1),) and s <= 0:
                return -c, 1 - s
    return None


def _same_for_all_queries(node: Node) -> bool:
    """Whether its shape says so: one row, one head."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not 1 <= value.dim() <= 4:
        return False
    shape = [s if isinstance(s, int) else 0 for s in value.shape]
    return all(s == 1 for s in shape[-3:-1]) and shape[-1] != 1

"""What products and sums share: the texts of their parts, and programs put into programs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from structc.errors import InternalError
from structc.families.base import AbstractFamily
from structc.forms import Add, Keep, Load, Mul, Step, Tile

LONGEST, DEEPEST = 20_000, 16
"""Letters of a text, and brackets in it: a file may say anything."""
_NAME = re.compile(r"(\w+)\((\d+),(\d+)(.*)\)", re.DOTALL)


class Part(NamedTuple):
    """One part as its text has it: ``low_rank(8,6,rank=2)`` has 8 inputs and 6 outputs."""

    name: str
    in_features: int
    out_features: int
    hyper: Mapping[str, Any]

    def __str__(self) -> str:
        words = "".join(f",{k}={_word(v)}" for k, v in self.hyper.items())
        return f"{self.name}({self.in_features},{self.out_features}{words})"


def _word(value: object) -> str:
    text = str(value)
    return f"[{text}]" if "(" in text else text


def part_of(module: AbstractFamily) -> Part:
    """The part that a module is.

    Errors: ValueError for one with a bias, which has no place inside a product or a sum.
    """
    if module.bias is not None:
        raise ValueError(f"{module.name} has a bias: give it to the product or sum instead")
    return Part(module.name, module.in_features, module.out_features, module.hyper())


def written(parts: Sequence[Part]) -> str:
    """The text of parts, ``diagonal(4,4); transform(4,4,kind=dct2)``.

    >>> parts = read("diagonal(4,4); transform(4,4,kind=dct2)")
    >>> written(parts) == "diagonal(4,4); transform(4,4,kind=dct2)"
    True
    """
    return "; ".join(map(str, parts))


def read(text: str) -> list[Part]:
    """The parts that :func:`written` wrote, in the order in which they are applied.

    Errors: :class:`InternalError` for a text that it did not write.
    """
    if len(text) > LONGEST or text.count("[") > DEEPEST:
        raise InternalError(f"a text of {len(text)} letters is no product or sum")
    parts = []
    for item in _split(text, ";"):
        match = _NAME.fullmatch(item)
        if match is None:
            raise InternalError(f"{item!r} is no part of a product or a sum")
        hyper: dict[str, Any] = {}
        for pair in _split(match[4], ","):
            key, equals, value = pair.partition("=")
            if not equals:
                raise InternalError(f"{item!r}: {pair!r} is no hyper-parameter")
            value = value[1:-1] if value.startswith("[") else value
            hyper[key] = int(value) if re.fullmatch(r"-?\d+", value) else value
        parts.append(Part(match[1], int(match[2]), int(match[3]), hyper))
    return parts


def _split(text: str, separator: str) -> Iterator[str]:
    """Pieces between separators that no bracket encloses; empty ones are left out."""
    depth, piece = 0, ""
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == separator and depth == 0:
            if piece.strip():
                yield piece.strip()
            piece = ""
        else:
            piece += letter
    if piece.strip():
        yield piece.strip()


# ---------------------------------------------------------------------------- programs


def inlined(form: Tile, source: int | None, slot: int) -> tuple[list[Step], int]:
    """The steps of a program where it is a part of another one.

    Args:
        form: of one input.
        source: the slot that holds its input, if one does.
        slot: the first one that is free.

    Returns:
        The steps, and the first slot that is free behind them.
    """
    marks = [s for s in form.steps if isinstance(s, (Keep, Load, Add, Mul))]
    steps: list[Step] = []
    if source is None and any(s.index == 0 for s in marks):
        steps.append(Keep(form.in_features, slot))
        source, slot = slot, slot + 1
    own = sorted({s.index for s in marks} - {0})
    places = {0: source or 0, **{index: slot + at for at, index in enumerate(own)}}
    for step in form.steps:
        if isinstance(step, (Keep, Load, Add, Mul)):
            step = replace(step, index=places[step.index])
        steps.append(step)
    return steps, slot + len(own)


def in_turn(forms: Sequence[Tile]) -> Tile:
    """The program of a product: one program after the other.

    >>> str(in_turn([Tile.parse("block(1,4,3,1)"), Tile.parse("block(1,2,4,1)")]))
    'block(1,4,3,1) block(1,2,4,1)'
    """
    steps: list[Step] = []
    for at, form in enumerate(forms):
        more, _ = inlined(form, None if at else 0, 1)
        steps += more
    return Tile(tuple(steps))


def beside(forms: Sequence[Tile]) -> Tile:
    """The program of a sum: each program on the same input, the outputs added.

    >>> str(beside([Tile.parse("block(1,3,3,1)"), Tile.parse("block(3,1,1,1)")]))
    'block(1,3,3,1) keep(3,1) load(3,0) block(3,1,1,1) add(3,1)'
    """
    steps, _ = inlined(forms[0], 0, 2)
    m, n = forms[0].out_features, forms[0].in_features
    for form in forms[1:]:
        more, _ = inlined(form, 0, 2)
        steps += [Keep(m, 1), Load(n, 0), *more, Add(m, 1)]
    return Tile(tuple(steps))


def empty_parts(text: str, dtype: torch.dtype) -> list[AbstractFamily]:
    """Modules of the right shapes with uninitialised factors."""
    from structc.families import BY_NAME  # the table names this module's families too

    made = []
    for part in read(text):
        if part.name not in BY_NAME:
            raise InternalError(f"there is no family {part.name!r}")
        kind = BY_NAME[part.name]
        made.append(kind.empty(part.in_features, part.out_features, part.hyper, dtype))
    return made


def forms_of(text: str) -> list[Tile]:
    """The programs of parts, without biases."""
    from structc.families import BY_NAME

    made = []
    for name, n, m, hyper in read(text):
        form = BY_NAME[name].form_of(n, m, hyper, bias=False, activation="")
        if not isinstance(form, Tile):
            raise InternalError(f"{name} is no tile program")
        made.append(form)
    return made

"""Rotary position embeddings in front of an attention: recognised, and kept as they are.

A rotation by an angle of the position turns pairs of features (x1, x2) into
(x1 cos - x2 sin, x2 cos + x1 sin), Su et al., "RoFormer", 2021, arXiv 2104.09864, section 3.2.2.
Models pair the two halves of a head or neighbours, write the turn as sums of products or as a
complex product, and may turn a part of a head only. The graph tells all but the angles; those are
checked by value (:func:`rotates`).
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from structc.passes.attention_parts import NOTHING, VIEWS, shape_of

aten = torch.ops.aten
MOVES = (
    *NOTHING,
    *VIEWS,
    aten.transpose.int,
    aten.permute.default,
    aten.flatten.using_ints,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.type_as.default,
)
PICKS = (aten.slice.Tensor, aten.select.int, operator.getitem)
PARTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
SUMS = {aten.add.Tensor: 1, aten.sub.Tensor: -1}
SPREAD = 2e-2
"""How much cos^2 + sin^2 may vary: rounding of bfloat16."""


def angles(node: Any) -> tuple[Node, ...] | None:
    """What turns a rotated tensor: nodes of (cos, sin), of both twice where each half has its own,
    or one of complex numbers; None if it is not rotated.

    Sound because: nothing is computed from it; a report says that positions enter here.

    Skips when: a factor meets something that is not a quarter turn of what the other one meets.
    """
    node = _plain(node)
    if not isinstance(node, Node):
        return None
    if node.target is aten.mul.Tensor and _factor(node) is not None:  # scaled behind it
        return angles(_factor(node))
    if node.target is aten.view_as_real.default:
        return _complex(_plain(node.args[0]))
    if node.target in (aten.cat.default, aten.stack.default):
        return _joined(node)
    if node.target in SUMS and len(node.args) == 2:
        return _halves(node)
    return None


def rotates(values: Sequence[Tensor | None]) -> bool:
    """Whether numbers are rotations, up to one factor: |cos + i sin| the same everywhere, and
    angles that differ.

    >>> at = torch.arange(4.0)
    >>> rotates([at.cos(), at.sin()]), rotates([at, at]), rotates([torch.polar(at * 0 + 2, at)])
    (True, False, True)
    """
    found = [v for v in values if v is not None and v.numel()]
    if len(found) != len(values) or len(found) not in (1, 2, 4):
        return False
    if len(found) == 1:
        if not found[0].is_complex():
            return False
        found = [found[0].real, found[0].imag]
    if any(not torch.equal(a, b) for a, b in zip(found[2:], found[:2])):
        return False
    cos, sin = (v.detach().double() for v in found[:2])
    try:
        square = cos.square() + sin.square()
    except RuntimeError:  # sizes that do not go together
        return False
    size = float(square.max())
    same = size > 0 and float(square.max() - square.min()) <= SPREAD * size
    return same and float(sin.max() - sin.min()) > SPREAD


def _plain(node: Any) -> Any:
    """Without what only moves numbers."""
    while isinstance(node, Node) and (node.target in MOVES or _whole(node)):
        node = node.args[0]
    return node


def _whole(node: Node) -> bool:
    return node.target is aten.slice.Tensor and node.args[2:] == (0, sys.maxsize)


def _factor(node: Node) -> Any:
    """The tensor of a product with a number; None if both are tensors."""
    tensors = [a for a in node.args[:2] if isinstance(a, Node) and shape_of(a)]
    return tensors[0] if len(tensors) == 1 else None


def _product(node: Any) -> tuple[Any, Any, int] | None:
    """Both tensors of a product, and its sign."""
    node = _plain(node)
    sign = 1
    while isinstance(node, Node) and node.target is aten.neg.default:
        node, sign = _plain(node.args[0]), -sign
    if not isinstance(node, Node) or node.target is not aten.mul.Tensor:
        return None
    first, second = map(_plain, node.args[:2])
    for factor in (first, second):
        if isinstance(factor, Node) and factor.target is aten.neg.default:
            sign = -sign
    return _unsigned(first), _unsigned(second), sign


def _unsigned(node: Any) -> Any:
    turned = isinstance(node, Node) and node.target is aten.neg.default
    return _plain(node.args[0]) if turned else node


def _picked(node: Any) -> tuple[Node, str] | None:
    """Of which tensor a node is which part."""
    node = _plain(node)
    if not isinstance(node, Node) or node.target not in PICKS:
        return None
    source: Any = node.args[0]
    if isinstance(source, Node) and source.target in PARTS:
        source = source.args[0]
    elif node.target is operator.getitem:
        return None
    source = _plain(source)
    return (source, str(node.args[1:])) if isinstance(source, Node) else None


def _quarter(node: Any) -> Node | None:
    """x of its quarter turn (-x2, x1), each a part of x."""
    node = _plain(node)
    if not isinstance(node, Node) or node.target not in (aten.cat.default, aten.stack.default):
        return None
    items: Any = node.args[0]
    if len(items) != 2:
        return None
    minus = [isinstance(i, Node) and _plain(i).target is aten.neg.default for i in items]
    parts = [_picked(_unsigned(_plain(i))) for i in items]
    if sum(minus) != 1 or None in parts:
        return None
    (first, one), (second, other) = parts  # type: ignore[misc]
    return first if first is second and one != other else None


def _halves(node: Node) -> tuple[Node, ...] | None:
    """``x cos + turn(x) sin``."""
    both = [p for p in map(_product, node.args) if p is not None]
    if len(both) != 2:
        return None
    for straight, turned in (both, both[::-1]):
        for x, cos in (straight[:2], straight[1::-1]):
            for r, sin in (turned[:2], turned[1::-1]):
                if _quarter(r) is x and isinstance(cos, Node) and isinstance(sin, Node):
                    return cos, sin
    return None


def _joined(node: Node) -> tuple[Node, ...] | None:
    """``(x1 cos - x2 sin, x2 cos + x1 sin)``; or a rotated part beside others."""
    items: Any = node.args[0]
    if len(items) == 2:
        found = _turn(_plain(items[0]), _plain(items[1]))
        if found is not None:
            return found
    known = [angles(i) for i in items]
    some = [k for k in known if k is not None]
    return some[0] if len(some) == 1 else None


def _turn(first: Any, second: Any) -> tuple[Node, ...] | None:
    """cos and sin of two sums of products, of which exactly one term is taken away."""
    terms = []
    for one in (first, second):
        if not isinstance(one, Node) or one.target not in SUMS or len(one.args) != 2:
            return None
        found = [p for p in map(_product, one.args) if p is not None]
        if len(found) != 2:
            return None
        (a, b, sign), (c, d, other) = found
        terms.append(((a, b, sign), (c, d, other * SUMS[one.target])))
    signs = [t[2] for pair in terms for t in pair]
    if signs[0] * signs[1] * signs[2] * signs[3] != -1:
        return None
    parts = {}
    for row, pair in enumerate(terms):
        for a, b, _ in pair:
            for x, angle in ((a, b), (b, a)):
                part = _picked(x)
                if part is not None and isinstance(angle, Node):
                    parts[row, part] = angle
    upper = [(key[1], angle) for key, angle in parts.items() if key[0] == 0]
    for x1, cos in upper:
        for x2, sin in upper:
            again, crossed = parts.get((1, x2)), parts.get((1, x1))
            if x1 == x2 or x1[0] is not x2[0] or again is None or crossed is None:
                continue
            return cos, sin, again, crossed
    return None


def _complex(node: Any) -> tuple[Node, ...] | None:
    """A product of complex numbers, of which one is the tensor."""
    if not isinstance(node, Node) or node.target is not aten.mul.Tensor:
        return None
    for x, angle in (node.args[:2], node.args[1::-1]):
        plain = _plain(x)
        if isinstance(plain, Node) and plain.target is aten.view_as_complex.default:
            return (angle,) if isinstance(angle, Node) else None
    return None

"""Attention spelled out: from a softmax up to the product of its scores and down to that with v."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from structc.passes.attention_parts import (
    NOTHING,
    VIEWS,
    Fill,
    Operand,
    Parts,
    Step,
    four,
    refuse,
    shape_of,
    transposed,
    ungrouped,
)
from structc.passes.attention_softmax import (
    DIV,
    MUL,
    PRODUCTS,
    Down,
    Weights,
    downwards,
    factors,
    is_row_maximum,
    product_above,
    weights_of,
)
from structc.passes.predicates import HIDES
from structc.records import Refusal
from structc.softmax import GONE

aten = torch.ops.aten

_MASKING = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.cat.default,
)
"""What does not commute with a cap on the scores."""


_LOW = -1000.0
"""Above it hidden scores are among those of keys that are seen, in every row."""


@dataclass
class _Walk:
    """What was found on the way from a softmax up to the product of its scores."""

    node: Any
    factor: float = 1.0
    softcap: float = 0.0
    heads: int | None = None
    shown: list[Operand] = field(default_factory=list)
    hidden: list[Operand] = field(default_factory=list)
    flat: list[tuple[list[Operand], Node]] = field(default_factory=list)  # and which list it is of
    sink: Node | None = None
    passed: list[Node] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)


def spelled_parts(node: Any) -> Parts | Refusal | None:
    """The attention around a softmax, in any spelling; None for one that is no attention."""
    weights = weights_of(node)
    if not isinstance(weights, Weights):
        return weights
    down = downwards(weights)
    if not isinstance(down, Down):
        return down
    walk = _Walk(weights.scores)
    while walk.node.target not in (*PRODUCTS, aten.baddbmm.default):
        failed = _up(walk)
        if failed is not None:
            return failed
    return _assembled(walk, down)


def _up(walk: _Walk) -> Refusal | None:
    """One step up."""
    node, args = walk.node, walk.node.args
    walk.passed.append(node)
    if walk.softcap and node.target in _MASKING:
        return refuse("SOFTCAP", "its scores are masked or shifted before they are capped")
    target, above = node.target, args[0]
    if not node.meta["val"].is_floating_point():
        return refuse("SPELLING", "its scores are made whole numbers")
    if target in NOTHING:
        pass
    elif target is aten.dropout.default:
        if args[2]:
            return refuse("DROPOUT", "it drops weights at random")
    elif target in VIEWS:
        if (refusal := _reshaped(walk)) is not None:
            return refusal
    elif target in MUL or target in DIV:
        number = _constant(args[1])
        if number is None or number == 0:
            return refuse("SCALE", "its scores are scaled by something that is no constant")
        walk.factor *= number if target in MUL else 1 / number
    elif target is aten.tanh.default:
        if walk.softcap:
            return refuse("SOFTCAP", "its scores are capped twice")
        walk.softcap, walk.factor = walk.factor, 1.0
    elif target is aten.add.Tensor:
        at = 0 if product_above(args[0]) is not None else 1
        above, mask = args[at], args[1 - at]
        if not isinstance(mask, Node) or node.kwargs.get("alpha", 1) != 1 or walk.factor != 1:
            return refuse("BIAS", "something is added to its scores that is no tensor of them")
        _mask(walk, mask, walk.shown)
    elif target is aten.sub.Tensor:
        if walk.sink is not None or not is_row_maximum(args[1], above):
            return refuse("BIAS", "something is subtracted from its scores")
        walk.fills = [fill._replace(shifted=True) for fill in walk.fills]  # but not from these
    elif target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        if (refusal := _filled_with(args[2], walk)) is not None:
            return refusal
        _mask(walk, args[1], walk.hidden)
    elif target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        scores_first = product_above(args[1]) is not None
        above, value = (args[1], args[2]) if scores_first else (args[2], args[1])
        if (refusal := _filled_with(value, walk)) is not None:
            return refusal
        _mask(walk, args[0], walk.shown if scores_first else walk.hidden)
    elif target is aten.cat.default:
        if (refusal := _sunk(walk)) is not None:
            return refusal
        above = args[0][0]
    else:
        return refuse("SPELLING", f"{target} stands between scores and softmax")
    assert isinstance(above, Node)
    walk.node = above
    return None


def _mask(walk: _Walk, mask: Any, to: list[Operand]) -> None:
    """A bias or mask: one for each sequence and head where they are one dimension, or for all."""
    flat = len(shape_of(walk.node)) == 3 and shape_of(mask)[:-2] not in ((), (1,))
    if flat:
        walk.flat.append((to, mask))
    else:
        to.append(Operand(mask))


def _constant(value: Any) -> float | None:
    if isinstance(value, Node):
        return _filled(value)
    return float(value) if isinstance(value, (int, float)) else None


def _filled(node: Any) -> float | None:
    """The number that a tensor is filled with, where the graph says so."""
    at = {aten.full.default: 1, aten.full_like.default: 1, aten.scalar_tensor.default: 0}
    place = at.get(node.target)
    number = node.args[place] if place is not None else None
    return float(number) if isinstance(number, (int, float)) else None


def _filled_with(value: Any, walk: _Walk) -> Refusal | None:
    """What hidden scores become."""
    number = _constant(value)
    if number is None or number * walk.factor > _LOW or walk.factor < 0:
        return refuse("MASK", "hidden scores get a value which hides nothing for sure")
    walk.fills.append(Fill(number * walk.factor, _shifted(walk)))
    return None


def _shifted(walk: _Walk) -> bool:
    """Whether something was added to the scores, as far as the walk has come."""
    masks = [*(mask for _, mask in walk.flat), *(mask.node for mask in walk.shown)]
    return any(mask.meta["val"].dtype != torch.bool for mask in masks)


def _sure(walk: _Walk) -> tuple[Fill, ...]:
    """What hidden scores become, as low as hides for sure where a cap keeps the others above it.

    Scores that are capped are at least ``-cap``; what is lower by 800 has a weight of exactly 0 in
    every dtype. Nothing else bounds scores.
    """
    low = -abs(walk.softcap) - GONE
    capped = walk.softcap and not _shifted(walk)
    return tuple(
        Fill(min(f.value, HIDES), False) if capped and f.value <= low and not f.shifted else f
        for f in walk.fills
    )


def _reshaped(walk: _Walk) -> Refusal | None:
    """Batch and heads put together or taken apart."""
    below, above = shape_of(walk.node), shape_of(walk.node.args[0])
    wide = below if len(below) == 4 else above
    if [str(s) for s in below[-2:]] != [str(s) for s in above[-2:]]:
        return refuse("SPELLING", "its scores are reshaped")
    if len(below) == len(above):
        return None
    if {len(below), len(above)} != {3, 4} or not isinstance(wide[1], int):
        return refuse("SPELLING", "its scores are reshaped")
    walk.heads = wide[1]
    return None


def _sunk(walk: _Walk) -> Refusal | None:
    pieces, dim = walk.node.args[0], (*walk.node.args, 0)[1]
    if not isinstance(pieces, (list, tuple)) or len(pieces) != 2 or dim not in (-1, 3):
        return refuse("SPELLING", "its scores are joined to others")
    sink = pieces[1]
    while isinstance(sink, Node) and sink.target in (*VIEWS, *NOTHING, aten.expand.default):
        if len(shape_of(sink)) == 1:
            break
        sink = sink.args[0]
    if walk.shown or walk.hidden or walk.flat:
        return refuse("SINK", "a mask reaches the column beside its scores")
    heads = shape_of(walk.node)[1]
    if not isinstance(sink, Node) or shape_of(sink) != (heads,) or walk.factor != 1:
        return refuse("SINK", "the column beside its scores is not one number a head")
    walk.sink = sink
    return None


def _assembled(walk: _Walk, down: Down) -> Parts | Refusal:
    out, below, heads = down.out, down.nodes, walk.heads or down.heads
    product = walk.node
    scale = walk.factor * (walk.softcap or 1.0)
    cut = any(n.target is aten.slice.Tensor for n in below)
    if cut != (walk.sink is not None):
        return refuse("SPELLING", "some columns of its attention matrix are left out")
    if product.target is aten.baddbmm.default:
        if product.kwargs.get("beta", 1) != 1 or walk.softcap or walk.factor != 1:
            return refuse("SPELLING", "a scaled baddbmm")
        _mask(walk, product.args[0], walk.shown)
        scale = float(product.kwargs.get("alpha", 1))
        q, kt = product.args[1:3]
    for to, mask in walk.flat:
        to.append(four(Operand(mask), heads))
    if product.target is aten.einsum.default or out.target is aten.einsum.default:
        found = _of_einsum(product, out)
        if found is None:
            return refuse("SPELLING", "an einsum that is no plain attention")
        q_, k_, v_, back = found
    else:
        if product.target is not aten.baddbmm.default:
            q, kt = product.args[:2]
        rank = len(shape_of(q))
        if rank not in (3, 4) or len(shape_of(out.args[1])) not in (3, 4):
            return refuse("RANK", f"q has {rank} dimensions")
        q_, k_, v_ = Operand(q), transposed(kt), Operand(out.args[1])
        fewer = (k_ if k_.steps else Operand(ungrouped(k_.node)), Operand(ungrouped(v_.node)))
        if shape_of(fewer[0].node)[1:2] == shape_of(fewer[1].node)[1:2]:
            k_, v_ = fewer
        q_, k_, v_ = (four(t, heads) for t in (q_, k_, v_))
        back = ()
        if len(shape_of(out)) == 3:
            back = ((aten.flatten.using_ints, (0, 1)),) if heads else ((aten.squeeze.dim, (1,)),)
    nodes = (product, *walk.passed, *below, out)
    repeated = shape_of(k_.node)[1:2] != shape_of(q_.node)[1:2]
    return Parts(
        out, q_, k_, v_, back, scale, walk.softcap, tuple(walk.shown), tuple(walk.hidden),
        walk.sink, repeated=repeated, nodes=nodes, fills=_sure(walk), zeroed=down.zeroed,
    )  # fmt: skip


def _of_einsum(product: Any, out: Any) -> tuple[Operand, Operand, Operand, tuple[Step, ...]] | None:
    """``bhid,bhjd->bhij`` and ``bhij,bhjd->bhid``, dimensions in any order."""
    first, second = _equation(product), _equation(out)
    if first is None or second is None:
        return None
    (q, k, scores), (weights, v, result) = first, second
    if len(scores) != 4 or len(weights) != 4 or len(result) != 4 or len(v) != 4:
        return None
    names = dict(zip(weights, scores, strict=True))  # letters of the second, in the first's
    batch, i, j = scores[:2], scores[2], scores[3]
    d = next((c for c in q if c in k and c not in scores), "")
    value = next((c for c in v if c not in weights), "")
    if not d or not value or set(q) != {*batch, i, d} or set(k) != {*batch, j, d}:
        return None
    v_ = "".join(names.get(c, "*") for c in v)
    back_to = "".join(names.get(c, "*") for c in result)
    if set(v_) != {*batch, j, "*"} or set(back_to) != {*batch, i, "*"}:
        return None
    (q_node, k_node), (_, v_node) = factors(product), factors(out)
    orders = ((q_node, q, batch + i + d), (k_node, k, batch + j + d), (v_node, v_, batch + j + "*"))
    operands = [
        Operand(n).then(aten.permute.default, [have.index(c) for c in want])
        for n, have, want in orders
    ]
    have = batch + i + "*"
    back: tuple[Step, ...] = ((aten.permute.default, ([have.index(c) for c in back_to],)),)
    return operands[0], operands[1], operands[2], back


def _equation(node: Any) -> tuple[str, str, str] | None:
    if node.target is aten.einsum.default:
        left, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
        terms = left.split(",")
        plain = all(t.isalpha() and len(set(t)) == len(t) for t in (*terms, result))
        return (terms[0], terms[1], result) if arrow and plain and len(terms) == 2 else None
    if len(shape_of(node)) == 4:  # a matmul beside an einsum
        return ("abik", "abkj", "abij")
    return None

"""The parts of one attention in a graph, whatever its spelling: q, k, v, scale, masks, output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from structc.passes.masks import HIDES
from structc.records import Refusal

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
ASSERTION = aten._assert_tensor_metadata.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)
_NOTHING = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_MUL, _DIV = (aten.mul.Tensor, aten.mul.Scalar), (aten.div.Tensor, aten.div.Scalar)

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

Step = tuple[Any, tuple[Any, ...]]
"""An operator and its arguments behind the tensor."""


@dataclass(frozen=True)
class Operand:
    """A node, and what is to be done to it."""

    node: Node
    steps: tuple[Step, ...] = ()

    def then(self, op: Any, *args: Any) -> Operand:
        return Operand(self.node, (*self.steps, (op, args)))


@dataclass(frozen=True)
class Parts:
    """One attention.

    Attributes:
        out: the node that holds its output.
        q, k, v: as ``(batch, heads, length, head_dim)``; k and v may have fewer heads.
        back: what turns ``(B, H, n, d_v)`` into ``out``.
        scale, softcap: of the scores; softcap 0 for none.
        shown: masks that are added, or boolean ones that are True where a key is seen.
        hidden: boolean masks that are True where a key is hidden.
        sink: ``(H,)``: a score in each row that meets no value.
        is_causal: whether PyTorch's flag says so.
        repeated: whether the graph repeats heads of keys for their groups.
        fused: whether it is PyTorch's own attention operator.
        nodes: everything between the scores and the output.
    """

    out: Node
    q: Operand
    k: Operand
    v: Operand
    back: tuple[Step, ...] = ()
    scale: float = 1.0
    softcap: float = 0.0
    shown: tuple[Node, ...] = ()
    hidden: tuple[Node, ...] = ()
    sink: Node | None = None
    is_causal: bool = False
    repeated: bool = False
    fused: bool = False
    nodes: tuple[Node, ...] = field(default=(), repr=False)


def attention_parts(node: Any) -> Parts | Refusal | None:
    """The attention around a node: PyTorch's operator, or a softmax.

    Returns:
        Its parts; why it is one that no form computes; None for a softmax that is no attention.
    """
    if node.target is SDPA:
        return _fused(node)
    return _spelled_out(node) if node.target in SOFTMAX else None


def shape_of(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's tensor, symbolic ones as they are; empty if it is none."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _refuse(code: str, reason: str) -> Refusal:
    return Refusal("", "attention", code, reason)


# ---------------------------------------------------------------------------- PyTorch's operator


def _fused(node: Any) -> Parts | Refusal:
    names = ("q", "k", "v", "mask", "dropout", "is_causal")
    args = dict(zip(names, node.args, strict=False))
    kwargs = {"attn_mask": "mask", "dropout_p": "dropout"}
    args |= {kwargs.get(name, name): value for name, value in node.kwargs.items()}
    q, k, v = (args[name] for name in ("q", "k", "v"))
    if args.get("dropout"):
        return _refuse("DROPOUT", "it drops weights at random")
    scale = args.get("scale")
    rank, d = len(shape_of(q)), (shape_of(q) or (0,))[-1]
    if rank not in (3, 4) or not isinstance(d, int):
        return _refuse("RANK", f"q has {rank} dimensions, or a head_dim that varies")
    if scale is not None and not isinstance(scale, (int, float)):
        return _refuse("SCALE", "its scale is computed")
    mask, back = args.get("mask"), tuple[Step, ...]()
    fewer = [ungrouped(t) for t in (k, v)]
    alike = shape_of(fewer[0])[1:2] == shape_of(fewer[1])[1:2]
    parts = [Operand(q), *map(Operand, fewer if alike else (k, v))]
    if rank == 3:  # one head
        parts = [p.then(aten.unsqueeze.default, 1) for p in parts]
        back = ((aten.squeeze.dim, (1,)),)
    if mask is not None and rank == 3 and len(shape_of(mask)) == 3:
        return _refuse("MASK", "a mask for each of its heads, which are its batch")
    q_, k_, v_ = parts
    return Parts(
        node,
        q_,
        k_,
        v_,
        back,
        d**-0.5 if scale is None else float(scale),
        shown=() if mask is None else (mask,),
        is_causal=bool(args.get("is_causal")),
        repeated=alike and fewer[0] is not k,
        fused=True,
        nodes=(node,),
    )


def ungrouped(node: Any) -> Any:
    """Heads of keys before they were repeated for their group: (B, g, n, d) of (B, g r, n, d)."""
    at: Any = node
    if at.target in (*_VIEWS, aten.contiguous.default, aten.clone.default):
        at = at.args[0]
    if not isinstance(at, Node) or at.target is not aten.expand.default:
        return node
    wide, source = shape_of(at), at.args[0]  # (B, g, r, n, d)
    if len(wide) != 5 or not isinstance(source, Node) or len(shape_of(node)) != 4:
        return node
    while isinstance(source, Node) and source.target is aten.slice.Tensor and _whole(source):
        source = source.args[0]
    if not isinstance(source, Node) or source.target is not aten.unsqueeze.default:
        return node
    before: Any = source.args[0]
    while before.target is aten.slice.Tensor and _whole(before):
        before = before.args[0]
    same = [*map(str, shape_of(before))] == [str(s) for i, s in enumerate(wide) if i != 2]
    return before if source.args[1] == 2 and same else node


def _whole(node: Any) -> bool:
    return [str(s) for s in shape_of(node)] == [str(s) for s in shape_of(node.args[0])]


# ---------------------------------------------------------------------------- spelled out


@dataclass
class _Walk:
    """What was found on the way from a softmax up to the product of its scores."""

    node: Any
    factor: float = 1.0
    softcap: float = 0.0
    heads: int | None = None
    shown: list[Node] = field(default_factory=list)
    hidden: list[Node] = field(default_factory=list)
    sink: Node | None = None
    passed: list[Node] = field(default_factory=list)


def _spelled_out(softmax: Any) -> Parts | Refusal | None:
    rank, dim = len(shape_of(softmax)), softmax.args[1]
    if rank not in (3, 4) or dim not in (-1, rank - 1):
        return None
    start = softmax.args[0]
    if not isinstance(start, Node) or _product_above(start) is None:
        return None
    down = _downwards(softmax)
    if down is None:
        return None
    if isinstance(down, Refusal):
        return down
    walk = _Walk(start)
    while walk.node.target not in (*_PRODUCTS, aten.baddbmm.default):
        failed = _up(walk)
        if failed is not None:
            return failed
    return _assembled(softmax, walk, down)


def _product_above(node: Any) -> Node | None:
    """The product of a softmax's scores, if there is one."""
    for _ in range(24):
        if not isinstance(node, Node) or node.op != "call_function":
            return None
        if node.target in (*_PRODUCTS, aten.baddbmm.default):
            return node
        if node.target is aten.cat.default:
            node = _first_of(node)
        elif node.target is aten.add.Tensor:
            one = _product_above(node.args[0])
            return one if one is not None else _product_above(node.args[1])
        elif node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            one = _product_above(node.args[1])
            return one if one is not None else _product_above(node.args[2])
        elif node.target in (
            *_NOTHING, *_VIEWS, *_MUL, *_DIV, aten.tanh.default, aten.sub.Tensor,
            aten.dropout.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
        ):  # fmt: skip
            node = node.args[0]
        else:
            return None
    return None


def _first_of(node: Any) -> Any:
    """What a join starts with."""
    return node.args[0][0]


def _up(walk: _Walk) -> Refusal | None:
    """One step up."""
    node, args = walk.node, walk.node.args
    walk.passed.append(node)
    if walk.softcap and node.target in _MASKING:
        return _refuse("SOFTCAP", "its scores are masked or shifted before they are capped")
    target, above = node.target, args[0]
    if target in _NOTHING:
        pass
    elif target is aten.dropout.default:
        if args[2]:
            return _refuse("DROPOUT", "it drops weights at random")
    elif target in _VIEWS:
        if (refusal := _reshaped(walk)) is not None:
            return refusal
    elif target in _MUL or target in _DIV:
        number = _constant(args[1])
        if number is None or number == 0:
            return _refuse("SCALE", "its scores are scaled by something that is no constant")
        walk.factor *= number if target in _MUL else 1 / number
    elif target is aten.tanh.default:
        if walk.softcap:
            return _refuse("SOFTCAP", "its scores are capped twice")
        walk.softcap, walk.factor = walk.factor, 1.0
    elif target is aten.add.Tensor:
        at = 0 if _product_above(args[0]) is not None else 1
        above, mask = args[at], args[1 - at]
        if not isinstance(mask, Node) or node.kwargs.get("alpha", 1) != 1 or walk.factor != 1:
            return _refuse("BIAS", "something is added to its scores that is no tensor of them")
        if len(shape_of(node)) == 3 and len(shape_of(mask)) == 3 and shape_of(mask)[0] != 1:
            return _refuse("BIAS", "a bias for each of its heads, which are its batch")
        walk.shown.append(mask)
    elif target is aten.sub.Tensor:
        if walk.sink is not None or not _is_row_maximum(args[1], above):
            return _refuse("BIAS", "something is subtracted from its scores")
    elif target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        if not _hides(args[2], walk.factor):
            return _refuse("MASK", f"hidden scores become {args[2]}, which hides nothing for sure")
        walk.hidden.append(args[1])
    elif target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        scores_first = _product_above(args[1]) is not None
        above, value = (args[1], args[2]) if scores_first else (args[2], args[1])
        if not _hides(value, walk.factor):
            return _refuse("MASK", "hidden scores get a value which hides nothing for sure")
        (walk.shown if scores_first else walk.hidden).append(args[0])
    elif target is aten.cat.default:
        if (refusal := _sunk(walk)) is not None:
            return refusal
        above = args[0][0]
    else:
        return _refuse("SPELLING", f"{target} stands between scores and softmax")
    assert isinstance(above, Node)
    walk.node = above
    return None


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


def _hides(value: Any, factor: float) -> bool:
    number = _constant(value)
    return number is not None and number * factor <= HIDES


def _is_row_maximum(node: Any, of: Any) -> bool:
    """Whether a node is the largest score of each row, which softmax does not feel."""
    if isinstance(node, Node) and node.op == "call_function" and "getitem" in str(node.target):
        node = node.args[0] if node.args[1] == 0 else None
    if not isinstance(node, Node) or node.target not in (aten.amax.default, aten.max.dim):
        return False
    dim = node.args[1] if len(node.args) > 1 else None
    return node.args[0] is of and dim in (-1, [-1]) and bool((*node.args, False)[2])


def _reshaped(walk: _Walk) -> Refusal | None:
    """Batch and heads put together or taken apart."""
    below, above = shape_of(walk.node), shape_of(walk.node.args[0])
    wide = below if len(below) == 4 else above
    if [str(s) for s in below[-2:]] != [str(s) for s in above[-2:]]:
        return _refuse("SPELLING", "its scores are reshaped")
    if len(below) == len(above):
        return None
    if {len(below), len(above)} != {3, 4} or not isinstance(wide[1], int):
        return _refuse("SPELLING", "its scores are reshaped")
    walk.heads = wide[1]
    return None


def _sunk(walk: _Walk) -> Refusal | None:
    pieces, dim = walk.node.args[0], (*walk.node.args, 0)[1]
    if not isinstance(pieces, (list, tuple)) or len(pieces) != 2 or dim not in (-1, 3):
        return _refuse("SPELLING", "its scores are joined to others")
    sink = pieces[1]
    while isinstance(sink, Node) and sink.target in (*_VIEWS, *_NOTHING, aten.expand.default):
        if len(shape_of(sink)) == 1:
            break
        sink = sink.args[0]
    heads = shape_of(walk.node)[1]
    if not isinstance(sink, Node) or shape_of(sink) != (heads,) or walk.factor != 1:
        return _refuse("SINK", "the column beside its scores is not one number a head")
    walk.sink = sink
    return None


def _downwards(softmax: Any) -> tuple[Any, list[Any], int | None] | Refusal | None:
    """The product with v, and what stands in between."""
    node, passed, heads, cut = softmax, [softmax], None, False
    while True:
        users = [u for u in node.users if u.target is not ASSERTION]
        if len(users) != 1 or users[0].op == "output":
            read = any(u.target in _PRODUCTS for u in node.users)
            return _refuse("READ", "the attention matrix itself is read") if read else None
        user = users[0]
        if user.target in (aten.matmul.default, aten.bmm.default):
            return (user, passed, heads) if user.args[0] is node else None
        if user.target is aten.einsum.default:
            return (user, passed, heads) if _factors(user)[0] is node else None
        if user.target in _VIEWS:
            below, above = shape_of(user), shape_of(node)
            if [str(s) for s in below[-2:]] != [str(s) for s in above[-2:]]:
                return None
            if len(below) != len(above):
                heads = (below if len(below) == 4 else above)[1]
        elif user.target is aten.slice.Tensor:
            rank = len(shape_of(node))
            if user.args[1] not in (-1, rank - 1) or user.args[2:4] != (0, -1) or cut:
                return None
            cut = True
        elif user.target is aten.dropout.default:
            if user.args[2]:
                return _refuse("DROPOUT", "it drops weights at random")
        elif user.target not in _NOTHING:
            return None
        node = user
        passed.append(node)


def _assembled(
    softmax: Any, walk: _Walk, down: tuple[Any, list[Any], int | None]
) -> Parts | Refusal:
    out, below, heads = down
    heads = walk.heads or heads
    product = walk.node
    scale = walk.factor * (walk.softcap or 1.0)
    cut = any(n.target is aten.slice.Tensor for n in below)
    if cut != (walk.sink is not None):
        return _refuse("SPELLING", "some columns of its attention matrix are left out")
    if product.target is aten.baddbmm.default:
        if product.kwargs.get("beta", 1) != 1 or walk.softcap or walk.factor != 1:
            return _refuse("SPELLING", "a scaled baddbmm")
        if shape_of(product.args[0])[:1] != (1,) and len(shape_of(product.args[0])) == 3:
            return _refuse("BIAS", "a bias for each of its heads, which are its batch")
        walk.shown.append(product.args[0])
        scale = float(product.kwargs.get("alpha", 1))
        q, kt = product.args[1:3]
    if product.target is aten.einsum.default or out.target is aten.einsum.default:
        found = _of_einsum(product, out)
        if found is None:
            return _refuse("SPELLING", "an einsum that is no plain attention")
        q_, k_, v_, back = found
    else:
        if product.target is not aten.baddbmm.default:
            q, kt = product.args[:2]
        rank = len(shape_of(q))
        if rank not in (3, 4) or len(shape_of(out.args[1])) not in (3, 4):
            return _refuse("RANK", f"q has {rank} dimensions")
        q_, k_, v_ = Operand(q), transposed(kt), Operand(out.args[1])
        fewer = (k_ if k_.steps else Operand(ungrouped(k_.node)), Operand(ungrouped(v_.node)))
        if shape_of(fewer[0].node)[1:2] == shape_of(fewer[1].node)[1:2]:
            k_, v_ = fewer
        q_, k_, v_ = (_four(t, heads) for t in (q_, k_, v_))
        back = ()
        if len(shape_of(out)) == 3:
            back = ((aten.flatten.using_ints, (0, 1)),) if heads else ((aten.squeeze.dim, (1,)),)
    nodes = (product, *walk.passed, *below, out)
    repeated = shape_of(k_.node)[1:2] != shape_of(q_.node)[1:2]
    return Parts(
        out, q_, k_, v_, back, scale, walk.softcap, tuple(walk.shown), tuple(walk.hidden),
        walk.sink, repeated=repeated, nodes=nodes,
    )  # fmt: skip


def transposed(node: Any) -> Operand:
    """k of k^T."""
    assert isinstance(node, Node)
    rank = len(shape_of(node))
    source: Any = node.args[0] if node.args else None
    if node.target is aten.transpose.int:
        dims = {d - rank if isinstance(d, int) and d >= 0 else d for d in node.args[1:3]}
        if dims == {-1, -2}:
            return Operand(source)
    if node.target is aten.permute.default:
        order = [d % rank for d in node.args[1]]  # type: ignore[union-attr, operator]
        if order == [*range(rank - 2), rank - 1, rank - 2]:
            return Operand(source)
    if "mT" in str(node.target):
        return Operand(source)
    return Operand(node).then(aten.transpose.int, -2, -1)


def _four(operand: Operand, heads: int | None) -> Operand:
    """Three dimensions: one head, or batch and heads together."""
    if len(shape_of(operand.node)) == 4:
        return operand
    if heads is None:
        return operand.then(aten.unsqueeze.default, 1)
    return operand.then(aten.unflatten.int, 0, [-1, heads])


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
    (q_node, k_node), (_, v_node) = _factors(product), _factors(out)
    orders = ((q_node, q, batch + i + d), (k_node, k, batch + j + d), (v_node, v_, batch + j + "*"))
    operands = [
        Operand(n).then(aten.permute.default, [have.index(c) for c in want])
        for n, have, want in orders
    ]
    have = batch + i + "*"
    back: tuple[Step, ...] = ((aten.permute.default, ([have.index(c) for c in back_to],)),)
    return operands[0], operands[1], operands[2], back


def _factors(node: Any) -> tuple[Any, Any]:
    """What a product multiplies."""
    first, second = node.args[1] if node.target is aten.einsum.default else node.args[:2]
    return first, second


def _equation(node: Any) -> tuple[str, str, str] | None:
    if node.target is aten.einsum.default:
        left, arrow, result = str(node.args[0]).replace(" ", "").partition("->")
        terms = left.split(",")
        plain = all(t.isalpha() and len(set(t)) == len(t) for t in (*terms, result))
        return (terms[0], terms[1], result) if arrow and plain and len(terms) == 2 else None
    if len(shape_of(node)) == 4:  # a matmul beside an einsum
        return ("abik", "abkj", "abij")
    return None

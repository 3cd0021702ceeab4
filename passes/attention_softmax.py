"""The softmax of an attention, and the way from it down to the product with v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from structc.passes.attention_parts import ASSERTION, NOTHING, SOFTMAX, VIEWS, refuse, shape_of
from structc.records import Refusal

aten = torch.ops.aten
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)
MUL, DIV = (aten.mul.Tensor, aten.mul.Scalar), (aten.div.Tensor, aten.div.Scalar)
_LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)


@dataclass(frozen=True)
class Weights:
    """A softmax over the last dimension.

    Attributes:
        node: what holds the weights.
        scores: what they are the softmax of.
        nodes: that compute it.
    """

    node: Any
    scores: Node
    nodes: tuple[Any, ...]


@dataclass(frozen=True)
class Down:
    """The way from weights to the product with v.

    Attributes:
        out: that product.
        nodes: from the softmax on.
        heads: where batch and heads are one dimension.
        zeroed: whether weights that are NaN, of rows that see no key, become 0.
    """

    out: Any
    nodes: tuple[Any, ...]
    heads: int | None
    zeroed: bool


def weights_of(node: Any) -> Weights | Refusal | None:
    """The softmax that a node holds, if its scores are a product.

    Spelled ``softmax``, ``exp(log_softmax(s))`` or ``e / sum(e)`` with ``e = exp(s - max(s))``; the
    sum is of the last dimension, or there is a refusal.
    """
    found = _spelled(node)
    if found is None or product_above(found.scores) is None:
        return None
    rank, dim = len(shape_of(found.scores)), _dim(found)
    if rank not in (3, 4):
        return None
    attends = _product_below(found.node)
    if dim not in (-1, rank - 1):
        reason = "its softmax is not over the last dimension of its scores"
        return refuse("SPELLING", reason) if attends else None
    if node.target in DIV and (reason := _by_hand(node, found.scores)):
        return refuse("SPELLING", reason) if attends else None
    inner = [n for n in found.nodes if n is not found.node]
    if any(user not in found.nodes for n in inner for user in n.users):
        return refuse("READ", "the attention matrix itself is read") if attends else None
    return found


def _spelled(node: Any) -> Weights | None:
    target, args = node.target, node.args
    if target in SOFTMAX:
        return Weights(node, args[0], (node,))
    first: Any = args[0] if args else None
    if not isinstance(first, Node):
        return None
    if target is aten.exp.default and first.target in _LOG_SOFTMAX:
        return Weights(node, first.args[0], (first, node))  # type: ignore[arg-type]
    if target is aten.div.Tensor and first.target is aten.exp.default:
        total = args[1]
        if isinstance(total, Node):
            return Weights(node, first.args[0], (first, total, node))  # type: ignore[arg-type]
    return None


def _by_hand(node: Any, shifted: Any) -> str:
    """Why exponentials divided by something are no softmax that is safe to replace; else empty."""
    e, total = node.args
    plain = total.target is aten.sum.dim_IntList and total.args[0] is e
    if not plain or not (*total.args, False)[2] or total.kwargs.get("dtype"):
        return "its exponentials are divided by something else than their sum"
    by_maximum = shifted.target is aten.sub.Tensor and is_row_maximum(*shifted.args[1::-1])
    return "" if by_maximum else "exponentials of scores as they are overflow there, and not here"


def _dim(found: Weights) -> Any:
    """The dimension that weights sum to 1 along; the last one if none is said."""
    first = found.nodes[0]
    if first.target in (*SOFTMAX, *_LOG_SOFTMAX):
        return first.args[1]
    total = found.nodes[1]
    dims = total.args[1] if total.target is aten.sum.dim_IntList else [-1]
    return dims[0] if len(dims) == 1 else None


def _product_below(node: Any) -> bool:
    """Whether a matrix of these sizes, or turned, is multiplied with something."""
    sizes = sorted(map(str, shape_of(node)[-2:]))
    level = [node]
    for _ in range(6):
        users = [u for n in level for u in n.users if u.op == "call_function"]
        if any(u.target in PRODUCTS for u in users):
            return True
        alike = [u for u in users if sorted(map(str, shape_of(u)[-2:])) == sizes]
        level = alike + [u for u in users if u.target is aten.slice.Tensor]
    return False


def product_above(node: Any) -> Node | None:
    """The product of a softmax's scores, if there is one."""
    for _ in range(24):
        if not isinstance(node, Node) or node.op != "call_function":
            return None
        if node.target in (*PRODUCTS, aten.baddbmm.default):
            return node
        if node.target is aten.cat.default:
            node = _first_of(node)
        elif node.target is aten.add.Tensor:
            one = product_above(node.args[0])
            return one if one is not None else product_above(node.args[1])
        elif node.target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
            one = product_above(node.args[1])
            return one if one is not None else product_above(node.args[2])
        elif node.target in (
            *NOTHING, *VIEWS, *MUL, *DIV, aten.tanh.default, aten.sub.Tensor,
            aten.dropout.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
        ):  # fmt: skip
            node = node.args[0]
        else:
            return None
    return None


def _first_of(node: Any) -> Any:
    """What a join starts with."""
    return node.args[0][0]


def is_row_maximum(node: Any, of: Any) -> bool:
    """Whether a node is the largest score of each row, which softmax does not feel."""
    if isinstance(node, Node) and node.op == "call_function" and "getitem" in str(node.target):
        node = node.args[0] if node.args[1] == 0 else None
    if not isinstance(node, Node) or node.target not in (aten.amax.default, aten.max.dim):
        return False
    dim = node.args[1] if len(node.args) > 1 else None
    return node.args[0] is of and dim in (-1, [-1]) and bool((*node.args, False)[2])


def downwards(weights: Weights) -> Down | Refusal | None:
    """The product with v, and what stands in between."""
    node, passed, heads, cut = weights.node, [*weights.nodes], None, False
    zeroed = False

    def found(out: Node) -> Down:
        return Down(out, tuple(passed), heads, zeroed)

    while True:
        users = [u for u in node.users if u.target is not ASSERTION]
        if len(users) != 1 or users[0].op == "output":
            read = any(u.target in PRODUCTS for u in node.users)
            return refuse("READ", "the attention matrix itself is read") if read else _lost(node)
        user = users[0]
        if user.target in (aten.matmul.default, aten.bmm.default):
            return found(user) if user.args[0] is node else _lost(node)
        if user.target is aten.einsum.default:
            return found(user) if factors(user)[0] is node else _lost(node)
        if user.target in VIEWS:
            below, above = shape_of(user), shape_of(node)
            if [str(s) for s in below[-2:]] != [str(s) for s in above[-2:]]:
                return _lost(node)
            if len(below) != len(above):
                heads = (below if len(below) == 4 else above)[1]
        elif user.target is aten.slice.Tensor:
            rank = len(shape_of(node))
            if user.args[1] not in (-1, rank - 1) or user.args[2:4] != (0, -1) or cut:
                return _lost(node)
            cut = True
        elif user.target is aten.dropout.default:
            if user.args[2]:
                return refuse("DROPOUT", "it drops weights at random")
        elif user.target is aten.nan_to_num.default:
            if (*user.args, None)[1] or user.kwargs.get("nan"):
                return refuse("SPELLING", "rows without keys become something else than 0")
            zeroed = True
        elif user.target not in NOTHING or not user.meta["val"].is_floating_point():
            return _lost(node)
        node = user
        passed.append(node)


def factors(node: Any) -> tuple[Any, Any]:
    """What a product multiplies."""
    first, second = node.args[1] if node.target is aten.einsum.default else node.args[:2]
    return first, second


def _lost(node: Any) -> Refusal | None:
    """Weights that go where an attention's do not; no attention if no product follows."""
    if not _product_below(node):
        return None
    users = ", ".join(dict.fromkeys(str(u.target) for u in node.users if u.target is not ASSERTION))
    return refuse("SPELLING", f"{users} reads its weights in a way that is not understood")


def head_dim_of(node: Any) -> int:
    """Of the attention around a softmax that is left as it is; 0 if its scores are no product."""
    found = _spelled(node)
    product: Any = None if found is None else product_above(found.scores)
    if product is None:
        return 0
    q = product.args[1] if product.target is aten.baddbmm.default else factors(product)[0]
    if product.target is aten.einsum.default:
        q = product.args[1][0]
    size = (shape_of(q) or (0,))[-1]
    return size if isinstance(size, int) else 0

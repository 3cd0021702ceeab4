"""The parts of one attention in a graph, whatever its spelling: q, k, v, scale, masks, output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from structc.records import Refusal

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
ASSERTION = aten._assert_tensor_metadata.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
NOTHING = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)

Step = tuple[Any, tuple[Any, ...]]
"""An operator and its arguments behind the tensor."""


@dataclass(frozen=True)
class Operand:
    """A node, and what is to be done to it."""

    node: Node
    steps: tuple[Step, ...] = ()

    def then(self, op: Any, *args: Any) -> Operand:
        return Operand(self.node, (*self.steps, (op, args)))

    def sizes(self) -> tuple[int, ...]:
        """At the example, behind its steps."""
        sizes = [int(getattr(getattr(s, "node", None), "hint", s)) for s in shape_of(self.node)]
        empty = torch.empty(sizes, device="meta")
        for op, args in self.steps:
            empty = op(empty, *args)
        return tuple(empty.shape)


class Fill(NamedTuple):
    """What hidden scores become, and whether something is added to that."""

    value: float
    shifted: bool


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
        fills: what hidden scores become, one for each time.
        zeroed: whether the graph gives 0 to queries that see no key.
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
    shown: tuple[Operand, ...] = ()
    hidden: tuple[Operand, ...] = ()
    sink: Node | None = None
    is_causal: bool = False
    repeated: bool = False
    fills: tuple[Fill, ...] = ()
    zeroed: bool = False
    fused: bool = False
    nodes: tuple[Node, ...] = field(default=(), repr=False)


def shape_of(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's tensor, symbolic ones as they are; empty if it is none."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def refuse(code: str, reason: str) -> Refusal:
    """Of an attention, whose name is put in later."""
    return Refusal("", "attention", code, reason)


# ---------------------------------------------------------------------------- PyTorch's operator


def fused_parts(node: Any) -> Parts | Refusal:
    """Those of PyTorch's operator."""
    names = ("q", "k", "v", "mask", "dropout", "is_causal")
    args = dict(zip(names, node.args, strict=False))
    kwargs = {"attn_mask": "mask", "dropout_p": "dropout"}
    args |= {kwargs.get(name, name): value for name, value in node.kwargs.items()}
    q, k, v = (args[name] for name in ("q", "k", "v"))
    if args.get("dropout"):
        return refuse("DROPOUT", "it drops weights at random")
    scale = args.get("scale")
    rank, d = len(shape_of(q)), (shape_of(q) or (0,))[-1]
    if rank not in (3, 4) or not isinstance(d, int):
        return refuse("RANK", f"q has {rank} dimensions, or a head_dim that varies")
    if scale is not None and not isinstance(scale, (int, float)):
        return refuse("SCALE", "its scale is computed")
    mask, back = args.get("mask"), tuple[Step, ...]()
    fewer = [ungrouped(t) for t in (k, v)]
    alike = shape_of(fewer[0])[1:2] == shape_of(fewer[1])[1:2]
    parts = [Operand(q), *map(Operand, fewer if alike else (k, v))]
    if rank == 3:  # one head
        parts = [p.then(aten.unsqueeze.default, 1) for p in parts]
        back = ((aten.squeeze.dim, (1,)),)
    if mask is not None and rank == 3 and len(shape_of(mask)) == 3:
        return refuse("MASK", "a mask for each of its heads, which are its batch")
    q_, k_, v_ = parts
    return Parts(
        node,
        q_,
        k_,
        v_,
        back,
        d**-0.5 if scale is None else float(scale),
        shown=() if mask is None else (Operand(mask),),
        is_causal=bool(args.get("is_causal")),
        repeated=alike and fewer[0] is not k,
        zeroed=True,
        fused=True,
        nodes=(node,),
    )


def ungrouped(node: Any) -> Any:
    """Heads of keys before they were repeated for their group: (B, g, n, d) of (B, g r, n, d)."""
    at: Any = node
    if at.target in (*VIEWS, aten.contiguous.default, aten.clone.default):
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


def four(operand: Operand, heads: int | None) -> Operand:
    """Three dimensions: one head, or batch and heads together."""
    if len(shape_of(operand.node)) == 4:
        return operand
    if heads is None:
        return operand.then(aten.unsqueeze.default, 1)
    return operand.then(aten.unflatten.int, 0, (-1, heads))

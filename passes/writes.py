"""What a graph writes to in place: an export does not turn writes into values."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

_ITSELF = (torch.ops.aten.dropout.default, torch.ops.aten._unsafe_view.default)
"""What may give its input back, whatever the schema says."""


def written_to(graph: Graph) -> set[Node]:
    """The nodes whose storage some operator of a graph writes to.

    Left out is a sum in place over a value that nothing else reads (``buckets += more``): its
    result is that of a sum.
    """
    found: set[Node] = set()
    sums: list[Node] = []
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        named = dict(zip((a.name for a in schema.arguments), node.args, strict=False))
        named |= node.kwargs
        for argument in schema.arguments:
            value = named.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                stores = {storage_of(v) for v in pytree.tree_leaves(value) if isinstance(v, Node)}
                if node.target is torch.ops.aten.add_.Tensor and _alone(node):
                    sums += stores
                else:
                    found |= stores
    return found | {store for store in sums if sums.count(store) > 1}


def _alone(node: Node) -> bool:
    """Whether what is written to is a fresh value that only this reads."""
    into = node.args[0]
    assert isinstance(into, Node)
    fresh = into.op == "call_function" and storage_of(into) is into
    return fresh and list(into.users) == [node]


def storage_of(node: Node) -> Node:
    """Where a view, or a write in place, goes back to."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], Node):
        schema = getattr(node.target, "_schema", None)
        returns = schema.returns if schema is not None else ()
        views = any(r.alias_info is not None for r in returns[:1])
        if not views and node.target not in _ITSELF:
            break
        node = node.args[0]
    return node

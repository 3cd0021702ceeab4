"""The guards of an exported graph: which sizes, dtypes and values it is right for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structc.passes.shapes import UNBOUNDED, facts_of, holds_at, narrow
from structc.records import Call, DimGuard, Guards


def guards_of(program: Any, graph: torch.fx.GraphModule, traced: Call, example: Call) -> Guards:
    """When the graph of an exported program is right.

    Args:
        program: from ``torch.export``, for its ranges and the guards of its shape environment.
        graph: its graph, with a placeholder for each flat input.
        traced: the call that was exported; example: the user's, whose batch may be another.
    """
    leaves, spec = pytree.tree_flatten((traced.args, traced.kwargs))
    nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
    ranges: dict[str, tuple[int, int]] = {}
    tied: dict[tuple[int, int], Any] = {}
    renamed: dict[Any, Any] = {}
    symbolic, derived, guards = list[Any](), list[Any](), list[Any]()
    for leaf, node in zip(leaves, nodes, strict=True):
        if not isinstance(leaf, Tensor):
            guards.append(leaf)
            continue
        dims: list[int | str] = []
        for at, size in enumerate(node.meta["val"].shape):
            expr = getattr(getattr(size, "node", None), "expr", None)
            if expr is not None:
                symbolic.append(size)
            if expr is None or not expr.is_Symbol:
                # a derived size (2*s, s+1) is only known to be right where it was seen
                dims.append(int(leaf.shape[at]))
                if expr is not None:
                    derived.append(sympy.Eq(expr, int(leaf.shape[at])))
                continue
            # equal sizes at the same position move together: export does not always say so,
            # and a graph must not run where the model would broadcast or fail
            renamed[expr] = tied.setdefault((at, leaf.shape[at]), expr)
            name = str(renamed[expr])
            bounds = program.range_constraints.get(expr)
            low, high = (
                (2, UNBOUNDED) if bounds is None else (_int(bounds.lower), _int(bounds.upper))
            )
            seen = ranges.get(name, (0, UNBOUNDED))
            ranges[name] = max(seen[0], low), min(seen[1], high)
            dims.append(name)
        guards.append(DimGuard(node.name, tuple(dims), leaf.dtype, leaf.device.type))
    found = Guards(spec, tuple(guards), ranges)
    facts = [f.xreplace(renamed) for f in (*facts_of(symbolic), *derived)]
    home = sizes_of(found, pytree.tree_leaves((example.args, example.kwargs)))
    if not holds_at(facts, home):  # a smaller batch went another way: the graph is that one's
        home = sizes_of(found, leaves)
    return replace(found, ranges=narrow(facts, ranges, home))


def sizes_of(guards: Guards, leaves: list[Any]) -> dict[str, int]:
    """The sizes of symbols in a call."""
    return {
        name: leaf.shape[at]
        for leaf, guard in zip(leaves, guards.leaves, strict=True)
        if isinstance(guard, DimGuard)
        for at, name in enumerate(guard.dims)
        if isinstance(name, str)
    }


def _int(bound: Any) -> int:
    """A bound as a number; export writes infinity as a symbol of its own."""
    return min(int(bound), UNBOUNDED) if getattr(bound, "is_Integer", False) else UNBOUNDED


def resize_inputs(leaves: list[Any], guards: Guards, sizes: dict[str, int]) -> list[Any]:
    """Inputs of other sizes, made by repeating or cutting the given ones."""
    out = []
    for leaf, guard in zip(leaves, guards.leaves, strict=True):
        if isinstance(guard, DimGuard):
            for at, name in enumerate(guard.dims):
                if isinstance(name, str) and sizes[name] != leaf.shape[at]:
                    index = torch.arange(sizes[name], device=leaf.device) % leaf.shape[at]
                    leaf = leaf.index_select(at, index)
        out.append(leaf)
    return out

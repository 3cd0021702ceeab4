"""What a mask in a graph hides, proven from how the graph computes it.

An export writes every mask out: ``arange``, comparisons, ``and``, ``where``. These are read as
statements about the indices of a query i and a key j, ``a i + b j + c <= 0``, and as tensors that
nothing is known of. Nothing is concluded from values at some lengths: a window that is longer than
an example looks causal there, and so may what depends on the data. A buffer that no operator of the
graph writes to has its values: a triangle, or a band, over its whole extent is one.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from structc.passes.index_rules import INDEX_RULES
from structc.passes.predicates import (
    HIDES,
    Added,
    All,
    AtMost,
    Entries,
    Given,
    Line,
    Number,
    Seen,
    Value,
    dtype_of,
    is_seen,
    on_units,
    seen_without_units,
    shape_of,
    without_units,
)
from structc.passes.seen_rules import SEEN_RULES
from structc.passes.writes import storage_of, written_to

_RULES = {**INDEX_RULES, **SEEN_RULES}
_WHOLE = (torch.int64, torch.int32, torch.float64, torch.float32)
"""Dtypes in which indices do not wrap or round."""


class Reading:
    """What is known of the nodes of one graph; each is looked at once.

    What something writes to in place is only known as the tensor that it is: an export does not
    turn writes into values.
    """

    def __init__(self, graph: Graph) -> None:
        self.written = written_to(graph)
        self.known: dict[Node, Value] = {}
        if self.written:
            for one in graph.nodes:
                if storage_of(one) in self.written:
                    self.known[one] = Given(one) if dtype_of(one) == torch.bool else None

    def __call__(self, node: Any) -> Value:
        """What is known of a node, or of a number: a tensor that is it everywhere."""
        if isinstance(node, (bool, int)):
            return Line((), int(node))
        if isinstance(node, float):
            return node
        if not isinstance(node, Node):
            return None
        if node not in self.known:
            self.known[node] = None  # a cycle cannot be; an exception would leave it unknown
            found = _settled(self._step(node), dtype_of(node), shape_of(node))
            self.known[node] = _by_itself(node) if found is None else found
        return self.known[node]

    def _step(self, node: Node) -> Value:
        if node.op == "get_attr":
            return _of_constant(node)
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        return None if rule is None else rule(node, self)


def _by_itself(node: Node) -> Value:
    """What a tensor is of which nothing is known."""
    dtype, shape = dtype_of(node), shape_of(node)
    if dtype == torch.bool:
        return Given(node)
    if shape is None or dtype is None or dtype.is_floating_point or dtype.is_complex:
        return None
    places = range(-len(shape), 0)
    return _settled(Entries(node, tuple(places)), dtype, shape) if len(shape) else None


def _settled(value: Value, dtype: torch.dtype | None, shape: tuple[Any, ...] | None) -> Value:
    """A value in its node's dtype."""
    if on_units(value, shape):
        return None
    if isinstance(value, Line):
        if value.coefs and dtype is not None and dtype not in _WHOLE:
            return None
        return without_units(value, shape)
    if is_seen(value):
        seen = seen_without_units(value, shape)
        return seen if dtype in (None, torch.bool) else Number(seen)
    if isinstance(value, Number):
        return Number(seen_without_units(value.seen, shape))
    if isinstance(value, Added):
        return Added(seen_without_units(value.seen, shape), value.value)
    return value


def seen_by(node: Node, read: Reading | None = None) -> tuple[Seen, float] | None:
    """Which keys a mask shows, and what it adds to the others (``-inf`` if boolean).

    None if it is no mask, or not known to be one.
    """
    value = (read or Reading(node.graph))(node)
    if is_seen(value):
        return value, float("-inf")
    return (value.seen, value.value) if isinstance(value, Added) else None


# ---------------------------------------------------------------------------- constants


def _of_constant(node: Node) -> Value:
    """A buffer's values: a triangle or band of its last two dimensions, or evenly spaced numbers.

    Sound because: they are looked at over the whole extent, which no slice leaves.
    """
    try:
        value = operator.attrgetter(str(node.target))(node.graph.owning_module)
    except AttributeError:
        return None
    if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter) or value.is_meta:
        return None
    value, rank = value.detach(), value.dim()
    if not value.numel() or rank < 1 or any(s != 1 for s in value.shape[:-2]):
        return None
    if rank == 1 or value.shape[-2] == 1:
        return _evenly_spaced(value.flatten())
    matrix = value.reshape(value.shape[-2:])
    if matrix.dtype == torch.bool:
        return _band(matrix)
    if bool(((matrix == 0) | (matrix == 1)).all()):
        seen = _band(matrix != 0)
        return None if seen is None else Number(seen)
    low = matrix[matrix != 0]
    if matrix.is_floating_point() and bool((low <= HIDES).all()):
        seen = _band(matrix == 0)
        return None if seen is None else Added(seen, float(low.max()))
    return None


def _band(seen: Tensor) -> Seen | None:
    """``-lower <= j - i <= upper`` wherever a matrix says so, and nowhere else."""
    lag = torch.arange(seen.shape[1]) - torch.arange(seen.shape[0])[:, None]
    shown = lag[seen.cpu()]
    if not shown.numel():
        return None
    least, most = int(shown.min()), int(shown.max())
    if not torch.equal(seen.cpu(), (lag >= least) & (lag <= most)):
        return None
    parts: tuple[Seen, ...] = ()
    if most < int(lag.max()):
        parts += (AtMost(Line(((-2, -1), (-1, 1)), -most)),)
    if least > int(lag.min()):
        parts += (AtMost(Line(((-2, 1), (-1, -1)), least)),)
    return All(parts)


def _evenly_spaced(values: Tensor) -> Value:
    """``step index + first``, whole numbers."""
    if values.dtype not in (torch.int64, torch.int32) or values.numel() < 2:
        return None
    first, step = int(values[0]), int(values[1] - values[0])
    even = torch.arange(values.numel(), device=values.device) * step + first
    return Line(((-1, step),) if step else (), first) if torch.equal(values.long(), even) else None

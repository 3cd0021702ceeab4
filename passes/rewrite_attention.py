"""Attention in a graph becomes ``structc::attention``, or PyTorch's own operator without a mask."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from structc import attend  # noqa: F401 - defines the operator
from structc.attention import by_head  # noqa: F401 - defines the operator
from structc.passes.attention_parts import (
    ASSERTION,
    SDPA,
    Operand,
    Parts,
    fused_parts,
    refuse,
    shape_of,
)
from structc.passes.attention_spelled import spelled_parts
from structc.passes.lags import ByLag, by_lag, computed
from structc.passes.masks import Reading, seen_by
from structc.passes.predicates import HIDES, All, AtMost, Given, Line, Seen, never
from structc.passes.visibility import Rule, rule_of
from structc.passes.writes import storage_of
from structc.records import Refusal
from structc.softmax import Softmax

aten = torch.ops.aten
OPERATOR = torch.ops.structc.attention.default
BY_HEAD = torch.ops.structc.attention_by_head.default


@dataclass(frozen=True)
class Planned:
    """What stands in the place of one attention.

    Attributes:
        parts: of the graph.
        form: the operator's; its scale and cap are in it.
        rule: what its masks are proven to show.
        bias: a mask that is handed over as it is: nothing, or not enough, is proven of it.
        keys: masks over keys alone.
        lags: a bias that depends on the lag alone, computed once a lag.
    """

    parts: Parts
    form: Softmax
    rule: Rule
    bias: Operand | None = None
    keys: tuple[Given, ...] = ()
    lags: ByLag | None = None

    @property
    def proven(self) -> str:
        """What the graph proves, in words; empty if it is nothing."""
        if self.lags is not None:
            return "by lag" if self.rule.full else f"{self.rule}, by lag"
        return "" if self.bias is not None and self.rule.full else str(self.rule)

    @property
    def torch_causal(self) -> bool | None:
        """PyTorch's own flag, where its operator computes the same without a mask; else None."""
        given = (self.bias, self.lags, self.parts.sink)
        plain = not any(t is not None for t in given) and not self.keys
        form, known = self.form, plain and not self.form.softcap
        if not known or form.window or form.offset or form.fill:
            return None
        return form.causal


def planned(node: Node) -> Planned | Refusal | None:
    """How the attention around a node is rewritten.

    rewrite:       softmax(scale q k^T + mask) v  -->  structc::attention(q, k, v, ..., form)
                   sdpa(q, k, v, mask)            -->  structc::attention(q, k, v, ..., form)
    Sound because: the operator computes the same sums in another order; a mask is left out only if
        the graph proves which keys it shows at every length (:mod:`structc.passes.masks`), and is
        handed over as it is otherwise.
        A query that sees no key gives what it gives in the graph: 0, NaN, or the mean of all values
        where hidden scores are a number like -1e9 (``Softmax.fill``).
    Skips when:    the attention matrix is read elsewhere, weights are dropped at random, or what
        hides a key might not: it is a number that something else is added to.
    """
    parts = fused_parts(node) if node.target is SDPA else spelled_parts(node)
    if not isinstance(parts, Parts):
        return parts
    read = Reading(node.graph)
    inputs = [p.node for p in (parts.q, parts.k, parts.v, *parts.shown, *parts.hidden)]
    if read.written and any(storage_of(n) in read.written for n in (*inputs, *parts.nodes)):
        return refuse("WRITTEN", "something writes to its tensors in place")
    shown = {mask: seen_by(mask.node, read) for mask in parts.shown}
    biases = [mask for mask, seen in shown.items() if seen is None]
    lags = _by_lag(parts, biases, read)
    if lags is not None:
        shown[biases.pop()] = lags.seen, lags.value
    rule, masked = _rule(parts, shown, read), bool(parts.shown or parts.hidden)
    fill = _fill(parts, shown, alive=not masked or rule.alive(_square(parts)))
    if isinstance(fill, Refusal):
        return fill
    if fill is None:  # as it is: exact whatever it hides
        biases, rule, lags, fill = list(parts.shown), Rule(), None, _dead(parts)
    fields = rule.fields()
    if rule.nothing or fields is None or rule.rest or rule.documents:
        whole_masks = [*parts.shown, *(_shown(mask) for mask in parts.hidden)]
        if len(whole_masks) != 1:
            return refuse("MASK", f"several masks, not all of them understood ({rule})")
        biases, lags = whole_masks, None
        fields = fields or {}
    if len(biases) > 1:
        return refuse("MASK", "several tensors are added to its scores")
    bias = biases[0] if biases else None
    if bias is not None and not 1 <= len(shape_of(bias.node)) <= 4:
        return refuse("MASK", "a mask of more than four dimensions")
    whole = bias is not None and bias.node.meta["val"].dtype == torch.bool
    form = Softmax(parts.scale, softcap=parts.softcap, fill=fill, **fields)  # type: ignore[arg-type]
    return Planned(parts, form, rule, bias, () if whole else rule.keys, lags)


def _fill(
    parts: Parts, shown: Mapping[Operand, tuple[Seen, float] | None], *, alive: bool
) -> float | Refusal | None:
    """What a hidden score is for the operator; None if masks are to be handed over as they are.

    Spelled out, a row without keys is NaN, or the mean of all values if hidden scores are a number,
    and then scores around that number are not above hidden ones.

    Args:
        alive: whether each query is proven to see a key.
    """
    values = [f.value for f in parts.fills]
    floats = [mask for mask in shown if mask.node.meta["val"].dtype != torch.bool]
    added = [seen[1] for mask in floats if (seen := shown[mask]) is not None]
    weak = any(value > HIDES for value in values)
    if alive and not weak:
        return _dead(parts) if len(added) < len(floats) else 0.0  # they might be -inf
    plain = not added and parts.sink is None and not any(f.shifted for f in parts.fills)
    if plain and len(set(values)) == 1 and values[0] > -torch.inf:
        return values[0]
    if weak:
        low = f"hidden scores become {max(values):g}"
        return refuse("MASK", f"{low}, something else is added, and nothing keeps others above")
    if all(value == -torch.inf for value in (*values, *added)):
        return _dead(parts)
    if _added(parts):
        return None
    return refuse("DEAD_ROWS", "a query might see no key, and hidden scores are of several kinds")


def _dead(parts: Parts) -> float:
    """What hidden scores of -inf make of a row without keys: 0, or NaN."""
    return 0.0 if parts.zeroed else -torch.inf


def _shown(hidden: Operand) -> Operand:
    """Where keys are seen, of where they are hidden."""
    return hidden.then(aten.logical_not.default)


def _by_lag(parts: Parts, biases: list[Operand], read: Reading) -> ByLag | None:
    """The only bias, if it is one number a lag: a rule's keys then count for it too."""
    if len(biases) != 1 or biases[0].steps or len(shape_of(parts.q.node)) != 4:
        return None
    found = by_lag(biases[0].node, read)
    heads = parts.q.sizes()[1]
    return found if found is not None and found.heads in (1, heads) else None


def _rule(parts: Parts, shown: Mapping[Operand, tuple[Seen, float] | None], read: Reading) -> Rule:
    """What all masks together show, as far as the graph proves it."""
    seen = [found[0] for found in shown.values() if found is not None]
    for mask in parts.hidden:
        found = seen_by(mask.node, read)
        if found is not None:
            seen.append(never(found[0]))
    if parts.is_causal:
        seen.append(AtMost(Line(((-2, -1), (-1, 1)), 0)))
    return rule_of(All(tuple(seen)))


def _added(parts: Parts) -> bool:
    """Whether every mask is added to the scores."""
    shown = [m.node for m in parts.shown]
    return all(m.meta["val"].dtype.is_floating_point for m in shown) and not parts.hidden


def _square(parts: Parts) -> bool:
    if parts.fused:
        scores = (shape_of(parts.q.node)[-2], shape_of(parts.k.node)[-2])
    else:
        scores = shape_of(parts.nodes[0])  # of the product; a softmax may have a column more
    return str(scores[-2]) == str(scores[-1])


# ---------------------------------------------------------------------------- the graph


def replace_attention(
    graph: Graph, found: Planned, nodes: Mapping[str, Node], kernel: str, groups: str = ""
) -> Node:
    """Put the operator in the place of an attention.

    Args:
        graph: to be changed.
        found: of the graph that this one is a copy of.
        nodes: of this graph by the name of their original.
        kernel: ``"structc"``, or ``"torch"`` for PyTorch's operator without a mask.
        groups: heads that methods compute, where there are such.
    """
    parts, form = found.parts, found.form
    out = nodes[parts.out.name]
    with graph.inserting_before(out):
        q, k, v = (_made(graph, p, nodes) for p in (parts.q, parts.k, parts.v))
        if groups:
            keys = _keys(graph, found.keys, nodes)
            new = graph.call_function(BY_HEAD, (q, k, v, keys, str(form), groups))
        elif kernel == "torch":
            grouped = shape_of(parts.k.node)[1:2] != shape_of(parts.q.node)[1:2]
            new = graph.call_function(
                SDPA,
                (q, k, v, None, 0.0, form.causal),
                {"scale": form.scale, "enable_gqa": grouped},
            )
        else:
            bias = None if found.bias is None else _mask(graph, found.bias, nodes)
            lags = None if found.lags is None else _lags(graph, found, q, k, nodes)
            keys = _keys(graph, found.keys, nodes)
            sink = None if parts.sink is None else nodes[parts.sink.name]
            given = (q, k, v, bias, lags, keys, None, sink, str(form))
            both = graph.call_function(OPERATOR, given)
            new = graph.call_function(operator.getitem, (both, 0))
        for op, args in parts.back:
            new = graph.call_function(op, (new, *args))
    new.meta = dict(out.meta)
    out.replace_all_uses_with(new)
    graph.erase_node(out)
    _erase(graph, [nodes[n.name] for n in parts.nodes if n is not parts.out])
    return new


def _erase(graph: Graph, gone: list[Node]) -> None:
    """Take out what nothing reads now: dead-code elimination keeps dropouts and assertions."""
    for node in gone:
        for user in list(node.users):
            if user.target is ASSERTION:
                graph.erase_node(user)
    before = -1
    while len(gone) != before:
        before, left = len(gone), []
        for node in gone:
            if node.users:
                left.append(node)
            else:
                graph.erase_node(node)
        gone = left


def _made(graph: Graph, operand: Operand, nodes: Mapping[str, Node]) -> Node:
    node = nodes[operand.node.name]
    for op, args in operand.steps:
        node = graph.call_function(op, (node, *args))
    return node


def _mask(graph: Graph, mask: Operand, nodes: Mapping[str, Node]) -> Node:
    """With four dimensions."""
    node = _made(graph, mask, nodes)
    for _ in range(4 - len(mask.sizes())):
        node = graph.call_function(aten.unsqueeze.default, (node, 0))
    return node


def _lags(graph: Graph, found: Planned, q: Node, k: Node, nodes: Mapping[str, Node]) -> Node:
    """One value a lag, from ``-(n_k - 1)`` to ``n_q - 1``."""
    assert found.lags is not None
    queries, keys = (graph.call_function(aten.sym_size.int, (t, 2)) for t in (q, k))
    first = graph.call_function(operator.sub, (1, keys))
    device = found.parts.q.node.meta["val"].device
    lags = graph.call_function(aten.arange.start, (first, queries), {"device": device})

    def call(op: Any, *args: Any, **kwargs: Any) -> Node:
        return graph.call_function(op, args, kwargs)

    return computed(found.lags, lags, call, lambda node: nodes[node.name])


def _keys(graph: Graph, keys: tuple[Given, ...], nodes: Mapping[str, Node]) -> Node | None:
    """(B or 1, n_k) of tensors with one row."""
    found: Node | None = None
    for given in keys:
        node, rank = nodes[given.node.name], len(shape_of(given.node))
        for _ in range(rank - 2):
            node = graph.call_function(aten.select.int, (node, -2, 0))
        if rank == 1:
            node = graph.call_function(aten.unsqueeze.default, (node, 0))
        if given.flipped:
            node = graph.call_function(aten.logical_not.default, (node,))
        found = (
            node if found is None else graph.call_function(aten.logical_and.default, (found, node))
        )
    return found

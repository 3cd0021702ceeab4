"""Token-local chains: everything between two attentions as one program over a tile of tokens."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from structc.forms import (
    SPECTRAL,
    Act,
    Add,
    Bias,
    Block,
    Keep,
    Load,
    Mul,
    Norm,
    Pattern,
    Sparse,
    Tile,
)
from structc.passes.activation import activation_of
from structc.passes.linear_uses import rows_of
from structc.records import Region
from structc.steps import SLOTS

aten = torch.ops.aten
_SAME_ROWS = (aten.view.default, aten.reshape.default, aten.dropout.default, aten.detach.default)
"""Ops that leave the features of each token as they are, where their output has as many."""
MOST_FACTORS = 16
"""Weights of more would pass through the caches once for each tile of tokens."""


@dataclass(frozen=True)
class Link:
    """One node of a chain, as steps of a program.

    Attributes:
        node: its output in the graph.
        x: what flows through it.
        steps: what it does to a token.
        weights: graph nodes of the weights that the steps take.
        other: what an :class:`Add` or a :class:`Mul` takes besides, if it is one.
    """

    node: torch.fx.Node
    x: torch.fx.Node
    steps: tuple[Any, ...]
    weights: tuple[torch.fx.Node, ...] = ()
    other: torch.fx.Node | None = None


@dataclass(frozen=True)
class Chain:
    """Links each of which is read by others of the chain alone, up to the last.

    Attributes:
        links: in their order.
        program: all of them as one program.
        inputs: what it starts from, and what it reads besides.
        rows, dtype: of the example.
        parts: shorter chains that it is made of, cut behind what several of its links read: where
            the whole is no faster than its products, one of these may be.
    """

    links: tuple[Link, ...]
    program: Tile
    inputs: tuple[torch.fx.Node, ...]
    rows: int
    dtype: torch.dtype
    parts: tuple[Chain, ...] = ()

    def among(self, programs: Collection[str]) -> list[Chain]:
        """The chain if its program is one of these, else those of its parts that are."""
        if str(self.program) in programs:
            return [self]
        return [part for part in self.parts if str(part.program) in programs]

    @property
    def weights(self) -> list[torch.fx.Node]:
        return [w for link in self.links for w in link.weights]


def find_chains(region: Region, view: torch.fx.GraphModule) -> list[Chain]:
    """The longest chains of a region's graph, each of a product at least and something around it.

    Args:
        region: the graph and its example.
        view: the same graph over the tables of its owner.

    The maximum fanout-free cones of the links: a link joins its readers where all of them are links
    of one cone, so what is inside leaves it through its last link alone. That is a path, branches
    that an addition or a gate brings together, and a residual around links of the same cone.
    Source: Cong and Ding 1994, "FlowMap" (the term; there of logic gates).
    """
    graph = region.graph.graph
    links = {link.node: link for link in _links(graph, view)}
    flow = _cones(links)
    for node in list(nx.topological_sort(flow)):
        # what starts a chain and is no product has nothing to be fused into
        if not flow.in_degree(node) and not isinstance(links[node].steps[0], Block):
            flow.remove_node(node)
    order = {node: at for at, node in enumerate(graph.nodes)}
    writes = [at for node, at in order.items() if _writes(node)]

    def made(cone: Collection[torch.fx.Node]) -> Chain | None:
        ordered = sorted(cone, key=order.__getitem__)
        # in between somebody may write to what the chain reads: it reads at its end
        if any(order[ordered[0]] < w < order[ordered[-1]] for w in writes):
            return None
        return _chain([links[n] for n in ordered], region)

    found: list[Chain] = []
    for cone in nx.weakly_connected_components(flow):
        whole, cut = made(cone), list(nx.weakly_connected_components(_cut(flow.subgraph(cone))))
        parts = [part for p in cut if len(cut) > 1 and (part := made(p)) is not None]
        found += parts if whole is None else [replace(whole, parts=tuple(parts))]
    return sorted(found, key=lambda c: order[c.links[-1].node])


def _cut(cone: nx.DiGraph[torch.fx.Node]) -> nx.DiGraph[torch.fx.Node]:
    """A cone without the edges from what several of its links read."""
    several = [edge for node in cone if cone.out_degree(node) > 1 for edge in cone.out_edges(node)]
    cut = cone.copy()
    cut.remove_edges_from(several)
    return cut


def _cones(links: Mapping[torch.fx.Node, Link]) -> nx.DiGraph[torch.fx.Node]:
    """The links, with an edge from each to its readers where all of these are of one cone."""
    readers: dict[torch.fx.Node, set[torch.fx.Node]] = {node: set() for node in links}
    through: dict[torch.fx.Node, set[torch.fx.Node]] = {node: set() for node in links}
    for link in links.values():
        for read in _reads(link) if link.x is not link.other else ():
            path = list(_reshapes(read))
            if path[-1] in links:
                readers[path[-1]].add(link.node)
                through[path[-1]].add(path[-2] if len(path) > 1 else _entry(link))
    flow: nx.DiGraph[torch.fx.Node] = nx.DiGraph()
    flow.add_nodes_from(links)
    cone: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in reversed(list(links)):  # of a graph: in topological order
        around = {cone[reader] for reader in readers[node]}
        inside = len(around) == 1 and through[node] == set(node.users)
        cone[node] = around.pop() if inside else node
        if inside:
            flow.add_edges_from((node, reader) for reader in readers[node])
    return flow


def _entry(link: Link) -> torch.fx.Node:
    """The node that takes a link's inputs: of an operator with several outputs not its output."""
    made = link.node.args[0]
    return made if link.node.target is operator.getitem else link.node  # type: ignore[return-value]


def fuse(graph: torch.fx.Graph, chains: list[Chain]) -> None:
    """Put one operator in the place of each chain.

    rewrite:      linear -> act -> linear -> add(z) -> norm  -->  structc::tile([x, z], weights,
                  program);  act(gate(x)) * up(x) -> down  -->  structc::tile([x], weights, program)
    Sound because: each link is read by links of its chain alone, and the program is their
        composition on one token; nothing in between mixes tokens or writes to a tensor.
    Skips when:   a link has other readers; sizes are not those of one token's features; dtypes
        differ; an in-place operator stands between the links; a weight is stored transposed.
    """
    fused: dict[torch.fx.Node, torch.fx.Node] = {}
    for chain in chains:
        last = chain.links[-1].node
        inputs = [fused.get(i, i) for i in chain.inputs]  # another chain's end is that chain now
        with graph.inserting_before(last):
            made = graph.call_function(
                torch.ops.structc.tile.default, (inputs, chain.weights, str(chain.program))
            )
            new = graph.call_function(operator.getitem, (made, 0))
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        fused[last] = new
        if _writes(last):  # an activation in place: what it wrote to was the chain's own
            graph.erase_node(last)
    # what stood between the links; torch.fx keeps any dropout for its random numbers
    graph.eliminate_dead_code(lambda n: n.is_impure() and not _drops_nothing(n))


# ---------------------------------------------------------------------------- links


def _links(graph: torch.fx.Graph, view: torch.fx.GraphModule) -> Iterator[Link]:
    readers = {
        operator.getitem: _tile_link,
        torch.ops.structc.dense.default: _dense_link,
        aten.linear.default: _linear_link,
        aten.add.Tensor: _pair_link,
        aten.mul.Tensor: _pair_link,
        aten.layer_norm.default: _norm_link,
    }
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        read = readers.get(node.target)
        link = read(node, view) if read is not None else _act_link(node)
        if link is not None:
            yield link


def _tile_link(node: torch.fx.Node, view: torch.fx.GraphModule) -> Link | None:
    made, index = list(node.args)
    if not isinstance(made, torch.fx.Node) or index != 0:
        return None
    if made.target is not torch.ops.structc.tile.default:
        return None
    inputs, weights, program = _args(made, 3)
    steps = Tile.parse(str(program)).steps
    if len(inputs) != 1 or any(isinstance(s, (Keep, Load, Add, Mul, *SPECTRAL)) for s in steps):
        return None  # it has slots of its own, or is for a library of transforms
    return Link(node, inputs[0], steps, tuple(weights))


def _dense_link(node: torch.fx.Node, view: torch.fx.GraphModule) -> Link | None:
    x, weight, bias, act, transposed = _args(node, 5)
    if transposed:
        return None
    m, n = _value(view, weight).shape
    steps: list[Any] = [Block(1, m, n, 1)]
    steps += [] if bias is None else [Bias(m)]
    steps += [Act(str(act), m)] if act else []
    return Link(node, x, tuple(steps), tuple(w for w in (weight, bias) if w is not None))


def _linear_link(node: torch.fx.Node, view: torch.fx.GraphModule) -> Link | None:
    """A product that is the user's own layer, if its weights are constants."""
    x, weight, bias = _args(node, 3)
    weights = [w for w in (weight, bias) if w is not None]
    if any(not isinstance(w, torch.fx.Node) or w.op != "get_attr" for w in weights):
        return None
    value = _value(view, weight)
    if value.dim() != 2 or not _features(node):
        return None
    m, n = value.shape
    steps = (Block(1, m, n, 1), *([] if bias is None else [Bias(m)]))
    return Link(node, x, steps, tuple(weights))


def _act_link(node: torch.fx.Node) -> Link | None:
    act, n = activation_of(node), _features(node)
    return Link(node, _args(node, 1)[0], (Act(act, n),)) if act and n else None


def _pair_link(node: torch.fx.Node, view: torch.fx.GraphModule) -> Link | None:
    x, z = _args(node, 2)
    if not isinstance(x, torch.fx.Node) or not isinstance(z, torch.fx.Node) or node.kwargs:
        return None
    n = _features(node)
    if not n or _shape(x) != _shape(z) or _shape(x) != _shape(node):
        return None
    if _depth(x) < _depth(z):  # the stream is what was computed last, the residual is older
        x, z = z, x
    step = Add(n, 1) if node.target is aten.add.Tensor else Mul(n, 1)
    return Link(node, x, (step,), (), z)


def _norm_link(node: torch.fx.Node, view: torch.fx.GraphModule) -> Link | None:
    x, shape, weight, bias, eps = _args(node, 5)
    n = _features(node)
    if list(shape or ()) != [n] or not isinstance(weight, torch.fx.Node):
        return None
    if not isinstance(bias, torch.fx.Node):
        return None
    step = Norm(n, "layer", repr(float(1e-5 if eps is None else eps)))
    return Link(node, x, (step,), (weight, bias))


def _args(node: torch.fx.Node, count: int) -> list[Any]:
    """The first positional arguments of a node; None for what is left out."""
    return [*node.args, *(None,) * count][:count]


def _value(view: torch.fx.GraphModule, node: Any) -> Tensor:
    value: Tensor = operator.attrgetter(str(node.target))(view)
    return value


def _meta(node: torch.fx.Node) -> Any:
    return node.meta.get("val")


def _shape(node: torch.fx.Node) -> list[str]:
    value = _meta(node)
    return [str(s) for s in value.shape] if isinstance(value, Tensor) else []


def _features(node: torch.fx.Node) -> int:
    value = _meta(node)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return 0
    n = value.shape[-1]
    return n if isinstance(n, int) else n.node.maybe_as_int() or 0  # of inputs a symbol, constant


def _depth(node: torch.fx.Node) -> int:
    return next(at for at, other in enumerate(node.graph.nodes) if other is node)


# ---------------------------------------------------------------------------- chains


def _through_reshapes(node: torch.fx.Node) -> torch.fx.Node:
    """What a node is a reshape of, tokens kept whole."""
    *_, node = _reshapes(node)
    return node


def _reshapes(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    """A node and what it is a reshape of, tokens kept whole, up to the value itself."""
    yield node
    while node.target in _SAME_ROWS and _is_inert(node):
        before = node.args[0]
        assert isinstance(before, torch.fx.Node)
        if len(node.users) != 1 or _features(before) != _features(node):
            return
        node = before
        yield node


def _is_inert(node: torch.fx.Node) -> bool:
    return node.target is not aten.dropout.default or _drops_nothing(node)


def _drops_nothing(node: torch.fx.Node) -> bool:
    return node.target is aten.dropout.default and node.args[2] is False


def _chain(links: list[Link], region: Region) -> Chain | None:
    """One program, or None for a lone product and for what cannot be one."""
    if len(links) < 2 and (not links or len(links[0].steps) <= 3):
        return None
    inside = {link.node for link in links}
    inputs: list[torch.fx.Node] = [links[0].x]
    for link in links:
        for read in (link.x, link.other):
            before = read and _through_reshapes(read)
            if read is not None and before not in inside and read not in inputs:
                inputs.append(read)
    if any(_shape(i)[:-1] != _shape(links[-1].node)[:-1] for i in inputs):
        return None
    dtype = _meta(inputs[0]).dtype
    if any(_meta(n).dtype != dtype for n in (*inputs, *inside)):
        return None
    steps = _steps(links, inputs)
    if steps is None or len(inputs) > SLOTS:
        return None
    if sum(isinstance(s, (Pattern, Sparse)) for s in steps) > MOST_FACTORS:
        return None
    return Chain(tuple(links), Tile(steps), tuple(inputs), rows_of(links[0].x, region), dtype)


def _writes(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _reads(link: Link) -> list[torch.fx.Node]:
    return [link.x] if link.other is None else [link.x, link.other]


def _steps(links: list[Link], inputs: list[torch.fx.Node]) -> tuple[Any, ...] | None:
    """The links in turn: what is read later is kept, a branch's start is loaded again."""
    slots = {node: at for at, node in enumerate(inputs)}
    free = list(range(len(inputs), SLOTS))
    flowing = inputs[0]
    steps: list[Any] = []
    for at, link in enumerate(links):
        x, other = link.x, link.other
        here = [n for n in (x, other) if n is not None and _through_reshapes(n) is flowing]
        if other is not None and here and here[0] is other:
            x, other = other, x
        if not here and x is not flowing:
            slot = slots[x] if x in slots else slots[_through_reshapes(x)]
            steps.append(Load(_features(x), slot))
        for step in link.steps:
            if other is not None:
                slot = slots[other] if other in slots else slots[_through_reshapes(other)]
                step = type(step)(step.n, slot)
            steps.append(step)
        flowing = link.node
        reads = [[_through_reshapes(r) for r in _reads(after)] for after in links[at + 1 :]]
        later = {node for read in reads for node in read}
        for node in [n for n, slot in slots.items() if slot >= len(inputs) and n not in later]:
            free.insert(0, slots.pop(node))
        if not reads or (reads[0].count(flowing) == 1 and all(flowing not in r for r in reads[1:])):
            continue
        if not free:
            return None
        slots[flowing] = free.pop(0)
        steps.append(Keep(_features(flowing), slots[flowing]))
    return tuple(steps)

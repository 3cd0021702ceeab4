"""A region's graph compiled by Inductor, around structc's operators and with its weights frozen."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structc import ops
from structc.numerics import output_error, rounding
from structc.passes.activation import ATEN
from structc.passes.region import Runner, view_of

aten = torch.ops.aten
INDUCTOR_HAS = frozenset({"aten", "mkl"})
"""Dense kernels that frozen code has as well: it may then also fuse and merge these products."""


class Frozen:
    """Compiled code that has the values of the weights inside, and knows when they are stale.

    A weight that is replaced, moved or changed in place is noticed; writing through ``weight.data``
    leaves no trace in PyTorch, and is not.

    Args:
        code: takes the tensors among a region's flat inputs, gives its flat outputs.
        view: the graph over its owner's tables.

    Errors: RuntimeError if a weight was made under ``inference_mode``: its changes leave no trace.
    """

    def __init__(self, code: Callable[..., Any], view: torch.fx.GraphModule) -> None:
        self.code, self.view = code, view
        names = {str(n.target) for n in view.graph.nodes if n.op == "get_attr"}
        self.getters = [operator.attrgetter(name) for name in sorted(names)]
        weights = self._weights()
        if any(w.is_inference() for w in weights):
            raise RuntimeError("weights made under inference_mode cannot be frozen")
        self.held = [_stamp(w) for w in weights]
        # while they are held, no other tensor can come to lie at their addresses
        self.storages = [w.untyped_storage() for w in weights]
        self.constant = _constant_outputs(view.graph)

    def _weights(self) -> list[Tensor]:
        values = (get(self.view) for get in self.getters)
        return [v for v in values if isinstance(v, Tensor)]

    def current(self) -> bool:
        """Whether every weight is the object that was frozen, unchanged."""
        weights = self._weights()
        return not any(w.is_inference() for w in weights) and self.held == [
            _stamp(w) for w in weights
        ]

    def __call__(self, *leaves: Any) -> Any:
        with torch.no_grad():
            flat = list(self.code(*[leaf for leaf in leaves if isinstance(leaf, Tensor)]))
        for at in self.constant:  # the code's own memory, which the caller may write to
            flat[at] = flat[at].clone()
        return flat


def _stamp(weight: Tensor) -> tuple[int, int, int]:
    return id(weight), weight.data_ptr(), weight._version


def _constant_outputs(graph: torch.fx.Graph) -> list[int]:
    """Which outputs come from weights alone: frozen code returns the same tensor each time."""
    fed: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in fed for n in node.all_input_nodes):
            fed.add(node)
    (outputs,) = graph.output_node().args
    flat = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return [i for i, n in enumerate(flat) if isinstance(n, torch.fx.Node) and n not in fed]


def freeze(runner: Runner) -> Frozen:
    """Compile a runner's graph for the sizes of its example alone: static code is the fastest.

    rewrite:      structc::dense(x, W, b, act)  -->  act(linear(x, W, b)), in Inductor's copy
    Sound because: that is the operator's definition.
    Skips when:   the attached kernel is one that Inductor does not have; it stays an operator, and
        Inductor compiles what is around it.

    Errors: whatever Inductor raises, and RuntimeError if its code gives something else than the
        graph on the example.
    """
    region, owner = runner.region, runner.owner
    assert owner is not None
    graph = torch.fx.Graph(owning_module=runner.view)
    graph.output(graph.graph_copy(region.graph.graph, {}))
    leaves = pytree.tree_leaves((region.example.args, region.example.kwargs))
    _drop_constants(graph, leaves)
    for node in graph.find_nodes(op="call_function", target=torch.ops.structc.dense.default):
        if _known_to_inductor(node, runner.view):
            _open(graph, node)
    graph.eliminate_dead_code()
    view = view_of(region.graph, owner, graph)
    tensors: list[Any] = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    with torch.no_grad():
        code: Any = torch._inductor.compile(view, tensors, options={"freezing": True})
        frozen = Frozen(code, runner.view)
        want, got = (f(*pytree.tree_map_only(Tensor, torch.clone, leaves)) for f in (view, frozen))
    error = output_error(list(got), list(want))
    if error > rounding(list(want)):
        raise RuntimeError(f"Inductor's code moves the output by {error:.2g}")
    return frozen


def _drop_constants(graph: torch.fx.Graph, leaves: Sequence[Any]) -> None:
    """Inputs that are no tensors are fixed by the guards; compiled code does not take them."""
    for node, leaf in zip(graph.find_nodes(op="placeholder"), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            assert not node.users, f"{node.name} is read"
            graph.erase_node(node)


def _known_to_inductor(node: torch.fx.Node, view: torch.fx.GraphModule) -> bool:
    _, weight, _, act, transposed = node.args
    value = operator.attrgetter(str(weight.target))(view)  # type: ignore[union-attr]
    n, m = value.shape if transposed else value.shape[::-1]
    key = ops.dense_key(n, m, str(act), value.dtype, bool(transposed))
    return all(label in INDUCTOR_HAS for _, label in ops.attached().get(key, ()))


def _open(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    x, weight, bias, act, transposed = node.args
    with graph.inserting_before(node):
        if transposed:
            weight = graph.call_function(aten.t.default, (weight,))
        new = graph.call_function(aten.linear.default, (x, weight, bias))
        if act:
            target, kwargs = ATEN[str(act)]
            new = graph.call_function(target, (new,), kwargs)
    node.replace_all_uses_with(new)
    graph.erase_node(node)

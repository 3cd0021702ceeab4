"""How a region's graph runs in place of its submodule, over the submodule's own parameters."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from structc import attend, ops
from structc.errors import ConfigError
from structc.inputs import canonical
from structc.records import Call, DimGuard, Guards, Region

log = logging.getLogger("structc.region")

MISS = object()
"""What a runner returns when its guards do not hold."""


def call_graph(graph: torch.fx.GraphModule, owner: nn.Module, leaves: list[Any]) -> Any:
    """Run a graph over a module's parameters, with flat inputs; the output in its real type."""
    flat = view_of(graph, owner)(*leaves)
    return pytree.tree_unflatten(flat, graph.meta["out_spec"])


def view_of(
    module: torch.fx.GraphModule, owner: nn.Module, graph: torch.fx.Graph | None = None
) -> torch.fx.GraphModule:
    """A graph as a module whose parameter, buffer and child tables *are* those of the owner.

    One owner: whatever is loaded, moved or replaced in the module is what the graph sees next.

    Args:
        module: the graph, and the constants and subgraphs that export lifted out of the code.
        graph: a rewritten graph to take in place of the module's own.
    """
    graph = module.graph if graph is None else graph
    held = attributes_of(module, owner)
    targets = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
    view = torch.fx.GraphModule({t: operator.attrgetter(t)(held) for t in targets}, graph)
    view.__dict__.update(held.__dict__)
    view.meta.update(module.meta)
    return view


def without_weights(region: Region) -> Region:
    """A region for the record: its graph can be read, and keeps no parameter alive."""
    names = [str(n.target) for n in region.graph.graph.nodes if n.op == "get_attr"]
    values = {name: operator.attrgetter(name)(region.graph) for name in names}
    root = {n: v.detach().to("meta") if isinstance(v, Tensor) else v for n, v in values.items()}
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(region.graph.graph, {}))
    return replace(region, graph=torch.fx.GraphModule(root, graph))


def attributes_of(module: torch.fx.GraphModule, owner: nn.Module) -> nn.Module:
    """A bare module with the owner's tables, and the graph's own constants beside them."""
    held = nn.Module()
    held.__dict__.clear()
    for table in ("_parameters", "_buffers", "_modules"):
        held.__dict__[table] = owner.__dict__[table]
    for node in module.graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and "." not in name and not hasattr(held, name):
            # lifted tensors; the bodies of autocast and grad blocks
            held.__dict__[name] = getattr(module, name)
    return held


_CALLS = {
    torch.ops.structc.tile.default: ops.tile,
    torch.ops.structc.dense.default: ops.dense,
    torch.ops.structc.attention.default: attend.attention_of,
}


class Runner:
    """Runs a region when its guards hold; says MISS otherwise.

    Args:
        region: the (rewritten) graph.
        owner: the module whose tables the graph reads.
    """

    def __init__(self, region: Region, owner: nn.Module) -> None:
        self.region = region
        self.out_spec = region.graph.meta["out_spec"]
        self.compiled: Any = None
        self.compiled_layout = example_layout(region)
        self.active = True
        self._adopt(owner)

    def _adopt(self, owner: nn.Module) -> None:
        graph = copy.deepcopy(self.region.graph.graph)
        for node in graph.nodes:
            node.target = _CALLS.get(node.target, node.target)
        self.view: Any = view_of(self.region.graph, owner, graph)
        self._modules = list(owner.modules())
        self._children = _children(self._modules)
        self._hooks = [t for m in self._modules for t in _hook_tables(m) if m is not owner]
        self.owner: nn.Module | None = owner  # last: other threads look at it first

    def _as_exported(self) -> bool:
        """Whether the modules inside are those of the export, none in train mode."""
        if any(m.training for m in self._modules):
            return False
        return _children(self._modules) == self._children

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        twin = copy.copy(self)  # its module is still being copied: adopted at the first call
        twin.owner = twin.view = twin.compiled = None
        return twin

    def _hooked(self) -> bool:
        if nn.modules.module._has_any_global_hook():
            return True
        return any(self._hooks) and any(_live(hook) for t in self._hooks for hook in t.values())

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The region's output, or MISS."""
        if not self.active or module.training or _wants_tree():
            return MISS
        if module is not self.owner:
            self._adopt(module)
        if self._hooked() or not self._as_exported():
            return MISS
        try:
            call = canonical_of(module, args, kwargs)
        except ConfigError:
            return MISS  # the module itself raises the error that its user knows
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        sizes = bind_sizes(self.region.guards, leaves, spec)
        if sizes is None or _wants_gradient(leaves, module):
            return MISS
        code, compiled = self.view, self.compiled
        if compiled is not None and layout_of(leaves) == self.compiled_layout:
            if compiled.current():
                code = compiled
            else:
                log.info("weights changed: the compiled code of %r is let go", self.region.path)
                self.compiled = None
        flat = code(*leaves)
        return pytree.tree_unflatten(flat, self.out_spec)


def install(owner: nn.Module, region: Region) -> Runner:
    """Make a module run a region's graph; everything else about it stays as it is.

    The module gets a subclass of its own class whose ``forward`` asks the runner first, so that
    ``isinstance``, attributes, hooks and methods that call ``self.forward`` keep working.
    """
    runner = Runner(region, owner)
    base = type(owner)

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self.__dict__["_structc_runner"].run(self, args, kwargs)
        return base.forward(self, *args, **kwargs) if output is MISS else output

    namespace = {"forward": forward, "__module__": base.__module__, "__doc__": base.__doc__}
    owner.__class__ = type(base.__name__, (base,), {**namespace, "_structc_base": base})
    owner.__dict__["_structc_runner"] = runner
    return runner


def runners(tree: nn.Module) -> list[Runner]:
    """The runners of all regions in a product."""
    found = (m.__dict__.get("_structc_runner") for m in tree.modules())
    return [r for r in found if r is not None]


def canonical_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The canonical call of a module with a region."""
    if not inspect.ismethod(module.forward):
        raise ConfigError("forward was replaced on the instance")
    return canonical(module, Call(args, kwargs))


def bind_sizes(guards: Guards, leaves: list[Any], spec: Any) -> dict[str, int] | None:
    """The sizes of a call's symbols if the guards hold, else None."""
    if spec != guards.spec:
        return None
    sizes: dict[str, int] = {}
    for leaf, guard in zip(leaves, guards.leaves, strict=True):
        if not isinstance(guard, DimGuard):
            if isinstance(leaf, Tensor) or leaf != guard:
                return None
            continue
        if (
            not isinstance(leaf, Tensor)
            or leaf.dtype != guard.dtype
            or leaf.device.type != guard.device
            or leaf.dim() != len(guard.dims)
        ):
            return None
        for size, want in zip(leaf.shape, guard.dims, strict=True):
            if isinstance(want, int):
                if size != want:
                    return None
            elif sizes.setdefault(want, size) != size:
                return None
    for name, size in sizes.items():
        low, high = guards.ranges[name]
        if not low <= size <= high:
            return None
    return sizes


Layout = list[tuple[tuple[int, ...], tuple[int, ...]]]


def example_layout(region: Region) -> Layout:
    """Sizes and strides of the call that a region was exported from: compiled code is for these."""
    return layout_of(pytree.tree_leaves((region.example.args, region.example.kwargs)))


def layout_of(leaves: list[Any]) -> Layout:
    """Sizes and strides of the tensors among flat inputs."""
    return [(tuple(t.shape), t.stride()) for t in leaves if isinstance(t, Tensor)]


def _children(modules: list[nn.Module]) -> list[tuple[int, type]]:
    """What stands where: a layer that is replaced, wrapped or added changes it."""
    return [(id(c), type(c)) for m in modules for c in m._modules.values()]


def _wants_tree() -> bool:
    return torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")


def _wants_gradient(leaves: list[Any], owner: nn.Module) -> bool:
    if not torch.is_grad_enabled():
        return False
    if any(isinstance(t, Tensor) and t.requires_grad for t in leaves):
        return True
    return any(p.requires_grad for p in owner.parameters())


def _hook_tables(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks


def _live(hook: Any) -> bool:
    """Whether a hook may do something now.

    transformers leaves its hooks on a model from which hidden states were asked for once; they do
    nothing while nobody collects, and a call that collects has arguments that the guards know.
    """
    if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
        return True
    collector = hook.__globals__.get("_active_collector")
    return collector is None or collector.get() is not None

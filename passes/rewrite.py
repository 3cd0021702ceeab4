"""Stage 7, rewrite: a plan becomes a new module tree with new graphs."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from structc.attention_records import AttentionSite
from structc.families import AbstractFamily, Dense
from structc.passes.activation import following_activation
from structc.passes.attention_hook import use_hook
from structc.passes.chains import find_chains, fuse
from structc.passes.clone import clone_tree, replace_modules
from structc.passes.filters import use_filters
from structc.passes.region import Runner, attributes_of, install, view_of
from structc.passes.rewrite_attention import Planned, planned, replace_attention
from structc.passes.windows import Windowed, replace_convolution
from structc.records import Captured, LinearSite, Region, Sites

aten = torch.ops.aten
FACTORS = "structc_"
"""Start of the name of a child that holds the factors of a weight used without a module."""


@dataclass(frozen=True, eq=False)
class Product:
    """A rewritten model.

    Attributes:
        tree: the module tree that owns all parameters.
        runners: its regions.
        replaced: the family module of each rewritten site.
        chains: programs of whole chains that its graphs run as one operator.
        by_head: attentions with heads that methods compute.
    """

    tree: nn.Module
    runners: tuple[Runner, ...]
    replaced: Mapping[str, AbstractFamily]
    chains: frozenset[str] = frozenset()
    by_head: frozenset[str] = frozenset()


def rewrite(
    captured: Captured,
    sites: Sites,
    modules: Mapping[str, AbstractFamily],
    chains: Collection[str] = (),
) -> Product:
    """Put family modules in the place of sites, in a fresh clone and in copies of the graphs.

    Args:
        captured: the tree and its graphs.
        sites: where ``modules`` go.
        modules: by the name of their site.
        chains: programs that become one operator wherever a graph has them
            (:mod:`structc.passes.chains`).

    rewrite:      linear(x, W, b) [-> act]  -->  structc::tile(x, factors, program with bias, act)
                  linear(x, W, b) [-> act]  -->  structc::dense(x, W, b, act)
                  softmax(q k^T + mask) v   -->  structc::attention(q, k, v, ...)
                  softmax(q k^T + mask) v   -->  structc::attention_by_head(q, k, v, ...)
        and where no graph has an attention, what :func:`structc.passes.attention_hook.hooked` says
    Sound because: the operator computes the family's matrix, bias and activation, which tests
        compare with its dense form; an activation is taken in only if it is the product's only use.
    Skips when:   a site is not in ``modules``; an activation has other readers; an attention has no
        faster kernel (:func:`structc.passes.rewrite_attention.planned` says what it may become).
    """
    tree = clone_tree(captured.tree)
    use_filters(tree, captured.filters)
    by_name = {site.name: site for site in sites.linear}
    places: dict[str, str] = {}
    for name, module in modules.items():
        site = by_name[name]
        places[name] = site.module or _adopt(tree, site, module)
        places[name] += ".map" if site.window else ""
    leaves = {by_name[n].module: _leaf(m, by_name[n]) for n, m in modules.items()}
    leaves.pop("", None)
    replace_modules(tree, leaves)
    runners, used = [], set()
    attended = [a for a in sites.attention if (a.kernel or a.by_head) and not a.hooked]
    through = [a.name for a in sites.attention if a.kernel and a.hooked]
    if through:
        use_hook(tree, through)
    for region in captured.regions:
        inside = [a for a in attended if a.node.region == region.path]
        graph = _rewrite_graph(region, tree, by_name, modules, places, inside)
        if chains:
            rewritten = replace(region, graph=graph)
            found = [c for whole in find_chains(rewritten, graph) for c in whole.among(chains)]
            fuse(graph.graph, found)
            used |= {str(c.program) for c in found}
            graph = view_of(region.graph, tree.get_submodule(region.path), graph.graph)
        runners.append(install(tree.get_submodule(region.path), replace(region, graph=graph)))
    by_head = frozenset(a.name for a in attended if a.by_head)
    return Product(tree, tuple(runners), dict(modules), frozenset(used), by_head)


def _leaf(module: AbstractFamily, site: LinearSite) -> nn.Module:
    return module if site.window is None else Windowed(module, site.window).train(False)


def _adopt(tree: nn.Module, site: LinearSite, module: AbstractFamily) -> str:
    """Give the factors of a functional site a home in the module that held its weight.

    What the user's code reads there from now on are the factors, multiplied out: the module tree
    and the graphs stay one function of one set of parameters.
    """
    path, _, name = site.weight.rpartition(".")
    owner = tree.get_submodule(path)
    key = f"{FACTORS}{name}"
    owner._modules[key] = module
    if not isinstance(module, Dense):  # whose weight and bias are the owner's own tensors
        parts = {name: "weight"}
        if site.bias is not None:
            parts[site.bias.rpartition(".")[2]] = "bias"
        _read_from_factors(owner, key, parts)
    return ".".join(filter(None, (path, key)))


def _read_from_factors(owner: nn.Module, key: str, parts: Mapping[str, str]) -> None:
    """Make attributes of a module those of its child instead of tensors of its own."""

    def reading(part: str) -> property:
        return property(lambda self: getattr(self._modules[key], part))

    for name in parts:
        owner._parameters.pop(name, None)
        owner._buffers.pop(name, None)
    base = type(owner)
    names: dict[str, Any] = {name: reading(part) for name, part in parts.items()}
    names |= {"__module__": base.__module__, "__doc__": base.__doc__}
    metaclass: Any = type(base)
    owner.__class__ = metaclass(base.__name__, (base,), names)


def _rewrite_graph(
    region: Region,
    tree: nn.Module,
    sites: Mapping[str, LinearSite],
    modules: Mapping[str, AbstractFamily],
    places: Mapping[str, str],
    attention: Sequence[AttentionSite] = (),
) -> torch.fx.GraphModule:
    owner = tree.get_submodule(region.path)
    held: Any = attributes_of(region.graph, owner)
    graph = torch.fx.Graph(owning_module=held)
    copied: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(region.graph.graph, copied))
    nodes = {old.name: new for old, new in copied.items()}
    originals = {old.name: old for old in copied}
    for one in attention:
        found = planned(originals[one.node.node])
        if isinstance(found, Planned):
            replace_attention(graph, found, nodes, one.kernel, one.by_head)
    for name, module in modules.items():
        site = sites[name]
        place = places[name].removeprefix(f"{region.path}." if region.path else "")
        for ref in site.nodes:
            if ref.region != region.path:
                continue
            if site.window is not None:
                replace_convolution(graph, nodes[ref.node], module, place, site.window)
            else:
                replace_linear(graph, nodes[ref.node], module, place, site)
    graph.eliminate_dead_code()
    graph.lint()
    return view_of(region.graph, owner, graph)


def replace_linear(
    graph: torch.fx.Graph,
    node: torch.fx.Node,
    module: AbstractFamily,
    place: str,
    site: LinearSite,
) -> None:
    """Replace one product, and the activation behind it where that is its only use."""
    x = node.args[1] if node.target is aten.addmm.default else node.args[0]
    takes_bias = site.bias is not None
    act_node = following_activation(node) if site.activation else None
    act = site.activation if act_node is not None else ""
    with graph.inserting_before(node):
        weights = [graph.get_attr(f"{place}.{n}") for n in module.factor_names()]
        bias = graph.get_attr(f"{place}.bias") if takes_bias else None
        if isinstance(module, Dense):
            new = graph.call_function(
                torch.ops.structc.dense.default, (x, weights[0], bias, act, module.transposed)
            )
        else:
            program = str(module.form(act))
            listed = weights if bias is None else [*weights, bias]
            made = graph.call_function(torch.ops.structc.tile.default, ([x], listed, program))
            new = graph.call_function(operator.getitem, (made, 0))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    if act_node is not None:
        before = act_node.args[0]
        act_node.replace_all_uses_with(before)  # type: ignore[arg-type]
        graph.erase_node(act_node)
    graph.erase_node(node)


def place_of(tree: nn.Module, module: nn.Module) -> str:
    """The name of a module in a tree."""
    return next(name for name, m in tree.named_modules() if m is module)

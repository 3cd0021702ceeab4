"""Loading an artifact into a model's code: the other end of :mod:`structc.artifact`."""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from structc import artifact
from structc.boundary import public_boundary
from structc.compiled import CompiledModel, Handle, wrap
from structc.errors import ArtifactCorrupt, ArtifactMismatch
from structc.families import BY_NAME, AbstractFamily, Dense
from structc.passes.attention_hook import hook_refused
from structc.passes.capture import export_region
from structc.passes.clone import clone_tree
from structc.passes.filters import use_filters
from structc.passes.inductor import Frozen, freeze
from structc.passes.region import Runner, without_weights
from structc.passes.rewrite import Product, place_of, rewrite
from structc.passes.rewrite_attention import Planned, planned
from structc.pricing import bind_saved
from structc.records import Call, Captured, LinearSite, Plan, Region, Sites

log = logging.getLogger("structc")


def load(path: str | Path, model: nn.Module) -> CompiledModel:
    """Load what :meth:`CompiledModel.save` wrote.

    Args:
        path: the artifact's folder.
        model: gives the code only; its weights are not read and may be on the meta device.

    Returns:
        A compiled model with the artifact's weights. Graphs are exported again from the model's
        code and used where they are the ones that were compiled; kernels are built again.

    Errors: :class:`ArtifactCorrupt`, :class:`ArtifactVersion`, :class:`ArtifactMismatch`.
    """
    with public_boundary():
        manifest, state, report = artifact.read(path)
        sites, plan = artifact.sites_from(manifest, Path(path))
        artifact.check_same_model(model, sites, manifest)
        tree = clone_tree(model).eval()
        _materialise_meta(tree)
        filters = _filters(tree, manifest.get("filters", []), Path(path))
        regions = _regions_again(tree, manifest, Path(path))
        _check_nodes(regions, sites, Path(path))
        sites = _hookable(tree, sites)
        captured = Captured(tree, Call((), {}), regions, None, {}, ())
        replaced = set(manifest["replaced"])
        modules = {
            site.name: _empty_module(tree, site, plan)
            for site in sites.linear
            if site.name in replaced
        }
        product = rewrite(captured, sites, modules, frozenset(map(str, manifest["chains"])))
        _assign(product.tree, state)
        for refusal in bind_saved(manifest["kernels"]):
            log.warning("load: %s: %s", refusal.site, refusal.reason)
        _run_as(product, manifest["runner"])
        kernels = tuple(manifest["kernels"])
        places = {n: place_of(product.tree, m) for n, m in product.replaced.items()}
        kept = tuple(map(without_weights, regions))
        plan = replace(plan, words=report.explanations())
        handle = Handle(
            report, plan, sites, kept, kernels, manifest["runner"], places, product.chains, filters
        )
        return wrap(product.tree, handle)


def _filters(tree: nn.Module, names: Any, path: Path) -> tuple[str, ...]:
    """Let the depthwise convolutions that an artifact names run by FFT again."""
    modules = dict(tree.named_modules())
    if not isinstance(names, list) or any(type(modules.get(n)) is not nn.Conv1d for n in names):
        raise ArtifactCorrupt(
            f"artifact: {path}: {names!r} are no convolutions of the model",
            hint="Convert the model again, or fetch the artifact again.",
        )
    use_filters(tree, names)
    return tuple(names)


def _hookable(tree: nn.Module, sites: Sites) -> Sites:
    """The sites, their attention as the model has it where the interface cannot be used now."""
    cause = hook_refused(tree) if any(a.hooked for a in sites.attention) else ""
    if not cause:
        return sites
    log.warning("load: attention stays as the model has it: %s", cause)
    kept = (replace(a, kernel="") if a.hooked else a for a in sites.attention)
    return replace(sites, attention=tuple(kept))


def _materialise_meta(tree: nn.Module) -> None:
    """Give meta tensors a place in memory, unread: export wants a device, loading the values."""
    made: dict[int, torch.Tensor] = {}  # tied tensors stay one
    for module in tree.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:
                        empty = torch.empty_like(tensor, device="cpu")
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = (
                            nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                        )
                    table[name] = made[id(tensor)]


def _regions_again(tree: nn.Module, manifest: Mapping[str, Any], path: Path) -> tuple[Region, ...]:
    """Export the regions of an artifact from the model's code; only the same graphs are used."""
    regions = []
    for data in manifest["regions"]:
        where, digest, guards, leaves = artifact.guards_from(data, path)
        args, kwargs = pytree.tree_unflatten(leaves, guards.spec)
        try:
            module = tree.get_submodule(where)
        except AttributeError:
            log.warning("load: the model has no %r any more: its graph is not used", where)
            continue
        region, reason = export_region(module, where, Call(args, kwargs), check=False)
        if region is None or region.hash != digest:
            log.warning("load: the graph of %r is another one now (%s): not used", where, reason)
            continue
        regions.append(replace(region, guards=guards))
    return tuple(regions)


_PRODUCTS = ("aten.linear", "aten.addmm", "aten.mm", "aten.matmul", "aten.conv")


def _check_nodes(regions: Sequence[Region], sites: Sites, path: Path) -> None:
    """A node that a site names must be a product in the graph that it is said to be in."""
    known = {
        r.path: {n.name for n in r.graph.graph.nodes if str(n.target).startswith(_PRODUCTS)}
        for r in regions
    }
    for site in sites.linear:
        for ref in site.nodes:
            if ref.region in known and ref.node not in known[ref.region]:
                raise ArtifactCorrupt(
                    f"artifact: {path}: {site.name} is said to be at {ref.node!r}, no product",
                    hint="Convert the model again, or fetch the artifact again.",
                )
    graphs = {r.path: {n.name: n for n in r.graph.graph.nodes} for r in regions}
    for place in sites.attention:
        if place.hooked:
            continue
        node = graphs.get(place.node.region, {}).get(place.node.node)
        if place.node.region in graphs and (node is None or not _is_attention(node)):
            raise ArtifactCorrupt(
                f"artifact: {path}: {place.name} is said to be at {place.node.node!r}, which is "
                "no attention",
                hint="Convert the model again, or fetch the artifact again.",
            )


def _is_attention(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and isinstance(planned(node), Planned)


def _empty_module(tree: nn.Module, site: LinearSite, plan: Plan) -> AbstractFamily:
    """The family module of a site, its values to be loaded; dense ones keep the model's ties."""
    choice = plan.choices[site.name]
    family = BY_NAME[choice.family]
    weight = operator.attrgetter(site.weight)(tree)
    bias = None if site.bias is None else operator.attrgetter(site.bias)(tree)
    if family is Dense:
        made: AbstractFamily = Dense(weight, transposed=site.transposed)
        made.bias = bias
        return made.eval()
    made = family.empty(site.in_features, site.out_features, choice.hyper, site.dtype)
    made.transposed = site.transposed  # type: ignore[assignment]
    if bias is not None:
        made.bias = nn.Parameter(torch.empty(site.out_features, dtype=site.dtype))
    for parameter in made.parameters():
        parameter.requires_grad_(weight.requires_grad)
    return made.eval()


def _assign(tree: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put an artifact's tensors into a tree of clones; ties stay, no shared tensor is written."""
    known = dict((*tree.named_parameters(), *tree.named_buffers()))
    if known.keys() != state.keys():
        odd = sorted(known.keys() ^ state.keys())[:3]
        raise ArtifactMismatch(f"load: the model and the artifact disagree about {', '.join(odd)}")
    new: dict[int, torch.Tensor] = {}
    for name, old in known.items():
        if tuple(old.shape) != tuple(state[name].shape):
            raise ArtifactMismatch(
                f"load: {name} is {tuple(old.shape)}, the artifact has {tuple(state[name].shape)}"
            )
        value = state[name]
        is_parameter = isinstance(old, nn.Parameter)
        new[id(old)] = nn.Parameter(value, old.requires_grad) if is_parameter else value
    for module in tree.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = new[id(tensor)]  # type: ignore[assignment]


def _run_as(product: Product, way: str) -> None:
    for runner in product.runners:
        runner.active = way != "modules"
        if way == "inductor":
            runner.compiled = _refrozen(runner)


def _refrozen(runner: Runner) -> Frozen | None:
    try:
        return freeze(runner)
    except Exception as e:  # another compiler or version than where it was saved: still right
        log.warning("load: Inductor: %s: the graph runs as it is", type(e).__name__)
        return None

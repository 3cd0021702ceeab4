"""Attention ops in exported graphs: fused or spelled out, with their masks told apart.

Export makes every mask an explicit boolean tensor and never marks causality. What is done about a
mask follows from what the graph proves of it (:mod:`structc.passes.masks`); for people it is also
evaluated on the example inputs and classified by its values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structc.attention_records import AttentionCase, AttentionSite
from structc.passes.attention_hook import hook_refused, hooked
from structc.passes.attention_parts import SDPA
from structc.passes.attention_softmax import head_dim_of
from structc.passes.guards import resize_inputs
from structc.passes.rewrite_attention import Planned, planned
from structc.passes.rotary import angles, rotates
from structc.records import Captured, DimGuard, NodeRef, Refusal, Region

log = logging.getLogger("structc.detect")


def attention_sites(
    region: Region, captured: Captured, *, runs: bool = True
) -> Iterator[AttentionSite]:
    """Every attention of a graph, as one site each; several of one module are numbered.

    Args:
        runs: whether the graph is part of products, and not only read.
    """
    masks: dict[torch.fx.Node, str] = {}
    many: dict[str, int] = {}
    cause = "" if runs else hook_refused(captured.tree)
    for node in region.graph.graph.nodes:
        if node.op != "call_function":
            continue
        found = planned(node)
        if found is None:
            continue
        name = _module_of(node, region)
        many[name] = many.get(name, 0) + 1
        name = name if many[name] == 1 else f"{name}#{many[name]}"
        if isinstance(found, Refusal):
            yield _left(node, name, region, replace(found, site=name))
        else:
            site = _site(node, name, found, region, captured, masks)
            yield site if runs else hooked(site, captured.tree, cause)


def _site(
    node: torch.fx.Node,
    name: str,
    found: Planned,
    region: Region,
    captured: Captured,
    masks: dict[torch.fx.Node, str],
) -> AttentionSite:
    parts, kind = found.parts, "none"
    given = [(m.node, False) for m in parts.shown] + [(m.node, True) for m in parts.hidden]
    if parts.is_causal:
        kind = "causal"
    elif len(given) == 1:
        kind = _mask_kind(given[0][0], region, captured, masks, hides=given[0][1])
    elif given:  # of several masks each hides what the others show
        kind = "data_dependent"
    case = case_of(found)
    return AttentionSite(
        name=name,
        node=NodeRef(region.path, node.name),
        spelling="sdpa" if parts.fused else "matmul_softmax_matmul",
        mask_kind=kind,
        scale=parts.scale,
        heads=case.heads,
        kv_heads=case.kv_heads,
        head_dim=case.head_dim,
        length=case.keys,
        proven=found.proven,
        nodes=tuple(n.name for n in parts.nodes),
        case=case,
        rotary=_rotary((parts.q.node, parts.k.node), region, captured),
    )


def _left(node: torch.fx.Node, name: str, region: Region, refusal: Refusal) -> AttentionSite:
    """One that no form computes: its sizes are those of its first operand, as far as they tell."""
    scores = node.args[0]
    fused = node.target is SDPA
    return AttentionSite(
        name=name,
        node=NodeRef(region.path, node.name),
        spelling="sdpa" if fused else "matmul_softmax_matmul",
        mask_kind="data_dependent",
        scale=None,
        heads=_size(scores, -3),
        kv_heads=_size(scores, -3),
        head_dim=_size(scores, -1) if fused else head_dim_of(node),
        length=_size(scores, -2),
        nodes=(node.name,),
        refusal=refusal,
    )


def case_of(found: Planned) -> AttentionCase:
    """What the time of a planned attention depends on."""
    parts = found.parts
    q, k, v = (p.sizes() for p in (parts.q, parts.k, parts.v))
    mask, shape = "", tuple[int, ...]()
    if found.bias is not None:
        mask = "bool" if found.bias.node.meta["val"].dtype == torch.bool else "float"
        shape = found.bias.sizes()
    return AttentionCase(
        str(found.form),
        q[0], q[1], k[1], q[2], k[2], q[3], v[3],
        dtype=parts.q.node.meta["val"].dtype,
        mask=mask,
        mask_shape=(1,) * (4 - len(shape)) + shape if mask else (),
        padded=bool(found.keys),
        sink=parts.sink is not None,
        masked=bool(parts.shown or parts.hidden),
        repeated=parts.repeated,
        fused=parts.fused,
        lags=0 if found.lags is None else found.lags.heads,
        torch_causal=found.torch_causal,
    )  # fmt: skip


def _hint(size: Any) -> int:
    return int(getattr(getattr(size, "node", None), "hint", size))


def _module_of(node: torch.fx.Node, region: Region) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inner = stack[-1][0] if stack else ""
    inner = inner.removeprefix("L['self']").lstrip(".")
    return ".".join(p for p in (region.path, inner or node.name) if p)


def _size(node: Any, dim: int) -> int:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() < -dim:
        return 1
    return _hint(value.shape[dim])


def _rotary(operands: tuple[torch.fx.Node, ...], region: Region, captured: Captured) -> bool:
    """Whether queries and keys are both turned by angles of their positions."""
    turned = [angles(o) for o in operands]
    if None in turned:
        return False
    known = {n for found in turned if found is not None for n in found}
    leaves = pytree.tree_leaves((region.example.args, region.example.kwargs))
    value = {n: _evaluate(n, region, captured, leaves) for n in known}
    return all(rotates([value[n] for n in found]) for found in turned if found is not None)


# ---------------------------------------------------------------------------- masks


def _mask_kind(
    mask: Any,
    region: Region,
    captured: Captured,
    known: dict[torch.fx.Node, str],
    *,
    hides: bool = False,
) -> str:
    """What a mask is at the example's sizes and at twice its length: a window that is longer than
    the example looks causal there alone."""
    if not isinstance(mask, torch.fx.Node):
        return "data_dependent"
    if mask not in known:
        leaves = pytree.tree_leaves((region.example.args, region.example.kwargs))
        kinds = []
        for inputs in (leaves, _longer(leaves, region)):
            value = None if inputs is None else _evaluate(mask, region, captured, inputs)
            if value is not None:
                kinds.append(classify_mask(~value if hides else value))
        if set(kinds) == {"causal", "sliding_window"}:
            known[mask] = "sliding_window"
        else:
            known[mask] = kinds[0] if len(set(kinds)) == 1 else "data_dependent"
    return known[mask]


def _longer(leaves: list[Any], region: Region) -> list[Any] | None:
    """The example with every free length doubled, the batch as it is; None if none is free."""
    sizes: dict[str, int] = {}
    for leaf, guard in zip(leaves, region.guards.leaves, strict=True):
        if isinstance(guard, DimGuard):
            for at, dim in enumerate(guard.dims):
                if isinstance(dim, str):
                    size = leaf.shape[at] * (2 if at else 1)
                    sizes[dim] = min(sizes.get(dim, size), size, region.guards.ranges[dim][1])
    longer = resize_inputs(leaves, region.guards, sizes)
    same = [getattr(a, "shape", None) == getattr(b, "shape", None) for a, b in zip(leaves, longer)]
    return None if all(same) else longer


def _evaluate(
    node: torch.fx.Node, region: Region, captured: Captured, leaves: list[Any]
) -> Tensor | None:
    """The mask's value on flat inputs of the region."""
    needed: set[torch.fx.Node] = set()
    stack = [node]
    while stack:
        at = stack.pop()
        if at not in needed:
            needed.add(at)
            stack.extend(at.all_input_nodes)
    values: dict[torch.fx.Node, Any] = {}
    inputs = iter(leaves)
    owner = captured.tree.get_submodule(region.path)
    try:
        with torch.no_grad():
            for at in region.graph.graph.nodes:
                if at.op == "placeholder":
                    values[at] = next(inputs)
                elif at in needed:
                    values[at] = _step(at, values, owner, region)
    except Exception as e:  # whatever an op raises: the mask is then unknown, which is safe
        log.info("mask of %s cannot be evaluated: %s", node.name, e)
        return None
    value = values[node]
    return value if isinstance(value, Tensor) else None


def _step(at: torch.fx.Node, values: dict[Any, Any], owner: Any, region: Region) -> Any:
    if at.op == "get_attr":
        for holder in (owner, region.graph):
            try:
                value = holder
                for part in str(at.target).split("."):
                    value = getattr(value, part)
                return value
            except AttributeError:
                continue
    args, kwargs = torch.fx.node.map_arg((at.args, at.kwargs), lambda n: values[n])
    return at.target(*args, **kwargs)  # type: ignore[operator]


def classify_mask(mask: Tensor) -> str:
    """What a mask does, by its values.

    Boolean masks are True where attention is allowed; additive ones are zero there, else they are
    a ``bias``. Returns ``all_true``, ``causal``, ``padding`` (depends on the key alone),
    ``causal_padding``, ``sliding_window`` or ``data_dependent``.
    ``causal`` is said only for an exact lower triangle.

    >>> classify_mask(torch.ones(4, 4, dtype=torch.bool).tril())
    'causal'
    """
    if mask.dim() < 2:
        return "data_dependent"
    if mask.dtype == torch.bool:
        allowed = mask
    else:
        allowed = mask > -1e3
        if bool((mask[allowed] != 0).any()):
            return "bias"
    rows, keys = allowed.shape[-2:]
    if bool(allowed.all()):
        return "all_true"
    flat = allowed.reshape(-1, rows, keys)
    if bool((flat == flat[:, :1]).all()):
        return "padding"
    if rows != keys:
        return "data_dependent"
    tril = torch.ones(rows, keys, dtype=torch.bool).tril()
    if bool((flat == tril).all()):
        return "causal"
    if bool((flat == (tril & flat[:, -1:])).all()):
        return "causal_padding"
    offsets = torch.arange(rows)[:, None] - torch.arange(keys)[None]
    width = int(offsets[flat[0]].max()) + 1
    if bool((flat == (tril & (offsets < width))).all()):
        return "sliding_window"
    return "data_dependent"

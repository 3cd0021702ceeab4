"""Attention ops in exported graphs: fused or spelled out, with their masks told apart.

Export makes every mask an explicit boolean tensor and never marks causality, so the mask is
evaluated on the example inputs and classified by its values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structc.passes.guards import resize_inputs
from structc.records import AttentionSite, Captured, DimGuard, NodeRef, Region

log = logging.getLogger("structc.detect")
aten = torch.ops.aten

_SDPA = aten.scaled_dot_product_attention.default
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_MATMUL = (aten.matmul.default, aten.bmm.default)
_BETWEEN = (
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.dropout.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.view.default,
    aten.reshape.default,
    aten.baddbmm.default,
)


def attention_sites(region: Region, captured: Captured) -> Iterator[AttentionSite]:
    """Every attention of a graph, as one site each."""
    masks: dict[torch.fx.Node, str] = {}
    for node in region.graph.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _SDPA:
            yield _fused(node, region, captured, masks)
        elif node.target in _SOFTMAX:
            site = _spelled_out(node, region, captured, masks)
            if site is not None:
                yield site


def _fused(
    node: torch.fx.Node, region: Region, captured: Captured, masks: dict[torch.fx.Node, str]
) -> AttentionSite:
    args = dict(zip(("q", "k", "v", "attn_mask", "dropout", "is_causal"), node.args, strict=False))
    args |= node.kwargs
    q, k = args["q"], args["k"]
    mask = args.get("attn_mask")
    if args.get("is_causal"):
        kind = "causal"
    elif mask is None:
        kind = "none"
    else:
        kind = _mask_kind(mask, region, captured, masks)
    scale = args.get("scale")
    dim = _size(q, -1)
    return AttentionSite(
        name=_module_of(node, region),
        node=NodeRef(region.path, node.name),
        spelling="sdpa",
        mask_kind=kind,
        scale=float(scale) if isinstance(scale, (int, float)) else dim**-0.5,
        heads=_size(q, -3),
        kv_heads=_kv_heads(k),
        head_dim=dim,
        length=_size(k, -2),
    )


def _spelled_out(
    softmax: torch.fx.Node,
    region: Region,
    captured: Captured,
    masks: dict[torch.fx.Node, str],
) -> AttentionSite | None:
    scores, scale = softmax.args[0], None
    found: list[tuple[Any, bool]] = []  # masks, and whether True stands for what is hidden
    while isinstance(scores, torch.fx.Node) and scores.target in _BETWEEN:
        rest = scores.args[1] if len(scores.args) > 1 else None
        if scores.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(rest, (int, float)):
            scale = float(rest) * (scale or 1.0)
        elif scores.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(rest, (int, float)):
            scale = (scale or 1.0) / float(rest)
        elif scores.target is aten.add.Tensor and isinstance(rest, torch.fx.Node):
            found.append((rest, False))
        elif scores.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
            found.append((rest, True))
        elif scores.target in (aten.where.self, aten.where.ScalarOther):
            found.append((scores.args[0], False))
            scores = scores.args[1]
            continue
        scores = scores.args[0]
    product = softmax
    while True:
        users = [u for u in product.users if u.op == "call_function"]
        if len(users) != 1:
            return None
        product = users[0]
        if product.target not in _BETWEEN:
            break
    if (
        not isinstance(scores, torch.fx.Node)
        or scores.target not in _MATMUL
        or product.target not in _MATMUL
    ):
        return None
    q, k = scores.args[:2]
    assert isinstance(q, torch.fx.Node) and isinstance(k, torch.fx.Node)
    kind = "none"
    if found:  # of several masks each hides what the others show
        (mask, hides), several = found[0], len(found) > 1
        one = _mask_kind(mask, region, captured, masks, hides=hides)
        kind = "data_dependent" if several else one
    return AttentionSite(
        name=_module_of(softmax, region),
        node=NodeRef(region.path, softmax.name),
        spelling="matmul_softmax_matmul",
        mask_kind=kind,
        scale=scale,
        heads=_size(q, -3),
        kv_heads=_size(q, -3),
        head_dim=_size(q, -1),
        length=_size(k, -1),
    )


def _module_of(node: torch.fx.Node, region: Region) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    inner = stack[-1][0] if stack else ""
    inner = inner.removeprefix("L['self']").lstrip(".")
    return ".".join(p for p in (region.path, inner or node.name) if p)


def _size(node: Any, dim: int) -> int:
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() < -dim:
        return 1
    size = value.shape[dim]
    return int(getattr(getattr(size, "node", None), "hint", size))


def _kv_heads(k: Any) -> int:
    """Heads of k before they were repeated: export writes grouped queries as an expand."""
    heads = _size(k, -3)
    node = k
    for _ in range(4):
        if not isinstance(node, torch.fx.Node) or node.op != "call_function":
            break
        if node.target is aten.expand.default:
            value = (
                node.args[0].meta.get("val") if isinstance(node.args[0], torch.fx.Node) else None
            )
            if isinstance(value, Tensor) and value.dim() == 5:
                return int(value.shape[1])
            break
        node = node.args[0] if node.args else None
    return heads


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

"""Products with constant weights in a graph, in any spelling; for stage 2, detect."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from structc.passes.activation import activation_of, following_activation
from structc.passes.capture import batch_of, traced_batch
from structc.records import NodeRef, Region

aten = torch.ops.aten
TRANSPOSES = (
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.mT.default,
    aten.numpy_T.default,
)
_SAME_ROWS = (aten.view.default, aten.reshape.default, aten.dropout.default, aten.detach.default)


@dataclass
class Use:
    """One product with a constant weight in a graph."""

    ref: NodeRef
    weight: str
    bias: str | None
    leaf: str
    """Path of the module in whose code the product stands."""
    transposed: bool
    source: str
    activation: str
    rows: int


def linear_uses(region: Region) -> Iterator[Use]:
    """All products with a constant 2-D weight in one region's graph."""
    for node in region.graph.graph.nodes:
        if node.op != "call_function":
            continue
        operands = _operands(node)
        if operands is None:
            continue
        x, weight_node, bias_node, stored_in_out = operands
        constant = _constant(weight_node)
        if constant is None:
            continue
        name, flipped = constant
        transposed = stored_in_out != flipped
        weight = _value(weight_node)
        if weight is None or weight.dim() != 2 or not weight.is_floating_point():
            continue
        bias = None
        if bias_node is not None:
            bias_constant = _constant(bias_node)
            if bias_constant is None:
                continue
            bias = full_name(region, bias_constant[0])
        follower = following_activation(node)
        yield Use(
            ref=NodeRef(region.path, node.name),
            weight=full_name(region, name),
            bias=bias,
            leaf=full_name(region, _leaf_of(node)),
            transposed=transposed,
            source=f"{region.path}:{_source(x).name}",
            activation="" if follower is None else activation_of(follower),
            rows=rows_of(x, region),
        )


def _operands(
    node: torch.fx.Node,
) -> tuple[torch.fx.Node, torch.fx.Node, torch.fx.Node | None, bool] | None:
    """(x, weight, bias, whether the weight operand is (in, out)) of a linear node."""
    args, target = node.args, node.target
    if target is aten.linear.default:
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        x, w = args[0], args[1]
        stored_in_out = False
    elif target is aten.addmm.default:
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            return None
        bias, x, w = args[0], args[1], args[2]
        stored_in_out = True
    elif target in (aten.mm.default, aten.matmul.default):
        x, w, bias = args[0], args[1], None
        stored_in_out = True
    else:
        return None
    if not isinstance(x, torch.fx.Node) or not isinstance(w, torch.fx.Node):
        return None
    value = _value(x)
    if value is None or value.dim() < 1 or _constant(x) is not None:
        return None
    if bias is not None and (not isinstance(bias, torch.fx.Node) or _ndim(bias) != 1):
        return None
    return x, w, bias, stored_in_out


def _constant(node: torch.fx.Node) -> tuple[str, bool] | None:
    """(parameter name, whether it is seen transposed) if the node is a parameter or its view."""
    flipped = False
    while node.op == "call_function" and node.args and isinstance(node.args[0], torch.fx.Node):
        if node.target not in TRANSPOSES:
            return None
        dims = tuple(node.args[1:])
        if node.target is aten.transpose.int and {int(d) % 2 for d in dims} != {0, 1}:  # type: ignore[arg-type]
            return None
        if node.target is aten.permute.default and list(dims[0]) != [1, 0]:  # type: ignore[arg-type]
            return None
        flipped = not flipped
        node = node.args[0]
    return (str(node.target), flipped) if node.op == "get_attr" else None


def _value(node: torch.fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return value
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(node.graph.owning_module)
        return value if isinstance(value, Tensor) else None
    return None


def _ndim(node: torch.fx.Node) -> int:
    value = _value(node)
    return -1 if value is None else value.dim()


def rows_of(x: torch.fx.Node, region: Region) -> int:
    """Rows at the example's sizes; the graph knows those of the batch that was traced."""
    value = _value(x)
    assert value is not None
    sizes = [getattr(getattr(s, "node", None), "hint", s) for s in value.shape[:-1]]
    rows = math.prod(int(s) for s in sizes)
    batch = batch_of(region.example)
    return rows * batch // traced_batch(batch) if batch else rows


def _source(x: torch.fx.Node) -> torch.fx.Node:
    """The node that made the values: reshapes that keep rows apart do not make a new input."""
    while x.op == "call_function" and x.target in _SAME_ROWS:
        before = x.args[0]
        assert isinstance(before, torch.fx.Node)
        a, b = _value(before), _value(x)
        if a is None or b is None or a.dim() == 0 or str(a.shape[-1]) != str(b.shape[-1]):
            break
        x = before
    return x


def full_name(region: Region, name: str) -> str:
    """A name in a region as the whole model has it."""
    return f"{region.path}.{name}" if region.path else name


def _leaf_of(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return re.sub(r"@\d+", "", path).removeprefix("L['self']").lstrip(".")

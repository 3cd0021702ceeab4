"""Convolutions as linear maps of windows: found in graphs, computed by structured factors.

A convolution is a matrix (channels out, channels in * kernel) that multiplies every window of its
input. Where that matrix has an exact structure, the windows are cut out and a structured map runs
on them: a short-time Fourier transform is written as a convolution more often than not.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from structc.families import AbstractFamily
from structc.passes.filters import LongFilter
from structc.passes.linear_uses import full_name, rows_of
from structc.records import Captured, LinearSite, NodeRef, Refusal, Region, Window
from structc.timing import interleaved

aten = torch.ops.aten
_CONVOLUTIONS: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2}
"""Dimensions that a window moves along."""

Apply = Callable[..., Any]
"""Runs an operator on tensors, or adds it to a graph."""


class Windowed(nn.Module):
    """A structured map of every window: what takes a convolution's place in the module tree.

    Shapes:  x (N, C, *sizes) or (C, *sizes);  y (N, m, *windows), as the convolution's.
    """

    def __init__(self, map: AbstractFamily, window: Window) -> None:
        super().__init__()
        self.map, self.window = map, window

    @property
    def weight(self) -> Tensor:
        """The convolution's weight, multiplied out, for code that reads it."""
        return self.map.to_dense().unflatten(1, (-1, *self.window.kernel))

    @property
    def bias(self) -> Tensor | None:
        return self.map.bias

    def forward(self, x: Tensor) -> Tensor:
        batched = x.dim() == len(self.window.kernel) + 2
        y = restored(_run, self.map(windows(_run, x if batched else x[None], self.window)))
        return y if batched else y[0]


def windows(apply: Apply, x: Any, window: Window) -> Any:
    """``(N, C, *sizes) -> (N, *windows, C * kernel)``, the order of a convolution's weight."""
    moved = len(window.kernel)
    if any(window.padding):
        ends = [p for pad in reversed(window.padding) for p in (pad, pad)]
        x = apply(aten.constant_pad_nd.default, x, ends, 0.0)
    for at, (size, step) in enumerate(zip(window.kernel, window.stride, strict=True)):
        x = apply(aten.unfold.default, x, 2 + at, size, step)
    places = range(2, 2 + moved)
    x = apply(aten.permute.default, x, [0, *places, 1, *range(2 + moved, 2 + 2 * moved)])
    return apply(aten.flatten.using_ints, x, 1 + moved, 1 + 2 * moved)


def restored(apply: Apply, y: Any, moved: int | None = None) -> Any:
    """``(N, *windows, m) -> (N, m, *windows)``, contiguous as a convolution's output is."""
    moved = y.dim() - 2 if moved is None else moved
    y = apply(aten.permute.default, y, [0, 1 + moved, *range(1, 1 + moved)])
    return apply(aten.contiguous.default, y)


def _run(op: Any, *args: Any) -> Any:
    return op(*args)


# ---------------------------------------------------------------------------- detection


def convolution_sites(captured: Captured) -> Iterator[LinearSite | Refusal]:
    """Convolutions with constant weights, each as the linear map of its windows.

    Skips when:   it has groups, a dilation or a padding that is not a number of zeros; its leaf has
        hooks or a forward of its own, or is called without a graph; its weight is tied.
    """
    uses: dict[str, list[tuple[Region, torch.fx.Node]]] = {}
    for region in captured.regions:
        for node in region.graph.graph.nodes:
            if node.op == "call_function" and node.target in _CONVOLUTIONS:
                weight = node.args[1]
                if isinstance(weight, torch.fx.Node) and weight.op == "get_attr":
                    name = full_name(region, str(weight.target))
                    uses.setdefault(name, []).append((region, node))
    for name, module in captured.tree.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)) and not isinstance(module, LongFilter):
            yield _site(name, module, uses.get(f"{name}.weight", []))


def _site(
    name: str, module: nn.Conv1d | nn.Conv2d, uses: list[tuple[Region, torch.fx.Node]]
) -> LinearSite | Refusal:
    def refuse(code: str, reason: str) -> Refusal:
        return Refusal(name, "detect", code, reason)

    kind = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
    weight = module._parameters.get("weight")
    if torch.nn.utils.parametrize.is_parametrized(module) or type(weight) is not nn.Parameter:
        return refuse("PARAMETRIZED", "its weight is computed, or no plain parameter")
    if module._forward_hooks or module._forward_pre_hooks or type(module) is not kind:
        return refuse("HOOKS", "it has hooks, or is a class of its own")
    if module.groups > 1:
        return refuse("GROUPS", f"a convolution in {module.groups} groups is no one matrix")
    if any(d != 1 for d in module.dilation):
        return refuse("DILATION", f"its windows have gaps: dilation {tuple(module.dilation)}")
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        return refuse("PADDING", f"padding {module.padding!r}, {module.padding_mode}")
    if not uses:
        return refuse("NO_REGION", "no exported graph calls it")
    if any(not _same(module, name, region, node) for region, node in uses):
        return refuse("MIXED", "its weight is used with another stride, padding or bias too")
    values = [node.meta["val"] for _, node in uses]
    if any(v.dim() != len(module.kernel_size) + 2 for v in values):
        return refuse("UNBATCHED", "it is called without a batch dimension")
    rows = [
        rows_of(node, region) * v.shape[-1] for (region, node), v in zip(uses, values, strict=True)
    ]
    m = module.out_channels
    return LinearSite(
        name=name,
        module=name,
        weight=f"{name}.weight",
        bias=None if module.bias is None else f"{name}.bias",
        in_features=weight[0].numel(),
        out_features=m,
        transposed=False,
        nodes=tuple(NodeRef(region.path, node.name) for region, node in uses),
        activation="",
        rows=max(1, max(int(r) for r in rows) // m),
        dtype=weight.dtype,
        group=f"{name}.weight",
        tags=frozenset({"convolution"}),
        window=Window(
            tuple(module.kernel_size), tuple(module.stride), tuple(int(p) for p in module.padding)
        ),
    )


def _same(module: nn.Conv1d | nn.Conv2d, name: str, region: Region, node: torch.fx.Node) -> bool:
    """Whether a graph calls the convolution as its layer does."""
    moved = len(module.kernel_size)
    words = (("bias", None), ("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
    bias, stride, padding, dilation, groups = (
        node.args[at] if len(node.args) > at else node.kwargs.get(word, usual)
        for at, (word, usual) in enumerate(words, 2)
    )
    told = full_name(region, str(bias.target)) if isinstance(bias, torch.fx.Node) else None
    if told != (None if module.bias is None else f"{name}.bias"):
        return False
    pairs = (stride, module.stride), (padding, module.padding), (dilation, module.dilation)
    alike = all(_each(a, moved) == _each(b, moved) for a, b in pairs)
    return alike and bool(groups == module.groups)


def _each(value: Any, moved: int) -> tuple[int, ...]:
    """One number a dimension, of one for all or of a list."""
    numbers = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return tuple(numbers * moved if len(numbers) == 1 else numbers)


# ---------------------------------------------------------------------------- what it gains


def ahead(
    conv: nn.Conv1d | nn.Conv2d, family: AbstractFamily, window: Window, x: Tensor
) -> tuple[float, float]:
    """Milliseconds of a convolution and of its windows through the factors, in turns.

    Cutting windows out counts.
    """
    map_ = copy.deepcopy(family).to(conv.weight.dtype)
    map_.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach())
    windowed = Windowed(map_, window).train(False)
    with torch.inference_mode():
        found = interleaved({"direct": lambda: conv(x), "windows": lambda: windowed(x)})
    return found["direct"].latency_ms, found["windows"].latency_ms


# ---------------------------------------------------------------------------- graphs


def replace_convolution(
    graph: torch.fx.Graph, node: torch.fx.Node, module: AbstractFamily, place: str, window: Window
) -> None:
    """Put windows and a structured map in the place of one convolution.

    rewrite:      conv(x, W, b)  -->  restored(structc::tile(windows(x), factors, program))
    Sound because: a convolution is its weight as a matrix times every window, and the operator
        computes the family's matrix.
    """

    def add(op: Any, *args: Any) -> torch.fx.Node:
        return graph.call_function(op, args)

    with graph.inserting_before(node):
        weights = [graph.get_attr(f"{place}.{n}") for n in module.factor_names()]
        if module.bias is not None:
            weights.append(graph.get_attr(f"{place}.bias"))
        cut = windows(add, node.args[0], window)
        made = add(torch.ops.structc.tile.default, [cut], weights, str(module.form()))
        new = restored(add, add(operator.getitem, made, 0), len(window.kernel))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)

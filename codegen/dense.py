"""Dense kernels: what every structured form has to beat.

``aten``    ``F.linear`` and the activation, as eager PyTorch runs them (MKL on most machines);
``mkl``     the weight packed once for MKL and for one number of rows, as frozen graphs have it;
``onednn``  the weight packed once for oneDNN, activation fused;
``tile``    the emitted one-factor kernel, bias and activation fused.

Which one wins depends on the machine and on the rows: MKL reaches 40 % of the roof on some
processors and all of it on others. Nothing here is decided by vendor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from structc import ops, reference
from structc.codegen.cpu import tile
from structc.forms import Act, Bias, Block, PackedDense, Tile
from structc.records import Refusal

LIBRARIES = ("aten", "mkl", "onednn")
KERNELS = (*LIBRARIES, "tile")
_FUSED: dict[str, tuple[str, str]] = {
    "": ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
    "silu": ("swish", ""),
}
"""oneDNN's name and algorithm of each activation."""


def make(
    form: PackedDense,
    dtype: torch.dtype,
    rows: int,
    kernel: str,
    config: Mapping[str, int | str],
    *,
    transposed: bool = False,
) -> ops.Kernel | Refusal:
    """A kernel ``(x, [weight] or [weight, bias]) -> y`` for one dense shape.

    Args:
        form: sizes and activation.
        dtype: of x, weight and bias.
        rows: that the packing is made for; others work too.
        kernel: one of :data:`KERNELS`.
        config: of the emitted kernel.
        transposed: whether the weight is stored (in_features, out_features).
    """
    match kernel:
        case "aten":
            return _aten(form.activation, transposed)
        case "mkl":
            return _mkl(form.activation, dtype, rows, transposed)
        case "onednn":
            return _onednn(form.activation, dtype, rows, transposed)
        case "tile":
            return _tile(form, dtype, config, transposed)
    return Refusal("", kernel, "KERNEL", f"no dense kernel is called {kernel!r}")


def _aten(act: str, transposed: bool) -> ops.Kernel:
    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        bias = weights[1] if len(weights) > 1 else None
        return reference.dense_reference(x, weights[0], bias, act, transposed)

    return run


def _mkl(act: str, dtype: torch.dtype, rows: int, transposed: bool) -> ops.Kernel | Refusal:
    if dtype != torch.float32:
        return Refusal("", "mkl", "UNAVAILABLE", f"MKL packs float32 weights, not {dtype}")
    if transposed:
        return Refusal("", "mkl", "UNAVAILABLE", "the weight is stored (in_features, out_features)")
    if not _has_mkl():
        return Refusal("", "mkl", "UNAVAILABLE", "this PyTorch has no MKL")
    linear, pack_for = torch.ops.mkl._mkl_linear.default, torch.ops.mkl._mkl_reorder_linear_weight
    activate = reference.ACTIVATION[act]
    eager = _aten(act, transposed)

    def pack(weights: Sequence[Tensor]) -> Tensor:
        return pack_for(weights[0].contiguous(), rows)

    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if x.shape[0] != rows or any(w.dtype != dtype for w in weights):
            return eager(x, weights)  # packed for one number of rows
        bias = weights[1] if len(weights) > 1 else None
        packed = ops.derived(weights[:1], f"mkl{rows}", pack)
        return activate(linear(x, packed, weights[0], bias, rows))

    return run


@lru_cache(maxsize=1)
def _has_mkl() -> bool:
    """Whether MKL's packed product is there and right; tried once."""
    if not torch.backends.mkl.is_available():
        return False
    try:
        w, x = (torch.ones(n, 16, dtype=torch.float32, device="cpu") for n in (8, 4))
        packed = torch.ops.mkl._mkl_reorder_linear_weight(w, 4)
        return bool((torch.ops.mkl._mkl_linear(x, packed, w, None, 4) == 16).all())
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


def _onednn(act: str, dtype: torch.dtype, rows: int, transposed: bool) -> ops.Kernel | Refusal:
    reason = _onednn_missing(dtype)
    if reason:
        return Refusal("", "onednn", "UNAVAILABLE", reason)
    name, algorithm = _FUSED[act]
    linear = torch.ops.mkldnn._linear_pointwise.default
    reorder = torch.ops.mkldnn._reorder_linear_weight.default

    def pack(weights: Sequence[Tensor]) -> Tensor:
        stored = weights[0].t() if transposed else weights[0]
        return reorder(stored.contiguous(), rows)

    tag = f"onednn{rows}{'t' if transposed else ''}"
    eager = _aten(act, transposed)

    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if any(w.dtype != dtype for w in weights):
            return eager(x, weights)
        bias = weights[1] if len(weights) > 1 else None
        return linear(x, ops.derived(weights[:1], tag, pack), bias, name, [], algorithm)

    return run


@lru_cache(maxsize=8)
def _onednn_missing(dtype: torch.dtype) -> str:
    """Why packed oneDNN products cannot be used for a dtype, or ``""``; tried once."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"oneDNN has no {dtype} product"
    try:
        w, x = (torch.ones(n, 16, dtype=dtype, device="cpu") for n in (8, 4))
        packed = torch.ops.mkldnn._reorder_linear_weight(w, 4)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError) as e:
        return f"oneDNN refuses {dtype}: {str(e).splitlines()[0][:200]}"
    return "" if bool((y == 16).all()) else f"oneDNN multiplies {dtype} wrongly here"


def _tile(
    form: PackedDense, dtype: torch.dtype, config: Mapping[str, int | str], transposed: bool
) -> ops.Kernel | Refusal:
    kernel = tile.make(tile_form(form, bias=True), config, dtype=dtype, transposed=transposed)
    if isinstance(kernel, Refusal):
        return kernel
    zeros: list[Tensor] = []

    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        if len(weights) == 1:  # one library serves both; adding zeros costs nothing measurable
            if not zeros:
                zeros.append(torch.zeros(form.out_features, dtype=dtype, device="cpu"))
            weights = (weights[0], zeros[0])
        return kernel(x, weights)

    return run


def tile_form(form: PackedDense, bias: bool) -> Tile:
    """The dense product as a program of one block factor."""
    n, m = form.in_features, form.out_features
    program = Tile((Block(1, m, n, 1),))
    if bias:
        program = program.then(Bias(m))
    return program.then(Act(form.activation, m)) if form.activation else program

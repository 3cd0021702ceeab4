"""The ``structc::`` operators: schema, fake kernel, autograd, ATen reference, and the kernel table.

Two operators execute everything token-local:

``structc::tile(Tensor[] inputs, Tensor[] weights, str program) -> Tensor[]``
    a tile program (:class:`structc.forms.Tile`) over its input, and what it adds on the way;
``structc::dense(Tensor x, Tensor weight, Tensor? bias, str act, bool transposed) -> Tensor``
    a dense product with its epilogue.

The reference is plain ATen, always there, differentiable, and never refuses. Faster kernels are
*attached* to a key with the largest number of rows that each one is meant for; a key without a
kernel, another dtype or another device runs the reference. Both pass ``torch.library.opcheck``, so
compiled models also go through ``torch.compile``, AOTInductor and training.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from structc.forms import COMPLEX, Tile, Transform
from structc.reference import dense_reference, tile_reference
from structc.watch import watched

Kernel = Callable[..., Tensor]
"""``(x (rows, in_features), weights) -> (rows, out_features)``; dense: weights [weight, bias].

A program that adds further inputs takes them as a third argument, each (rows, n)."""

_LIB = torch.library.Library("structc", "DEF")
_LIB.define("tile(Tensor[] inputs, Tensor[] weights, str program) -> Tensor[]")
_LIB.define(
    "dense(Tensor x, Tensor weight, Tensor? bias, str act='', bool transposed=False) -> Tensor"
)

Backward = Callable[[Tensor, Sequence[Tensor], Tensor], tuple[Tensor, list[Tensor]] | None]
"""``(x, weights, gradient of the output)``, rows flat, to gradients of x and of the weights."""

BACKENDS = {"cuda": "structc.codegen.triton.serve"}
"""For each kind of device that finds kernels at the first call the module whose ``kernel_of(key)``
gives them; on others they are attached beforehand."""

_KERNELS: dict[Hashable, tuple[tuple[int, str, Kernel], ...]] = {}
_SEARCHED: set[Hashable] = set()
_BACKWARDS: dict[Hashable, Backward] = {}
_calls = 0


# ---------------------------------------------------------------------------- the kernel table


def tile_key(program: str, dtype: torch.dtype, backend: str = "cpu") -> Hashable:
    """Where a tile program's kernels are attached."""
    return ("tile", backend, program, dtype)


def dense_key(
    in_features: int,
    out_features: int,
    act: str,
    dtype: torch.dtype,
    transposed: bool = False,
    backend: str = "cpu",
) -> Hashable:
    """Where a dense product's kernels are attached."""
    return ("dense", backend, in_features, out_features, act, dtype, transposed)


def attach(key: Hashable, max_rows: int, label: str, kernel: Kernel) -> None:
    """Use a kernel for calls of up to ``max_rows`` rows; the largest entry serves all above too."""
    entries = {rows: (rows, name, k) for rows, name, k in _KERNELS.get(key, ())}
    entries[max_rows] = (max_rows, label, kernel)
    _KERNELS[key] = tuple(entries[rows] for rows in sorted(entries))


def attach_backward(key: Hashable, backward: Backward) -> None:
    """Let gradients of a tile program go this way; what it answers None for, the reference does."""
    _BACKWARDS[key] = backward


def attached() -> dict[Hashable, list[tuple[int, str]]]:
    """The table as (largest rows, label) for each key."""
    return {key: [(rows, label) for rows, label, _ in e] for key, e in _KERNELS.items()}


def detach_all() -> None:
    """Empty the table and forget packed weights; references run from here on."""
    _KERNELS.clear()
    _SEARCHED.clear()
    _BACKWARDS.clear()
    _derived.clear()


def count_call() -> None:
    """Say that an operator runs; see :func:`call_count`."""
    global _calls
    _calls += 1


def call_count() -> int:
    """How many times an operator has run in this process: lets a test see that it ran at all."""
    return _calls


def kernel_for(key: Hashable, rows: int) -> Kernel | None:
    """The kernel attached for this many rows: the nearest bucket from above, else the largest."""
    entries = _KERNELS.get(key) or _searched(key)
    if not entries:
        return None
    for max_rows, _, kernel in entries:
        if rows <= max_rows:
            return kernel
    return entries[-1][2]


def search_again() -> None:
    """Ask backends anew for what they found, or did not find, at first calls."""
    for key in _SEARCHED:
        _KERNELS.pop(key, None)
    _SEARCHED.clear()


def _searched(key: Any) -> tuple[tuple[int, str, Kernel], ...]:
    """What the backend of a key's device finds, asked once."""
    name = BACKENDS.get(key[1])
    if name is None or key in _SEARCHED:
        return ()
    _SEARCHED.add(key)
    found = importlib.import_module(name).kernel_of(key)
    if found is not None:
        attach(key, 1, name.rpartition(".")[0].rpartition(".")[2], found)
    return _KERNELS.get(key, ())


# ---------------------------------------------------------------------------- packed weights

_derived: Any = WeakTensorKeyDictionary()


def derived(weights: Sequence[Tensor], tag: str, make: Callable[[Sequence[Tensor]], Any]) -> Any:
    """Data computed from weights once (a packed layout), until one of them changes or dies.

    Writing through ``weight.data`` leaves no trace in PyTorch, and is not noticed; putting another
    tensor there is.

    Never in a state dict: an in-place change raises the tensor's version, and the data are made
    again; a tensor without versions (made under ``inference_mode``) is never cached.
    """
    if any(w.is_inference() for w in weights):
        return make(weights)
    stamps = tuple((w._version, w.data_ptr()) for w in weights)
    entry = _derived.get(weights[0])
    if entry is None or entry[0] != stamps[0]:
        entry = (stamps[0], {})
        _derived[weights[0]] = entry
    found = entry[1].get(tag)
    same = found is not None and found[0] == stamps[1:]
    if not same or any(r() is not w for r, w in zip(found[2], weights[1:], strict=True)):
        with torch.no_grad(), _own_dtype(weights[0]):  # it stays, autocast does not
            made = make([w.detach() for w in weights])
        held = [w.detach() for w in weights]  # or another storage could come to lie at its address
        found = (stamps[1:], made, [weakref.ref(w) for w in weights[1:]], held)
        entry[1][tag] = found
    return found[1]


def derived_bytes() -> int:
    """Bytes that packed copies of weights take now."""
    return sum(_bytes(v) for _, made in _derived.values() for _, v, *_ in made.values())


def _bytes(value: object) -> int:
    if not isinstance(value, Tensor):
        return 0
    return value.numel() * value.element_size()  # oneDNN's tensors have no storage to ask


# ---------------------------------------------------------------------------- calls


def tile(inputs: Sequence[Tensor], weights: Sequence[Tensor], program: str) -> Sequence[Tensor]:
    """``structc::tile``; past the dispatcher where nothing watches it.

    On its way through PyTorch's dispatcher a call costs several times what a small product takes.
    """
    if watched((*inputs, *weights)):
        y: Sequence[Tensor] = torch.ops.structc.tile(inputs, weights, program)
        return y
    return _tile(inputs, weights, program)


def dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "", transposed: bool = False
) -> Tensor:
    """``structc::dense``; past the dispatcher where nothing watches it."""
    if watched((x, weight) if bias is None else (x, weight, bias)):
        y: Tensor = torch.ops.structc.dense(x, weight, bias, act, transposed)
        return y
    return _dense(x, weight, bias, act, transposed)


# ---------------------------------------------------------------------------- implementations


def _tile(inputs: Sequence[Tensor], weights: Sequence[Tensor], program: str) -> list[Tensor]:
    if torch.is_autocast_enabled(_kind(inputs[0])):
        with _own_dtype(inputs[0]):
            return _tile(inputs, weights, program)
    count_call()
    x = inputs[0]
    shape = x.shape
    rows = x.numel() // shape[-1] if shape[-1] else 0
    kernel = kernel_for(("tile", _backend(x), program, x.dtype), rows)
    if kernel is None or rows == 0:
        _check_counts(program, inputs, weights)
        _check_dtypes(inputs)
        return [_fresh(tile_reference(x, weights, program, inputs[1:]), inputs)]
    features, many = _counts(program)
    if (len(inputs), len(weights), shape[-1]) != (len(features), many, features[0]):
        _check_counts(program, inputs, weights)  # raises
    if len(inputs) == 1:
        y = kernel(_flat(x, rows), weights)
    else:
        _check_dtypes(inputs)
        others = [
            _flat(o.expand(*shape[:-1], n or o.shape[-1]), rows)
            for o, n in zip(inputs[1:], features[1:], strict=True)
        ]
        y = kernel(_flat(x, rows), weights, others)
    return [y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])]


def _own_dtype(x: Tensor) -> Any:
    """An operator's dtype is its input's, whether or not a kernel is there: autocast is off."""
    return torch.autocast(_kind(x), enabled=False)


def _kind(x: Tensor) -> str:
    """The devices that autocast is asked about; others have none of their own."""
    return "cuda" if x.is_cuda else "cpu"


def _backend(x: Tensor) -> str:
    return "cpu" if x.is_cpu else x.device.type  # asking for the device makes an object


def _flat(x: Tensor, rows: int) -> Tensor:
    """(rows, features), contiguous."""
    flat = x if x.dim() == 2 else x.reshape(rows, -1)
    return flat if flat.is_contiguous() else flat.contiguous()


def _dense(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "", transposed: bool = False
) -> Tensor:
    if torch.is_autocast_enabled(_kind(x)):
        with _own_dtype(x):
            return _dense(x, weight, bias, act, transposed)
    count_call()
    n, m = weight.shape if transposed else weight.shape[::-1]
    _check_width(x, n)
    rows = x.numel() // n if n else 0
    kernel = kernel_for(("dense", _backend(x), n, m, act, x.dtype, transposed), rows)
    if kernel is None or rows == 0:
        return _fresh(dense_reference(x, weight, bias, act, transposed), (x,))
    weights = (weight,) if bias is None else (weight, bias)
    if bias is not None and bias.shape != (m,):
        raise RuntimeError(f"structc::dense takes a bias of {m}, got {tuple(bias.shape)}")
    y = kernel(_flat(x, rows), weights)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], m)


def _check_width(x: Tensor, n: int) -> None:
    if x.dim() == 0 or x.shape[-1] != n:
        raise RuntimeError(f"structc::dense takes {n} features, got {tuple(x.shape)}")


def _fresh(y: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """An operator may not return an input or a view of it (a program of permutations alone)."""
    y = y.contiguous()
    return y.clone() if any(y.data_ptr() == x.data_ptr() for x in inputs) else y


@functools.lru_cache(maxsize=4096)
def _counts(program: str) -> tuple[tuple[int, ...], int]:
    """Features of each input, and how many weights; asked at every call."""
    form = Tile.parse(program)
    return form.input_features, form.weights


def _check_counts(program: str, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """A kernel reads what the program says, whatever it is given: the operator looks first."""
    features, many = _counts(program)
    torch._check(
        len(inputs) == len(features),
        lambda: f"structc::tile takes {len(features)} inputs, got {len(inputs)}",
    )
    torch._check(
        inputs[0].shape[-1] == features[0],
        lambda: f"structc::tile takes {features[0]} features, got {tuple(inputs[0].shape)}",
    )
    torch._check(
        len(weights) == many, lambda: f"structc::tile takes {many} weights, got {len(weights)}"
    )


def _check_dtypes(inputs: Sequence[Tensor]) -> None:
    if any(x.dtype != inputs[0].dtype for x in inputs):
        raise RuntimeError(f"structc::tile takes one dtype, got {[x.dtype for x in inputs]}")


def _tile_fake(inputs: Sequence[Tensor], weights: Sequence[Tensor], program: str) -> list[Tensor]:
    x, form = inputs[0], Tile.parse(program)
    _check_counts(program, inputs, weights)
    _check_dtypes(inputs)
    return [x.new_empty(*x.shape[:-1], form.out_features, dtype=_out_dtype(x, weights, form))]


def _out_dtype(x: Tensor, weights: Sequence[Tensor], form: Tile) -> torch.dtype:
    """That of x; complex where a factor or a transform is."""
    turns = any(isinstance(s, Transform) and s.kind in COMPLEX for s in form.steps)
    if x.is_complex() or not (turns or any(w.is_complex() for w in weights)):
        return x.dtype
    return torch.complex128 if x.dtype == torch.float64 else torch.complex64


def _dense_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "", transposed: bool = False
) -> Tensor:
    n, m = weight.shape if transposed else (weight.shape[1], weight.shape[0])
    torch._check(
        x.shape[-1] == n, lambda: f"structc::dense takes {n} features, got {tuple(x.shape)}"
    )
    return x.new_empty(*x.shape[:-1], m)


_LIB.impl("tile", _tile, "CompositeExplicitAutograd")
_LIB.impl("dense", _dense, "CompositeExplicitAutograd")
torch.library.register_fake("structc::tile", _tile_fake, lib=_LIB)
torch.library.register_fake("structc::dense", _dense_fake, lib=_LIB)


# ---------------------------------------------------------------------------- autograd


def _tile_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    streams, weights, ctx.program = inputs
    ctx.streams = len(streams)
    ctx.save_for_backward(*streams, *weights)


def _tile_backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    (x, *others), weights = ctx.saved_tensors[: ctx.streams], ctx.saved_tensors[ctx.streams :]
    fast = _BACKWARDS.get(("tile", x.device.type, ctx.program, x.dtype))
    plain = not torch.is_grad_enabled() and not watched((*ctx.saved_tensors, grads[0]))
    if fast is not None and plain and not others and x.numel():
        flat = grads[0].reshape(-1, grads[0].shape[-1]).contiguous()
        found = fast(x.reshape(-1, x.shape[-1]).contiguous(), weights, flat)
        if found is not None:
            return [found[0].view_as(x)], found[1], None
    leaves = _leaves(ctx.saved_tensors)
    (x, *others), weights = leaves[: ctx.streams], leaves[ctx.streams :]
    with torch.enable_grad(), _own_dtype(x):
        y = tile_reference(x, weights, ctx.program, others)
    able = [t for t in leaves if t.requires_grad]
    given = iter(torch.autograd.grad(y, able, grads[0], allow_unused=True))
    all_ = [next(given) if t.requires_grad else None for t in leaves]
    return all_[: ctx.streams], all_[ctx.streams :], None


def _dense_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.act, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, *([] if bias is None else [bias]))


def _dense_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    leaves = _leaves(ctx.saved_tensors)
    x, weight, *bias = leaves
    with torch.enable_grad(), _own_dtype(x):
        y = dense_reference(x, weight, bias[0] if bias else None, ctx.act, ctx.transposed)
    gx, gw, *gb = torch.autograd.grad(y, leaves, grad)
    return gx, gw, (gb[0] if gb else None), None, None


def _leaves(saved: Sequence[Tensor]) -> list[Tensor]:
    """Detached copies that record a graph of their own: the forward is computed again."""
    return [t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in saved]


torch.library.register_autograd(
    "structc::tile", _tile_backward, setup_context=_tile_setup, lib=_LIB
)
torch.library.register_autograd(
    "structc::dense", _dense_backward, setup_context=_dense_setup, lib=_LIB
)

"""``structc::attention``: the operator, its fake kernel and its gradient.

``structc::attention(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? lags, Tensor? keys,
Tensor? blocks, Tensor? sink, str form) -> (Tensor, Tensor)`` gives the output and the natural
logarithm of each row's sum of exponentials; what the inputs are stands in
:class:`structc.softmax.Extras`. ``structc::attention_backward`` gives the gradients of q, k and v,
so that a traced gradient runs on kernels too. Heads of keys may be fewer than heads of queries;
each then serves a group of neighbours.

The kernel of a dtype is looked for once, when the first call needs it; where there is none the
reference runs (:mod:`structc.softmax`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from structc import ops
from structc.softmax import (
    NOTHING,
    Extras,
    Softmax,
    by_rule,
    faint_rows,
    filled,
    softmax_backward,
    softmax_reference,
)
from structc.watch import watched

Kernel = Callable[[Tensor, Tensor, Tensor, Softmax, Extras], tuple[Tensor, Tensor] | None]
"""Output and row sums, or None for inputs that it does not serve."""

_NAME = "attention"
BACKENDS = {"cpu": "structc.codegen.attention", "cuda": "structc.codegen.triton.attention"}
"""For each kind of device the module whose ``kernel_of(dtype)`` gives its kernel. A kernel may have
a method ``backward`` with the arguments of :func:`structc.softmax.softmax_backward`, which computes
gradients where it does not, or gives None."""

ops._LIB.define(
    f"{_NAME}(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? lags, Tensor? keys, "
    "Tensor? blocks, Tensor? sink, str form) -> (Tensor, Tensor)"
)
_kernels: dict[tuple[str, torch.dtype], Kernel | None] = {}


def attention(
    q: Tensor, k: Tensor, v: Tensor, form: Softmax, extras: Extras = NOTHING
) -> tuple[Tensor, Tensor]:
    """``structc::attention``; past the dispatcher where nothing watches it."""
    given = (q, k, v) if extras is NOTHING else [t for t in (q, k, v, *extras) if t is not None]
    if watched(given):
        o, lse = torch.ops.structc.attention(q, k, v, *extras, str(form))
        return o, lse
    return _run(q, k, v, form, extras)


def attention_of(
    q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | str | None
) -> tuple[Tensor, Tensor]:
    """The operator with its own arguments."""
    *extras, form = rest
    assert isinstance(form, str)
    some = NOTHING if not any(t is not None for t in extras) else Extras(*extras)  # type: ignore[arg-type]
    return attention(q, k, v, Softmax.parse(form), some)


def kernel_for(device: str, dtype: torch.dtype) -> Kernel | None:
    """The kernel of a dtype, built when first asked for."""
    key = (device, dtype)
    if key not in _kernels:
        name = BACKENDS.get(device)
        _kernels[key] = importlib.import_module(name).kernel_of(dtype) if name else None
    return _kernels[key]


def forget() -> None:
    """Look for kernels anew."""
    _kernels.clear()


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *extras, form = rest
    return _run(q, k, v, Softmax.parse(form), Extras(*extras))


def _run(q: Tensor, k: Tensor, v: Tensor, form: Softmax, extras: Extras) -> tuple[Tensor, Tensor]:
    ops.count_call()
    _check(q, k, v, form, extras)
    kernel = kernel_for(q.device.type, q.dtype)
    if kernel is not None and q.numel() and k.numel() and v.numel():
        found = kernel(q, k, v, form, extras)
        if found is not None:
            o, lse = found
            return filled(o, lse, q, k, v, form, extras), lse
    return softmax_reference(q, k, v, form, extras)


def _check(q: Tensor, k: Tensor, v: Tensor, form: Softmax, extras: Extras) -> None:
    """A kernel reads what the form says, whatever it is given: the operator looks first."""
    fits = q.dim() == k.dim() == v.dim() == 4 and q.dtype == k.dtype == v.dtype
    if fits:
        (b, h, n, d), (kb, g, m, kd), (vb, vg, vm, _) = q.shape, k.shape, v.shape
        fits = b == kb == vb and g == vg and m == vm and d == kd and (h == g or h % max(1, g) == 0)
    if not fits or not q.is_floating_point():
        shapes, dtypes = [tuple(t.shape) for t in (q, k, v)], [t.dtype for t in (q, k, v)]
        raise RuntimeError(f"structc::attention takes (B, H, n, d), got {shapes} in {dtypes}")
    if (extras.blocks is None) != (form.block_q == 0):
        raise RuntimeError("structc::attention takes blocks together with their size")
    if extras is NOTHING:
        return
    for name, want in (
        ("bias", (b, h, n, m)),
        ("lags", (h, n + m - 1)),
        ("keys", (b, m)),
        ("blocks", (b, h, -(-n // max(1, form.block_q)), -(-m // max(1, form.block_k)))),
        ("sink", (h,)),
    ):
        given = getattr(extras, name)
        if given is None:
            continue
        free = {"bias": 4, "blocks": 2, "lags": 1, "keys": 1}.get(name, 0)
        same = given.dim() == len(want) and all(
            s == w or (s == 1 and at < free) for at, (s, w) in enumerate(zip(given.shape, want))
        )
        if not same:
            shape = tuple(given.shape)
            raise RuntimeError(f"structc::attention takes {name} of {want}, got {shape}")
        if name in ("keys", "blocks") and given.dtype != torch.bool:
            raise RuntimeError(f"structc::attention takes boolean {name}, got {given.dtype}")


def empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the output, heads of a query side by side, and for the row sums."""
    b, h, n, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)
    return o, q.new_empty(b, h, n, dtype=wide)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.form = inputs
    ctx.given = [t is not None for t in tensors]
    ctx.save_for_backward(*(t for t in tensors if t is not None), *output)


def _backward(ctx: Any, grad_o: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    *saved, o, lse = ctx.saved_tensors
    rest = iter(saved)
    tensors = [next(rest) if given else None for given in ctx.given]
    if torch.is_grad_enabled() or any(ctx.needs_input_grad[3:8]):
        return (*_through(tensors, Softmax.parse(ctx.form), grad_o, grad_lse), None)
    given = (*tensors, o, lse, grad_o, grad_lse, ctx.form)
    if watched([t for t in (*tensors, grad_o) if t is not None]):
        found = torch.ops.structc.attention_backward(*given)
    else:
        found = _gradients(*given)
    return (*found, *[None] * 6)


def _gradients(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v: by a kernel, or else in the memory of some queries' scores."""
    *tensors, o, lse, grad_o, grad_lse, text = given
    form, extras = Softmax.parse(text), Extras(*tensors[3:])
    q, k, v = tensors[:3]
    if -torch.inf < form.fill < 0:
        faint = faint_rows(lse, form, q.dtype)
        if by_rule(extras):  # rows without keys are means of all values
            faint = faint & (lse != -torch.inf)
        if bool(faint.any()):
            dq, dk, dv, *_ = _through(tensors, form, grad_o, grad_lse)
            assert dq is not None and dk is not None and dv is not None
            return dq, dk, dv
    call = (q, k, v, form, extras, o, lse, grad_o, grad_lse)
    fast = getattr(kernel_for(q.device.type, q.dtype), "backward", None)
    grads = None if fast is None else fast(*call)
    return grads or softmax_backward(*call)


def _gradients_impl(*given: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():  # a traced graph may run where gradients are recorded
        return tuple(t.contiguous() for t in _gradients(*given))


def _gradients_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (q, k, v))


def _no_second(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "structc::attention_backward has no gradient: a traced gradient cannot be differentiated. "
        "Trace the second gradient with the first, or run the model as it is."
    )


def _through(
    tensors: Sequence[Tensor | None], form: Softmax, grad_o: Tensor, grad_lse: Tensor
) -> list[Tensor | None]:
    """Gradients of all tensors through the reference, which has a gradient in turn."""
    able = [at for at, t in enumerate(tensors) if t is not None and t.is_floating_point()]
    # aliases, for q, k and v may come from each other
    leaves = [t.view_as(t) for t in tensors if t is not None and t.is_floating_point()]

    def run(*given: Tensor) -> tuple[Tensor, Tensor]:
        some = [*tensors]
        for at, t in zip(able, given, strict=True):
            some[at] = t
        q, k, v, *extras = some
        assert q is not None and k is not None and v is not None
        return softmax_reference(q, k, v, form, Extras(*extras))

    if torch.is_grad_enabled():
        found = _twice(leaves, run(*leaves), (grad_o, grad_lse))
    else:  # also below autograd, where nothing but a transform would record
        found = torch.func.vjp(run, *leaves)[1]((grad_o, grad_lse))
    given = dict(zip(able, found, strict=True))
    return [given.get(at) for at in range(len(tensors))]


def _twice(
    leaves: Sequence[Tensor], outputs: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients that have gradients."""
    if not outputs[0].requires_grad:  # nothing was computed from anything: there are no queries
        return [torch.zeros_like(t) for t in leaves]
    able = [at for at, t in enumerate(leaves) if t.requires_grad]
    many = 2 if outputs[1].requires_grad else 1  # sums of rows do not come from v
    found = torch.autograd.grad(
        outputs[:many], [leaves[at] for at in able], grads[:many],
        allow_unused=True, create_graph=True,
    )  # fmt: skip
    given = dict(zip(able, found, strict=True))
    return [given.get(at) for at in range(len(leaves))]


ops._LIB.define(
    f"{_NAME}_backward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? lags, Tensor? keys, "
    "Tensor? blocks, Tensor? sink, Tensor o, Tensor lse, Tensor grad_o, Tensor grad_lse, str form) "
    "-> (Tensor, Tensor, Tensor)"
)
ops._LIB.impl(f"{_NAME}_backward", _gradients_impl, "CompositeExplicitAutograd")
torch.library.register_fake(f"structc::{_NAME}_backward", _gradients_fake, lib=ops._LIB)
torch.library.register_autograd(f"structc::{_NAME}_backward", _no_second, lib=ops._LIB)
ops._LIB.impl(_NAME, _attention, "CompositeExplicitAutograd")
torch.library.register_fake(f"structc::{_NAME}", _attention_fake, lib=ops._LIB)
torch.library.register_autograd(f"structc::{_NAME}", _backward, setup_context=_setup, lib=ops._LIB)

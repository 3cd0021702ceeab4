"""The operator of convolutions: schema, fake kernel, autograd and ATen reference.

``structc::spectral(Tensor x, Tensor taps, Tensor? bias, str form) -> Tensor``
    a convolution (:class:`structc.forms.Spectral`) of each row of x, with its epilogue.

As with the operators of :mod:`structc.ops`, the reference never refuses, faster kernels are
attached to a key of the same table, and ``torch.library.opcheck`` passes.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from structc import ops, reference
from structc.forms import Spectral

_LIB = torch.library.Library("structc", "FRAGMENT")
_LIB.define("spectral(Tensor x, Tensor taps, Tensor? bias, str form) -> Tensor")


def spectral_key(form: str, dtype: torch.dtype, backend: str = "cpu") -> Hashable:
    """Where a convolution's kernels are attached; they take weights [taps] or [taps, bias]."""
    return ("spectral", backend, form, dtype)


def on_circle(taps: Tensor, form: Spectral, size: int) -> Tensor:
    """The taps of a circular convolution of ``size`` points that contains the form.

    Math:    with g what comes back, y_i = sum_j g[(i - j) mod size] * x[j] for i < m and j < n.
    Shapes:  taps (form.taps,); the result (size,).
    Cost:    O(taps + size).

    Args:
        taps: of the form.
        form: the convolution.
        size: ``form.fft_size`` or larger; the period itself, if all outputs lie inside it.

    >>> on_circle(torch.tensor([1.0, 2.0, 3.0]), Spectral(4, 4, 3, 1), 6)
    tensor([2., 3., 0., 0., 0., 1.])
    """
    n, m = form.in_features, form.out_features
    if form.periodic:
        at = _steps(taps, 0, form.taps, -form.shift) % n
        period = taps.new_zeros(n).index_add(0, at, taps)
        if size == n:
            return period
        least, most = 1 - n, m - 1
        part = period[_steps(taps, least, most + 1) % n]
    else:
        least, most = form.diagonals
        part = taps[least + form.shift : max(least, most + 1) + form.shift]
    at = _steps(taps, least, max(least, most + 1)) % size
    return taps.new_zeros(size).index_add(0, at, part)


def _steps(like: Tensor, start: int, end: int, offset: int = 0) -> Tensor:
    return torch.arange(start + offset, end + offset, device=like.device)


def spectral_reference(x: Tensor, taps: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """``act(W @ x + b)`` for each row by one FFT each way, in plain ATen.

    Half and bfloat16 are computed in float32: there is no FFT of theirs on a CPU.

    >>> x = torch.tensor([1.0, 0.0, 0.0, 2.0])
    >>> y = spectral_reference(x, torch.tensor([1.0, 10.0]), None, "spectral(4,4,2,0,0,none)")
    >>> y.round().int().tolist()
    [1, 10, 0, 2]
    """
    wanted = Spectral.parse(form)
    half = x.dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if half else x.dtype
    size = wanted.fft_size
    if x.numel():
        spectrum = torch.fft.rfft(on_circle(taps.to(wide), wanted, size))
        y = torch.fft.irfft(torch.fft.rfft(x.to(wide), size) * spectrum, size)
        y = y[..., : wanted.out_features]
    else:  # no FFT takes an empty batch; the sum keeps the gradients' graph
        y = x.to(wide).sum(-1, keepdim=True).expand(*x.shape[:-1], wanted.out_features)
        y = y + taps.to(wide).sum()
    y = y if bias is None else y + bias.to(wide)
    return reference.ACTIVATION[wanted.activation](y).to(x.dtype).contiguous()


def spectral(x: Tensor, taps: Tensor, bias: Tensor | None, form: str) -> Tensor:
    """``structc::spectral``; past the dispatcher where nothing watches it."""
    if ops.watched((x, taps) if bias is None else (x, taps, bias)):
        y: Tensor = torch.ops.structc.spectral(x, taps, bias, form)
        return y
    return _spectral(x, taps, bias, form)


def _spectral(x: Tensor, taps: Tensor, bias: Tensor | None, form: str) -> Tensor:
    ops.count_call()
    _check(x, taps, bias, form)
    n = x.shape[-1]
    rows = x.numel() // n
    kernel = ops.kernel_for(("spectral", x.device.type, form, x.dtype), rows)
    if kernel is None or rows == 0:
        return spectral_reference(x, taps, bias, form)
    y = kernel(x.reshape(rows, n).contiguous(), (taps,) if bias is None else (taps, bias))
    return y.view(*x.shape[:-1], y.shape[-1])


def _check(x: Tensor, taps: Tensor, bias: Tensor | None, form: str) -> None:
    """Kernels index by what the form says, whatever they are given."""
    wanted = Spectral.parse(form)
    n, m, many = wanted.in_features, wanted.out_features, wanted.taps
    torch._check(
        x.dim() > 0 and x.shape[-1] == n,
        lambda: f"structc::spectral takes {n} features, got {tuple(x.shape)}",
    )
    torch._check(
        taps.shape == (many,),
        lambda: f"structc::spectral takes {many} taps, got {tuple(taps.shape)}",
    )
    torch._check(
        bias is None or bias.shape == (m,),
        lambda: f"structc::spectral takes a bias of {m}, got {bias is not None and bias.shape}",
    )


def _fake(x: Tensor, taps: Tensor, bias: Tensor | None, form: str) -> Tensor:
    _check(x, taps, bias, form)
    return x.new_empty(*x.shape[:-1], Spectral.parse(form).out_features)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, taps, bias, ctx.form = inputs
    ctx.save_for_backward(x, taps, *([] if bias is None else [bias]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
    x, taps, *bias = leaves
    with torch.enable_grad():  # the forward is computed again: no spectrum is kept
        y = spectral_reference(x, taps, bias[0] if bias else None, ctx.form)
    gx, gtaps, *gbias = torch.autograd.grad(y, leaves, grad)
    return gx, gtaps, (gbias[0] if gbias else None), None


_LIB.impl("spectral", _spectral, "CompositeExplicitAutograd")
torch.library.register_fake("structc::spectral", _fake, lib=_LIB)
torch.library.register_autograd("structc::spectral", _backward, setup_context=_setup, lib=_LIB)

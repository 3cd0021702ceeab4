"""The operator of long filters: each channel of a signal convolved with taps of its own, by FFT.

``structc::filter(Tensor x, Tensor weight, Tensor? bias, int padding) -> Tensor``
    what ``conv1d(x, weight, bias, padding=padding, groups=C)`` computes, for weight (C, 1, taps).

No tile program, because it runs along the signal and not along the features of a token. Plain ATen
on every device, differentiable; ``torch.library.opcheck`` passes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from structc import ops
from structc.spectral_steps import fast_size

_LIB = torch.library.Library("structc", "FRAGMENT")
_LIB.define("filter(Tensor x, Tensor weight, Tensor? bias, int padding) -> Tensor")
CHUNK = 1 << 21
"""Points that are transformed at once."""


def filter_reference(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """``y[n, c, i] = b_c + sum_l w[c, 0, l] x[n, c, i + l - padding]`` by FFTs of the signal.

    Shapes:  x (N, C, L); weight (C, 1, taps); bias (C,); y (N, C, L + 2 padding - taps + 1).
    Cost:    two real FFTs of about L + taps points a channel, 2.5 n log2 n each; the spectrum of
             the weight is made once.

    >>> x, w = torch.randn(2, 3, 50), torch.randn(3, 1, 20)
    >>> y = filter_reference(x, w, None, 4)
    >>> torch.allclose(y, F.conv1d(x, w, padding=4, groups=3), atol=1e-4)
    True
    """
    length, taps = x.shape[-1], weight.shape[-1]
    many = length + 2 * padding - taps + 1
    if not x.numel() or many < 1 or x.dtype not in (torch.float32, torch.float64):
        return F.conv1d(x, weight, bias, padding=padding, groups=weight.shape[0])
    size = fast_size(length + taps - 1)

    def spectrum(weights: Any) -> Tensor:
        return torch.fft.rfft(weights[0][:, 0].flip(-1), size)

    graded = torch.is_grad_enabled() and weight.requires_grad
    made = spectrum([weight]) if graded else ops.derived([weight], f"filter{size}", spectrum)
    first = taps - 1 - padding
    parts = x.split(max(1, CHUNK // (size * weight.shape[0])))
    done = [_convolved(part, made, size)[..., max(0, first) : first + many] for part in parts]
    y = torch.cat(done) if len(done) > 1 else done[0]
    if first < 0 or y.shape[-1] < many:  # more zeros around than the taps reach over
        y = F.pad(y, (max(0, -first), many - y.shape[-1] - max(0, -first)))
    return (y if bias is None else y + bias[:, None]).contiguous()


def _convolved(x: Tensor, spectrum: Tensor, size: int) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x, size) * spectrum, size)


def _filter(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    ops.count_call()
    with torch.autocast("cpu", enabled=False):
        return filter_reference(x, weight, bias, padding)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] + 2 * padding - weight.shape[-1] + 1)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.padding = inputs
    ctx.save_for_backward(x, weight, *([] if bias is None else [bias]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
    x, weight, *bias = leaves
    with torch.enable_grad():  # the forward is computed again: no spectrum is kept
        y = filter_reference(x, weight, bias[0] if bias else None, ctx.padding)
    gx, gw, *gb = torch.autograd.grad(y, leaves, grad)
    return gx, gw, (gb[0] if gb else None), None


_LIB.impl("filter", _filter, "CompositeExplicitAutograd")
torch.library.register_fake("structc::filter", _fake, lib=_LIB)
torch.library.register_autograd("structc::filter", _backward, setup_context=_setup, lib=_LIB)

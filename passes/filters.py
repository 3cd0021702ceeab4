"""Long depthwise convolutions, which an FFT computes in fewer operations: taken where faster."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from structc.numerics import relative_error, tolerance
from structc.records import Call
from structc.spectral_steps import fast_size
from structc.timing import interleaved

SHORT = 32
"""Taps below which a direct convolution is not questioned."""
WORTH = 0.8
"""An FFT must take less than this share of the direct time."""
FFT_FLOPS = 8.0
"""Multiply-adds of a direct convolution that take as long as one of an FFT: what is assumed where
nothing may be timed."""


class LongFilter(nn.Conv1d):
    """A depthwise convolution whose taps go through the frequency domain.

    The user's own layer with another forward: names, parameters and attributes stay.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            return super().forward(x)
        y: Tensor = torch.ops.structc.filter(x, self.weight, self.bias, int(self.padding[0]))
        return y


def use_filters(tree: nn.Module, names: Collection[str]) -> None:
    """Make the layers so named compute their convolution by FFT."""
    import structc.filters  # the operator

    assert structc.filters
    for name in names:
        tree.get_submodule(name).__class__ = LongFilter


def long_filters(
    tree: nn.Module, calls: Mapping[str, Call], *, timed: bool
) -> dict[str, tuple[float, float]]:
    """The depthwise convolutions that an FFT computes faster, with both times in milliseconds.

    rewrite:      conv1d(x, W, b, groups=C)  -->  structc::filter(x, W, b)
    Sound because: both compute one sum for each output, in another order; the outputs are compared
        on the example's input, within the rounding of the dtype.
    Skips when:   it has a stride, a dilation, fewer than 32 taps, several filters a channel, hooks,
        another dtype than float32 or float64; the example does not reach it; it is no faster.

    Args:
        tree: eval mode.
        calls: the first call of each module.
        timed: whether to time both; otherwise operations are counted, and times are estimates of
            them in millions.
    """
    found: dict[str, tuple[float, float]] = {}
    for name, module in tree.named_modules():
        call = calls.get(name)
        if call is None or not call.args or not _eligible(module):
            continue
        assert isinstance(module, nn.Conv1d)
        x = call.args[0]
        if x.dim() != 3 or x.dtype not in (torch.float32, torch.float64):
            continue
        direct, by_fft = _times(module, x) if timed else _estimates(module, x)
        if by_fft < WORTH * direct and _agree(module, x):
            found[name] = direct, by_fft
    return found


def _eligible(module: nn.Module) -> bool:
    if type(module) is not nn.Conv1d or module._forward_hooks or module._forward_pre_hooks:
        return False
    depthwise = module.groups == module.in_channels == module.out_channels
    plain = module.stride == (1,) == module.dilation and module.padding_mode == "zeros"
    number = not isinstance(module.padding, str)
    return depthwise and plain and number and module.kernel_size[0] >= SHORT


def _by_fft(module: nn.Conv1d) -> Callable[[Tensor], Tensor]:
    from structc.filters import filter_reference

    return lambda x: filter_reference(x, module.weight, module.bias, int(module.padding[0]))


def _agree(module: nn.Conv1d, x: Tensor) -> bool:
    with torch.no_grad():
        return relative_error(_by_fft(module)(x), module(x)) < tolerance(x.dtype)


def _times(module: nn.Conv1d, x: Tensor) -> tuple[float, float]:
    by_fft = _by_fft(module)
    with torch.inference_mode():
        found = interleaved({"direct": lambda: module(x), "fft": lambda: by_fft(x)})
    return found["direct"].latency_ms, found["fft"].latency_ms


def _estimates(module: nn.Conv1d, x: Tensor) -> tuple[float, float]:
    taps, length = module.kernel_size[0], x.shape[-1]
    size = fast_size(length + taps - 1)
    signals = x.numel() / max(1, length) / 1e6
    return signals * length * taps, signals * FFT_FLOPS * 5 * size * max(1, size.bit_length())

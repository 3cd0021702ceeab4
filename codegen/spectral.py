"""Kernels of convolutions: what an FFT saves, and where it does not pay.

``fft``   one real FFT each way for a chunk of tokens that stays in the caches, the spectrum of the
          taps made once;
``pocket``  the same for a few tokens by SciPy's FFT, which keeps its plans; PyTorch's plans anew at
          each call, which at 4096 points takes longer than a row does;
``band``  for few taps: every block of outputs is the same small dense product with its window.

Measured and left out, for none is clearly faster than these: overlap-save (a row fits L1 as it is),
sums of shifted rows, PyTorch's one-channel convolution, a Toeplitz matrix as circulant plus
skew-circulant (no padding, but more passes over memory), buffers made beforehand (PyTorch copies
into them). Two rows in one complex FFT are slower too, and let a NaN of one into the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from structc import ops, reference
from structc.forms import Spectral
from structc.records import Refusal
from structc.spectral import on_circle, spectral_reference

KERNELS = ("fft", "pocket", "band")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1 << 19
"""Points of one chunk: with the spectrum and what comes back, some megabytes."""


def make(
    form: Spectral, dtype: torch.dtype, kernel: str, config: Mapping[str, int | str]
) -> ops.Kernel | Refusal:
    """A kernel ``(x, [taps] or [taps, bias]) -> y`` for one convolution.

    Args:
        form: sizes and activation.
        dtype: of x, taps and bias.
        kernel: one of :data:`KERNELS`, or ``"reference"``.
        config: ``fft``: ``size`` of the FFT and ``chunk``, in tokens; ``band``: ``block``, in
            outputs; ``pocket``: ``size``. What is left out is chosen for the form.
    """
    match kernel:
        case "reference":
            return _reference(str(form))
        case "fft":
            size = config.get("size", form.fft_size)
            chunk = config.get("chunk", max(1, CHUNK // form.fft_size))
            return _fft(form, dtype, size, chunk)
        case "pocket":
            return _pocket(form, dtype, config.get("size", form.fft_size))
        case "band":
            return _band(form, dtype, config.get("block", 64))
    return _refuse(kernel, "KERNEL", f"no kernel for convolutions is called {kernel!r}")


def sizes(form: Spectral) -> tuple[int, ...]:
    """FFT sizes worth trying: the form's own, and the period where that is another."""
    n = form.in_features
    own = (form.fft_size,)
    return own if not form.periodic or form.out_features > n or n in own else (*own, n)


def _reference(form: str) -> ops.Kernel:
    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        taps, *bias = weights
        return spectral_reference(x, taps, bias[0] if bias else None, form)

    return run


def _fft(
    form: Spectral, dtype: torch.dtype, size: int | str, chunk: int | str
) -> ops.Kernel | Refusal:
    spectrum_of = _spectrum(form, dtype, "fft", size)
    if isinstance(spectrum_of, Refusal):
        return spectrum_of
    if not isinstance(chunk, int) or chunk < 1:
        return _refuse("fft", "CONFIG", f"chunk {chunk!r} is no number of tokens")
    finish, m, points = _epilogue(form.activation), form.out_features, int(size)

    def convolve(x: Tensor, spectrum: Tensor, bias: Tensor | None) -> Tensor:
        through = torch.fft.rfft(x.to(torch.float32), points)
        through *= spectrum
        return finish(torch.fft.irfft(through, points)[:, :m], bias)

    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        spectrum = spectrum_of(weights)
        bias = weights[1] if len(weights) > 1 else None
        if x.shape[0] <= chunk:
            return convolve(x, spectrum, bias).to(dtype).contiguous()
        y = x.new_empty(x.shape[0], m)
        for part, into in zip(x.split(chunk), y.split(chunk), strict=True):
            into.copy_(convolve(part, spectrum, bias))
        return y

    return run


def _pocket(form: Spectral, dtype: torch.dtype, size: int | str) -> ops.Kernel | Refusal:
    from scipy import fft  # not at the top: it is asked for at few rows alone, and takes a while

    spectrum_of = _spectrum(form, dtype, "pocket", size)
    if isinstance(spectrum_of, Refusal):
        return spectrum_of
    finish, m, points = _epilogue(form.activation), form.out_features, int(size)

    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        spectrum = spectrum_of(weights)
        through = torch.from_numpy(fft.rfft(x.detach().to(torch.float32).numpy(), points))
        through *= spectrum  # not by NumPy, which warns of a NaN
        y = torch.from_numpy(fft.irfft(through.numpy(), points, overwrite_x=True))
        return finish(y[:, :m], weights[1] if len(weights) > 1 else None).to(dtype).contiguous()

    return run


def _spectrum(
    form: Spectral, dtype: torch.dtype, kernel: str, size: int | str
) -> Callable[[Sequence[Tensor]], Tensor] | Refusal:
    """What gives the spectrum of the taps, made anew only when they have changed."""
    if dtype not in DTYPES:
        return _refuse(kernel, "DTYPE", f"the FFT is made in float32, which is too few for {dtype}")
    if not isinstance(size, int) or size not in sizes(form):
        return _refuse(kernel, "CONFIG", f"size {size!r} is none of {sizes(form)}")
    tag = f"{form}/{size}"

    def make_spectrum(weights: Sequence[Tensor]) -> Tensor:
        return torch.fft.rfft(on_circle(weights[0].to(torch.float32), form, size))

    return lambda weights: ops.derived(weights[:1], tag, make_spectrum)


def _band(form: Spectral, dtype: torch.dtype, block: int | str) -> ops.Kernel | Refusal:
    if dtype not in (*DTYPES, torch.float64):
        return _refuse("band", "DTYPE", f"no product of {dtype}")
    if not isinstance(block, int) or block < 1:
        return _refuse("band", "CONFIG", f"block {block!r} is no number of outputs")
    least, most = form.diagonals
    if least > most:
        return _refuse("band", "FORM", f"no tap of {form} meets an input")
    m, tag = form.out_features, f"{form}/band{block}"
    blocks, window, wide = -(-m // block), block + most - least, block
    windows_of = _windows(form, blocks * block + most - least)
    finish = _epilogue(form.activation)

    def matrix_of(weights: Sequence[Tensor]) -> Tensor:
        """(window, block): column c holds the taps that output c of a block sees, backwards."""
        taps = weights[0][least + form.shift : most + form.shift + 1].to(dtype).flip(0)
        columns = F.pad(taps, (0, wide)).repeat(wide)[: wide * window]
        return columns.view(wide, window).t().contiguous()

    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        matrix = ops.derived(weights[:1], tag, matrix_of)
        windows = windows_of(x).unfold(1, window, wide)
        y = torch.mm(windows.reshape(-1, window), matrix).view(x.shape[0], blocks * wide)
        return finish(y[:, :m], weights[1] if len(weights) > 1 else None).to(dtype).contiguous()

    return run


def _windows(form: Spectral, total: int) -> Callable[[Tensor], Tensor]:
    """Inputs in a row such that window b starts at output b * block: padded, cut or repeated."""
    n, most = form.in_features, form.diagonals[1]
    if not form.periodic:
        return lambda x: F.pad(x, (most, total - n - most))  # negative: cut
    at = torch.arange(total, device="cpu").sub(most).remainder(n)
    return lambda x: x.index_select(1, at)


def _epilogue(act: str) -> Callable[[Tensor, Tensor | None], Tensor]:
    activate = reference.ACTIVATION[act]

    def finish(y: Tensor, bias: Tensor | None) -> Tensor:
        return activate(y if bias is None else y + bias)

    return finish


def _refuse(kernel: str, code: str, reason: str) -> Refusal:
    return Refusal("", kernel, code, reason)

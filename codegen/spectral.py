"""Kernels of programs that are one convolution: what an FFT saves, and where it does not pay.

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
from structc.forms import Act, Bias, Convolve, Step, Tile
from structc.records import Refusal
from structc.spectral import on_circle

KERNELS = ("fft", "pocket", "band")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 1 << 19
"""Points of one chunk: with the spectrum and what comes back, some megabytes."""


def convolution(form: Tile) -> tuple[Convolve, str] | None:
    """The convolution that a program is, and the activation at its end; None for other programs.

    >>> convolution(Tile.parse("convolve(8,8,8,0,1) bias(8) act(relu,8)"))
    (Convolve(n=8, m=8, taps=8, shift=0, periodic=1), 'relu')
    """
    steps: list[Step] = list(form.steps)
    last = steps.pop() if isinstance(steps[-1], Act) else None
    if len(steps) > 1 and isinstance(steps[-1], Bias):
        steps.pop()
    if len(steps) != 1 or not isinstance(steps[0], Convolve):
        return None
    return steps[0], last.fn if isinstance(last, Act) else ""


def make(
    form: Tile, dtype: torch.dtype, kernel: str, config: Mapping[str, int | str]
) -> ops.Kernel | Refusal:
    """A kernel ``(x, [taps] or [taps, bias]) -> y`` for one convolution.

    Args:
        form: a convolution, a bias perhaps, an activation perhaps.
        dtype: of x, taps and bias.
        kernel: one of :data:`KERNELS`.
        config: ``fft``: ``size`` of the FFT and ``chunk``, in tokens; ``band``: ``block``, in
            outputs; ``pocket``: ``size``. What is left out is chosen for the form.
    """
    found = convolution(form)
    if found is None:
        return _refuse(kernel, "FORM", f"{form} is more than one convolution")
    step, act = found
    match kernel:
        case "fft":
            size = config.get("size", step.fft_size)
            chunk = config.get("chunk", max(1, CHUNK // step.fft_size))
            return _fft(step, act, dtype, size, chunk)
        case "pocket":
            return _pocket(step, act, dtype, config.get("size", step.fft_size))
        case "band":
            return _band(step, act, dtype, config.get("block", 64))
    return _refuse(kernel, "KERNEL", f"no kernel for convolutions is called {kernel!r}")


def sizes(step: Convolve) -> tuple[int, ...]:
    """FFT sizes worth trying: the step's own, and the period where that is another."""
    own = (step.fft_size,)
    return own if not step.periodic or step.m > step.n or step.n in own else (*own, step.n)


def _fft(
    step: Convolve, act: str, dtype: torch.dtype, size: int | str, chunk: int | str
) -> ops.Kernel | Refusal:
    spectrum_of = _spectrum(step, dtype, "fft", size)
    if isinstance(spectrum_of, Refusal):
        return spectrum_of
    if not isinstance(chunk, int) or chunk < 1:
        return _refuse("fft", "CONFIG", f"chunk {chunk!r} is no number of tokens")
    finish, m, points = _epilogue(act), step.m, int(size)

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


def _pocket(step: Convolve, act: str, dtype: torch.dtype, size: int | str) -> ops.Kernel | Refusal:
    from scipy import fft  # not at the top: it is asked for at few rows alone, and takes a while

    spectrum_of = _spectrum(step, dtype, "pocket", size)
    if isinstance(spectrum_of, Refusal):
        return spectrum_of
    finish, m, points = _epilogue(act), step.m, int(size)

    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        spectrum = spectrum_of(weights)
        through = torch.from_numpy(fft.rfft(x.detach().to(torch.float32).numpy(), points))
        through *= spectrum  # not by NumPy, which warns of a NaN
        y = torch.from_numpy(fft.irfft(through.numpy(), points, overwrite_x=True))
        return finish(y[:, :m], weights[1] if len(weights) > 1 else None).to(dtype).contiguous()

    return run


def _spectrum(
    step: Convolve, dtype: torch.dtype, kernel: str, size: int | str
) -> Callable[[Sequence[Tensor]], Tensor] | Refusal:
    """What gives the spectrum of the taps, made anew only when they have changed."""
    if dtype not in DTYPES:
        return _refuse(kernel, "DTYPE", f"the FFT is made in float32, which is too few for {dtype}")
    if not isinstance(size, int) or size not in sizes(step):
        return _refuse(kernel, "CONFIG", f"size {size!r} is none of {sizes(step)}")
    tag = f"{step}/{size}"

    def make_spectrum(weights: Sequence[Tensor]) -> Tensor:
        return torch.fft.rfft(on_circle(weights[0].to(torch.float32), step, size))

    return lambda weights: ops.derived(weights[:1], tag, make_spectrum)


def _band(step: Convolve, act: str, dtype: torch.dtype, block: int | str) -> ops.Kernel | Refusal:
    if dtype not in (*DTYPES, torch.float64):
        return _refuse("band", "DTYPE", f"no product of {dtype}")
    if not isinstance(block, int) or block < 1:
        return _refuse("band", "CONFIG", f"block {block!r} is no number of outputs")
    least, most = step.diagonals
    if least > most:
        return _refuse("band", "FORM", f"no tap of {step} meets an input")
    m, tag = step.m, f"{step}/band{block}"
    blocks, window, wide = -(-m // block), block + most - least, block
    windows_of = _windows(step, blocks * block + most - least)
    finish = _epilogue(act)

    def matrix_of(weights: Sequence[Tensor]) -> Tensor:
        """(window, block): column c holds the taps that output c of a block sees, backwards."""
        taps = weights[0][least + step.shift : most + step.shift + 1].to(dtype).flip(0)
        columns = F.pad(taps, (0, wide)).repeat(wide)[: wide * window]
        return columns.view(wide, window).t().contiguous()

    def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        matrix = ops.derived(weights[:1], tag, matrix_of)
        windows = windows_of(x).unfold(1, window, wide)
        y = torch.mm(windows.reshape(-1, window), matrix).view(x.shape[0], blocks * wide)
        return finish(y[:, :m], weights[1] if len(weights) > 1 else None).to(dtype).contiguous()

    return run


def _windows(step: Convolve, total: int) -> Callable[[Tensor], Tensor]:
    """Inputs in a row such that window b starts at output b * block: padded, cut or repeated."""
    n, most = step.n, step.diagonals[1]
    if not step.periodic:
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

"""What the spectral steps compute, in plain ATen: differentiable, for any floating dtype.

Half and bfloat16 go through float32: there is no FFT of theirs on a CPU. Complex inputs are taken
by all of them; a transform of real numbers acts on the real and the imaginary parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from structc.spectral_steps import COMPLEX, Convolve, Displace, Transform

_HALF = (torch.float16, torch.bfloat16)


def convolve(x: Tensor, taps: Tensor, step: Convolve) -> Tensor:
    """W x by one FFT each way.

    >>> x = torch.tensor([1.0, 0.0, 0.0, 2.0])
    >>> convolve(x, torch.tensor([1.0, 10.0]), Convolve(4, 4, 2, 0, 0)).round().int().tolist()
    [1, 10, 0, 2]
    """
    if not x.numel():  # no FFT takes an empty batch; the sum keeps the gradients' graph
        return x.sum(-1, keepdim=True).expand(*x.shape[:-1], step.m) + 0 * taps.sum()
    wide, taps = _wide(x), _wide(taps)
    size = step.fft_size
    circle = on_circle(taps, step, size)
    if wide.is_complex() or taps.is_complex():
        y = torch.fft.ifft(torch.fft.fft(wide, size) * torch.fft.fft(circle), size)
    else:
        y = torch.fft.irfft(torch.fft.rfft(wide, size) * torch.fft.rfft(circle), size)
    return _like(y[..., : step.m], x)


def on_circle(taps: Tensor, step: Convolve, size: int) -> Tensor:
    """The taps of a circular convolution of ``size`` points that contains the step.

    Math:    with g what comes back, y_i = sum_j g[(i - j) mod size] * x[j] for i < m and j < n.
    Shapes:  taps (step.taps,); the result (size,).
    Cost:    O(taps + size).

    Args:
        taps: of the step.
        step: the convolution.
        size: ``step.fft_size`` or larger; the period itself, if all outputs lie inside it.

    >>> on_circle(torch.tensor([1.0, 2.0, 3.0]), Convolve(4, 4, 3, 1, 0), 6)
    tensor([2., 3., 0., 0., 0., 1.])
    """
    n, m = step.n, step.m
    if step.periodic:
        at = _steps(taps, 0, step.taps, -step.shift) % n
        period = taps.new_zeros(n).index_add(0, at, taps)
        if size == n:
            return period
        least, most = 1 - n, m - 1
        part = period[_steps(taps, least, most + 1) % n]
    else:
        least, most = step.diagonals
        part = taps[least + step.shift : max(least, most + 1) + step.shift]
    at = _steps(taps, least, max(least, most + 1)) % size
    return taps.new_zeros(size).index_add(0, at, part)


def displace(x: Tensor, g: Tensor, h: Tensor, step: Displace) -> Tensor:
    """``sum_q K(Z_1, g_q) K(Z_-1, h_q)^T x``, the sum over q in frequency.

    A skew-circulant is a circulant between two diagonals: with om_t = e^(i pi t / n),
    ``K(Z_-1, h) = diag(om)^-1 circ(om h) diag(om)``.

    >>> x, h = torch.randn(3, 8), torch.eye(8)[:1]
    >>> torch.allclose(displace(x, h, h, Displace(8, 1)), x, atol=1e-5)
    True
    """
    if not x.numel():
        return x + 0 * (g.sum() + h.sum())
    wide, g, h = _wide(x), _wide(g), _wide(h)
    om = _turns(wide, step.n, 1.0)
    # the transpose of a circulant: its spectrum read backwards, the product with x by its inverse
    backwards = torch.fft.ifft(om * h, norm="forward")
    inner = torch.fft.fft(wide / om).unsqueeze(-2) * backwards
    skew = om * torch.fft.ifft(inner)
    y = torch.fft.ifft((torch.fft.fft(skew) * torch.fft.fft(g)).sum(-2))
    given = any(t.is_complex() for t in (x, g, h))
    return _like(y if given else y.real, x)


def transform(x: Tensor, step: Transform) -> Tensor:
    """A named transform of the last dimension.

    >>> transform(torch.tensor([1.0, 2.0, 3.0, 4.0]), Transform("hadamard", 4)).tolist()
    [10.0, -2.0, -4.0, 0.0]
    """
    if not x.numel():
        y = x.sum(-1, keepdim=True).expand(*x.shape[:-1], step.out_features) + 0
        return y.to(torch.complex64) if step.kind in COMPLEX and not y.is_complex() else y
    wide = _wide(x)
    compute = _TRANSFORMS[step.kind]
    if wide.is_complex() and step.kind not in COMPLEX:
        y = torch.complex(compute(wide.real, step.n), compute(wide.imag, step.n))
    else:
        y = compute(wide, step.n)
    return _like(y, x)


# ---------------------------------------------------------------------------- transforms


def _hartley(x: Tensor, n: int) -> Tensor:
    f = torch.fft.fft(x)
    return f.real - f.imag


def _rdft(x: Tensor, n: int) -> Tensor:
    f = torch.fft.rfft(x)
    return torch.cat([f.real, f.imag], -1)


def _irdft(x: Tensor, n: int) -> Tensor:
    re, im = x.split(n // 2 + 1, -1)
    return torch.fft.irfft(torch.complex(re.contiguous(), im.contiguous()), n)


def _dct1(x: Tensor, n: int) -> Tensor:
    if n == 1:
        return 2 * x
    return torch.fft.rfft(torch.cat([x, x[..., 1:-1].flip(-1)], -1)).real


def _dct2(x: Tensor, n: int) -> Tensor:
    """Even samples, then odd ones backwards (Makhoul 1980): one FFT of n points."""
    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    return 2 * (torch.fft.fft(v) * _turns(x, n, -0.5)).real


def _dct3(x: Tensor, n: int) -> Tensor:
    """The inverse of dct2 times 2 n: its steps backwards."""
    behind = torch.nn.functional.pad(x[..., 1:].flip(-1), (1, 0))  # x[n - k], 0 at k = 0
    v = torch.complex(x, -behind) * _turns(x, n, 0.5)
    y = torch.fft.ifft(v, norm="forward").real
    out = torch.empty_like(y)
    half = (n + 1) // 2
    out[..., ::2], out[..., 1::2] = y[..., :half], y[..., half:].flip(-1)
    return out


def _dct4(x: Tensor, n: int) -> Tensor:
    turned = torch.fft.fft(x * _turns(x, n, -0.5), 2 * n)[..., :n]
    return 2 * (turned * _turns(x, n, -0.5, 0.5)).real


def _dst1(x: Tensor, n: int) -> Tensor:
    zero = torch.zeros_like(x[..., :1])
    odd = torch.cat([zero, x, zero, -x.flip(-1)], -1)
    return -torch.fft.rfft(odd).imag[..., 1:-1]


def _dst2(x: Tensor, n: int) -> Tensor:
    return _dct2(x * _signs(x, n), n).flip(-1)


def _dst3(x: Tensor, n: int) -> Tensor:
    return _dct3(x.flip(-1), n) * _signs(x, n)


def _dst4(x: Tensor, n: int) -> Tensor:
    return _dct4(x.flip(-1), n) * _signs(x, n)


def _hadamard(x: Tensor, n: int) -> Tensor:
    shape, width = x.shape, 1
    while width < n:
        a, b = x.reshape(-1, 2, width).unbind(1)
        x = torch.stack([a + b, a - b], 1)
        width *= 2
    return x.reshape(shape)


def _haar(x: Tensor, n: int) -> Tensor:
    details: list[Tensor] = []
    while x.shape[-1] > 1:
        even, odd = x[..., ::2], x[..., 1::2]
        details.append((even - odd) * math.sqrt(0.5))
        x = (even + odd) * math.sqrt(0.5)
    return torch.cat([x, *reversed(details)], -1)


_TRANSFORMS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "dft": lambda x, n: torch.fft.fft(x),
    "idft": lambda x, n: torch.fft.ifft(x).resolve_conj(),
    "hartley": _hartley,
    "hadamard": _hadamard,
    "haar": _haar,
    "rdft": _rdft,
    "irdft": _irdft,
    "dct1": _dct1,
    "dct2": _dct2,
    "dct3": _dct3,
    "dct4": _dct4,
    "dst1": _dst1,
    "dst2": _dst2,
    "dst3": _dst3,
    "dst4": _dst4,
}


def _turns(like: Tensor, n: int, half: float, offset: float = 0.0) -> Tensor:
    """``e^(half * i pi (k + offset) / n)`` for k < n."""
    at = torch.arange(n, device=like.device, dtype=torch.float64) + offset
    angle = (half * math.pi / n * at).to(_real(like.dtype))
    return torch.polar(torch.ones_like(angle), angle)


def _signs(like: Tensor, n: int) -> Tensor:
    return 1 - 2 * (torch.arange(n, device=like.device) % 2).to(like.dtype)


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.zeros((), dtype=dtype).real.dtype if dtype.is_complex else dtype


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype in _HALF else x


def _like(y: Tensor, x: Tensor) -> Tensor:
    """In the dtype of x; complex stays complex."""
    return y.to(x.dtype) if x.dtype in _HALF and not y.is_complex() else y


def _steps(like: Tensor, start: int, end: int, offset: int = 0) -> Tensor:
    return torch.arange(start + offset, end + offset, device=like.device)

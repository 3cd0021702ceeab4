"""Circular convolutions as products of matrices: the Monarch-style FFT of order 2 and 3.

With ``size = n1 n2``, ``i = i1 n2 + i2`` and ``k = k1 + n1 k2`` a transform is a product with the
small DFT over i1, a twiddle ``w^(k1 i2)``, and a product with the small DFT over i2; of order 3,
the second is split once more. Real inputs meet the first product as two real ones, real outputs the
last; the spectrum of the taps and what follows the sums are applied on chip. One program holds some
rows whole.

Source: FlashFFTConv, Fu et al. 2023 (https://arxiv.org/abs/2311.05908), its factorisation; Van
Loan 1992, Computational Frameworks for the Fast Fourier Transform, 1.10 (mixed radix).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from structc.codegen.program import Stage
from structc.codegen.triton.config import DOT, power_above
from structc.codegen.triton.pieces import Kernel, Way, extras, head, product, said, tail
from structc.spectral import on_circle
from structc.spectral_steps import Convolve

ORDERS = {2: 32, 3: 16}
"""For each number of factors the largest one: a row must lie in registers. On some targets less has
room (:attr:`structc.codegen.triton.targets.GpuTarget.points`)."""


@dataclass(frozen=True)
class Factors:
    """How a size is split.

    Attributes:
        size: points of the transform.
        own: its factors, two or three.
    """

    size: int
    own: tuple[int, ...]

    @property
    def wide(self) -> tuple[int, ...]:
        """As powers of two, for products."""
        return tuple(max(DOT, power_above(n)) for n in self.own)


def factors_of(step: Convolve) -> Factors | None:
    """The split of a convolution's size that fills products best, or None: it has no room.

    >>> factors_of(Convolve.circulant(1024)).own, factors_of(Convolve.circulant(4096)).own
    ((32, 32), (16, 16, 16))
    """
    size = step.fft_size
    for many, most in ORDERS.items():
        found = [Factors(size, own) for own in _splits(size, many) if max(own) <= most]
        if found:
            return min(found, key=lambda f: (math.prod(f.wide), max(f.own), f.own))
    return None


def _splits(size: int, many: int) -> Iterator[tuple[int, ...]]:
    if many == 1:
        yield (size,)
        return
    for first in range(1, math.isqrt(size) + 1 if many == 2 else size + 1):
        if size % first == 0 and first <= max(ORDERS.values()):
            yield from ((first, *rest) for rest in _splits(size // first, many - 1))


def step_of(stage: Stage) -> Convolve:
    """The convolution of a stage."""
    assert stage.convolution is not None
    return stage.convolution


def tables(step: Convolve, taps: Tensor) -> dict[str, Tensor]:
    """What the kernel reads: ``turns`` (2, size), cosines and sines of the circle; ``gate``
    (2, size), the spectrum of the taps over size, by digits of the frequency."""
    found = factors_of(step)
    assert found is not None
    at = torch.arange(found.size, dtype=torch.float64) * (2 * math.pi / found.size)
    spectrum = torch.fft.fft(on_circle(taps.double(), step, found.size)) / found.size
    places = tuple(reversed(range(len(found.own))))
    digits = torch.arange(found.size).reshape(found.own[::-1]).permute(places).reshape(-1)
    gate = spectrum[digits.to(taps.device)]
    return {
        "turns": torch.stack([at.cos(), at.sin()]).float().to(taps.device),
        "gate": torch.stack([gate.real, gate.imag]).float().contiguous(),
    }


# ---------------------------------------------------------------------------- source


def _lines(kernel: Kernel, stage: Stage, width: int, tf32: bool) -> Iterator[str]:
    found = factors_of(step_of(stage))
    assert found is not None
    first, rest = found.wide[0], math.prod(found.wide[1:])
    yield from head(kernel, f"{step_of(stage)}, {said(stage, width)}")
    yield from _indices(found)
    yield f"    live = (m < rows) & (a < {found.own[0]})"
    for n, digit in zip(found.own[1:], "bc", strict=False):
        yield f"    live = live & ({digit} < {n})"
    yield f"    at = m.to(tl.int64) * {width} + i"
    yield f"    x = tl.load(x + at, mask=live & (i < {width}), other=0.0)"
    for axis, n in enumerate(found.own):
        yield from _small(axis, n, found)
    yield f"    re = {product('cos0', 'x', '', tf32)}"
    yield f"    im = -{product('sin0', 'x', '', tf32)}"
    yield from _twiddle(found, f"a * (i - a * {found.size // found.own[0]})", found.size, -1)
    yield from _inner(found, tf32, forward=True)
    yield from _gate(found)
    yield from _inner(found, tf32, forward=False)
    yield f"    re = tl.reshape(re, ({first}, BM * {rest}))"
    yield f"    im = tl.reshape(im, ({first}, BM * {rest}))"
    yield from _twiddle(found, f"a * (i - a * {found.size // found.own[0]})", found.size, 1)
    sums = f"{product('cos0', 're', '', tf32)} - {product('sin0', 'im', '', tf32)}"
    yield f"    sums = {sums}"
    yield f"    inside = live & (i < {stage.out})"
    yield "    out = i"
    yield f"    spot = m.to(tl.int64) * {stage.out} + out"
    yield from tail(stage)


def _indices(found: Factors) -> Iterator[str]:
    """Rows m and digits a, b, c of a tile (first factor, rows x the others)."""
    wide, rest = found.wide, math.prod(found.wide[1:])
    yield f"    a = tl.arange(0, {wide[0]})[:, None]"
    yield f"    r = tl.arange(0, BM * {rest})[None, :]"
    yield f"    m = tl.program_id(0) * BM + r // {rest}"
    if len(wide) == 2:
        yield f"    b = r % {wide[1]}"
        yield f"    i = a * {found.own[1]} + b"
    else:
        yield f"    b = r // {wide[2]} % {wide[1]}"
        yield f"    c = r % {wide[2]}"
        yield f"    i = (a * {found.own[1]} + b) * {found.own[2]} + c"


def _small(axis: int, n: int, found: Factors) -> Iterator[str]:
    """The DFT of one factor: cosines and sines, 0 past its size."""
    wide = found.wide[axis]
    yield f"    p = tl.arange(0, {wide})[:, None]"
    yield f"    q = tl.arange(0, {wide})[None, :]"
    yield f"    turn = p * q % {n} * {found.size // n}"
    yield f"    there = (p < {n}) & (q < {n})"
    yield f"    cos{axis} = tl.load(turns + turn, mask=there, other=0.0)"
    yield f"    sin{axis} = tl.load(turns + {found.size} + turn, mask=there, other=0.0)"


def _twiddle(found: Factors, index: str, period: int, sign: int) -> Iterator[str]:
    """``(re, im)`` times ``e^(sign 2 pi i index / period)``."""
    step = found.size // period
    yield f"    turn = ({index}) % {period} * {step}"
    yield f"    c_turn = tl.load(turns + turn, mask=(turn >= 0) & (turn < {found.size}), other=0.0)"
    yield f"    s_turn = tl.load(turns + {found.size} + turn, mask=(turn >= 0) & " + (
        f"(turn < {found.size}), other=0.0)"
    )
    one, two = ("+", "-") if sign < 0 else ("-", "+")
    yield f"    kept = re * c_turn {one} im * s_turn"
    yield f"    im = im * c_turn {two} re * s_turn"
    yield "    re = kept"


def _turned(axis: int, tf32: bool, sign: int) -> Iterator[str]:
    """Products with the DFT of an axis from the right, the axis last."""
    one, two = ("+", "-") if sign < 0 else ("-", "+")
    left = product("re", f"cos{axis}", "", tf32)
    yield f"    kept = {left} {one} {product('im', f'sin{axis}', '', tf32)}"
    left = product("im", f"cos{axis}", "", tf32)
    yield f"    im = {left} {two} {product('re', f'sin{axis}', '', tf32)}"
    yield "    re = kept"


def _shaped(shape: str) -> Iterator[str]:
    for name in ("re", "im"):
        yield f"    {name} = tl.reshape({name}, ({shape}))"


def _swapped(outer: str, one: int, two: int) -> Iterator[str]:
    """The last two axes change places; what is in front becomes rows."""
    for name in ("re", "im"):
        inner = f"tl.permute(tl.reshape({name}, ({outer}, {one}, {two})), (0, 2, 1))"
        yield f"    {name} = tl.reshape({inner}, ({outer} * {two}, {one}))"


def _inner(found: Factors, tf32: bool, *, forward: bool) -> Iterator[str]:
    """The transform over the digits behind the first; there and back in opposite orders."""
    wide, sign = found.wide, -1 if forward else 1
    if len(wide) == 2:
        yield from _shaped(f"{wide[0]} * BM, {wide[1]}")
        yield from _turned(1, tf32, sign)
        return
    outer, pair = f"{wide[0]} * BM", found.own[1] * found.own[2]
    rows = f"tl.arange(0, {wide[0]} * BM * {wide[2]})[:, None] % {wide[2]}"
    index = f"tl.arange(0, {wide[1]})[None, :] * ({rows})"
    if forward:
        yield from _swapped(outer, wide[1], wide[2])
        yield from _turned(1, tf32, sign)
        yield from _twiddle(found, index, pair, sign)
        yield from _swapped(outer, wide[2], wide[1])
        yield from _turned(2, tf32, sign)
    else:
        yield from _turned(2, tf32, sign)
        yield from _swapped(outer, wide[1], wide[2])
        yield from _twiddle(found, index, pair, sign)
        yield from _turned(1, tf32, sign)
        yield from _swapped(outer, wide[2], wide[1])


def _gate(found: Factors) -> Iterator[str]:
    """The spectrum of the taps at the digits of the frequency."""
    wide, last = found.wide, found.own[-1]
    rows = math.prod(wide[:-1])
    yield f"    row = tl.arange(0, {rows} * BM)[:, None]"
    yield f"    z = tl.arange(0, {wide[-1]})[None, :]"
    if len(wide) == 2:
        yield "    place = row // BM"
        yield f"    there = (place < {found.own[0]}) & (z < {last})"
    else:
        yield f"    high = row // (BM * {wide[1]})"
        yield f"    low = row % {wide[1]}"
        yield f"    place = high * {found.own[1]} + low"
        yield f"    there = (high < {found.own[0]}) & (low < {found.own[1]}) & (z < {last})"
    yield f"    place = place * {last} + z"
    yield "    gate_re = tl.load(gate + place, mask=there, other=0.0)"
    yield f"    gate_im = tl.load(gate + {found.size} + place, mask=there, other=0.0)"
    yield "    kept = re * gate_re - im * gate_im"
    yield "    im = re * gate_im + im * gate_re"
    yield "    re = kept"


def _kernel(at: int, stage: Stage) -> Kernel:
    pointers = ("x", "turns", "gate", *extras(stage), "y")
    return Kernel(f"stage{at}_convolve", pointers, 1, 1, ("BM",))


WAYS = {"convolve": {"convolve": Way(_kernel, _lines)}}

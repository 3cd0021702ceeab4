"""Measure what recognition finds, how exactly and how fast: planted matrices, then noise.

    python examples/bench_recognize.py                      N = 64, 256, 1024
    python examples/bench_recognize.py --sizes 4096         the long ones
    python examples/bench_recognize.py --kinds dft,dct2

Every matrix is planted under random unknown row and column orders; then with random signs (phases
for complex ones) of rows and columns, then with random scales too. The residual is relative, in
float64, of the factors that came back.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # also runs from a checkout

import numpy as np
import scipy.fft
import scipy.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

from structc.recognition import recognize

Array = NDArray[Any]


def _hartley(n: int) -> Array:
    spectrum = scipy.fft.fft(np.eye(n))
    return np.asarray(spectrum.real - spectrum.imag)


PLANTED: dict[str, Callable[[int], Array]] = {
    "dft": lambda n: scipy.fft.fft(np.eye(n)),
    "idft": lambda n: scipy.fft.ifft(np.eye(n)),
    "dct2": lambda n: scipy.fft.dct(np.eye(n), axis=0),
    "dst2": lambda n: scipy.fft.dst(np.eye(n), axis=0),
    "hartley": _hartley,
    "hadamard": lambda n: scipy.linalg.hadamard(n).astype(np.float64),
    "circulant": lambda n: scipy.linalg.circulant(np.random.default_rng(1).normal(size=n)),
}
HIDDEN = ("orders", "signs", "scales")
NOISE = ((1536, 384), (384, 1536), (2048, 2048))


def hide(matrix: Array, how: str, seed: int = 0) -> Array:
    """The matrix under random orders; with ``"signs"`` and ``"scales"`` under those too."""
    rng = np.random.default_rng(seed)
    m, n = matrix.shape
    matrix = matrix[rng.permutation(m)][:, rng.permutation(n)]
    if how == "orders":
        return matrix
    if np.iscomplexobj(matrix):
        r, s = (np.exp(2j * np.pi * rng.random(size)) for size in (m, n))
    else:
        r, s = (rng.choice([-1.0, 1.0], size) for size in (m, n))
    if how == "scales":
        r, s = r * np.exp(rng.normal(size=m)), s * np.exp(rng.normal(size=n))
    return np.asarray(r[:, None] * matrix * s)


def stored(matrix: Array, narrow: bool) -> Tensor:
    """float64 or complex128, or half as wide."""
    weight = torch.from_numpy(np.ascontiguousarray(matrix))
    if not narrow:
        return weight
    return weight.to(torch.complex64 if weight.is_complex() else torch.float32)


def rows(sizes: Sequence[int], kinds: Sequence[str]) -> Iterator[str]:
    """A line of the table for each planted matrix."""
    for kind in kinds:
        for n in sizes:
            matrix = PLANTED[kind](n)
            for how in HIDDEN:
                hidden = hide(matrix, how)
                for narrow in (False, True):
                    weight = stored(hidden, narrow)
                    start = time.perf_counter()
                    found = recognize(weight)
                    seconds = time.perf_counter() - start
                    told = f"{found.name:20} {found.residual:9.1e}" if found else f"{'-':30}"
                    dtype = str(weight.dtype).removeprefix("torch.")
                    yield f"{kind:10} {n:5} {how:7} {dtype:10} {told} {seconds:7.2f}"


def noise() -> Iterator[str]:
    """A line for each size of a Gaussian matrix, in which there is nothing to find."""
    for m, n in NOISE:
        weight = torch.randn(m, n, generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        found = recognize(weight)
        seconds = time.perf_counter() - start
        yield f"Gaussian {m} x {n}: {found.name if found else 'nothing'} after {seconds:.2f} s"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="64,256,1024", help="N of the planted matrices")
    parser.add_argument("--kinds", default=",".join(PLANTED))
    options = parser.parse_args(argv)
    sizes = [int(n) for n in options.sizes.split(",")]
    print(f"{'planted':10} {'N':>5} {'hidden':7} {'dtype':10} {'found':20} {'residual':>9} seconds")
    for line in rows(sizes, options.kinds.split(",")):
        print(line, flush=True)
    for line in noise():
        print(line, flush=True)


if __name__ == "__main__":
    main()

"""Measure what recognition finds, how exactly and how fast: planted matrices, then noise.

    python examples/bench_recognize.py                      N = 64, 256, 1024
    python examples/bench_recognize.py --sizes 4096         the long ones
    python examples/bench_recognize.py --kinds dft,dct2
    python examples/bench_recognize.py --learned --silero silero_vad_16k.safetensors

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
from safetensors.torch import load_file
from torch import Tensor

from structc.families import LearnedButterfly
from structc.numerics import relative_error
from structc.passes.windows import Windowed
from structc.recognition import recognize
from structc.records import Window
from structc.timing import interleaved

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


def learned(points: int = 64) -> str:
    """What a learned butterfly reaches on the DFT by gradient alone."""
    target = torch.fft.fft(torch.eye(points, dtype=torch.complex128)) / points**0.5
    start = time.perf_counter()
    made = LearnedButterfly.learn(target)
    seconds = time.perf_counter() - start
    rmse = float((made.to_dense().detach() - target).abs().square().mean().sqrt())
    return f"learned DFT of {points} points: RMSE {rmse:.1e} after {seconds:.0f} s"


def front_end(file: Path) -> Iterator[str]:
    """Lines about the STFT of Silero VAD: what it is, and its time as convolution and as FFT."""
    weight = load_file(file)["stft_conv.weight"]
    found = recognize(weight[:, 0])
    assert found is not None
    yield f"Silero VAD's front end: {found.words}, residual {found.residual:.1e}"
    conv = torch.nn.Conv1d(1, 258, 256, stride=128, bias=False).eval()
    conv.weight.data.copy_(weight)
    fft = Windowed(found.family.float(), Window((256,), (128,), (0,))).eval()
    for batch, length in ((1, 576), (64, 640), (256, 640), (1, 480_000), (8, 480_000)):
        x = torch.randn(batch, 1, length)
        with torch.inference_mode():
            error = relative_error(fft(x), conv(x))
            spent = interleaved({"conv": lambda x=x: conv(x), "fft": lambda x=x: fft(x)})
        direct, by_fft = (spent[k].latency_ms for k in ("conv", "fft"))
        windows = batch * ((length - 256) // 128 + 1)
        yield (
            f"{windows:6} windows: conv1d {direct:.3f} ms, windowed FFT {by_fft:.3f} ms, "
            f"{direct / by_fft:.2f}x, error {error:.1e}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="64,256,1024", help="N of the planted matrices")
    parser.add_argument("--kinds", default=",".join(PLANTED))
    parser.add_argument("--learned", action="store_true", help="learn a DFT by gradient, minutes")
    parser.add_argument("--silero", type=Path, help="silero_vad_16k.safetensors: time its STFT")
    options = parser.parse_args(argv)
    if options.learned:
        print(learned(), flush=True)
    if options.silero:
        for line in front_end(options.silero):
            print(line, flush=True)
    sizes = [int(n) for n in options.sizes.split(",")]
    print(f"{'planted':10} {'N':>5} {'hidden':7} {'dtype':10} {'found':20} {'residual':>9} seconds")
    for line in rows(sizes, options.kinds.split(",")):
        print(line, flush=True)
    for line in noise():
        print(line, flush=True)


if __name__ == "__main__":
    main()

"""Transforms and convolutions under unknown orders, signs, phases and scales."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recognition.planted import checked, fixed, real_dft, rng, scaled, shuffled, signed, tensor

from structc.recognition import recognize

KINDS = ("dft", "idft", "dct2", "dst2", "hartley", "hadamard", "circulant")
AT_MOST = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}
SAME = {"idft": "dft"}
"""What a kind is called under unknown orders: the inverse DFT is a DFT with other rows."""


def name_of(kind: str, signs: bool) -> str:
    name = SAME.get(kind, kind)
    if signs:  # a DST-II is a DCT-II with signs and other rows
        name = name.replace("dst2", "dct2").replace("dst3", "dct3")
    return f"permuted {name}"


@pytest.mark.parametrize("dtype", AT_MOST, ids=str)
@pytest.mark.parametrize("n", [64, 256])
@pytest.mark.parametrize("kind", [*KINDS, "dct3", "dst3", "dct4"])
def test_planted_under_unknown_orders(kind: str, n: int, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and kind in ("dft", "idft"):
        pytest.skip("there is no complex dtype of that width")
    weight = tensor(shuffled(fixed(kind, n)), dtype)
    checked(recognize(weight), weight, name_of(kind, False), AT_MOST[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scales", [False, True], ids=["signs", "scales"])
@pytest.mark.parametrize("kind", KINDS)
def test_planted_under_signs_and_scales_too(kind: str, scales: bool, dtype: torch.dtype) -> None:
    matrix = signed(shuffled(fixed(kind, 64)), 5)
    weight = tensor(scaled(matrix) if scales else matrix, dtype)
    checked(recognize(weight), weight, name_of(kind, True), AT_MOST[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("narrow", [False, True], ids=["wide", "narrow"])
@pytest.mark.parametrize("n, seconds", [(1024, 10), (4096, 60)])
@pytest.mark.parametrize("kind", KINDS)
def test_large_ones_in_time(kind: str, n: int, seconds: float, narrow: bool) -> None:
    dtype = torch.float32 if narrow else torch.float64
    signs = kind in ("dft", "idft", "hadamard")
    matrix = shuffled(fixed(kind, n))
    weight = tensor(signed(matrix) if signs else matrix, dtype)
    start = time.perf_counter()
    found = recognize(weight)
    took = time.perf_counter() - start
    checked(found, weight, name_of(kind, signs), AT_MOST[dtype])
    assert took < seconds


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(["dft", "dct2", "dst2", "dct3", "hartley", "dct4", "circulant"]),
    n=st.integers(5, 80),
    seed=st.integers(0, 2**16),
    signs=st.booleans(),
)
def test_any_size_any_order(kind: str, n: int, seed: int, signs: bool) -> None:
    matrix = shuffled(fixed(kind, n), seed)
    weight = tensor(signed(matrix, seed) if signs else matrix)
    found = recognize(weight)
    assert found is not None and found.residual < 1e-12


@settings(deadline=None, max_examples=20)
@given(bits=st.integers(2, 7), seed=st.integers(0, 2**16))
def test_any_hadamard(bits: int, seed: int) -> None:
    weight = tensor(signed(shuffled(fixed("hadamard", 2**bits), seed), seed))
    found = recognize(weight)
    assert found is not None and found.residual < 1e-12


@pytest.mark.parametrize("kind", ["dft", "dct2", "dst2", "hartley"])
def test_a_choice_of_rows_in_unknown_orders(kind: str) -> None:
    rows = fixed(kind, 60)[15:] if kind == "dst2" else fixed(kind, 60)[:45]
    weight = tensor(shuffled(rows))  # with the row that shows the signs
    found = recognize(weight)
    assert found is not None and found.residual < 1e-12
    turned = recognize(weight.mT)
    assert turned is not None and turned.residual < 1e-12


def test_cosines_and_sines_in_unknown_orders() -> None:
    matrix = real_dft(64)
    weight = tensor(signed(shuffled(matrix[np.abs(matrix).max(axis=1) > 1e-9])))
    checked(recognize(weight), weight, "permuted rdft", 1e-12)


@pytest.mark.parametrize("signs", [False, True], ids=["plain", "signs"])
@pytest.mark.parametrize(
    "taps",
    [
        np.concatenate([rng(1).normal(size=5), np.zeros(59)]),
        np.concatenate([rng(1).normal(size=33), rng(1).normal(size=33)[1:-1][::-1]]),
        np.exp(-np.minimum(np.arange(64), 64 - np.arange(64)) / 8),
        rng(1).normal(size=63),
        rng(1).normal(size=64).round(1),
    ],
    ids=["short", "symmetric", "decaying", "odd", "repeated"],
)
def test_filters(taps: np.ndarray, signs: bool) -> None:
    n = len(taps)
    matrix = shuffled(taps[(np.arange(n)[:, None] - np.arange(n)) % n])
    weight = tensor(signed(matrix) if signs else matrix)
    checked(recognize(weight), weight, "permuted circulant", 1e-12)


def test_a_complex_filter_with_phases() -> None:
    taps = rng(2).normal(size=40) + 1j * rng(3).normal(size=40)
    matrix = taps[(np.arange(40)[:, None] - np.arange(40)) % 40]
    weight = tensor(signed(shuffled(matrix)))
    checked(recognize(weight), weight, "permuted circulant", 1e-12)


def test_noise_of_a_thousandth_hides_everything() -> None:
    for kind in KINDS:
        matrix = shuffled(fixed(kind, 64))
        noise = rng(4).normal(size=matrix.shape) * np.abs(matrix).mean()
        assert recognize(tensor(matrix + 1e-3 * noise, torch.float32)) is None, kind

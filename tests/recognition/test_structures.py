"""What else a matrix may be, in natural order or not, stored in any dtype."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recognition.planted import (
    Array,
    Maker,
    checked,
    fixed,
    monarch,
    real_dft,
    rng,
    scaled,
    shuffled,
    strided,
    tensor,
)

from structc.families import LowRank, Monarch
from structc.recognition import kinds, recognize
from structc.recognition.base import read
from structc.recognition.kronecker import divisors, kronecker


def normal(*shape: int, seed: int = 11) -> Array:
    return rng(seed).normal(size=shape)


def ragged() -> Array:
    sizes = [(3, 5), (7, 2), (10, 10), (4, 9), (1, 6)]
    matrix = np.zeros((40, 40))
    inner = scipy.linalg.block_diag(*[normal(*size) for size in sizes])
    matrix[: inner.shape[0], : inner.shape[1]] = inner
    return matrix


def stft(n: int, width: int) -> Array:
    window = np.zeros(n)
    at = (n - width) // 2
    window[at : at + width] = scipy.signal.get_window("hann", width)
    return real_dft(n) * window


EXACT: dict[str, tuple[str, Maker]] = {
    "zero": ("zero", lambda: np.zeros((5, 7))),
    "diagonal": ("diagonal", lambda: np.diag(normal(20))),
    "permutation": ("permutation", lambda: shuffled(np.eye(20))),
    "selection": ("permutation", lambda: np.eye(20)[rng().permutation(20)[:12]]),
    "scaled permutation": ("scaled permutation", lambda: shuffled(np.diag(normal(20)))),
    "blocks": ("block_diagonal", lambda: scipy.linalg.block_diag(*normal(8, 12, 8))),
    "shuffled blocks": (
        "permuted block_diagonal",
        lambda: shuffled(scipy.linalg.block_diag(*normal(8, 12, 8))),
    ),
    "ragged blocks": ("permuted block_diagonal", lambda: shuffled(ragged())),
    "circulant": ("circulant", lambda: fixed("circulant", 50)),
    "toeplitz": ("toeplitz", lambda: scipy.linalg.toeplitz(normal(30), normal(50))),
    "hankel": ("hankel", lambda: scipy.linalg.hankel(normal(30), normal(40))),
    "low rank": ("low_rank", lambda: normal(60, 5) @ normal(5, 80)),
    "wide low rank": ("low_rank", lambda: normal(90, 30) @ normal(30, 80)),
    "scaled low rank": ("low_rank", lambda: scaled(shuffled(normal(60, 5) @ normal(5, 80)))),
    "kronecker": ("kronecker", lambda: np.kron(normal(6, 5), normal(8, 9))),
    "kronecker sum": (
        "kronecker",
        lambda: sum(np.kron(normal(8, 8, seed=s), normal(8, 8, seed=s + 9)) for s in range(3)),
    ),
    "scaled kronecker": (
        "scaled kronecker",
        lambda: scaled(np.kron(normal(6, 5), normal(8, 9))),
    ),
    "monarch": ("monarch", lambda: monarch(4, 8, 6, 10, 1)),
    "strided monarch": ("monarch", lambda: strided(monarch(8, 8, 8, 8, 2), 8)),
    "monarch of large rank": ("monarch", lambda: monarch(4, 4, 48, 48, 20)),
    "scaled monarch": ("monarch", lambda: scaled(monarch(4, 8, 6, 10, 1))),
    "haar": ("haar", lambda: kinds.forward("haar", np.eye(32)).T),
    "rows of a dct": ("permuted dct2", lambda: fixed("dct2", 64)[rng().permutation(64)[:30]]),
    "stft": ("rdft", lambda: stft(64, 64)),
    "padded stft": ("rdft", lambda: stft(64, 50)),
    "stft of a short window": ("rdft", lambda: stft(64, 30)),
    "part of an stft": ("rdft", lambda: stft(64, 64)[np.r_[0:20, 33:53]]),
    "istft": ("irdft", lambda: stft(64, 64).T),
    **{k: (k, lambda k=k: fixed(k, 32)) for k in kinds.REAL if k not in ("rdft", "haar")},  # type: ignore[misc]
}
"""Structures that survive rounding to any dtype."""
WIDE: dict[str, tuple[str, Maker]] = {
    "inverse of Toeplitz": (
        "displacement",
        lambda: np.linalg.inv(scipy.linalg.toeplitz(normal(64) + 9 * np.eye(64)[0])),
    ),
    "Toeplitz times Toeplitz": (
        "displacement",
        lambda: (
            scipy.linalg.toeplitz(normal(64), normal(64, seed=2))
            @ scipy.linalg.toeplitz(normal(64, seed=3), normal(64, seed=4))
        ),
    ),
    "its columns reversed": (
        "displacement",
        lambda: WIDE["Toeplitz times Toeplitz"][1]()[:, ::-1],
    ),
    "scaled circulant": ("scaled circulant", lambda: scaled(fixed("circulant", 50))),
    "shuffled monarch": ("permuted monarch", lambda: shuffled(monarch(5, 6, 7, 8, 1))),
    "shuffled square monarch": ("permuted monarch", lambda: shuffled(monarch(8, 8, 8, 8, 1))),
    "dft": ("dft", lambda: fixed("dft", 48)),
    "idft": ("idft", lambda: fixed("idft", 48)),
    "windowed dft": (
        "dft",
        lambda: fixed("dft", 64)[:33] * scipy.signal.get_window("hann", 64),
    ),
}
"""Structures that sixteen bits hide, or that no real dtype holds."""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", EXACT)
def test_found_in_every_dtype(case: str, dtype: torch.dtype) -> None:
    name, make = EXACT[case]
    weight = tensor(make(), dtype)
    allowed = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-4}.get(dtype, 4e-3)
    checked(recognize(weight), weight, name, allowed)


@pytest.mark.parametrize("case", [c for c in EXACT if c not in ("zero", "permutation")])
def test_found_where_bfloat16_values_are_stored_in_float32(case: str) -> None:
    name, make = EXACT[case]
    weight = tensor(make(), torch.bfloat16).float()
    checked(recognize(weight), weight, name, 4e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", WIDE)
def test_found_in_wide_dtypes(case: str, dtype: torch.dtype) -> None:
    name, make = WIDE[case]
    weight = tensor(make(), dtype)
    checked(recognize(weight), weight, name, {torch.float64: 1e-12}.get(dtype, 1e-5))


@pytest.mark.parametrize("case", [*EXACT, *WIDE])
def test_a_family_of_a_recognition_is_applied_as_its_matrix_is(case: str) -> None:
    _, make = {**EXACT, **WIDE}[case]
    found = recognize(tensor(make()))
    assert found is not None
    dense = found.family.to_dense().detach()
    x = torch.randn(3, dense.shape[1], dtype=torch.float64)
    y = found.family(x.to(dense.dtype) if dense.is_complex() else x)
    assert torch.allclose(y.to(dense.dtype), x.to(dense.dtype) @ dense.T, atol=1e-8)


def test_the_least_rank_is_found() -> None:
    found = recognize(tensor(normal(60, 5) @ normal(5, 80)))
    assert found is not None and isinstance(found.family, LowRank)
    assert found.family.hyper()["rank"] == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [9, 15, 16, 17, 18, 20, 21, 22, 24, 31])
def test_every_rank_in_narrow_dtypes(rank: int, dtype: torch.dtype) -> None:
    """A random range finder hardly wider than the rank enlarges what rounding left."""
    for seed in range(3):
        matrix = tensor(normal(128, rank, seed=seed) @ normal(rank, 128, seed=seed + 9)).to(dtype)
        found = recognize(matrix)
        assert found is not None and found.name == "low_rank"
        assert isinstance(found.family, LowRank) and found.family.hyper() == {"rank": rank}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_low_rank_is_no_kronecker_product_of_columns_and_rows(dtype: torch.dtype) -> None:
    matrix = read(tensor(normal(64, 15) @ normal(15, 48), dtype))
    assert matrix is not None and not list(kronecker(matrix))


def test_rows_that_repeat_are_low_rank_and_no_transform() -> None:
    found = recognize(tensor(normal(8, 1) @ np.abs(normal(1, 16))))
    assert found is not None and found.name == "low_rank"
    found = recognize(tensor(fixed("hartley", 16)[[1, 1, 1, 1, 1, 1, 1, 1]]))
    assert found is not None and found.name == "low_rank"


def test_the_cheapest_grid_is_found() -> None:
    found = recognize(tensor(monarch(4, 8, 6, 10, 1)))
    assert found is not None and isinstance(found.family, Monarch)
    assert found.family.hyper() == {"in_blocks": 4, "out_blocks": 8, "rank": 1}


@settings(deadline=None, max_examples=40)
@given(m=st.integers(2, 40), n=st.integers(2, 40), r=st.integers(1, 4), seed=st.integers(0, 99))
def test_any_low_rank(m: int, n: int, r: int, seed: int) -> None:
    matrix = normal(m, r, seed=seed) @ normal(r, n, seed=seed + 1)
    found = recognize(tensor(matrix))
    if r * (m + n) < m * n and r < min(m, n):
        assert found is not None and found.residual < 1e-12


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(*[st.integers(2, 6)] * 4),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_kronecker_product(
    shape: tuple[int, int, int, int], seed: int, dtype: torch.dtype
) -> None:
    a, b = normal(*shape[:2], seed=seed), normal(*shape[2:], seed=seed + 1)
    found = recognize(tensor(np.kron(a, b), dtype))
    assert found is not None and found.residual < 4e-3


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=8, max_size=12),
    seed=st.integers(0, 99),
)
def test_any_blocks(sizes: list[tuple[int, int]], seed: int) -> None:
    blocks = [normal(*size, seed=seed + at) for at, size in enumerate(sizes)]
    matrix = scipy.linalg.block_diag(*blocks)
    found = recognize(tensor(shuffled(matrix, seed)))
    padded = len(sizes) * max(s[0] for s in sizes) * max(s[1] for s in sizes)
    if padded <= matrix.size // 2:
        assert found is not None and found.residual == 0


@pytest.mark.parametrize("n", [1, 2, 12, 36, 97])
def test_divisors(n: int) -> None:
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]

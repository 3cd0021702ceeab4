"""Learned butterflies: transforms found by gradient, permutations among the 8 choices a level."""

from __future__ import annotations

import math

import pytest
import torch

from structc.families import LearnedButterfly, learned_butterfly
from structc.families.relaxed import RelaxedButterfly, strides
from structc.numerics import relative_error


@pytest.fixture(autouse=True)
def full_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RESTARTS": 12, "BATCHES": 3, "STEPS": 1500, "POLISH": 200}.items():
        monkeypatch.setattr(learned_butterfly, name, value)


def dft(n: int) -> torch.Tensor:
    return torch.fft.fft(torch.eye(n, dtype=torch.complex128)) / math.sqrt(n)


def rmse(module: LearnedButterfly, target: torch.Tensor) -> float:
    return float((module.to_dense().detach() - target).abs().square().mean().sqrt())


@pytest.mark.parametrize("tied", [0, 1])
def test_a_small_dft_is_learned(tied: int) -> None:
    module = LearnedButterfly.learn(dft(8), tied=tied)
    assert rmse(module, dft(8)) < 1e-8
    x = torch.randn(3, 8, dtype=torch.complex128)
    assert relative_error(module(x), x @ dft(8).T) < 1e-7
    assert module.form().params == (4 * 7 if tied else 2 * 8 * 3)


@pytest.mark.parametrize("layout", ["bp", "kaleidoscope"])
def test_a_hadamard_matrix_is_learned_in_real_numbers(layout: str) -> None:
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    target = torch.kron(two, torch.kron(two, two))
    module = LearnedButterfly.fit(target, layout=layout, depth=1, tied=0)
    assert isinstance(module, LearnedButterfly) and module.fit_error < 1e-7


@pytest.mark.slow
def test_the_dft_of_64_points_is_learned_by_gradient_alone() -> None:
    assert rmse(LearnedButterfly.learn(dft(64)), dft(64)) < 1e-4


def test_rounded_choices_are_permutations_and_all_first_ones_reverse_bits() -> None:
    n = 16
    layer = RelaxedButterfly(n, starts=1)
    with torch.no_grad():
        layer.logits.copy_(torch.tensor([9.0, -9.0, -9.0]).expand_as(layer.logits))
    order = layer._rounded(0).hard[0]
    bits = len(strides(n))
    assert order.tolist() == [int(f"{i:0{bits}b}"[::-1], 2) for i in range(n)]
    for seed in range(5):
        rounded = RelaxedButterfly(n, seed=seed)._rounded(0).hard[0]
        assert sorted(rounded.tolist()) == list(range(n))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_relaxed_layer_trains(dtype: torch.dtype) -> None:
    layer = RelaxedButterfly(8, depth=2, tied=True, dtype=dtype)
    x = torch.randn(5, 8, dtype=dtype)
    assert relative_error(layer(x), x @ layer.matrix()[0].mT) < 1e-12
    layer(x).abs().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in layer.parameters())


@pytest.mark.parametrize("shape", [(8, 16), (12, 12), (1024, 1024), (1, 1)])
def test_other_sizes_are_refused(shape: tuple[int, int]) -> None:
    made = LearnedButterfly.fit(torch.ones(shape), layout="bp", depth=1, tied=0)
    assert not isinstance(made, LearnedButterfly) and made.code == "SIZE"
    assert str(shape[0]) in made.reason

"""Low rank: the optimum it promises, with and without data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structc.families import LowRank
from structc.numerics import relative_error, weighted_error


def problem(n: int, m: int, decay: float) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    spectrum = torch.arange(1, n + 1, dtype=torch.float64) ** -decay
    return torch.randn(m, n, generator=g, dtype=torch.float64), (q * spectrum) @ q.mT


@pytest.mark.parametrize("n, m", [(20, 32), (32, 20), (24, 24)], ids=["tall", "wide", "square"])
def test_is_the_eckart_young_optimum(n: int, m: int) -> None:
    weight, _ = problem(n, m, 1.0)
    u, s, vh = torch.linalg.svd(weight)
    for rank in (1, 7, 20):
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert relative_error(LowRank.fit(weight, rank=rank).to_dense(), best) < 1e-11


@pytest.mark.parametrize("n, m", [(20, 32), (32, 20), (24, 24)], ids=["tall", "wide", "square"])
def test_weighted_fit_is_the_global_optimum(n: int, m: int) -> None:
    """For an invertible C = L L^T the optimum is SVD(W L)_r L^-1."""
    weight, gram = problem(n, m, 1.5)
    lower = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(weight @ lower)
    for rank in (1, 7, 19):
        best = torch.linalg.solve_triangular(
            lower, (u[:, :rank] * s[:rank]) @ vh[:rank], upper=False, left=False
        )
        assert relative_error(LowRank.fit(weight, gram, rank=rank).to_dense(), best) < 1e-9


@pytest.mark.parametrize("n, m", [(20, 32), (32, 20), (24, 24)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_curve_is_what_fits_reach(n: int, m: int, weighted: bool) -> None:
    weight, gram = problem(n, m, 1.0)
    used = gram if weighted else None
    ranks = [1, 3, 10, min(n, m) - 1]
    measured = [
        weighted_error(weight, LowRank.fit(weight, used, rank=r).to_dense(), used) for r in ranks
    ]
    assert LowRank.curve(weight, used, ranks) == pytest.approx(measured, rel=1e-6)
    assert LowRank.curve(weight, used, [min(n, m)])[0] == pytest.approx(0.0, abs=1e-7)


def test_curve_of_a_zero_weight_is_zero() -> None:
    assert LowRank.curve(torch.zeros(4, 6), None, [1, 2, 4]) == [0.0, 0.0, 0.0]


def test_fewer_samples_than_features_cost_nothing_on_the_samples() -> None:
    """A Gram of rank 5: any map is exact on the data from rank 5 on."""
    weight, _ = problem(30, 20, 1.0)
    x = torch.randn(5, 30, dtype=torch.float64)
    module = LowRank.fit(weight, x.mT @ x / 5, rank=5)
    assert relative_error(x @ module.to_dense().T, x @ weight.T) < 1e-6


@pytest.mark.parametrize("n, m", [(20, 32), (32, 20)], ids=["tall", "wide"])
def test_the_way_of_large_weights_ends_at_the_same_optimum(
    n: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, _ = problem(n, m, 1.0)
    direct = LowRank.fit(weight, rank=7).to_dense()
    monkeypatch.setattr("structc.families.low_rank.DIRECT", 0)
    assert relative_error(LowRank.fit(weight, rank=7).to_dense(), direct) < 1e-10

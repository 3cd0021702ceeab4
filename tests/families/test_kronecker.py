"""Kronecker sums: the optimum without data, exact half-steps with data."""

from __future__ import annotations

import pytest
import torch

from structc.families import Kronecker
from structc.numerics import relative_error, weighted_error


def problem(n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    gram = (q * torch.arange(1, n + 1, dtype=torch.float64) ** -1.0) @ q.mT
    return torch.randn(m, n, generator=g, dtype=torch.float64), gram


def test_is_the_sum_that_its_docstring_writes() -> None:
    a, b = torch.randn(3, 4, 2).double(), torch.randn(3, 5, 6).double()
    x = torch.randn(12, dtype=torch.float64)
    y = sum(a[t] @ x.reshape(2, 6) @ b[t].T for t in range(3))
    assert relative_error(Kronecker(a, b)(x), y.flatten()) < 1e-13
    dense = sum(torch.kron(a[t], b[t]) for t in range(3))
    assert relative_error(Kronecker(a, b).to_dense(), dense) < 1e-13


@pytest.mark.parametrize("terms, error", [(16, 0.756), (25, 0.630)])
def test_noise_is_fitted_as_well_as_published(terms: int, error: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 128, dtype=torch.float64)
    module = Kronecker.fit(weight, in_outer=8, out_outer=8, terms=terms)
    assert module.fit_error == pytest.approx(error, abs=0.005)
    assert module.null_error() == pytest.approx(error, abs=0.01)


@pytest.mark.parametrize("joint", [0, 10**6], ids=["conjugate", "jointly"])
def test_half_sweeps_never_raise_the_error(joint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(24, 36)
    hyper = {"in_outer": 4, "out_outer": 6, "terms": 5}
    monkeypatch.setattr("structc.families.kronecker.JOINT", joint)
    monkeypatch.setattr("structc.families.solves.PROGRESS", -1.0)
    errors = [weighted_error(weight, Kronecker.fit(weight, **hyper).to_dense(), gram)]
    for sweeps in range(1, 8):
        monkeypatch.setattr("structc.families.kronecker.SWEEPS", sweeps)
        errors.append(Kronecker.fit(weight, gram, **hyper).fit_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.85 * errors[0]


@pytest.mark.parametrize("joint", [0, 10**6], ids=["conjugate", "jointly"])
def test_half_sweeps_end_at_the_least_squares_solution(
    joint: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the design matrix in full: all of A for one B, in the metric of the Gram."""
    from structc.families.kronecker import _Weighted

    weight, gram = problem(12, 15)
    g = torch.Generator().manual_seed(3)
    a, b = (torch.randn(2, *s, generator=g, dtype=torch.float64) for s in ((5, 4), (3, 3)))
    root = torch.linalg.cholesky(gram)
    units = torch.eye(a.numel(), dtype=torch.float64).reshape(-1, *a.shape)
    columns = [sum(map(torch.kron, unit, b)) @ root for unit in units]
    design = torch.stack([c.flatten() for c in columns], 1)
    best = torch.linalg.lstsq(design, (weight @ root).flatten()[:, None])[0].reshape(a.shape)
    monkeypatch.setattr("structc.families.kronecker.TURNS", 60)
    monkeypatch.setattr("structc.families.kronecker.JOINT", joint)
    sweeps = _Weighted(weight, gram, 4)
    sweeps.at((a, b))
    assert relative_error(sweeps._moved((a, b), 0, sweeps.pull), best) < 1e-8


def test_sizes_that_do_not_divide_are_refused() -> None:
    refusal = Kronecker.fit(torch.randn(12, 13), in_outer=2, out_outer=3, terms=1)
    assert refusal.code == "GRID" and "13" in refusal.reason
    assert Kronecker.fit(torch.randn(12, 14), in_outer=2, out_outer=3, terms=7).code == "RANK"

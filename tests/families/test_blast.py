"""BLAST: the sum of its docstring, the published null table, and what its sweeps promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structc.families import Blast, LowRank
from structc.numerics import relative_error, weighted_error


def correlated(n: int, decay: float, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return (q * torch.arange(1, n + 1, dtype=torch.float64) ** -decay) @ q.mT


def gaussian(n: int, m: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(m, n, generator=g, dtype=torch.float64)


def test_is_the_sum_that_its_docstring_writes() -> None:
    b, r, i, l = 3, 4, 5, 2
    v, s, u = (torch.randn(*size).double() for size in ((b, r, i), (b, b, r), (b, l, r)))
    x = torch.randn(b * i, dtype=torch.float64)
    y = [u[a] @ sum(s[a, c] * (v[c] @ x[c * i : (c + 1) * i]) for c in range(b)) for a in range(b)]
    assert relative_error(Blast(v, s, u)(x), torch.cat(y)) < 1e-13


@pytest.mark.parametrize(
    "blocks, rank, published, low_rank",
    [
        (4, 28, 0.554, 0.644),
        pytest.param(8, 20, 0.598, 0.687, marks=pytest.mark.slow),
        pytest.param(16, 12, 0.615, 0.699, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "identity"])
def test_noise_is_fitted_as_well_as_published(blocks, rank, published, low_rank, weighted) -> None:
    """Gaussian 128 x 128: errors after 30 plain sweeps, and of low rank at equal parameters."""
    torch.manual_seed(0)
    weight = torch.randn(128, 128, dtype=torch.float64)
    gram = torch.eye(128, dtype=torch.float64) if weighted else None
    module = Blast.fit(weight, gram, blocks=blocks, rank=rank)
    assert published - 0.03 < module.fit_error < published + 0.005
    equal = module.form().params // 256
    assert LowRank.fit(weight, rank=equal).fit_error == pytest.approx(low_rank, abs=0.005)


@pytest.mark.parametrize("decay, published", [(0.5, 0.435), (1.0, 0.327), (2.0, 0.086)])
def test_data_are_used_as_well_as_published(decay, published) -> None:
    """Gaussian 96 x 128 under C = Q diag(t^-a) Q^T: errors after 20 plain sweeps."""
    gram = correlated(128, decay)
    assert Blast.fit(gaussian(128, 96), gram, blocks=4, rank=29).fit_error < published * 1.03


@pytest.mark.parametrize("joint", [0, 10**6], ids=["block-by-block", "jointly"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_sweeps_never_raise_the_error(weighted, joint, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = gaussian(64, 48), correlated(64, 1.5) if weighted else None
    monkeypatch.setattr("structc.families.blast.JOINT", joint)
    monkeypatch.setattr("structc.families.solves.PROGRESS", -1.0)
    errors = [LowRank.fit(weight, gram, rank=9).fit_error]
    for sweeps in range(1, 13):
        monkeypatch.setattr("structc.families.blast.SWEEPS", sweeps)
        errors.append(Blast.fit(weight, gram, blocks=4, rank=9).fit_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.93 * errors[0]


@pytest.mark.slow
def test_many_sweeps_end_where_no_factor_can_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = gaussian(16, 12), correlated(16, 1.0)
    monkeypatch.setattr("structc.families.solves.PROGRESS", -1.0)
    monkeypatch.setattr("structc.families.blast.SWEEPS", 1000)
    module = Blast.fit(weight, gram, blocks=2, rank=3)
    gap = module.to_dense() - weight
    loss = ((gap @ gram) * gap).sum()
    for gradient in torch.autograd.grad(loss, list(module.parameters())):
        assert float(gradient.norm()) < 1e-3 * float(loss.detach())


def test_one_block_is_low_rank() -> None:
    weight, gram = gaussian(40, 24), correlated(40, 1.0)
    one = Blast.fit(weight, gram, blocks=1, rank=6)
    assert relative_error(one.to_dense(), LowRank.fit(weight, gram, rank=6).to_dense()) < 1e-7


def test_dependent_inputs_and_too_much_rank_are_harmless() -> None:
    """Three samples, rank above what they span: every system is singular, the fit is exact."""
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weight = gaussian(24, 36)
    module = Blast.fit(weight, x.mT @ x, blocks=3, rank=20)
    assert relative_error(x @ module.to_dense().T, x @ weight.T) < 1e-6


@pytest.mark.slow
def test_null_of_a_larger_weight_is_what_noise_gives() -> None:
    weight, hyper = gaussian(384, 384), {"blocks": 8, "rank": 88}
    assert Blast.null(384, 384, hyper) == pytest.approx(
        weighted_error(weight, Blast.fit(weight, **hyper).to_dense(), None), abs=0.01
    )


def test_products_made_again_are_those_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(24, 40, generator=g, dtype=torch.float64)
    x = torch.randn(200, 40, generator=g, dtype=torch.float64)
    kept = Blast.fit(weight, x.T @ x, blocks=4, rank=6)
    monkeypatch.setattr("structc.families.blast.HELD", 0)
    again = Blast.fit(weight, x.T @ x, blocks=4, rank=6)
    assert torch.allclose(kept.to_dense(), again.to_dense(), rtol=1e-10, atol=1e-12)

"""Monarch: its mathematics by the loops of its docstring, and the data-aware descent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structc.families import LowRank, Monarch
from structc.numerics import relative_error, weighted_error

HYPER = {"in_blocks": 8, "out_blocks": 8, "rank": 4}


def correlated(n: int, decay: float, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))
    return (q * torch.arange(1, n + 1, dtype=torch.float64) ** -decay) @ q.mT


def gaussian(n: int, m: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(m, n, generator=g, dtype=torch.float64)


def test_is_the_sum_that_its_docstring_writes() -> None:
    k, j, r, i, l = 3, 4, 2, 5, 6
    w1 = torch.randn(k, j, r, i, dtype=torch.float64)
    w2 = torch.randn(j, l, r, k, dtype=torch.float64)
    x = torch.randn(k * i, dtype=torch.float64)
    parts = []
    for b in range(j):
        y = torch.zeros(l, dtype=torch.float64)
        for a in range(k):
            y += w2[b, :, :, a] @ (w1[a, b] @ x[a * i : (a + 1) * i])
        parts.append(y)
    assert relative_error(Monarch(w1, w2)(x), torch.cat(parts)) < 1e-13


def test_projection_truncates_every_block() -> None:
    weight, k, j, rank = gaussian(24, 40), 4, 5, 3
    dense = Monarch.fit(weight, in_blocks=k, out_blocks=j, rank=rank).to_dense().detach()
    for b in range(j):
        for a in range(k):
            block = weight[b * 8 : b * 8 + 8, a * 6 : a * 6 + 6]
            u, s, vh = torch.linalg.svd(block)
            best = (u[:, :rank] * s[:rank]) @ vh[:rank]
            assert relative_error(dense[b * 8 : b * 8 + 8, a * 6 : a * 6 + 6], best) < 1e-11


@pytest.mark.parametrize(
    "decay, plain, descended",
    [(0.0, 0.551, 0.551), (0.5, 0.550, 0.504), (1.0, 0.546, 0.361), (2.0, 0.529, 0.101)],
    ids=lambda v: f"{v:g}",
)
def test_descent_reaches_the_published_errors(decay, plain, descended) -> None:
    """Gaussian 96 x 128 at 58 % of the parameters, grid 8 x 8, rank 4, C = Q diag(t^-a) Q^T."""
    weight, gram = gaussian(128, 96), correlated(128, decay)
    before = weighted_error(weight, Monarch.fit(weight, **HYPER).to_dense(), gram)
    after = weighted_error(weight, Monarch.fit(weight, gram, **HYPER).to_dense(), gram)
    assert before == pytest.approx(plain, abs=0.02)
    assert after == pytest.approx(descended, rel=0.08, abs=0.01)
    assert after <= before * (1 + 1e-12)


def test_descent_is_monotone_in_its_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = gaussian(128, 96), correlated(128, 1.5)
    errors = []
    for sweeps in range(6):
        monkeypatch.setattr("structc.families.monarch.SWEEPS", sweeps)
        module = Monarch.fit(weight, gram, **HYPER)
        errors.append(weighted_error(weight, module.to_dense(), gram))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.75 * errors[0]


def test_grid_of_one_block_is_weighted_low_rank() -> None:
    weight, gram = gaussian(40, 24), correlated(40, 1.0)
    one = Monarch.fit(weight, gram, in_blocks=1, out_blocks=1, rank=6)
    other = LowRank.fit(weight, gram, rank=6)
    assert relative_error(one.to_dense(), other.to_dense()) < 1e-8


def test_block_diagonal_gram_needs_no_descent() -> None:
    """Blocks decouple: whitening block by block is the optimum, so a sweep changes nothing."""
    weight = gaussian(24, 40)
    gram = torch.block_diag(*(correlated(6, 1.0, seed) for seed in range(4)))
    module = Monarch.fit(weight, gram, in_blocks=4, out_blocks=5, rank=3)
    total = 0.0
    for a in range(4):
        root = torch.linalg.cholesky(gram[a * 6 : a * 6 + 6, a * 6 : a * 6 + 6])
        for b in range(5):
            block = weight[b * 8 : b * 8 + 8, a * 6 : a * 6 + 6]
            total += float((torch.linalg.svdvals(block @ root)[3:] ** 2).sum())
    best = (total / float(((weight @ gram) * weight).sum())) ** 0.5
    assert weighted_error(weight, module.to_dense(), gram) == pytest.approx(best, rel=1e-6)


@pytest.mark.slow
def test_projection_of_a_large_weight() -> None:
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    module = Monarch.fit(weight, in_blocks=4, out_blocks=4, rank=256)
    assert module.form().params == 4096 * 4096 // 2
    tail = torch.linalg.svdvals(weight[:1024, :1024].double())[256:]
    gap = (weight[:1024, :1024].double() - module.to_dense()[:1024, :1024].double()).norm()
    assert float(gap) == pytest.approx(float(tail.norm()), rel=1e-4)


def test_the_way_of_large_blocks_descends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthogonal iteration in place of eigendecompositions: monotone, and near their error."""
    weight, gram = gaussian(128, 96), correlated(128, 1.0)
    usual = Monarch.fit(weight, gram, **HYPER).fit_error
    plain = Monarch.fit(weight, **HYPER).to_dense()
    monkeypatch.setattr("structc.families.monarch.DIRECT", 0)
    assert relative_error(Monarch.fit(weight, **HYPER).to_dense(), plain) < 1e-10
    errors = []
    for sweeps in range(9):
        monkeypatch.setattr("structc.families.monarch.SWEEPS", sweeps)
        errors.append(Monarch.fit(weight, gram, **HYPER).fit_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1.05 * usual

"""Butterfly: exact in its class, within its bound outside, better with data."""

from __future__ import annotations

import math

import pytest
import torch

from structc.families import Butterfly
from structc.families.butterfly import radices
from structc.numerics import relative_error


def test_sizes_split_evenly_or_not_at_all() -> None:
    assert radices(384, 3) == [8, 8, 6] and radices(97, 4) == [97]
    assert all(math.prod(radices(s, levels)) == s for s in range(2, 200) for levels in (1, 2, 5))


@pytest.mark.parametrize("n, error", [(64, 0.905), (128, 0.947)])
def test_noise_is_fitted_as_well_as_published(n: int, error: float) -> None:
    """Gaussian n x n with log2 n levels: worse than low rank, so only found structure uses it."""
    torch.manual_seed(0)
    weight, levels = torch.randn(n, n, dtype=torch.float64), n.bit_length() - 1
    module = Butterfly.fit(weight, levels=levels, rank=1)
    assert module.form().params == 2 * n * levels
    assert module.fit_error == pytest.approx(error, abs=0.005)
    assert module.null_error() == pytest.approx(error, abs=0.01)


@pytest.mark.parametrize(
    "n, m, levels, rank", [(64, 64, 6, 1), (60, 36, 3, 2), (36, 60, 3, 3), (105, 30, 3, 2)]
)
def test_members_are_recovered_and_noise_is_not_amplified(n, m, levels, rank) -> None:
    member = Butterfly.empty(n, m, {"levels": levels, "rank": rank}, torch.float64)
    g = torch.Generator().manual_seed(3)
    for parameter in member.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    planted = member.to_dense().detach()
    assert Butterfly.fit(planted, levels=levels, rank=rank).fit_error < 1e-12
    noise = torch.randn(m, n, generator=g, dtype=torch.float64)
    noise *= 1e-3 * planted.norm() / noise.norm()
    module = Butterfly.fit(planted + noise, levels=levels, rank=rank)
    assert module.fit_error < 1.0e-3


def test_hadamard_is_found() -> None:
    h = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = h
    for _ in range(5):
        matrix = torch.kron(matrix, h)
    module = Butterfly.fit(matrix, levels=6, rank=1)
    assert relative_error(module.to_dense(), matrix) < 1e-14
    assert module.form().params == 2 * 64 * 6


def test_the_bound_is_never_violated() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(16, 16, 4, 1), (24, 36, 3, 2), (30, 12, 2, 2), (32, 8, 3, 1)]
    for trial in range(200):
        n, m, levels, rank = shapes[trial % len(shapes)]
        weight = torch.randn(m, n, generator=g, dtype=torch.float64)
        weight *= torch.arange(1, n + 1, dtype=torch.float64) ** -(trial % 7 / 2)
        weight = weight.cumsum(0) if trial % 3 else weight
        module = Butterfly.fit(weight, levels=levels, rank=rank)
        assert module.fit_error <= module.bound * (1 + 1e-9)


def test_refinement_is_monotone_and_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(48, 64, generator=g, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64))[0]
    gram = (q * torch.arange(1, 65, dtype=torch.float64) ** -1.0) @ q.mT
    plain = Butterfly.fit(weight, levels=3, rank=3).error(weight, gram)
    errors = [plain]
    for sweeps in range(1, 5):
        monkeypatch.setattr("structc.families.butterfly.SWEEPS", sweeps)
        errors.append(Butterfly.fit(weight, gram, levels=3, rank=3).fit_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * plain


@pytest.mark.parametrize("at", [0, 1, 2])
def test_steps_end_at_the_least_squares_solution(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the design matrix in full: one factor for the others as they are."""
    from structc.families import butterfly

    g = torch.Generator().manual_seed(2)
    chain = list(Butterfly.empty(12, 18, {"levels": 3, "rank": 2}, torch.float64).chain)
    chain = [torch.randn(f.shape, generator=g, dtype=torch.float64) for f in chain]
    weight = torch.randn(18, 12, generator=g, dtype=torch.float64)
    x = torch.randn(12, 30, generator=g, dtype=torch.float64)
    gram = x @ x.mT
    left, right = weight.new_ones(1, 1, 1, 18), weight.new_ones(12, 1, 1, 1)
    ranks = butterfly._ranks(3, 2)
    parts = [butterfly._parted(f.clone(), *r) for f, r in zip(chain, ranks, strict=True)]
    for part in parts[:at]:
        left = butterfly._wider(left, part)
    for part in reversed(parts[at + 1 :]):
        right = butterfly._longer(part, right)
    monkeypatch.setattr(butterfly, "TURNS", 400)
    lost = butterfly._least(parts[at], left, right, weight @ gram, gram)
    found = [*chain[:at], parts[at].reshape(chain[at].shape), *chain[at + 1 :]]

    def output(factors: list[torch.Tensor]) -> torch.Tensor:
        return Butterfly(factors, 2).to_dense().detach() @ x

    units = torch.eye(chain[at].numel(), dtype=torch.float64).reshape(-1, *chain[at].shape)
    columns = [output([*chain[:at], unit, *chain[at + 1 :]]).flatten() for unit in units]
    design, target = torch.stack(columns, 1), (weight @ x).flatten()
    best = design @ torch.linalg.lstsq(design, target[:, None], driver="gelsd")[0][:, 0]
    assert relative_error(output(found).flatten(), best) < 1e-8
    gap = target - best
    assert float(target @ target) + lost == pytest.approx(float(gap @ gap), rel=1e-6)


def test_primes_are_refused_with_a_reason() -> None:
    refusal = Butterfly.fit(torch.randn(12, 13), levels=2, rank=1)
    assert refusal.code == "GRID" and "13 has 1 prime factors" in refusal.reason

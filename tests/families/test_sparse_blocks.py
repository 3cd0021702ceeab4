"""Block diagonal, block sparse and pixelfly: exact steps on a mask, and what finds the mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structc.families import BlockDiagonal, BlockSparse, LowRank, Pixelfly
from structc.families.pixelfly import pattern


def problem(n: int, m: int, decay: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    gram = (q * torch.arange(1, n + 1, dtype=torch.float64) ** -decay) @ q.mT
    return torch.randn(m, n, generator=g, dtype=torch.float64), gram


def is_stationary(module: torch.nn.Module, weight: Tensor, gram: Tensor) -> bool:
    """Whether no small change of the factors lowers the output error."""
    gap = module.to_dense() - weight
    loss = ((gap @ gram) * gap).sum()
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return all(float(g.norm()) < 1e-6 * float(loss.detach()) for g in gradients)


def test_values_on_a_mask_are_least_squares() -> None:
    weight, gram = problem(24, 36)
    for module in (
        BlockDiagonal.fit(weight, gram, blocks=3, order="given"),
        BlockDiagonal.fit(weight, gram, blocks=3, order="clustered"),
        BlockSparse.fit(weight, gram, height=4, width=3, count=30),
    ):
        assert is_stationary(module, weight, gram)


def test_shuffled_blocks_are_found() -> None:
    g = torch.Generator().manual_seed(2)
    blocks = torch.randn(4, 5, 6, generator=g, dtype=torch.float64)
    rows, columns = torch.randperm(20, generator=g), torch.randperm(24, generator=g)
    weight = torch.block_diag(*blocks)[rows][:, columns]
    assert BlockDiagonal.fit(weight, blocks=4, order="given").fit_error > 0.5
    assert BlockDiagonal.fit(weight, blocks=4, order="clustered").fit_error < 1e-15
    noisy = weight + 1e-3 * torch.randn(20, 24, generator=g, dtype=torch.float64)
    assert BlockDiagonal.fit(noisy, blocks=4, order="clustered").fit_error < 0.9


def test_clustering_never_loses_to_the_order_as_given() -> None:
    weight, gram = problem(48, 32)
    for used in (None, gram):
        given, found = (
            BlockDiagonal.fit(weight, used, blocks=4, order=order).fit_error
            for order in ("given", "clustered")
        )
        assert found < given


def test_unknown_orders_are_refused() -> None:
    assert BlockDiagonal.fit(torch.randn(4, 4), blocks=2, order="random").code == "ORDER"


def test_kept_blocks_are_the_largest() -> None:
    weight, _ = problem(24, 36)
    module = BlockSparse.fit(weight, height=6, width=4, count=10)
    energy = weight.reshape(6, 6, 6, 4).square().sum((1, 3)).flatten()
    best = energy.sort(descending=True).values[:10].sum()
    assert float(module.to_dense().detach().square().sum()) == pytest.approx(float(best))
    assert module.values.shape == (10, 6, 4) and module.rows[-1] == 10


def test_the_pattern_is_the_published_one() -> None:
    mask = pattern(16, 2)
    assert mask.float().mean() == 3 / 16 and bool((mask == mask.T).all())
    assert mask[5].nonzero().flatten().tolist() == [4, 5, 7]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_pixelfly_only_improves_on_low_rank(weighted, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(64, 48)
    used = gram if weighted else None
    monkeypatch.setattr("structc.families.pixelfly.PROGRESS", -1.0)
    errors = [LowRank.fit(weight, used, rank=6).fit_error]
    for sweeps in range(1, 10):
        monkeypatch.setattr("structc.families.pixelfly.SWEEPS", sweeps)
        errors.append(Pixelfly.fit(weight, used, blocks=8, levels=1, rank=6).fit_error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.slow
def test_pixelfly_settles_where_no_factor_can_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(24, 16)
    monkeypatch.setattr("structc.families.pixelfly.PROGRESS", -1.0)
    monkeypatch.setattr("structc.families.pixelfly.SWEEPS", 4000)
    assert is_stationary(Pixelfly.fit(weight, gram, blocks=4, levels=1, rank=3), weight, gram)


@pytest.mark.parametrize("blocks, levels", [(3, 1), (4, 0), (4, 3), (8, 4)])
def test_pixelfly_wants_powers_of_two(blocks: int, levels: int) -> None:
    refusal = Pixelfly.fit(torch.randn(24, 24), blocks=blocks, levels=levels, rank=1)
    assert refusal.code == "GRID"

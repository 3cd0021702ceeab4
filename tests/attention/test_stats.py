"""Statistics of heads, against heads whose structure is planted."""

from __future__ import annotations

import math

import pytest
import torch

from structc.attention import METHODS, BlockSparse, Uniform, WindowSinks
from structc.attention.stats import HeadStats, StatsSum, recall_scores
from structc.records import Refusal


def stats_of(q: torch.Tensor, k: torch.Tensor, causal: bool = True) -> HeadStats:
    total = StatsSum()
    total.add(q[None, None], k[None, None], scale=1.0, is_causal=causal)
    return total.pooled()[0]


def positions(n: int) -> torch.Tensor:
    """Features whose products fall with the distance."""
    at = torch.arange(n)[:, None] / 200
    return torch.cat([at.cos(), at.sin()], 1)


def test_a_flat_head_is_uniform() -> None:
    q, k = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0)) * 0.05
    found = stats_of(q, k)
    assert found.entropy > 0.999 and found.spread < 0.1 and found.centred <= found.bound + 1e-6
    assert Uniform.proposals(found) == (Uniform(is_causal=True),)
    assert isinstance(WindowSinks.proposals(found), tuple)  # 256 of 300 keys
    assert isinstance(BlockSparse.proposals(found), Refusal)


def test_a_local_head_is_a_window() -> None:
    x = positions(400)
    found = stats_of(2e4 * x, x)
    (window, sinks) = found.window(0.99) or (0, 0)
    assert 0 < window <= 64 and sinks == 0
    assert isinstance(Uniform.proposals(found), Refusal)
    assert WindowSinks(window, 0) in WindowSinks.proposals(found)  # type: ignore[operator]


def test_sinks_are_seen() -> None:
    q = torch.ones(400, 4)
    k = torch.zeros(400, 4)
    k[:4] = 3.0
    found = stats_of(q, k)
    assert found.kept[64, 4] > 0.98 > found.kept[64, 0]
    assert found.blocks[0.9] < 0.5


def test_entropy_and_masses_are_those_of_the_matrix() -> None:
    q, k = torch.randn(2, 120, 8, generator=torch.Generator().manual_seed(1))
    total = StatsSum()
    total.add(q[None, None], k[None, None], scale=1.0, is_causal=True, rows=120)
    found = total.pooled()[0]
    a = (q @ k.mT).masked_fill(torch.ones(120, 120).triu(1).bool(), -math.inf).softmax(1)
    lag = torch.arange(120)[:, None] - torch.arange(120)
    assert found.kept[32, 4] == pytest.approx(
        float((a * ((lag < 32) | (torch.arange(120) < 4))).sum(1).mean()), rel=1e-5
    )
    rows = -torch.special.xlogy(a, a).sum(1)[1:] / torch.arange(2, 121).log()
    assert found.entropy == pytest.approx(float(rows.mean()), rel=1e-5)


def test_a_period_is_found() -> None:
    at = torch.arange(600) % 24
    x = torch.nn.functional.one_hot(at).float()
    assert 24 in stats_of(3 * x, x, causal=False).periods


def test_a_head_that_recalls_is_known() -> None:
    tokens = torch.nn.functional.one_hot(torch.randperm(64)).float()
    twice = torch.cat([tokens, tokens])
    behind = torch.cat([torch.zeros(1, 64), twice[:-1]])  # a key holds the token before it
    q, k = 20 * twice[None, None], behind[None, None]
    score = recall_scores(q, k, scale=1.0, is_causal=True, half=64)
    assert float(score) > 0.9
    noise = torch.randn(2, 1, 1, 128, 64)
    assert float(recall_scores(*noise, scale=0.1, is_causal=True, half=64)) < 0.1


def test_inputs_pool_with_the_larger_bound() -> None:
    q, k = torch.randn(2, 1, 1, 300, 8, generator=torch.Generator().manual_seed(2))
    total = StatsSum()
    for factor in (1.0, 3.0):
        total.add(factor * q, k, scale=1.0, is_causal=True)
    one = StatsSum()
    one.add(3 * q, k, scale=1.0, is_causal=True)
    assert total.pooled()[0].norms == one.pooled()[0].norms
    assert total.pooled()[0].entropy > one.pooled()[0].entropy


@pytest.mark.parametrize("factor", [0.0, 1e-6, 1.0, 100.0])
@pytest.mark.parametrize("causal", [True, False])
def test_every_size_of_scores_has_an_answer(factor: float, causal: bool) -> None:
    q, k = factor * torch.randn(2, 256, 8, generator=torch.Generator().manual_seed(3))
    found = stats_of(q, k, causal)
    for kind in METHODS:
        made = kind.proposals(found)
        assert isinstance(made, Refusal) or (made and all(isinstance(m, kind) for m in made))

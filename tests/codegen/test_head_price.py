"""Prices of attention methods: lengths, the database, what is not faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from structc.attention import ConvBasis, Nystrom, Uniform, WindowSinks
from structc.attention_records import AttentionCase
from structc.codegen import head_price
from structc.codegen.head_price import HeadPrice, price_methods
from structc.records import Refusal, Timed
from structc.softmax import Softmax

CASE = AttentionCase(str(Softmax(0.25, causal=True)), 1, 4, 2, 1024, 1024, 16, 16, torch.float32)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Quadratic for the exact kernel, linear for methods: they meet at 300 keys."""
    timed: list[int] = []

    def interleaved(calls: Mapping[str, Callable[[], Any]], **_: Any) -> dict[str, Timed]:
        n = calls["exact"]()[0].shape[2]
        assert calls["method"]().shape == calls["exact"]()[0].shape
        timed.append(n)
        ms = {"exact": n * n / 300, "method": float(n)}
        return {name: Timed(t, t, 0.05, 5) for name, t in ms.items()}

    monkeypatch.setattr(head_price, "interleaved", interleaved)
    return timed


def test_a_method_has_the_least_length_at_which_it_is_faster(clock: list[int]) -> None:
    method = WindowSinks(64, 4)
    found = price_methods(CASE, [method], effort="quick")[method]
    assert isinstance(found, HeadPrice)
    assert clock == [1024, 512, 256]
    assert found.least == 512 and found.speedup == pytest.approx(1024 / 300)
    clock.clear()
    assert price_methods(CASE, [method], effort="quick")[method] == found
    assert price_methods(CASE, [method], effort="recorded")[method] == found
    assert not clock  # all of it was known


def test_what_is_not_faster_is_refused_with_its_times(
    clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_price, "WORTH", 0.01)
    method = Uniform(is_causal=True)
    refusal = price_methods(CASE, [method], effort="quick")[method]
    assert isinstance(refusal, Refusal) and refusal.code == "NOT_FASTER"
    assert "ms, the exact kernel takes" in refusal.reason and "uniform" in refusal.reason


def test_nothing_is_timed_unasked(clock: list[int]) -> None:
    for effort in ("none", "recorded"):
        method = ConvBasis(2)
        refusal = price_methods(CASE, [method], effort=effort)[method]
        assert isinstance(refusal, Refusal) and refusal.code == "BUDGET"
    assert not clock


def test_a_method_that_does_not_apply_says_so(clock: list[int]) -> None:
    method = Nystrom(2000)
    refusal = price_methods(CASE, [method], effort="quick")[method]
    assert isinstance(refusal, Refusal) and refusal.code == "SIZE" and not clock


def test_a_real_clock_gives_a_price() -> None:
    method = WindowSinks(32, 0)
    found = price_methods(CASE, [method], effort="quick")[method]
    if isinstance(found, HeadPrice):
        assert found.method_ms > 0 and found.exact_ms > 0 and found.least <= 1024
    else:
        assert found.code == "NOT_FASTER"

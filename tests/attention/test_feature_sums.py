"""Sums over a polynomial of scores: their value, their gradients, and what these keep."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from structc.attention import Polynomial
from structc.attention.feature_sums import Rule, feature_sums, monomials
from structc.numerics import relative_error

DECAY = (0.02, 0.7)
FORMS = ("whole", "causal", "decayed")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tests reach several chunks, and several groups and slabs of them."""
    monkeypatch.setattr("structc.attention.feature_sums.CHUNK", 4)
    monkeypatch.setattr("structc.attention.feature_sums.SLAB", 400)


def inputs(n: int, m: int, d: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((n, d), (m, d), (m, 3))
    q, k, x = (torch.randn(1, 2, *s, dtype=torch.float64).requires_grad_() for s in sizes)
    return q, k, x


def weighed(rule: Rule, dims: int) -> Tensor:
    chosen, counts = monomials(dims, rule.degree)
    found = [rule.a[len(c)] * count for c, count in zip(chosen, counts, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def made(form: str, degree: int, dims: int = 2) -> tuple[Rule, Tensor, Tensor | None]:
    rule = Rule((0.9, 1.1, 0.6, 0.3)[: degree + 1], form != "whole")
    decay = torch.tensor(DECAY, dtype=torch.float64) if form == "decayed" else None
    return rule, weighed(rule, dims), decay


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("degree", [1, 2, 3])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (13, 13), (16, 16), (9, 17), (17, 9), (0, 3), (3, 0)])
def test_sums_and_gradients_are_those_of_the_matrix(form: str, degree: int, n: int, m: int) -> None:
    q, k, x = inputs(n, m)
    rule, weights, decay = made(form, degree)
    pairs = rule.f(q @ k.mT)
    lag = torch.arange(n)[:, None] - torch.arange(m)
    if rule.causal:
        pairs = pairs * (lag >= 0)
    if decay is not None:
        pairs = pairs * (-decay[:, None, None] * lag.clamp(min=0)).exp()
    got, want = feature_sums(q, k, x, rule, weights, decay), pairs @ x
    assert got.shape == want.shape and torch.allclose(got, want, rtol=1e-10, atol=1e-10)
    along = torch.randn_like(want)
    grads = [torch.autograd.grad(y, (q, k, x), along) for y in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("degree", [1, 2, 3])
def test_gradients_of_gradients(form: str, degree: int) -> None:
    q, k, x = inputs(6, 5)
    rule, weights, decay = made(form, degree)
    dropped = weights * (torch.arange(len(weights)) % 3 != 1)

    def sums(*args: Tensor) -> Tensor:
        return feature_sums(*args, rule, dropped if form == "whole" else weights, decay)

    assert torch.autograd.gradcheck(sums, (q, k, x))
    assert torch.autograd.gradgradcheck(sums, (q, k, x), atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_with_dropped_features(causal: bool) -> None:
    method = Polynomial(2, 1.0, causal, scale=0.3, dropout=0.5)
    q, k, v = inputs(9, 9)

    def seeded(*args: Tensor) -> Tensor:
        torch.manual_seed(5)
        return method(*args)

    assert torch.autograd.gradcheck(seeded, (q, k, v), atol=1e-4)
    assert relative_error(seeded(q, k, v), Polynomial(2, 1.0, causal, scale=0.3)(q, k, v)) > 1e-3


@pytest.mark.parametrize("alone", [(0,), (1,), (2,), (0, 2)])
def test_some_inputs_alone_want_gradients(alone: tuple[int, ...]) -> None:
    args = [t.detach().requires_grad_(i in alone) for i, t in enumerate(inputs(9, 9))]
    rule, weights, _ = made("causal", 2)
    asked = [args[i] for i in alone]
    y = feature_sums(*args, rule, weights)
    first = torch.autograd.grad(y.square().sum(), asked, create_graph=True)
    plain = torch.autograd.grad(
        (rule.f(args[0] @ args[1].mT).tril() @ args[2]).square().sum(), asked
    )
    for a, b in zip(first, plain, strict=True):
        assert torch.allclose(a, b)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), asked)
    assert all(t.isfinite().all() for t in second)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_keep_no_features(form: str) -> None:
    """What lives from forward to backward is q, k and x, whatever the number of features."""
    for n, d in itertools.product((64, 256), (2, 8)):
        q, k, x = inputs(n, n, d)
        rule, weights, decay = made(form, 3, d)
        kept = Kept()
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
            feature_sums(q, k, x, rule, weights, decay)
        few = q.numel() + k.numel() + x.numel() + len(weights) + len(DECAY)
        assert 0 < kept.numbers <= few < q.shape[1] * n * math.comb(d + 3, 3)


class Kept:
    """Counts what autograd saves."""

    numbers = 0

    def pack(self, t: Tensor) -> Tensor:
        self.numbers += t.numel()
        return t

"""Polynomial attention with a weight a lag and with rotations, against matrices written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from structc.attention import Polynomial, ToeplitzPolynomial, exact
from structc.attention.toeplitz_polynomial import rope_terms
from structc.errors import ConfigError
from structc.numerics import relative_error

TURNS = (0.9, 0.05)


def qkv(n: int, m: int, d: int = 5, **to: Any) -> tuple[Tensor, Tensor, Tensor]:
    to = {"dtype": torch.float64, **to}
    q, k, v = (torch.randn(2, 3, *s, **to) for s in ((n, d), (m, d), (m, 4)))
    return 0.3 * q, k, v


def turned(x: Tensor, turns: tuple[float, ...]) -> Tensor:
    """Pair by pair and token by token, as complex numbers."""
    x, r = x.clone(), len(turns)
    for p, turn in enumerate(turns):
        pair = torch.complex(x[..., p].clone(), x[..., p + r].clone())
        pair = pair * torch.polar(torch.ones(1).double(), turn * torch.arange(x.shape[-2]).double())
        x[..., p], x[..., p + r] = pair.real, pair.imag
    return x


def written_out(method: ToeplitzPolynomial, t: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = method.sigma(q) * turned(q, method.frequencies) @ turned(k, method.frequencies).mT
    coefficients = Polynomial(method.degree, method.bound).coefficients()
    pairs = (t - t.amax(-1, keepdim=True)).exp() * sum(c * s**p for p, c in enumerate(coefficients))
    pairs = pairs.tril() if method.is_causal else pairs
    return pairs / pairs.sum(-1, keepdim=True) @ v


def lag(n: int, m: int) -> Tensor:
    return torch.arange(n)[:, None] - torch.arange(m)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (300, 300), (29, 150), (150, 29)])
def test_slopes_a_head(causal: bool, n: int, m: int) -> None:
    """Over several chunks; queries past the last key have all their weights faint."""
    q, k, v = qkv(n, m)
    slopes = (0.0, 0.1, 9.0)
    method = ToeplitzPolynomial(2, 1.0, causal, slopes)
    t = -torch.tensor(slopes, dtype=torch.float64)[:, None, None] * lag(n, m).abs()
    want = written_out(method, t, q, k, v)
    assert relative_error(method(q, k, v), want) < 1e-11
    assert relative_error(method.matrix(q, k) @ v, want) < 1e-11


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("turns", [(), TURNS])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (31, 31), (20, 33), (33, 20)])
def test_lags_a_head(causal: bool, turns: tuple[float, ...], n: int, m: int) -> None:
    """A table that is shorter than the lags there are, so that its ends go on."""
    q, k, v = qkv(n, m)
    table = torch.randn(3, 15).double()
    rows = tuple(map(tuple, table.tolist()))
    method = ToeplitzPolynomial(2, 1.0, causal, lags=rows, frequencies=turns)
    t = table[:, lag(n, m).clamp(-7, 7) + 7]
    assert relative_error(method(q, k, v), written_out(method, t, q, k, v)) < 1e-11
    assert relative_error(method.matrix(q, k) @ v, method(q, k, v)) < 1e-11


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("turns", [(0.4,), TURNS])
def test_rotations_by_fft(degree: int, causal: bool, turns: tuple[float, ...]) -> None:
    """Plain q and k with frequencies give what rotated ones give to a polynomial."""
    q, k, v = qkv(61, 61)
    method = ToeplitzPolynomial(degree, 1.0, causal, frequencies=turns)
    got = method(q, k, v)
    assert relative_error(got, written_out(method, torch.zeros(61, 61), q, k, v)) < 1e-12
    want = Polynomial(degree, 1.0, causal)(turned(q, turns), turned(k, turns), v)
    assert relative_error(got, want) < 1e-12
    assert relative_error(got, Polynomial(degree, 1.0, causal)(q, k, v)) > 1e-3
    narrow = method(*(t.float() for t in (q, k, v)))
    assert relative_error(narrow, want) < 1e-5


@pytest.mark.parametrize("power", [1, 2])
def test_powers_of_rotated_scores_are_terms(power: int) -> None:
    """Each term, and each product of two, is diag Toeplitz diag."""
    q, k, _ = qkv(9, 6)
    u, w, turns = rope_terms(q, k, TURNS)
    assert u.shape[-1] == w.shape[-1] == turns.shape[-1] == 5 + 2 * len(TURNS)
    around = turns[lag(9, 6) + 5]
    terms = [u[..., r, None] * around[..., r] * w[..., None, :, r] for r in range(u.shape[-1])]
    total = sum(terms) if power == 1 else sum(a * b for a in terms for b in terms)
    assert relative_error(total, (turned(q, TURNS) @ turned(k, TURNS).mT) ** power) < 1e-12


def test_slopes_are_lags() -> None:
    """A state that decays, and convolutions: the same; far tokens in float32 too."""
    q, k, v = qkv(900, 900, dtype=torch.float32)
    table = tuple(-0.01 * abs(at) for at in range(-899, 900))
    by_state = ToeplitzPolynomial(1, slopes=(0.01,))(q, k, v)
    by_lags = ToeplitzPolynomial(1, lags=(table,))(q, k, v)
    assert relative_error(by_state, by_lags) < 1e-4
    bias = torch.tensor(table)
    assert relative_error(by_state, exact(q, k, v, bias=bias)) < 0.1
    turning = ToeplitzPolynomial(1, slopes=(0.01,), frequencies=(0.3,))
    both = turning(q, k, v)
    assert relative_error(both, turning.matrix(q.double(), k.double()) @ v.double()) < 1e-4


@pytest.mark.parametrize(
    "method",
    [ToeplitzPolynomial(2, slopes=(0.1, 0.2, 3.0)),
     ToeplitzPolynomial(2, is_causal=True, lags=((0.1, 0.2, -0.3),), frequencies=(0.5,))],
)  # fmt: skip
def test_gradients_of_gradients(
    method: ToeplitzPolynomial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("structc.attention.feature_sums.CHUNK", 2)
    monkeypatch.setattr("structc.attention.toeplitz_polynomial.SLAB", 100)
    q, k, v = (t[:1, :, :, :2].requires_grad_() for t in qkv(4, 5))
    if len(method.slopes) != 3:
        q, k, v = (t[:, :1] for t in (q, k, v))
    assert torch.autograd.gradcheck(method, (q, k, v), atol=1e-4)
    assert torch.autograd.gradgradcheck(method, (q, k, v), atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"slopes": (-0.1,)}, {"slopes": (math.nan,)}, {"slopes": (0.1,), "lags": ((0.0,),)},
     {"lags": ((0.0, 1.0),)}, {"lags": ((0.0,), (1.0, 2.0, 3.0))}, {"lags": ((-math.inf,),)},
     {"frequencies": (math.inf,)}, {"degree": 5}, {"bound": 0.0}],
)  # fmt: skip
def test_mistakes_are_told(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ToeplitzPolynomial(**{"degree": 2, **options})


def test_what_does_not_fit_the_input_is_told() -> None:
    q, k, v = qkv(6, 6)
    with pytest.raises(ConfigError, match="2 heads, q has 3"):
        ToeplitzPolynomial(2, slopes=(0.1, 0.2))(q, k, v)
    with pytest.raises(ConfigError, match="3 frequencies turn twice as many features, q has 5"):
        ToeplitzPolynomial(2, frequencies=(0.1, 0.2, 0.3))(q, k, v)

"""Circulant, Toeplitz, Hankel and displacement rank: optima against plain least squares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from structc.families import Circulant, Displacement, Hankel, Toeplitz
from structc.families.displacement import (
    _best_g,
    _best_h,
    _squared,
    _truncated,
    displaced,
    sum_of,
)
from structc.families.toeplitz import spread
from structc.records import Refusal


def gram_of(n: int) -> Tensor:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(5 * n, n, generator=g, dtype=torch.float64) ** 3
    return x.T @ x / len(x)


def least_squares(weight: Tensor, gram: Tensor, patterns: list[Tensor]) -> Tensor:
    """The combination of patterns of least output error, by its normal equations in full."""
    normal = torch.stack(
        [torch.stack([((p @ gram) * q).sum() for q in patterns]) for p in patterns]
    )
    wanted = torch.stack([((weight @ gram) * p).sum() for p in patterns])
    return torch.linalg.solve(normal, wanted)


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6), (1, 4), (4, 1), (1, 1)])
def test_toeplitz_and_hankel_fits_are_optimal(shape: tuple[int, int]) -> None:
    m, n = shape
    weight, gram = torch.randn(m, n, dtype=torch.float64), gram_of(n)
    units = torch.eye(m + n - 1, dtype=torch.float64)
    made = Toeplitz.fit(weight, gram)
    assert isinstance(made, Toeplitz)
    want = least_squares(weight, gram, [spread(u, n) for u in units])
    assert torch.allclose(made.taps, want, atol=1e-9)
    turned = Hankel.fit(weight, gram)
    assert isinstance(turned, Hankel)
    want = least_squares(weight, gram, [spread(u, n).flip(1) for u in units])
    assert torch.allclose(turned.taps, want, atol=1e-9)


def test_circulant_fits_are_optimal() -> None:
    n = 9
    weight, gram = torch.randn(n, n, dtype=torch.float64), gram_of(n)
    eye = torch.eye(n, dtype=torch.float64)
    made = Circulant.fit(weight, gram)
    assert isinstance(made, Circulant)
    want = least_squares(weight, gram, [eye.roll(s, 0) for s in range(n)])
    assert torch.allclose(made.taps, want, atol=1e-9)


def test_displacement_ranks_are_those_of_the_literature() -> None:
    n = 32
    g = torch.Generator().manual_seed(0)
    one, two = (
        spread(torch.randn(2 * n - 1, generator=g, dtype=torch.float64), n) for _ in range(2)
    )
    noise = torch.randn(n, n, generator=g, dtype=torch.float64)
    for matrix, rank in ((one, 2), (torch.linalg.inv(one), 2), (one @ two, 4), (noise, n)):
        assert int(torch.linalg.matrix_rank(displaced(matrix), rtol=1e-9)) == rank
    made = Displacement.fit(one @ two, rank=4)
    assert isinstance(made, Displacement) and made.fit_error < 1e-11
    square = Displacement.fit(torch.randn(4, 5), rank=1)
    assert isinstance(square, Refusal) and square.code == "SQUARE"


def test_half_steps_are_exact() -> None:
    """No gradient is left where each of them ends, and the error never rises."""
    n, weight = 24, torch.randn(24, 24, dtype=torch.float64)
    start = _truncated(weight, 3)
    for gram in (None, gram_of(n)):
        metric = torch.eye(n, dtype=torch.float64) if gram is None else gram

        def loss(g: Tensor, h: Tensor, metric: Tensor = metric) -> Tensor:
            gap = weight - sum_of(g, h)
            return ((gap @ metric) * gap).sum()

        g = _best_g(weight, gram, start[1]).requires_grad_()
        (slope,) = torch.autograd.grad(loss(g, start[1]), g)
        assert float(slope.abs().max()) < 1e-8 * float(metric.trace())
        assert _squared(weight, gram, (g.detach(), start[1])) <= _squared(weight, gram, start)
    h = _best_h(weight, start[0]).requires_grad_()
    gap = weight - sum_of(start[0], h)
    (slope,) = torch.autograd.grad((gap * gap).sum(), h)
    assert float(slope.abs().max()) < 1e-9


def test_data_lower_the_error_of_displacement_fits() -> None:
    weight, gram = torch.randn(40, 40, dtype=torch.float64), gram_of(40)
    plain, aware = Displacement.fit(weight, rank=3), Displacement.fit(weight, gram, rank=3)
    assert isinstance(plain, Displacement) and isinstance(aware, Displacement)
    assert aware.fit_error < plain.error(weight, gram)

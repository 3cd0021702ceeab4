"""Polynomial attention's kernels, under the interpreter against the plain forms in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from unwritten import nothing_written

from structc.attention import Polynomial, SparseLowRank, ToeplitzPolynomial
from structc.attention import kernels as lookup
from structc.attention.base import AbstractMethod
from structc.codegen.triton import attempt, method_kernel, polynomial, sparse_polynomial
from structc.codegen.triton.polynomial_source import SOURCE
from structc.numerics import relative_error

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
Sizes = tuple[int, int, int, int]


def inputs(sizes: Sizes, dtype: torch.dtype, loud: float = 0.3) -> list[Tensor]:
    """Queries, keys, features and numbers of a value; heads lie beside each other in memory."""
    n, m, d, e = sizes
    q, k = (loud * torch.randn(1, t, 2, d) for t in (n, m))
    return [t.transpose(1, 2).to(dtype) for t in (q, k, torch.randn(1, m, 2, e))]


def plainly(method: AbstractMethod, *given: Tensor) -> Tensor:
    """Without kernels, in float64."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(lookup.BACKENDS, "cpu")
        return method(*given)


def check(method: AbstractMethod, given: list[Tensor], gradients: bool) -> None:
    """Output and gradients; whatever is not written stays NaN."""
    dtype = given[0].dtype
    leaves = [t.clone().requires_grad_(gradients) for t in given]
    wide = [t.double().requires_grad_(gradients) for t in given]
    with pytest.MonkeyPatch.context() as patch:
        nothing_written(patch)
        o = method(*leaves)
        slope = torch.randn_like(o)
        if gradients:
            o.backward(slope)
    want = plainly(method, *wide)
    assert not attempt.failures() and bool(method_kernel._tried) and o.dtype == dtype
    assert relative_error(o.detach(), want.detach()) <= TOLERANCE[dtype]
    if gradients:
        want.backward(slope.double())
        for a, b in zip(leaves, wide, strict=True):
            assert a.grad is not None and a.grad.dtype == dtype and b.grad is not None
            off = (a.grad.double() - b.grad).norm()
            assert off <= TOLERANCE[dtype] * b.grad.norm() + 1e-7


SHAPES = [
    ((1, 1, 1, 1), 1, True),
    ((37, 37, 5, 7), 2, True),
    ((37, 50, 17, 16), 2, False),
    ((300, 140, 3, 5), 2, True),
    ((150, 270, 3, 8), 3, True),
    ((20, 30, 3, 20), 4, False),
]


@pytest.mark.parametrize(("sizes", "degree", "causal"), SHAPES)
def test_polynomial(sizes: Sizes, degree: int, causal: bool, backend: Any) -> None:
    check(Polynomial(degree, is_causal=causal), inputs(sizes, torch.float32), gradients=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_half(dtype: torch.dtype, causal: bool, backend: Any) -> None:
    given = inputs((140, 140, 4, 8), dtype)
    check(Polynomial(2, is_causal=causal, scale=0.5), given, gradients=True)


def test_fastmax(backend: Any) -> None:
    """Means and norms are PyTorch's, gradients go through them."""
    method = Polynomial(2, taylor=True, normalize=True)
    check(method, inputs((33, 33, 4, 8), torch.float32, loud=3.0), gradients=True)


@pytest.mark.parametrize("slopes", [(0.1, 0.02), ()])
def test_states_that_decay(slopes: tuple[float, ...], backend: Any) -> None:
    method = ToeplitzPolynomial(2, slopes=slopes, is_causal=True)
    check(method, inputs((200, 270, 3, 5), torch.float32), gradients=True)


@pytest.mark.parametrize(
    ("sizes", "window", "sinks", "causal"),
    [
        ((37, 37, 5, 7), 4, 2, True),
        ((300, 420, 3, 8), 20, 150, False),
        ((420, 300, 3, 8), 20, 3, False),
        ((420, 300, 3, 8), 30, 0, True),
        ((280, 280, 3, 8), 140, 1, True),
        ((300, 100, 3, 8), 1, 200, True),  # more sinks than keys
    ],
)
def test_window_and_polynomial(
    sizes: Sizes, window: int, sinks: int, causal: bool, backend: Any, ran: Any
) -> None:
    method = SparseLowRank(window, sinks, is_causal=causal)
    check(method, inputs(sizes, torch.float32, loud=0.8), gradients=False)
    assert ran("sparse_polynomial")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_window_and_polynomial_in_half(dtype: torch.dtype, backend: Any) -> None:
    check(SparseLowRank(20, 2), inputs((300, 300, 3, 8), dtype), gradients=False)


def test_faint_windows(backend: Any) -> None:
    """Rows whose keys are all exact, with scores far below 0, need no polynomial."""
    q, k, v = inputs((30, 30, 4, 5), torch.float32)
    q, k = q + 8, k - 8
    found = SparseLowRank(40, is_causal=True)(q, k, v)
    exact = plainly(SparseLowRank(40, is_causal=True), q.double(), k.double(), v.double())
    assert relative_error(found, exact) <= 1e-5


def test_a_gradient_of_the_gradient(backend: Any) -> None:
    q, k, v = inputs((9, 9, 3, 4), torch.float64)
    q, k, v = (t[:, :, :, :2].requires_grad_() for t in (q, k, v))
    method = Polynomial(2, is_causal=True)
    single = [t.detach().float().requires_grad_() for t in (q, k, v)]
    (slope,) = torch.autograd.grad(method(*single).square().sum(), single[:1], create_graph=True)
    slope.square().sum().backward()
    (want,) = torch.autograd.grad(plainly(method, q, k, v).square().sum(), [q], create_graph=True)
    want.square().sum().backward()
    assert k.grad is not None and relative_error(single[1].grad, k.grad) <= 1e-5


def test_where_the_plain_form_runs(backend: Any, ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polynomial, "WIDEST", 3)
    given = inputs((20, 20, 4, 4), torch.float32)
    leaves = [t.clone().requires_grad_() for t in given]
    o = Polynomial(2)(*leaves)
    o.sum().backward()
    assert not ran("") and leaves[0].grad is not None
    torch.testing.assert_close(o, plainly(Polynomial(2), *given))
    near = SparseLowRank(3)(*given)
    torch.testing.assert_close(near, plainly(SparseLowRank(3), *given))
    monkeypatch.setattr(polynomial, "WIDEST", 128)
    SparseLowRank(3)(*leaves).sum().backward()  # there is no kernel for its gradient
    assert not ran("sparse_polynomial")


def test_what_is_not_served_is_as_exact_as_without_kernels(
    backend: Any, ran: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polynomial, "WIDEST", 3)
    given = inputs((20, 20, 4, 4), torch.bfloat16)
    for method in (Polynomial(2), SparseLowRank(3), ToeplitzPolynomial(2)):
        assert torch.equal(method(*given), plainly(method, *given))
    assert not ran("")


def test_no_room_for_states(backend: Any, ran: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan holds one state, the kernel one a chunk."""
    make = torch.empty

    def full(*sizes: Any, **more: Any) -> Tensor:
        if len(sizes) == 5:
            raise torch.OutOfMemoryError("full")
        return make(*sizes, **more)

    given = inputs((300, 300, 3, 5), torch.float32)
    monkeypatch.setattr(torch, "empty", full)
    found = Polynomial(2, is_causal=True)(*given)
    assert not ran("polynomial")
    torch.testing.assert_close(found, plainly(Polynomial(2, is_causal=True), *given))


def test_dropout_is_for_the_scan(backend: Any, ran: Any) -> None:
    given = [t.requires_grad_() for t in inputs((20, 20, 4, 4), torch.float32)]
    Polynomial(2, dropout=0.5)(*given).sum().backward()
    assert not ran("") and all(t.grad is not None for t in given)


@pytest.mark.slow
@pytest.mark.parametrize("config", polynomial.CONFIGS)
def test_every_config(config: Any, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in (
        (polynomial, ("STATES", "WHOLE_STATES", "OUTPUTS", "QUERIES", "KEYS")),
        (sparse_polynomial, ("KERNEL",)),
    ):
        for name in names:
            kernel = getattr(module, name)
            monkeypatch.setattr(module, name, replace(kernel, configs=(config,)))
    given = inputs((140, 140, 3, 5), torch.float32)
    check(Polynomial(2, is_causal=True), given, gradients=True)
    check(SparseLowRank(10), given, gradients=False)


def test_sources(golden) -> None:  # type: ignore[no-untyped-def]
    golden("triton/polynomial.txt", SOURCE)
    golden("triton/sparse-polynomial.txt", sparse_polynomial.SOURCE[len(SOURCE) :].lstrip())

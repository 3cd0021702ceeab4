"""Softmax attention on Triton kernels, forward and gradients, under the interpreter in float64's
company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structc import attend
from structc.attention import exact
from structc.codegen.triton import attempt, attention, device
from structc.codegen.triton.attention import KERNELS, configs
from structc.codegen.triton.attention_table import CASES, work
from structc.codegen.triton.config import Config
from structc.codegen.triton.softmax import Shape, emit
from structc.codegen.triton.targets import TARGETS, target_of
from structc.numerics import relative_error
from structc.records import Refusal
from structc.softmax import NOTHING, Extras, Softmax, softmax_backward, softmax_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
FORMS = {
    "plain": Softmax(0.3),
    "causal": Softmax(0.3, causal=True, offset=8),
    "causal, keys ahead": Softmax(0.3, causal=True, offset=-9),
    "window": Softmax(0.3, window=5, offset=2),
    "window, sinks": Softmax(0.3, causal=True, offset=8, window=5, sinks=3),
    "window, sinks ahead": Softmax(0.3, window=4, sinks=30, offset=-3),
    "softcap": Softmax(0.3, softcap=2.0),
}
N, M, H, G, D, E = 37, 45, 4, 2, 20, 24


def extras_of(name: str) -> tuple[Softmax, Extras]:
    if name == "bias":
        return Softmax(0.3), Extras(bias=torch.randn(1, H, N, M))
    if name == "mask":
        return Softmax(0.3), Extras(bias=torch.rand(2, 1, N, M) > 0.5)
    if name == "padding, row bias":
        keys = torch.arange(M)[None] < torch.tensor([[M], [9]])
        return Softmax(0.3), Extras(bias=torch.randn(1, 1, 1, M), keys=keys)
    if name == "lags, sink":
        lags = torch.randn(H, N + M - 1)
        return Softmax(0.3, causal=True), Extras(lags=lags, sink=torch.randn(H))
    blocks = torch.rand(2, 1, 5, 3) > 0.6
    return Softmax(0.3, block_q=8, block_k=16), Extras(blocks=blocks)


EXTRAS = ("bias", "mask", "padding, row bias", "lags, sink", "blocks")


def sides(dtype: torch.dtype, n: int = N, m: int = M) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(2, H, n, D), torch.randn(2, G, m, D), torch.randn(2, G, m, E)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def kernel_of(dtype: torch.dtype) -> attention.AttentionKernel:
    made = attention.make(dtype)
    assert not isinstance(made, Refusal), made
    return made


@pytest.fixture(autouse=True)
def nothing_is_left_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN: what a kernel does not write is seen."""
    empty = Tensor.new_empty

    def filled(self: Tensor, *sizes: Any, **more: Any) -> Tensor:
        made = empty(self, *sizes, **more)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", filled)
    monkeypatch.setattr(attempt, "_failures", [])


def wide(extras: Extras) -> Extras:
    given = (t.double() if t is not None and t.is_floating_point() else t for t in extras)
    return Extras(*given)


def agree(q: Tensor, k: Tensor, v: Tensor, form: Softmax, extras: Extras = NOTHING) -> None:
    """Output, row sums and gradients against float64."""
    kernel, tolerance = kernel_of(q.dtype), TOLERANCE[q.dtype]
    found = kernel(q, k, v, form, extras)
    assert found is not None and not attempt.failures()
    o, lse = found
    sources = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want, sums = softmax_reference(sources[0], sources[1], sources[2], form, wide(extras))
    assert o.shape == want.shape and o.dtype == q.dtype and lse.dtype == torch.float32
    assert relative_error(o, want) <= tolerance
    seen = sums > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    torch.testing.assert_close(
        lse[seen].double(), sums[seen].detach(), rtol=tolerance, atol=10 * tolerance
    )
    slope, push = torch.randn(o.shape).to(q.dtype), torch.randn(lse.shape).masked_fill(~seen, 0)
    grads = kernel.backward(q, k, v, form, extras, o, lse, slope, push)
    assert grads is not None and not attempt.failures()
    total = (want * slope).sum() + (sums.masked_fill(~seen, 0) * push).sum()
    for got, right in zip(grads, torch.autograd.grad(total, sources), strict=True):
        assert got.shape == right.shape and got.dtype == q.dtype
        assert relative_error(got, right) <= 3 * tolerance


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str, dtype: torch.dtype) -> None:
    agree(*sides(dtype), FORMS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EXTRAS)
def test_extras(name: str, dtype: torch.dtype) -> None:
    agree(*sides(dtype), *extras_of(name))


@pytest.mark.parametrize("name", ["causal", "window, sinks", "softcap", *EXTRAS])
def test_slabs_of_long_heads(name: str) -> None:
    """In float32 the gradient takes heads of more than 64 numbers in slabs."""
    form, extras = extras_of(name) if name in EXTRAS else (FORMS[name], NOTHING)
    d, e = 70, 129
    q, k, v = torch.randn(2, H, N, d), torch.randn(2, G, M, d), torch.randn(2, G, M, e)
    shape = Shape.of(form, d, e, extras, torch.float32)
    assert [len(cuts) for cuts in shape.cuts] == [4, 8] and "again" in emit(shape)
    agree(q / d**0.5, k, v, form, extras)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 36), st.booleans(), st.integers(-20, 20),
    st.integers(0, 30), st.integers(0, 12),
)  # fmt: skip
def test_rules(n: int, m: int, causal: bool, offset: int, window: int, sinks: int) -> None:
    form = Softmax(0.5, causal=causal, offset=offset, window=window, sinks=sinks if window else 0)
    agree(*sides(torch.float32, n, m), form)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_config(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = sides(torch.float32, 40, 40)
    for config in KERNELS[kernel]:
        monkeypatch.setattr(
            attention, "KERNELS", {**{n: c[-2:] for n, c in KERNELS.items()}, kernel: (config,)}
        )
        attention.source_of.cache_clear()
        agree(q, k, v, FORMS["window, sinks"])
    attention.source_of.cache_clear()


def test_values_of_hidden_keys_may_be_nan() -> None:
    q, k, v = sides(torch.float32)
    keys = torch.arange(M)[None] < torch.tensor([[M], [9]])
    k[1, :, 9:] = v[1, :, 9:] = torch.nan
    found = kernel_of(torch.float32)(q, k, v, Softmax(0.3), Extras(keys=keys))
    assert found is not None and bool(found[0].isfinite().all())
    k, v = k.nan_to_num(0.0), v.nan_to_num(0.0)
    agree(q, k, v, Softmax(0.3), Extras(keys=keys))


def test_strides_are_taken_as_they_are() -> None:
    q, k, v = sides(torch.float32)
    packed = torch.cat([t.transpose(1, 2).flatten(2) for t in (k, v)], -1)  # one tensor of both
    k2, v2 = packed.split([G * D, G * E], -1)
    other = [k2.unflatten(2, (G, D)).transpose(1, 2), v2.unflatten(2, (G, E)).transpose(1, 2)]
    kernel, turned = kernel_of(torch.float32), q.mT.contiguous().mT
    a = kernel(q, k, v, FORMS["causal"], NOTHING)
    b = kernel(turned, other[0], other[1], FORMS["causal"], NOTHING)
    assert a is not None and b is not None and torch.equal(a[0], b[0])


# ---------------------------------------------------------------------------- the operator


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU's operator looks for Triton's kernels."""
    monkeypatch.setitem(attend.BACKENDS, "cpu", attention.__name__)
    attend.forget()
    yield
    attend.forget()


def test_the_operator_runs_on_triton(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    run = attention.Source.run

    def seen(self: Any, kernel: str, *rest: Any) -> bool:
        calls.append(kernel)
        return run(self, kernel, *rest)

    monkeypatch.setattr(attention.Source, "run", seen)
    q, k, v = (t.requires_grad_() for t in sides(torch.float32))
    o = exact(q, k, v, is_causal=True, enable_gqa=True)
    grads = torch.autograd.grad(o.square().sum(), (q, k, v), create_graph=False)
    assert calls == ["forward", "queries", "keys"]
    copies = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = softmax_reference(*copies, Softmax(D**-0.5, causal=True), NOTHING)[0]
    for got, right in zip(grads, torch.autograd.grad(want.square().sum(), copies), strict=True):
        assert relative_error(got, right) <= 1e-5


def test_opcheck(backend: Any) -> None:
    q, k, v = (t.requires_grad_() for t in sides(torch.float32, 9, 11))
    form = str(Softmax(0.3, causal=True, offset=2))
    torch.library.opcheck(
        torch.ops.structc.attention.default, (q, k, v, None, None, None, None, None, form)
    )


def test_a_gradient_of_the_gradient_is_the_references(backend: Any) -> None:
    q, k, v = (t[:, :, :5].requires_grad_() for t in sides(torch.float32))
    o = exact(q, k, v, enable_gqa=True)
    (first,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), q)
    wide_q, wide_k, wide_v = (t.detach().double().requires_grad_() for t in (q, k, v))
    want = softmax_reference(wide_q, wide_k, wide_v, Softmax(D**-0.5), NOTHING)[0]
    (one,) = torch.autograd.grad(want.square().sum(), wide_q, create_graph=True)
    (two,) = torch.autograd.grad(one.square().sum(), wide_q)
    assert relative_error(second, two) <= 1e-4


def test_empty_inputs(backend: Any) -> None:
    for n, m in ((0, 5), (5, 0)):
        q, k, v = sides(torch.float32, n, m)
        o, lse = exact(q, k, v, enable_gqa=True, return_lse=True)
        assert o.shape == (2, H, n, E) and bool((o == 0).all()) and bool((lse < 0).all())


def test_the_reference_is_the_last_way(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention.source_of.cache_clear()
    bad = Config(24, 32, 1, 4, 1)
    monkeypatch.setattr(attention, "configs", lambda *_: [bad])
    q, k, v = (t.requires_grad_() for t in sides(torch.float32))
    o = exact(q, k, v, enable_gqa=True)
    grads = torch.autograd.grad(o.square().sum(), (q, k, v))
    copies = [t.detach().requires_grad_() for t in (q, k, v)]
    want = softmax_reference(*copies, Softmax(D**-0.5), NOTHING)[0]
    assert torch.equal(o, want)
    for got, right in zip(grads, torch.autograd.grad(want.square().sum(), copies), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
    assert [f.what.split()[0] for f in attempt.failures()] == [
        "attention_forward", "attention_queries",
    ]  # fmt: skip
    attention.source_of.cache_clear()


@pytest.mark.parametrize("kernel", ["forward", "queries"])
def test_the_next_config(backend: Any, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "_failures", [])
    monkeypatch.setitem(attend.BACKENDS, "cpu", attention.__name__)
    attention.source_of.cache_clear()
    attend.forget()
    bad = Config(24, 32, 1, 4, 1)  # no power of two
    good = Config(16, 16, 1, 4, 1)
    monkeypatch.setattr(
        attention, "configs", lambda name, *_: [bad, good] if name == kernel else [good]
    )
    q, k, v = (t.requires_grad_() for t in sides(torch.float32))
    o = exact(q, k, v, enable_gqa=True)
    grads = torch.autograd.grad(o.sum(), (q, k, v))
    want = softmax_reference(*(t.detach() for t in (q, k, v)), Softmax(D**-0.5), NOTHING)[0]
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
    assert all(bool(g.isfinite().all()) for g in grads)
    (failure,) = attempt.failures()
    assert failure.way == str(bad) and f"attention_{kernel}" in failure.what
    attention.source_of.cache_clear()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = attention.make(torch.float64)
    assert isinstance(refusal, Refusal) and refusal.code == "DTYPE"
    monkeypatch.setattr(attention, "running", lambda: device.of_capability((7, 0)))
    refusal = attention.make(torch.float32)
    assert isinstance(refusal, Refusal) and "sm_70" in refusal.reason
    assert attention.kernel_of(torch.float32) is None
    monkeypatch.undo()
    q, k, v = (torch.randn(1, 1, 3, 300) for _ in range(3))
    assert kernel_of(torch.float32)(q, k, v, Softmax(0.1), NOTHING) is None  # heads too wide


# ---------------------------------------------------------------------------- data and model


@pytest.mark.parametrize("kernel", KERNELS)
def test_there_are_eight_configs(kernel: str) -> None:
    assert len(set(KERNELS[kernel])) == len(KERNELS[kernel]) >= 8


@pytest.mark.parametrize("target", TARGETS)
def test_default_configs_fit(target: str) -> None:
    for shape in CASES.values():
        for kernel in KERNELS:
            some = configs(kernel, shape, target_of(target), torch.bfloat16, 4096, 4096)
            assert some and len(set(some)) == len(some)
    few = configs("forward", next(iter(CASES.values())), target_of(target), torch.bfloat16, 1, 4096)
    assert few[0].bm == 16


def test_skipped_tiles_are_not_counted() -> None:
    config = Config(64, 64, 1, 4, 2)

    def flops(form: Softmax) -> int:
        return work("forward", Shape(form, 64, 64), config, 4096, 4096, 1, 2).flops

    full, causal = flops(Softmax(1.0)), flops(Softmax(1.0, causal=True))
    window = flops(Softmax(1.0, causal=True, window=256, sinks=4))
    assert full == 4 * 4096**2 * 64
    assert 0.5 < causal / full < 0.52 and window / full < 0.1


@pytest.mark.parametrize(
    "name", ["causal, heads of 64", "window 256, sinks, 64", "Toeplitz bias, padding, 64"]
)
def test_golden_sources(name: str, golden) -> None:  # type: ignore[no-untyped-def]
    text = emit(CASES[name])
    assert softmax_backward.__name__ not in text
    golden(f"triton/attention-{name.split(',')[0].replace(' ', '-')}.txt", text)

"""Kernels of attention methods, under the interpreter against their plain forms in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from unwritten import nothing_written

from structc.attention import METHODS, ConvBasis, Monarch, Polynomial, SparseLowRank, TiledMonarch
from structc.attention import kernels as lookup
from structc.attention.conv_basis import Basis
from structc.attention.monarch import Parts, alternate
from structc.codegen.triton import attempt, conv_basis, device, method_kernel, methods, monarch
from structc.numerics import relative_error

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def basis(n: int, segments: int, loud: float = 1.0) -> Basis:
    starts = torch.tensor([[0, n // 3, n], [0, n // 2, n - 1]])[:, :segments]
    return Basis(starts, loud * torch.randn(2, segments, n))


def test_every_method_has_a_kernel_or_a_reason() -> None:
    names = {m.name for m in METHODS}
    assert set(methods.KERNELS) | set(methods.OTHERS) == names
    assert not set(methods.KERNELS) & set(methods.OTHERS)
    assert all(len(reason) > 20 for reason in methods.OTHERS.values())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("n", "d", "segments"), [(1, 3, 1), (37, 20, 3), (130, 16, 2)])
def test_conv_basis(
    n: int, d: int, segments: int, dtype: torch.dtype, backend: Any, ran: Any
) -> None:
    found, method = basis(n, segments), ConvBasis(3)
    v = torch.randn(1, 2, n, d).to(dtype)
    o, lse = method.apply(found, v)
    assert not attempt.failures() and o.dtype == dtype and ran("conv_basis")
    scores = method.scores(Basis(found.starts, found.columns.double()), n)
    want = (scores.softmax(-1) @ v.double().flatten(0, 1)).unflatten(0, (1, 2))
    assert relative_error(o, want) <= TOLERANCE[dtype]
    assert relative_error(lse, scores.logsumexp(-1).unflatten(0, (1, 2))) <= 1e-5


def test_faint_rows_are_exact(backend: Any) -> None:
    """Weights far below the largest of their head, which an FFT in float32 loses."""
    found, method = basis(60, 2, loud=40.0), ConvBasis(2)
    v = torch.randn(1, 2, 60, 8)
    scores = method.scores(Basis(found.starts, found.columns.double()), 60)
    want = (scores.softmax(-1) @ v.double()[0])[None]
    assert relative_error(method.apply(found, v)[0], want) <= 1e-5


@pytest.mark.parametrize("config", conv_basis.KERNEL.configs)
def test_every_config(config: Any, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_basis, "KERNEL", replace(conv_basis.KERNEL, configs=(config,)))
    found, method, v = basis(37, 3), ConvBasis(3), torch.randn(1, 2, 37, 5)
    scores = method.scores(found, 37)
    torch.testing.assert_close(
        method.apply(found, v)[0][0], scores.softmax(-1) @ v[0], rtol=1e-4, atol=1e-5
    )
    assert not attempt.failures()


def test_where_the_plain_form_runs(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found, method = basis(20, 2), ConvBasis(2)
    v = torch.randn(1, 2, 20, 4)
    calls: list[int] = []
    monkeypatch.setattr(
        methods, "KERNELS", {"conv_basis": lambda *_: calls.append(1)}
    )  # gives None
    lookup._found.cache_clear()
    plain = method.apply(found, v)[0]
    assert calls == [1] and plain.shape == v.shape
    method.apply(found, v.requires_grad_())  # a gradient is wanted
    assert calls == [1]
    monkeypatch.setattr(methods, "running", lambda: device.of_capability((7, 0)))
    lookup._found.cache_clear()
    method.apply(found, v.detach())
    assert calls == [1]
    assert conv_basis.apply(found.starts, found.columns.double(), v.detach().double()) is None
    monkeypatch.setattr(conv_basis, "CHEAP", 0)  # an FFT costs nothing beside it
    assert conv_basis.apply(found.starts, found.columns, v.detach()) is None


def test_sources(golden) -> None:  # type: ignore[no-untyped-def]
    golden("triton/conv-basis.txt", conv_basis.SOURCE)
    golden("triton/monarch.txt", monarch.SOURCE)


MONARCHS = [
    (Monarch(5, 2), (37, 37, 6, 7)),
    (Monarch(4, 1), (30, 21, 16, 20)),
    (Monarch(8, 3), (64, 70, 5, 16)),
    (Monarch(6, 2, extra=1), (37, 37, 6, 7)),
    (TiledMonarch((6, 6), (2, 3), 2), (36, 36, 6, 7)),
]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("method", "sizes"), MONARCHS)
def test_monarch(
    method: Any,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    backend: Any,
    ran: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n, m, d, e = sizes
    q, k, v = (
        torch.randn(1, t, 2, w).transpose(1, 2).to(dtype) for t, w in ((n, d), (m, d), (m, e))
    )
    with monkeypatch.context() as patch:
        nothing_written(patch)
        o, lse = method.attend(q, k, v)
    assert not attempt.failures() and ran("monarch") and o.dtype == dtype
    monkeypatch.delitem(lookup.BACKENDS, "cpu")
    want, sums = method.attend(q.double(), k.double(), v.double())
    assert relative_error(o, want) <= 3 * TOLERANCE[dtype]
    assert relative_error(lse, sums) <= TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("config", monarch.CONFIGS)
def test_every_config_of_monarch(
    config: Any, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RIGHT", "MIDDLE", "LEFT"):
        kernel = getattr(monarch, name)
        monkeypatch.setattr(monarch, name, replace(kernel, configs=(config,)))
    q, k, v = torch.randn(3, 1, 2, 150, 5).unbind(0)
    found = Monarch(12, 2)(q, k, v)
    assert not attempt.failures()
    monkeypatch.delitem(lookup.BACKENDS, "cpu")
    torch.testing.assert_close(found, Monarch(12, 2)(q, k, v), rtol=1e-4, atol=1e-5)


def test_blocks_that_nobody_sees(backend: Any) -> None:
    """A block of hidden keys alone weighs nothing, as with the plain form."""
    q, k, v = torch.randn(3, 2, 4, 3, 5).unbind(0)
    shown = torch.ones(1, 4, 1, 3, dtype=torch.bool)
    shown[:, 2] = False
    left = torch.randn(2, 4, 4, 5)
    parts = Parts(q, k, v, left, shown)
    o, lse = alternate(parts, 1, 0.4)
    kept = [0, 1, 3]
    without = Parts(q, k[:, kept], v[:, kept], left[:, kept])
    want, sums = alternate(without, 1, 0.4)
    torch.testing.assert_close(o, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, sums, rtol=1e-4, atol=1e-5)


def test_monarch_of_more_blocks_than_a_tile(backend: Any, ran: Any) -> None:
    """Queries are averaged over tiles of blocks, each with the row sums of all."""
    q, k, v = torch.randn(3, 1, 1, 290, 3).unbind(0)
    found = Monarch(2, 2)(q, k, v)
    assert ran("monarch_middle") and not attempt.failures()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(lookup.BACKENDS, "cpu")
        torch.testing.assert_close(found, Monarch(2, 2)(q, k, v), rtol=1e-4, atol=1e-5)


def test_monarch_where_the_plain_form_runs(
    backend: Any, ran: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monarch, "WIDEST", 3)
    q, k, v = torch.randn(3, 1, 1, 30, 4).unbind(0)
    Monarch(5, 2)(q, k, v)
    assert not ran("monarch")
    monkeypatch.setattr(monarch, "WIDEST", 4)
    Monarch(5, 2)(q, k, v)
    assert ran("monarch")


def test_tracers_see_no_kernels(backend: Any, ran: Any) -> None:
    """What they record is ATen's, and nothing of theirs stays behind."""
    q, k, v = torch.randn(3, 1, 1, 12, 4).unbind(0)
    method = Polynomial(2, is_causal=True)
    graph = make_fx(method)(q, k, v)
    assert not ran("polynomial")
    torch.testing.assert_close(graph(q, k, v), method(q, k, v))
    assert ran("polynomial") and not attempt.failures()
    with FakeTensorMode() as mode:
        assert method(*(mode.from_tensor(t) for t in (q, k, v))).shape == v.shape
    assert not attempt.failures()


def test_ten_bits_where_pytorch_takes_them(backend: Any) -> None:
    """``torch.set_float32_matmul_precision`` is for methods too."""
    calls, given = [], torch.empty(3, 1, 2, 200, 16, device="meta").unbind(0)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            for method in (Monarch(10, 2), Polynomial(2), SparseLowRank(4)):
                kernel = methods.kernel_of(method.name)
                given_by = lookup.given_by(lambda _, kernel=kernel: kernel)
                with given_by, method_kernel.noted() as found:
                    method(*given)
                calls += [dict(c.key[2])["TF32"] for c in found]
    finally:
        torch.set_float32_matmul_precision(before)
    half = len(calls) // 2
    assert half >= 7 and not any(calls[:half]) and all(calls[half:])

"""Dense kernels: all agree with the reference wherever they exist."""

from __future__ import annotations

import pytest
import torch

from structc import ops, reference
from structc.codegen import bench, dense, lower
from structc.forms import ACTIVATIONS, PackedDense, Tile
from structc.numerics import relative_error
from structc.records import Refusal

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CONFIG = {"tile": {"tile": 32}, "aten": {}, "onednn": {}, "mkl": {}}


def problem(
    n: int, m: int, rows: int, dtype: torch.dtype, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    w = torch.randn(m, n, generator=g) / n**0.5
    w = w.t().contiguous() if transposed else w
    x, b = torch.randn(rows, n, generator=g), torch.randn(m, generator=g)
    return x.to(dtype), w.to(dtype), b.to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("act", ["", *ACTIVATIONS])
@pytest.mark.parametrize("kernel", dense.KERNELS)
def test_dense_kernel(kernel: str, act: str, transposed: bool) -> None:
    for n, m in ((64, 96), (37, 51), (1, 1), (130, 1)):
        form = PackedDense(n, m, act)
        made = dense.make(form, torch.float32, 17, kernel, CONFIG[kernel], transposed=transposed)
        if kernel == "mkl" and (transposed or not torch.backends.mkl.is_available()):
            assert isinstance(made, Refusal) and made.code == "UNAVAILABLE"
            continue
        assert not isinstance(made, Refusal), made.reason
        for rows in (1, 17, 100):
            x, w, b = problem(n, m, rows, torch.float32, transposed)
            for weights in ([w, b], [w]):
                wide = [t.double() for t in weights]
                bias = wide[1] if len(wide) > 1 else None
                expected = reference.dense_reference(x.double(), wide[0], bias, act, transposed)
                assert relative_error(made(x, weights), expected) < 1e-5, (n, m, rows)


@pytest.mark.parametrize("kernel", dense.KERNELS)
def test_the_default_dtype_is_the_callers_own(kernel: str) -> None:
    form, tensors = PackedDense(51, 37, "gelu"), problem(51, 37, 17, torch.float32, False)
    x, w, b = tensors
    dense._has_mkl.cache_clear()  # tried once, perhaps by whoever has other defaults
    dense._onednn_missing.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert dense._has_mkl() == torch.backends.mkl.is_available()
        made = dense.make(form, torch.float32, 17, kernel, CONFIG[kernel])
        if isinstance(made, Refusal):
            assert kernel == "mkl" and not dense._has_mkl()
            return
        for weights in ([w, b], [w]):
            y, wide = made(x, weights), [t.double() for t in weights]
            bias = wide[1] if len(wide) > 1 else None
            expected = reference.dense_reference(x.double(), wide[0], bias, "gelu")
            assert y.dtype == torch.float32 and relative_error(y, expected) < 1e-5
        found, call_ms = bench.Bench().check(
            bench.Job(str(form), 17, "float32", True, False, kernel, CONFIG[kernel])
        )
        assert found is None and call_ms > 0
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    form = PackedDense(64, 96, "gelu")
    x, w, b = problem(64, 96, 33, dtype, False)
    expected = reference.dense_reference(x.double(), w.double(), b.double(), "gelu")
    for kernel in ("aten", "onednn", "tile"):
        made = dense.make(form, dtype, 33, kernel, {})
        if isinstance(made, Refusal):
            assert made.code in ("UNAVAILABLE", "DTYPE") and str(dtype) in made.reason
        else:
            assert relative_error(made(x, [w, b]), expected) < TOLERANCE[dtype]


def test_onednn_refuses_float64() -> None:
    refused = dense.make(PackedDense(8, 8), torch.float64, 4, "onednn", {})
    assert isinstance(refused, Refusal) and refused.code == "UNAVAILABLE"


def test_bind_attaches_by_rows() -> None:
    form = PackedDense(64, 96, "relu")
    config = {"tile": 64}
    assert lower.bind(form, torch.float32, 16, "aten", {}, transposed=True) is None
    assert lower.bind(form, torch.float32, 512, "tile[64]", config, transposed=True) is None
    key = ops.dense_key(64, 96, "relu", torch.float32, True)
    assert ops.attached()[key] == [(16, "aten"), (512, "tile[64]")]
    for rows in (3, 100, 5000):
        x, w, b = problem(64, 96, rows, torch.float32, True)
        for bias in (b, None):
            y = torch.ops.structc.dense(x, w, bias, "relu", True)
            assert relative_error(y, reference.dense_reference(x, w, bias, "relu", True)) < 1e-5


def test_bind_refuses_and_attaches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = Tile.parse("block(1,4,8,1) block(1,8,4,1)")
    cases = [
        (PackedDense(8, 8), torch.float32, "fault", {"kind": "wrong"}),
        (tile, torch.float32, "fault", {"kind": "wrong"}),
        (tile, torch.float32, "onednn", {}),
        (tile, torch.float32, "tile", {"tile": "big"}),
        (tile, torch.float16, "tile", {}),
    ]
    for form, dtype, kernel, config in cases:
        assert isinstance(lower.bind(form, dtype, 64, kernel, config), Refusal)
    monkeypatch.setenv("STRUCTC_NATIVE", "0")
    refused = lower.bind(tile, torch.float32, 64, "tile", {})
    assert isinstance(refused, Refusal) and refused.code == "OFF"
    assert ops.attached() == {}


def test_bind_reference() -> None:
    form = Tile.parse("permute(2,3)")
    assert lower.bind(form, torch.float32, 64, "reference", {}) is None
    x = torch.randn(5, 6)
    (y,) = torch.ops.structc.tile([x], [], str(form))
    assert torch.equal(y, x.view(5, 2, 3).transpose(1, 2).reshape(5, 6))


def test_gradients_flow_past_kernels() -> None:
    """Packed weights give no gradient; the operator computes it from the reference."""
    for kernel in dense.KERNELS:
        assert lower.bind(PackedDense(16, 8, "gelu"), torch.float32, 64, kernel, {}) is None
        x, w, b = (t.requires_grad_() for t in problem(16, 8, 5, torch.float32, False))
        torch.ops.structc.dense(x, w, b, "gelu", False).sum().backward()
        assert all(t.grad is not None and bool(t.grad.abs().sum() > 0) for t in (x, w, b))


def test_other_widths_are_refused_before_a_kernel_reads() -> None:
    form = PackedDense(16, 24)
    assert lower.bind(form, torch.float32, 64, "tile[64]", {}) is None
    w, b = torch.randn(24, 16), torch.randn(24)
    for call in (ops.dense, torch.ops.structc.dense):
        for x in (torch.randn(4, 8), torch.randn(4, 32), torch.randn(2, 8)):
            with pytest.raises(RuntimeError, match="16 features"):
                call(x, w, None)
        with pytest.raises(RuntimeError, match="bias"):
            call(torch.randn(4, 16), w, b[:5])
        assert call(torch.randn(16), w, b).shape == (24,)


def test_views_with_a_sign_and_autocast() -> None:
    form = PackedDense(8, 8)
    assert lower.bind(form, torch.float32, 64, "tile[64]", {}) is None
    w = torch.randn(8, 8)
    z = torch.randn(1, 8, dtype=torch.complex64)
    x = torch._neg_view(z.real.contiguous())
    torch.testing.assert_close(ops.dense(x, w, None), x @ w.T)
    zero = torch._efficientzerotensor(3, 8)
    assert not ops.dense(zero, w, None).any()
    with torch.autocast("cpu", torch.bfloat16):
        with_kernel = ops.dense(torch.randn(3, 8), w, None).dtype
        ops.detach_all()
        assert ops.dense(torch.randn(3, 8), w, None).dtype == with_kernel == torch.float32

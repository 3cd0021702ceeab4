"""Kernels of convolutions: all agree with the dense matrix wherever they serve."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structc
from structc import ops, reference
from structc.codegen import bench, kernel_table, lower, spectral
from structc.codegen.autotune import Request, price, tuning_key
from structc.codegen.contenders import Contender
from structc.codegen.cost import predict_ms
from structc.codegen.peaks import Peaks
from structc.errors import ConfigError
from structc.forms import PackedDense, Spectral
from structc.numerics import relative_error
from structc.records import Price, Refusal
from structc.spectral import on_circle, spectral_key, spectral_reference

F32 = torch.float32
FORMS = [
    Spectral.circulant(1),
    Spectral.circulant(64, "gelu"),
    Spectral.circulant(61),
    Spectral.toeplitz(1, 1),
    Spectral.toeplitz(37, 53, "relu"),
    Spectral.toeplitz(53, 1),
    Spectral(50, 50, 5, 2, activation="silu"),
    Spectral(50, 46, 5, 4),
    Spectral(50, 54, 5, 0),
    Spectral(40, 40, 3, -30),
    Spectral(40, 40, 3, 39),
    Spectral(40, 40, 7, 3, True, "gelu_tanh"),
    Spectral(20, 50, 45, -7, True),
    Spectral(10, 10, 100, 50),
]


def matrix(form: Spectral, taps: Tensor) -> Tensor:
    """W[i, j] = k[i - j + shift] in float64, tap by tap."""
    n, m = form.in_features, form.out_features
    i = torch.arange(m)
    found = torch.zeros(m, n, dtype=torch.float64)
    for tap in range(form.taps):
        j = i + form.shift - tap
        inside = torch.ones_like(j, dtype=torch.bool) if form.periodic else (j >= 0) & (j < n)
        found[i[inside], j[inside] % n] += taps[tap].double()
    return found


def problem(form: Spectral, rows: int, dtype: torch.dtype = F32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows)
    shapes = [(rows, form.in_features), (form.taps,), (form.out_features,)]
    x, taps, bias = (torch.randn(*s, generator=g).to(dtype) for s in shapes)
    return x, taps, bias


def expected(form: Spectral, x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ matrix(form, taps).T
    return reference.ACTIVATION[form.activation](y if bias is None else y + bias.double())


def kernels(form: Spectral, dtype: torch.dtype = F32) -> list[tuple[str, ops.Kernel]]:
    """Every kernel in every configuration that a search would try, and some that cut more."""
    configs = [("reference", {}), ("fft", {}), ("pocket", {}), ("band", {})]
    configs += [
        (c.kernel, dict(c.config)) for c in Request(form, 17, F32, True, "").contenders("full")
    ]
    configs += [("fft", {"chunk": c}) for c in (1, 5)] + [("band", {"block": b}) for b in (1, 7)]
    made = [(f"{k} {c}", spectral.make(form, dtype, k, c)) for k, c in configs]
    return [(name, run) for name, run in made if not isinstance(run, Refusal)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_kernel_is_the_matrix(form: Spectral, threads: int) -> None:
    torch.set_num_threads(threads)
    for name, run in kernels(form):
        for rows in (1, 17):
            x, taps, bias = problem(form, rows)
            kept = x.clone()
            for weights in ([taps, bias], [taps]):
                want = expected(form, x, taps, weights[1] if len(weights) > 1 else None)
                y = run(x, weights)
                assert y.shape == want.shape and y.is_contiguous(), name
                assert (y - want).norm() <= 1e-5 * max(1.0, float(want.norm())), name
            assert torch.equal(x, kept) and y.data_ptr() != x.data_ptr()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(-70, 70), st.booleans()
)
def test_any_band(n: int, m: int, taps_: int, shift: int, periodic: bool) -> None:
    form = Spectral(n, m, taps_, shift, periodic)
    run = spectral.make(form, torch.float64, "band", {"block": 8})
    if isinstance(run, Refusal):
        assert run.code == "FORM" and not matrix(form, torch.ones(taps_)).any()
        return
    x, taps, bias = (t.double() for t in problem(form, 3))
    assert torch.allclose(run(x, [taps, bias]), expected(form, x, taps, bias), atol=1e-10)


@pytest.mark.parametrize("form", [Spectral.circulant(4096), Spectral.toeplitz(4096, 4096),
                                  Spectral.circulant(4093)], ids=str)  # fmt: skip
def test_large_sizes(form: Spectral) -> None:
    x, taps, bias = problem(form, 100)
    i = torch.arange(form.in_features)
    place = i[:, None] - i
    place = place % form.in_features if form.periodic else place + form.shift
    want = x.double() @ taps.double()[place].T + bias.double()
    for size in spectral.sizes(form):
        run = spectral.make(form, F32, "fft", {"size": size, "chunk": 33})
        assert not isinstance(run, Refusal)
        assert relative_error(run(x, [taps, bias]), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for form in (Spectral.circulant(64, "gelu"), Spectral(64, 64, 5, 2)):
        x, taps, bias = problem(form, 33, dtype)
        want = expected(form, x, taps, bias)
        for name, run in kernels(form, dtype):
            y = run(x, [taps, bias])
            assert y.dtype == dtype and relative_error(y, want) < bench.TOLERANCE[dtype], name
    for kernel in ("fft", "pocket"):
        refused = spectral.make(Spectral.circulant(8), torch.float64, kernel, {})
        assert isinstance(refused, Refusal) and refused.code == "DTYPE"


def test_weights_may_have_another_dtype() -> None:
    form = Spectral(64, 64, 5, 2)
    x, taps, bias = problem(form, 9)
    for name, run in kernels(form):
        y = run(x, [taps.double(), bias.double()])
        assert y.dtype == F32, name
        assert relative_error(y, expected(form, x, taps, bias)) < 1e-5, name


@pytest.mark.filterwarnings("error")
def test_a_row_keeps_its_nan() -> None:
    for form in (Spectral.circulant(64), Spectral.toeplitz(60, 60), Spectral(60, 60, 5, 2)):
        for name, run in kernels(form):
            x, taps, bias = problem(form, 17)
            clean = run(x, [taps, bias])
            x[3, 10], x[8, 0] = float("nan"), float("inf")
            y = run(x, [taps, bias])
            others = torch.ones(17, dtype=torch.bool)
            others[[3, 8]] = False
            assert not y[3].isfinite().all() and not y[8].isfinite().all(), name
            assert torch.equal(y[others], clean[others]), name


def test_no_spectrum_is_stale() -> None:
    form = Spectral(40, 40, 9, 4)
    for name, run in kernels(form):
        x, taps, _ = problem(form, 6)
        for _ in range(2):
            assert relative_error(run(x, [taps]), expected(form, x, taps, None)) < 1e-5, name
            taps.mul_(-3).add_(1)
        before = ops.derived_bytes()
        with torch.inference_mode():
            made = taps.clone()
            for _ in range(2):
                assert relative_error(run(x, [made]), expected(form, x, made, None)) < 1e-5, name
                made.mul_(2)
        assert ops.derived_bytes() == before, f"{name} keeps data of a tensor without versions"


def test_two_forms_may_share_their_taps() -> None:
    left, right = Spectral(32, 32, 9, 0), Spectral(32, 32, 9, 8)
    x, taps, _ = problem(left, 4)
    for kernel in ("fft", "band"):
        for form in (left, right, left):
            run = spectral.make(form, F32, kernel, {})
            assert not isinstance(run, Refusal)
            assert relative_error(run(x, [taps]), expected(form, x, taps, None)) < 1e-5


@pytest.mark.parametrize(
    ("kernel", "config", "code"),
    [("fft", {"size": 60}, "CONFIG"), ("fft", {"size": "big"}, "CONFIG"),
     ("pocket", {"size": 60}, "CONFIG"), ("fft", {"chunk": 0}, "CONFIG"),
     ("fft", {"chunk": "x"}, "CONFIG"),
     ("band", {"block": 0}, "CONFIG"), ("band", {"block": "x"}, "CONFIG"),
     ("onednn", {}, "KERNEL"), ("fault", {"kind": "wrong"}, "KERNEL")],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(
    kernel: str, config: dict[str, int | str], code: str
) -> None:
    refused = lower.bind(Spectral.circulant(64), F32, 8, kernel, config)
    assert isinstance(refused, Refusal) and refused.code == code and refused.reason
    assert ops.attached() == {}


def test_the_operator_runs_what_is_bound() -> None:
    form = Spectral.circulant(30, "relu")
    assert lower.bind(form, F32, 4, "reference", {}) is None
    assert lower.bind(form, F32, 64, "fft[30,16]", {"size": 30, "chunk": 16}) is None
    assert ops.attached() == {spectral_key(str(form), F32): [(4, "reference"), (64, "fft[30,16]")]}
    for rows in (2, 40, 500):
        x, taps, bias = problem(form, rows)
        leaves = [t.requires_grad_() for t in (x, taps, bias)]
        y = torch.ops.structc.spectral(x, taps, bias, str(form))
        assert relative_error(y, expected(form, x.detach(), taps.detach(), bias.detach())) < 1e-5
        ours = torch.autograd.grad(y.sum(), leaves)
        theirs = torch.autograd.grad(spectral_reference(*leaves, str(form)).sum(), leaves)
        assert all(map(torch.allclose, ours, theirs))


# ---------------------------------------------------------------------------- tuning


def test_requests_and_contenders() -> None:
    request = Request(Spectral.circulant(61), 64, F32, True, "")
    assert request.dense().form == PackedDense(61, 61)
    found = request.contenders("quick")
    assert found[0] == Contender("fft", {"size": 125, "chunk": 64})
    assert found[0].label == "fft[125,64]" and Contender("band", {"block": 8}).label == "band[8]"
    assert {c.config.get("size") for c in found if c.kernel == "fft"} == {125, 61}
    assert len(request.contenders("full")) > len(found)
    one = Request(Spectral.circulant(1024), 1, F32, False, "")
    assert [c.label for c in one.contenders("quick")] == ["fft[1024,1]", "pocket[1024]"]
    wide = Request(Spectral.toeplitz(512, 512), 64, F32, False, "")
    assert {c.kernel for c in wide.contenders("full")} == {"fft"}
    assert tuning_key(request) != tuning_key(Request(request.form, 64, F32, False, ""))


@pytest.mark.parametrize("kernel", ["fft", "pocket", "band", "reference"])
def test_the_gate_passes_right_kernels(kernel: str) -> None:
    for form, dtype in ((Spectral(96, 96, 31, 4, False, "gelu"), "float32"),
                        (Spectral.circulant(96), "bfloat16")):  # fmt: skip
        for bias in (True, False):
            job = bench.Job(str(form), 33, dtype, bias, False, kernel, {})
            refused, call_ms = bench.Bench().check(job)
            assert refused is None and call_ms > 0


def test_the_gate_stops_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "on_circle", lambda *a: on_circle(*a).roll(1))
    job = bench.Job(str(Spectral.circulant(96)), 33, "float32", False, False, "fft", {})
    refused, _ = bench.Bench().check(job)
    assert refused is not None and refused.code == "WRONG"


def test_prices_are_measured_and_bound() -> None:
    request = Request(Spectral(128, 128, 3, 1, False, "relu"), 16, F32, True, "relu")
    found = price([request], effort="quick")[request]
    assert isinstance(found, Price) and found.source == "measured" and found.baseline_ms > 0
    assert price([request], effort="recorded")[request] == found
    assert lower.bind(request.form, F32, 16, found.kernel, found.config) is None


def test_the_cost_model_knows_that_long_convolutions_pay() -> None:
    peaks = Peaks(200.0, 20.0, 400.0)
    dense = predict_ms(PackedDense(4096, 4096), 128, F32, peaks)
    circulant = predict_ms(Spectral.circulant(4096), 128, F32, peaks)
    toeplitz = predict_ms(Spectral.toeplitz(4096, 4096), 128, F32, peaks)
    assert circulant < toeplitz < dense / 4
    assert predict_ms(Spectral.toeplitz(16, 16), 1, F32, peaks) > 0


def test_the_kernel_table_has_them() -> None:
    names = {c.name: c for c in kernel_table.cases(F32, (128,))}
    for n in (1024, 2048, 4096):
        assert names[f"circulant {n}"].form == Spectral.circulant(n)
        assert names[f"Toeplitz {n}"].ratio < names[f"circulant {n}"].ratio


def test_build() -> None:
    form = Spectral.toeplitz(48, 64)
    x, taps, bias = problem(form, 5)
    for given_, effort in ((form, "none"), (str(form), "quick")):
        op = structc.build(given_, rows=(1, 5), bias=bias, activation="gelu", effort=effort)
        assert op.form == Spectral.toeplitz(48, 64, "gelu") and not op.refusals
        assert sorted(op.prices) == [1, 5] and "spectral(48" in repr(op)
        want = torch.nn.functional.gelu(expected(form, x, taps, bias))
        assert relative_error(op(x, [taps]), want) < 1e-5
        assert relative_error(op(x[0], [taps]), want[0]) < 1e-5
    with pytest.raises(ConfigError, match="bias has shape"):
        structc.build(form, rows=1, bias=torch.ones(48))
    with pytest.raises(ConfigError, match="start at 1"):
        structc.build("spectral(0,1,1,0,0,none)", rows=1)

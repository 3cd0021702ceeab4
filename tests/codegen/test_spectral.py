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
from structc.families.base import with_epilogue
from structc.forms import Convolve, PackedDense, Tile
from structc.numerics import relative_error
from structc.records import Price, Refusal
from structc.spectral import on_circle

F32 = torch.float32


def conv(
    n: int, m: int, taps: int, shift: int, periodic: int = 0, act: str = "", bias: bool = True
) -> Tile:
    step = Convolve(n, m, taps, shift, periodic)
    return with_epilogue(Tile((step,)), bias=bias, activation=act)


def circulant(n: int, act: str = "", bias: bool = True) -> Tile:
    return with_epilogue(Tile((Convolve.circulant(n),)), bias=bias, activation=act)


def toeplitz(n: int, m: int, act: str = "", bias: bool = True) -> Tile:
    return with_epilogue(Tile((Convolve.toeplitz(n, m),)), bias=bias, activation=act)


FORMS = [
    circulant(1),
    circulant(64, "gelu"),
    circulant(61, bias=False),
    toeplitz(1, 1),
    toeplitz(37, 53, "relu", bias=False),
    toeplitz(53, 1),
    conv(50, 50, 5, 2, act="silu"),
    conv(50, 46, 5, 4),
    conv(50, 54, 5, 0),
    conv(40, 40, 3, -30),
    conv(40, 40, 3, 39),
    conv(40, 40, 7, 3, 1, "gelu_tanh"),
    conv(20, 50, 45, -7, 1),
    conv(10, 10, 100, 50, bias=False),
]


def step_of(form: Tile) -> Convolve:
    found = spectral.convolution(form)
    assert found is not None
    return found[0]


def matrix(form: Tile, taps: Tensor) -> Tensor:
    """W[i, j] = k[i - j + shift] in float64, tap by tap."""
    step = step_of(form)
    i = torch.arange(step.m)
    found = torch.zeros(step.m, step.n, dtype=torch.float64)
    for tap in range(step.taps):
        j = i + step.shift - tap
        inside = torch.ones_like(j, dtype=torch.bool)
        inside = inside if step.periodic else (j >= 0) & (j < step.n)
        found[i[inside], j[inside] % step.n] += taps[tap].double()
    return found


def problem(form: Tile, rows: int, dtype: torch.dtype = F32) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(rows)
    step = step_of(form)
    shapes = [(rows, step.n), (step.taps,), (step.m,)][: 1 + form.weights]
    x, *weights = (torch.randn(*s, generator=g).to(dtype) for s in shapes)
    return x, weights


def expected(form: Tile, x: Tensor, weights: list[Tensor]) -> Tensor:
    taps, *bias = weights
    y = x.double() @ matrix(form, taps).T
    found = spectral.convolution(form)
    assert found is not None
    return reference.ACTIVATION[found[1]](y + bias[0].double() if bias else y)


def kernels(form: Tile, dtype: torch.dtype = F32) -> list[tuple[str, ops.Kernel]]:
    """Every kernel in every configuration that a search would try, and some that cut more."""
    configs = [("fft", {}), ("pocket", {}), ("band", {})]
    configs += [
        (c.kernel, dict(c.config))
        for c in Request(form, 17, F32, True, "").contenders("full")
        if c.kernel != "reference"
    ]
    configs += [("fft", {"chunk": c}) for c in (1, 5)] + [("band", {"block": b}) for b in (1, 7)]
    made = [(f"{k} {c}", lower.make(form, dtype, 17, k, c)) for k, c in configs]
    return [(name, run) for name, run in made if not isinstance(run, Refusal)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_kernel_is_the_matrix(form: Tile, threads: int) -> None:
    torch.set_num_threads(threads)
    for name, run in kernels(form):
        for rows in (1, 17):
            x, weights = problem(form, rows)
            kept, want = x.clone(), expected(form, x, weights)
            y = run(x, weights)
            assert y.shape == want.shape and y.is_contiguous(), name
            assert (y - want).norm() <= 1e-5 * max(1.0, float(want.norm())), name
            assert torch.equal(x, kept) and y.data_ptr() != x.data_ptr()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(-70, 70), st.booleans()
)
def test_any_band(n: int, m: int, taps_: int, shift: int, periodic: bool) -> None:
    form = conv(n, m, taps_, shift, periodic)
    run = spectral.make(form, torch.float64, "band", {"block": 8})
    if isinstance(run, Refusal):
        assert run.code == "FORM" and not matrix(form, torch.ones(taps_)).any()
        return
    x, weights = problem(form, 3, torch.float64)
    assert torch.allclose(run(x, weights), expected(form, x, weights), atol=1e-10)


@pytest.mark.parametrize("form", [circulant(4096), toeplitz(4096, 4096),
                                  circulant(4093)], ids=str)  # fmt: skip
def test_large_sizes(form: Tile) -> None:
    x, (taps, bias) = problem(form, 100)
    step = step_of(form)
    i = torch.arange(step.n)
    place = i[:, None] - i
    place = place % step.n if step.periodic else place + step.shift
    want = x.double() @ taps.double()[place].T + bias.double()
    for size in spectral.sizes(step):
        run = spectral.make(form, F32, "fft", {"size": size, "chunk": 33})
        assert not isinstance(run, Refusal)
        assert relative_error(run(x, [taps, bias]), want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for form in (circulant(64, "gelu"), conv(64, 64, 5, 2)):
        x, weights = problem(form, 33, dtype)
        want = expected(form, x, weights)
        for name, run in kernels(form, dtype):
            y = run(x, weights)
            assert y.dtype == dtype and relative_error(y, want) < bench.TOLERANCE[dtype], name
    for kernel in ("fft", "pocket"):
        refused = spectral.make(circulant(8), torch.float64, kernel, {})
        assert isinstance(refused, Refusal) and refused.code == "DTYPE"


def test_weights_may_have_another_dtype() -> None:
    form = conv(64, 64, 5, 2)
    x, weights = problem(form, 9)
    for name, run in kernels(form):
        y = run(x, [w.double() for w in weights])
        assert y.dtype == F32, name
        assert relative_error(y, expected(form, x, weights)) < 1e-5, name


@pytest.mark.filterwarnings("error")
def test_a_row_keeps_its_nan() -> None:
    for form in (circulant(64), toeplitz(60, 60), conv(60, 60, 5, 2)):
        for name, run in kernels(form):
            x, weights = problem(form, 17)
            clean = run(x, weights)
            x[3, 10], x[8, 0] = float("nan"), float("inf")
            y = run(x, weights)
            others = torch.ones(17, dtype=torch.bool)
            others[[3, 8]] = False
            assert not y[3].isfinite().all() and not y[8].isfinite().all(), name
            assert torch.equal(y[others], clean[others]), name


def test_no_spectrum_is_stale() -> None:
    form = conv(40, 40, 9, 4, bias=False)
    for name, run in kernels(form):
        x, (taps,) = problem(form, 6)
        for _ in range(2):
            assert relative_error(run(x, [taps]), expected(form, x, [taps])) < 1e-5, name
            taps.mul_(-3).add_(1)
        before = ops.derived_bytes()
        with torch.inference_mode():
            made = taps.clone()
            for _ in range(2):
                assert relative_error(run(x, [made]), expected(form, x, [made])) < 1e-5, name
                made.mul_(2)
        assert ops.derived_bytes() == before, f"{name} keeps data of a tensor without versions"


def test_two_forms_may_share_their_taps() -> None:
    left, right = conv(32, 32, 9, 0, bias=False), conv(32, 32, 9, 8, bias=False)
    x, (taps,) = problem(left, 4)
    for kernel in ("fft", "band"):
        for form in (left, right, left):
            run = spectral.make(form, F32, kernel, {})
            assert not isinstance(run, Refusal)
            assert relative_error(run(x, [taps]), expected(form, x, [taps])) < 1e-5


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
    refused = lower.bind(circulant(64), F32, 8, kernel, config)
    assert isinstance(refused, Refusal) and refused.code == code and refused.reason
    assert ops.attached() == {}


def test_the_operator_runs_what_is_bound() -> None:
    form = circulant(30, "relu")
    assert lower.bind(form, F32, 4, "reference", {}) is None
    assert lower.bind(form, F32, 64, "fft[30,16]", {"size": 30, "chunk": 16}) is None
    assert ops.attached() == {ops.tile_key(str(form), F32): [(4, "reference"), (64, "fft[30,16]")]}
    for rows in (2, 40, 500):
        x, weights = problem(form, rows)
        want = expected(form, x, weights)
        leaves = [t.requires_grad_() for t in (x, *weights)]
        y = torch.ops.structc.tile(leaves[:1], leaves[1:], str(form))[0]
        assert relative_error(y, want) < 1e-5
        ours = torch.autograd.grad(y.sum(), leaves)
        plain = reference.tile_reference(leaves[0], leaves[1:], str(form))
        theirs = torch.autograd.grad(plain.sum(), leaves)
        assert all(map(torch.allclose, ours, theirs))


# ---------------------------------------------------------------------------- tuning


def test_requests_and_contenders() -> None:
    request = Request(circulant(61), 64, F32, True, "")
    assert request.dense().form == PackedDense(61, 61)
    found = request.contenders("quick")
    assert found[0] == Contender("fft", {"size": 125, "chunk": 64})
    assert found[0].label == "fft[125,64]" and Contender("band", {"block": 8}).label == "band[8]"
    assert {c.config.get("size") for c in found if c.kernel == "fft"} == {125, 61}
    assert len(request.contenders("full")) > len(found)
    one = Request(circulant(1024), 1, F32, False, "")
    assert [c.label for c in one.contenders("quick")] == [
        "fft[1024,1]",
        "pocket[1024]",
        "reference",
    ]
    wide = Request(toeplitz(512, 512), 64, F32, False, "")
    assert {c.kernel for c in wide.contenders("full")} == {"fft", "reference"}
    assert tuning_key(request) != tuning_key(Request(circulant(61, bias=False), 64, F32, False, ""))


@pytest.mark.parametrize("kernel", ["fft", "pocket", "band", "reference"])
def test_the_gate_passes_right_kernels(kernel: str) -> None:
    for bias in (True, False):
        filters, ring = conv(96, 96, 31, 4, 0, "gelu", bias), circulant(96, bias=bias)
        for form, dtype in ((filters, "float32"), (ring, "bfloat16")):
            job = bench.Job(str(form), 33, dtype, bias, False, kernel, {})
            refused, call_ms = bench.Bench().check(job)
            assert refused is None and call_ms > 0


def test_the_gate_stops_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "on_circle", lambda *a: on_circle(*a).roll(1))
    job = bench.Job(str(circulant(96)), 33, "float32", False, False, "fft", {})
    refused, _ = bench.Bench().check(job)
    assert refused is not None and refused.code == "WRONG"


def test_prices_are_measured_and_bound() -> None:
    request = Request(conv(128, 128, 3, 1, act="relu"), 16, F32, True, "relu")
    found = price([request], effort="quick")[request]
    assert isinstance(found, Price) and found.source == "measured" and found.baseline_ms > 0
    assert price([request], effort="recorded")[request] == found
    assert lower.bind(request.form, F32, 16, found.kernel, found.config) is None


def test_the_cost_model_knows_that_long_convolutions_pay() -> None:
    peaks = Peaks(200.0, 20.0, 400.0)
    dense = predict_ms(PackedDense(4096, 4096), 128, F32, peaks)
    ring = predict_ms(circulant(4096), 128, F32, peaks)
    band = predict_ms(toeplitz(4096, 4096), 128, F32, peaks)
    assert ring < band < dense / 4
    assert predict_ms(toeplitz(16, 16), 1, F32, peaks) > 0


def test_the_kernel_table_has_them() -> None:
    names = {c.name: c for c in kernel_table.cases(F32, (128,))}
    for n in (1024, 2048, 4096):
        assert names[f"circulant {n}"].form == circulant(n, bias=False)
        assert names[f"Toeplitz {n}"].ratio < names[f"circulant {n}"].ratio


def test_build() -> None:
    form = toeplitz(48, 64, bias=False)
    x, (taps, bias) = problem(toeplitz(48, 64), 5)
    for given_, effort in ((form, "none"), (str(form), "quick")):
        op = structc.build(given_, rows=(1, 5), bias=bias, activation="gelu", effort=effort)
        assert op.form == toeplitz(48, 64, "gelu") and not op.refusals
        assert sorted(op.prices) == [1, 5] and "convolve(48" in repr(op)
        want = torch.nn.functional.gelu(expected(form, x, [taps]) + bias)
        assert relative_error(op(x, [taps]), want) < 1e-5
        assert relative_error(op(x[0], [taps]), want[0]) < 1e-5
    with pytest.raises(ConfigError, match="bias has shape"):
        structc.build(form, rows=1, bias=torch.ones(48))
    with pytest.raises(ConfigError, match="start at 1"):
        structc.build("convolve(0,1,1,0,0)", rows=1)

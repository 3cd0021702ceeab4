"""Convolutions: the form, and the operator against the dense matrix in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from structc.codegen import spectral as kernels
from structc.errors import InternalError
from structc.forms import ACTIVATIONS, Spectral, parse_form
from structc.numerics import relative_error
from structc.records import Refusal
from structc.reference import ACTIVATION
from structc.spectral import on_circle, spectral_reference

SIZES = st.integers(1, 40)
FORMS = st.builds(
    Spectral,
    SIZES,
    SIZES,
    SIZES,
    st.integers(-60, 60),
    st.booleans(),
    st.sampled_from(["", *ACTIVATIONS]),
)


def dense(form: Spectral, taps: Tensor) -> Tensor:
    """The matrix, element by element as the form's docstring has it."""
    n, m = form.in_features, form.out_features
    matrix = torch.zeros(m, n, dtype=torch.float64)
    for i in range(m):
        for tap in range(form.taps):
            j = i + form.shift - tap
            if form.periodic:
                matrix[i, j % n] += taps[tap].double()
            elif 0 <= j < n:
                matrix[i, j] += taps[tap].double()
    return matrix


def arguments(
    form: Spectral, rows: int = 5, dtype: torch.dtype = torch.float64, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(form.taps)
    sizes = [(rows, form.in_features), (form.taps,), (form.out_features,)]
    x, taps, b = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in sizes)
    return x, taps, b if bias else None


def expected(form: Spectral, x: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ dense(form, taps).T
    return ACTIVATION[form.activation](y if bias is None else y + bias.double())


# ---------------------------------------------------------------------------- the form


@given(FORMS)
def test_the_text_is_read_back(form: Spectral) -> None:
    assert parse_form(str(form)) == form and hash(parse_form(str(form))) == hash(form)


@pytest.mark.parametrize(
    "text",
    ["spectral(1,2,3,4,0)", "spectral(1,2,3,4,0,tanh)", "spectral(-1,2,3,4,0,none)",
     "spectral(0,2,3,4,0,none)", "spectral(1,2,0,4,0,none)", "spectral(1,2,3,4,2,none)",
     "spectral(1,2,3,4.0,1,none)", "spectral(1,2,3,4,0,none) ", "spectral()"],
)  # fmt: skip
def test_texts_that_are_no_convolution(text: str) -> None:
    with pytest.raises(InternalError):
        parse_form(text)


@given(FORMS)
def test_sizes_and_costs(form: Spectral) -> None:
    size = rest = form.fft_size
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    assert rest == 1 and size >= max(form.in_features, form.out_features)
    assert form.params == form.taps
    assert 0 < form.flops <= 2 * form.taps * form.out_features


def test_circulants_run_at_their_own_size_where_it_is_fast() -> None:
    assert [Spectral.circulant(n).fft_size for n in (1, 2, 30, 4096)] == [1, 2, 30, 4096]
    assert Spectral.circulant(7).fft_size == 15  # 13 diagonals
    assert Spectral.toeplitz(4096, 4096).fft_size == 8192
    assert Spectral(4096, 4096, 5, 2).fft_size == 4320  # 4098 points, not 8191


def test_constructors_say_which_matrix() -> None:
    taps = torch.arange(1.0, 6.0)
    circulant = dense(Spectral.circulant(5), taps)
    toeplitz = dense(Spectral.toeplitz(3, 3), taps)
    assert circulant[:, 0].tolist() == taps.tolist() and circulant[0].tolist() == [1, 5, 4, 3, 2]
    assert toeplitz.tolist() == [[3, 2, 1], [4, 3, 2], [5, 4, 3]]


# ---------------------------------------------------------------------------- the operator


@given(FORMS)
def test_any_convolution_is_its_matrix(form: Spectral) -> None:
    for bias in (True, False):
        x, taps, b = arguments(form, bias=bias)
        want = expected(form, x, taps, b)
        y = torch.ops.structc.spectral(x, taps, b, str(form))
        assert torch.allclose(y, want, rtol=1e-12, atol=1e-12)


@given(FORMS, st.integers(0, 50))
def test_larger_circles_hold_the_same_matrix(form: Spectral, more: int) -> None:
    _, taps, _ = arguments(form)
    size = form.fft_size + more
    if more and form.periodic and form.fft_size == form.in_features:
        return  # the period and nothing else
    circle = on_circle(taps, form, size)
    i, j = torch.arange(form.out_features)[:, None], torch.arange(form.in_features)
    assert torch.allclose(circle[(i - j) % size], dense(form, taps), rtol=1e-12, atol=1e-12)


SMALL = [
    Spectral.circulant(1),
    Spectral.circulant(7, "gelu"),
    Spectral.circulant(8),
    Spectral.toeplitz(3, 5, "silu"),
    Spectral(6, 6, 3, 1),
    Spectral(4, 9, 6, -2, True, "gelu_tanh"),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", SMALL, ids=str)
def test_gradients(form: Spectral, bias: bool) -> None:
    tensors = arguments(form, rows=3, bias=bias)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def run(x: Tensor, taps: Tensor, b: Tensor | None = None) -> Tensor:
        y: Tensor = torch.ops.structc.spectral(x, taps, b, str(form))
        return y

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", SMALL[1:4], ids=str)
def test_opcheck(form: Spectral, bias: bool) -> None:
    for grad in (True, False):
        tensors = arguments(form, rows=4, bias=bias)
        given_ = [t if t is None else t.requires_grad_(grad) for t in tensors]
        torch.library.opcheck(torch.ops.structc.spectral.default, (*given_, str(form)))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (3, 1, 2, 2)])
@pytest.mark.parametrize("attached", [False, True])
def test_every_shape(shape: tuple[int, ...], attached: bool) -> None:
    from structc.codegen import lower

    form = Spectral.toeplitz(12, 10, "relu")
    _, taps, bias = arguments(form, dtype=torch.float32)
    if attached:
        assert lower.bind(form, torch.float32, 8, "fft", {"size": 24, "chunk": 2}) is None
    wide = torch.randn(*shape, 24)
    for x in (wide[..., ::2], wide[..., :12].contiguous()):
        y = torch.ops.structc.spectral(x, taps, bias, str(form))
        assert y.shape == (*shape, 10) and y.is_contiguous() and y is not x
        assert relative_error(y, expected(form, x, taps, bias)) < 1e-6


def test_empty_rows_have_gradients() -> None:
    form = Spectral.circulant(8)
    x, taps, bias = (t.requires_grad_() for t in arguments(form, rows=0) if t is not None)
    torch.ops.structc.spectral(x, taps, bias, str(form)).sum().backward()
    assert [t.grad.abs().sum().item() for t in (taps, bias)] == [0, 0] and x.grad.shape == (0, 8)


@pytest.mark.parametrize(
    ("x", "taps", "bias", "message"),
    [((2, 7), 8, 8, "8 features"), ((2, 8), 7, 8, "8 taps"), ((2, 8), 8, 7, "bias of 8"),
     ((), 8, 8, "8 features")],
)  # fmt: skip
def test_counts_are_checked(x: tuple[int, ...], taps: int, bias: int, message: str) -> None:
    tensors = (torch.randn(x), torch.randn(taps), torch.randn(bias))
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.structc.spectral(*(t.to(device) for t in tensors), str(Spectral.circulant(8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_dtypes(dtype: torch.dtype) -> None:
    form = Spectral.circulant(48, "gelu")
    x, taps, bias = arguments(form, dtype=dtype)
    y = torch.ops.structc.spectral(x, taps, bias, str(form))
    assert y.dtype == dtype
    assert relative_error(y, expected(form, x, taps, bias)) < 2 * torch.finfo(dtype).eps


def test_it_compiles() -> None:
    form = Spectral.toeplitz(16, 8)
    text = str(form)

    def run(x: Tensor, taps: Tensor) -> Any:
        return torch.ops.structc.spectral(x, taps, None, text) + 1

    x, taps, _ = arguments(form)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.allclose(compiled(x, taps), run(x, taps))


def test_kernels_and_reference_agree_on_large_sizes() -> None:
    """A circulant of 4096 by two sizes of FFT, and a matrix that no loop has to build."""
    form = Spectral.toeplitz(4096, 3000)
    x, taps, bias = arguments(form, rows=3)
    i, j = torch.arange(3000)[:, None], torch.arange(4096)
    want = x @ taps[i - j + 4095].T + bias
    assert relative_error(spectral_reference(x, taps, bias, str(form)), want) < 1e-13
    run = kernels.make(form, torch.float32, "fft", {})
    assert not isinstance(run, Refusal)
    assert relative_error(run(x.float(), [taps.float(), bias.float()]), want) < 1e-6

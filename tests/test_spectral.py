"""Spectral steps: their texts, and the operator against dense matrices in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import fft
from scipy.linalg import hadamard
from torch import Tensor

from structc.codegen import spectral as kernels
from structc.codegen.cpu.samples import sample
from structc.errors import InternalError
from structc.families.base import with_epilogue
from structc.forms import ACTIVATIONS, COMPLEX, TRANSFORMS, Convolve, Tile, parse_form
from structc.numerics import relative_error
from structc.records import Refusal
from structc.reference import ACTIVATION, tile_reference
from structc.spectral import on_circle

SIZES = st.integers(1, 40)
STEPS = st.builds(Convolve, SIZES, SIZES, SIZES, st.integers(-60, 60), st.integers(0, 1))
ACTS = st.sampled_from(["", *ACTIVATIONS])


def dense(step: Convolve, taps: Tensor) -> Tensor:
    """The matrix, element by element as the step's docstring has it."""
    matrix = torch.zeros(step.m, step.n, dtype=torch.float64)
    for i in range(step.m):
        for tap in range(step.taps):
            j = i + step.shift - tap
            if step.periodic:
                matrix[i, j % step.n] += taps[tap].double()
            elif 0 <= j < step.n:
                matrix[i, j] += taps[tap].double()
    return matrix


def program(step: Convolve, bias: bool, act: str = "") -> Tile:
    return with_epilogue(Tile((step,)), bias=bias, activation=act)


def arguments(
    step: Convolve, rows: int = 5, dtype: torch.dtype = torch.float64, bias: bool = True
) -> tuple[Tensor, list[Tensor]]:
    g = torch.Generator().manual_seed(step.taps)
    sizes = [(rows, step.n), (step.taps,), (step.m,)][: 2 + bias]
    x, *weights = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in sizes)
    return x, weights


def expected(step: Convolve, x: Tensor, weights: list[Tensor], act: str = "") -> Tensor:
    taps, *bias = weights
    y = x.double() @ dense(step, taps).T
    return ACTIVATION[act](y + bias[0].double() if bias else y)


def call(form: Tile, x: Tensor, weights: list[Tensor]) -> Tensor:
    y: Tensor = torch.ops.structc.tile([x], weights, str(form))[0]
    return y


# ---------------------------------------------------------------------------- the form


@given(STEPS, ACTS)
def test_the_text_is_read_back(step: Convolve, act: str) -> None:
    form = program(step, True, act)
    assert parse_form(str(form)) == form and hash(parse_form(str(form))) == hash(form)


@pytest.mark.parametrize(
    "text",
    ["convolve(1,2,3,4)", "convolve(-1,2,3,4,0)", "convolve(0,2,3,4,0)", "convolve(1,2,3,4.0,1)",
     "convolve(1,2,3,4,0) ", "convolve()", "transform(dft5,8)", "transform(8,dft)",
     "displace(0,1)", "flip(-3)", "convolve(1,2,3,--4,0)"],
)  # fmt: skip
def test_texts_that_are_no_step(text: str) -> None:
    with pytest.raises(InternalError):
        parse_form(text)


@given(STEPS)
def test_sizes_and_costs(step: Convolve) -> None:
    size = rest = step.fft_size
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    assert rest == 1 and size >= max(step.n, step.m)
    assert step.params == step.taps
    assert 0 < step.flops <= 2 * step.taps * step.m


def test_circulants_run_at_their_own_size_where_it_is_fast() -> None:
    assert [Convolve.circulant(n).fft_size for n in (1, 2, 30, 4096)] == [1, 2, 30, 4096]
    assert Convolve.circulant(7).fft_size == 15  # 13 diagonals
    assert Convolve.toeplitz(4096, 4096).fft_size == 8192
    assert Convolve(4096, 4096, 5, 2, 0).fft_size == 4320  # 4098 points, not 8191


def test_constructors_say_which_matrix() -> None:
    taps = torch.arange(1.0, 6.0)
    circulant = dense(Convolve.circulant(5), taps)
    toeplitz = dense(Convolve.toeplitz(3, 3), taps)
    assert circulant[:, 0].tolist() == taps.tolist() and circulant[0].tolist() == [1, 5, 4, 3, 2]
    assert toeplitz.tolist() == [[3, 2, 1], [4, 3, 2], [5, 4, 3]]


# ---------------------------------------------------------------------------- the operator


@given(STEPS, ACTS, st.booleans())
def test_any_convolution_is_its_matrix(step: Convolve, act: str, bias: bool) -> None:
    x, weights = arguments(step, bias=bias)
    y = call(program(step, bias, act), x, weights)
    assert torch.allclose(y, expected(step, x, weights, act), rtol=1e-12, atol=1e-12)


@given(STEPS, st.integers(0, 50))
def test_larger_circles_hold_the_same_matrix(step: Convolve, more: int) -> None:
    _, (taps,) = arguments(step, bias=False)
    size = step.fft_size + more
    if more and step.periodic and step.fft_size == step.n:
        return  # the period and nothing else
    circle = on_circle(taps, step, size)
    i, j = torch.arange(step.m)[:, None], torch.arange(step.n)
    assert torch.allclose(circle[(i - j) % size], dense(step, taps), rtol=1e-12, atol=1e-12)


SMALL = [
    Convolve.circulant(1),
    Convolve.circulant(7),
    Convolve.circulant(8),
    Convolve.toeplitz(3, 5),
    Convolve(6, 6, 3, 1, 0),
    Convolve(4, 9, 6, -2, 1),
]
PROGRAMS = [
    *(program(step, True, "gelu") for step in SMALL),
    *(Tile.parse(f"transform({k},4)") for k in TRANSFORMS if k not in COMPLEX),
    Tile.parse("displace(6,2)"),
    Tile.parse("flip(5) convolve(5,4,8,4,0) bias(4)"),
    Tile.parse("shared(3,4,2,1) shared(1,2,3,4)"),
]


@pytest.mark.parametrize("form", PROGRAMS, ids=str)
def test_gradients_and_opcheck(form: Tile) -> None:
    (x, *_), weights = sample(form, 3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    assert torch.autograd.gradcheck(lambda x, *w: call(form, x, list(w)), leaves)
    for grad in (True, False):
        given_ = [t.detach().requires_grad_(grad) for t in leaves]
        torch.library.opcheck(torch.ops.structc.tile.default, ([given_[0]], given_[1:], str(form)))


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (3, 1, 2, 2)])
@pytest.mark.parametrize("attached", [False, True])
def test_every_shape(shape: tuple[int, ...], attached: bool) -> None:
    from structc.codegen import lower

    step = Convolve.toeplitz(12, 10)
    form = program(step, True, "relu")
    _, weights = arguments(step, dtype=torch.float32)
    if attached:
        assert lower.bind(form, torch.float32, 8, "fft", {"size": 24, "chunk": 2}) is None
    wide = torch.randn(*shape, 24)
    for x in (wide[..., ::2], wide[..., :12].contiguous()):
        y = call(form, x, weights)
        assert y.shape == (*shape, 10) and y.is_contiguous() and y is not x
        assert relative_error(y, expected(step, x, weights, "relu")) < 1e-6


@pytest.mark.parametrize("form", PROGRAMS, ids=str)
def test_empty_rows_have_gradients(form: Tile) -> None:
    (x, *_), weights = sample(form, 0, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    y = call(form, x, weights)
    assert y.shape == (0, form.out_features)
    y.sum().backward()
    assert all(t.grad is None or t.grad.abs().sum() == 0 for t in leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", PROGRAMS, ids=str)
def test_other_dtypes(form: Tile, dtype: torch.dtype) -> None:
    (x, *_), weights = sample(form, 5, dtype=dtype)
    y = call(form, x, weights)
    want = call(form, x.double(), [w.double() for w in weights])
    assert y.dtype == dtype
    assert relative_error(y, want) < 4 * torch.finfo(dtype).eps


def test_complex_transforms_and_factors() -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    turn = torch.randn(6, 1, 1, 1, dtype=torch.complex128)
    for text in ("block(6,1,1,1) transform(dft,6)", "transform(idft,6) block(6,1,1,1)"):
        for given_ in (x, x.to(torch.complex128)):
            y = call(Tile.parse(text), given_, [turn])
            fake = torch.ops.structc.tile([given_.to("meta")], [turn.to("meta")], text)[0]
            assert y.dtype == fake.dtype == torch.complex128 and y.shape == fake.shape
            assert not y.is_conj()
    z = torch.complex(x, x.flip(0))
    for kind in TRANSFORMS:
        if kind not in (*COMPLEX, "hadamard", "haar", "irdft"):
            form = Tile.parse(f"transform({kind},6)")
            want = torch.complex(call(form, x, []), call(form, x.flip(0), []))
            assert torch.allclose(call(form, z, []), want), kind


@pytest.mark.parametrize("n", [1, 2, 3, 8, 15, 16])
def test_transforms_are_those_of_scipy(n: int) -> None:
    x = torch.randn(4, n, dtype=torch.float64)
    for kind in ("dct", "dst"):
        for number in (1, 2, 3, 4):
            if n == 1 and (kind, number) == ("dct", 1):
                continue  # SciPy has none
            want = getattr(fft, kind)(x.numpy(), type=number)
            y = call(Tile.parse(f"transform({kind}{number},{n})"), x, [])
            assert torch.allclose(y, torch.from_numpy(want), atol=1e-12), (kind, number)
    assert torch.allclose(call(Tile.parse(f"transform(rdft,{n}) transform(irdft,{n})"), x, []), x)
    if n & (n - 1) == 0:
        y = call(Tile.parse(f"transform(hadamard,{n})"), x, [])
        assert torch.allclose(y, x @ torch.from_numpy(hadamard(n)).double())
        haar = call(Tile.parse(f"transform(haar,{n})"), torch.eye(n, dtype=torch.float64), [])
        assert torch.allclose(haar.T @ haar, torch.eye(n, dtype=torch.float64))


def test_it_compiles() -> None:
    text = str(program(Convolve.toeplitz(16, 8), False))

    def run(x: Tensor, taps: Tensor) -> Any:
        return torch.ops.structc.tile([x], [taps], text)[0] + 1

    x, (taps,) = arguments(Convolve.toeplitz(16, 8), bias=False)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.allclose(compiled(x, taps), run(x, taps))


def test_kernels_and_reference_agree_on_large_sizes() -> None:
    """A Toeplitz matrix of 4096, and a matrix that no loop has to build."""
    form = program(Convolve.toeplitz(4096, 3000), True)
    x, (taps, bias) = arguments(Convolve.toeplitz(4096, 3000), rows=3)
    i, j = torch.arange(3000)[:, None], torch.arange(4096)
    want = x @ taps[i - j + 4095].T + bias
    assert relative_error(tile_reference(x, [taps, bias], str(form)), want) < 1e-13
    run = kernels.make(form, torch.float32, "fft", {})
    assert not isinstance(run, Refusal)
    assert relative_error(run(x.float(), [taps.float(), bias.float()]), want) < 1e-6

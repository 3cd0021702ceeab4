"""The emitted attention kernel against the float64 reference: shapes, masks, all combined."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from structc import settings
from structc.codegen import attention
from structc.codegen.attention import AttentionKernel
from structc.numerics import relative_error
from structc.records import Refusal
from structc.softmax import Extras, Softmax, softmax_reference

DTYPES = (torch.float32, torch.bfloat16)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def kernel_of(dtype: torch.dtype) -> AttentionKernel:
    made = attention.make(dtype)
    if isinstance(made, Refusal):
        pytest.skip(made.reason)
    return made


def anything(dtype: torch.dtype) -> tuple[tuple[Tensor, Tensor, Tensor], Softmax, Extras]:
    """Sizes, masks and biases drawn at random, the awkward ones often."""
    pick = random.choice
    b, g = pick([1, 2, 3]), pick([1, 2, 3])
    h = g * pick([1, 1, 2, 4])
    n = pick([1, 2, 3, 4, 5, 7, 16, 47, 48, 49, 97, 200])
    m = pick([n, 1, 5, 63, 64, 65, 190, 301])
    d, dv = pick([8, 16, 20, 33, 64, 80, 128, 256]), pick([8, 17, 64, 72])
    window = pick([0, 0, 1, 17, 64, 100])
    block_q, block_k = pick([(0, 0), (0, 0), (16, 64), (50, 30)])
    form = Softmax(
        pick([d**-0.5, 1.0 / d, -0.2]),
        causal=pick([True, False]),
        offset=pick([0, m - n, 3, -5]),
        window=window,
        sinks=pick([0, 2, 70]) if window else 0,
        softcap=pick([0.0, 0.0, 5.0]),
        block_q=block_q,
        block_k=block_k,
    )
    shape = (pick([1, b]), pick([1, h]), pick([1, n]), pick([1, m]))
    bias = pick([None, None, torch.randn(shape), torch.rand(shape) < 0.6])
    if bias is not None and bias.is_floating_point() and pick([True, False]):
        bias = bias.to(dtype)
    blocks = (
        torch.rand(pick([1, b]), pick([1, h]), -(-n // block_q), -(-m // block_k)) < 0.5
        if block_q
        else None
    )
    extras = Extras(
        bias,
        pick([None, torch.randn(pick([1, h]), n + m - 1)]),
        pick([None, torch.rand(b, m) < 0.7]),
        blocks,
        pick([None, torch.randn(h)]),
    )
    q = torch.randn(b, n, h, d).transpose(1, 2).to(dtype)
    k, v = torch.randn(b, g, m, d).to(dtype), torch.randn(b, g, m, dv).to(dtype)
    if pick([True, False, False]):
        v[:, :, random.randrange(m)] = pick([float("nan"), float("inf")])
    return (q, k, v), form, extras


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_matches_the_reference(dtype: torch.dtype) -> None:
    kernel = kernel_of(dtype)
    for _ in range(300):
        (q, k, v), form, extras = anything(dtype)
        b, h, n, _ = q.shape
        o = torch.full((b, n, h, v.shape[-1]), torch.nan, dtype=dtype).transpose(1, 2)
        lse = torch.full((b, h, n), torch.nan)
        assert kernel.into(q, k, v, form, extras, o, lse)
        want = softmax_reference(q.double(), k.double(), v.double(), form, extras)
        told = f"{form} {[tuple(t.shape) for t in (q, k, v)]} {[t is not None for t in extras]}"
        assert relative_error(o, want[0]) < LIMIT[dtype], told
        assert relative_error(lse, want[1]) < LIMIT[dtype], told


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_few_queries_on_many_keys(dtype: torch.dtype, threads: int) -> None:
    """Ranges of keys are shared among threads, and put together."""
    kernel, before = kernel_of(dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n, m, h, g, d in ((1, 3001, 9, 3, 64), (4, 2048, 40, 1, 33), (2, 4097, 4, 4, 80)):
            q = torch.randn(1, h, n, d).to(dtype)
            k, v = torch.randn(2, 1, m, g, d).transpose(2, 3).to(dtype).unbind(0)
            hidden = torch.arange(m)[None] >= 700
            k, v = (t.masked_fill(~hidden[:, None, :, None], torch.nan) for t in (k, v))
            window = Softmax(d**-0.5, causal=True, offset=m - n, window=1111, sinks=70)
            for form, extras in (
                (window, Extras(keys=hidden)),
                (Softmax(d**-0.5, causal=True, offset=m - n), Extras(keys=hidden)),
                (Softmax(1.0, causal=True, offset=900), Extras(keys=hidden, sink=torch.randn(h))),
                (Softmax(d**-0.5, causal=True, offset=3), Extras(keys=hidden)),
                (Softmax(0.2, softcap=3.0), Extras(torch.randn(1, h, 1, m), keys=hidden)),
            ):
                o, lse = q.new_full((1, h, n, d), torch.nan), torch.full((1, h, n), torch.nan)
                assert kernel.into(q, k, v, form, extras, o, lse)
                want = softmax_reference(q.double(), k.double(), v.double(), form, extras)
                assert relative_error(o, want[0]) < LIMIT[dtype], str(form)
                assert relative_error(lse, want[1]) < LIMIT[dtype], str(form)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_and_large_scores(dtype: torch.dtype) -> None:
    kernel = kernel_of(dtype)
    q, k, v = (torch.randn(1, 2, 1500, 32).to(dtype) for _ in range(3))
    for form in (Softmax(3.0, causal=True), Softmax(0.2, window=100), Softmax(30.0)):
        found = kernel(q, k, v, form, Extras())
        assert found is not None
        want = softmax_reference(q.double(), k.double(), v.double(), form, Extras())
        assert relative_error(found[0], want[0]) < 5 * LIMIT[dtype]
        assert relative_error(found[1], want[1]) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    made = attention.make(dtype)
    assert isinstance(made, Refusal) and made.code == "DTYPE"


def test_another_bias_dtype_is_left_to_the_reference() -> None:
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    bias = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    assert kernel_of(torch.float32)(q, k, v, Softmax(1.0), Extras(bias=bias)) is None


@pytest.mark.parametrize("isa", ["avx2", "avx512f"])
def test_lesser_instruction_sets(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in settings.INSTRUCTION_SETS or isa not in _has():
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("STRUCTC_ISA", isa)
    kernel = kernel_of(torch.float32)
    for _ in range(60):
        (q, k, v), form, extras = anything(torch.float32)
        found = kernel(q, k, v, form, extras)
        assert found is not None
        want = softmax_reference(q.double(), k.double(), v.double(), form, extras)
        assert relative_error(found[0], want[0]) < 1e-5, str(form)


def _has() -> tuple[str, ...]:
    from structc import hardware

    return tuple(hardware.target().isa)


def test_source_is_as_it_was(golden: Callable[[str, str], None]) -> None:
    outline = [
        line for line in attention.emit(torch.float32).splitlines() if line.startswith("// ")
    ]
    golden("codegen/attention_f32.txt", "\n".join(outline) + "\n")

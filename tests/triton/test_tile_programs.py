"""Every step of tile programs as a Triton kernel, under the interpreter against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structc import reference
from structc.codegen.cpu.samples import sample
from structc.codegen.program import stages_of
from structc.codegen.triton import tile
from structc.codegen.triton.config import Config, configs, default
from structc.codegen.triton.emit import emit
from structc.forms import Convolve, Tile
from structc.numerics import relative_error
from structc.records import Refusal

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PROGRAMS = {
    "dense": "block(1,33,70,1) bias(33) act(gelu,33)",
    "low rank": "block(1,12,70,1) block(1,33,12,1) bias(33)",
    "monarch": "block(4,12,10,1) permute(4,12) block(12,5,4,1)",
    "block of one": "block(5,1,3,1) block(1,7,5,1)",
    "butterfly": "block(32,2,2,1) block(16,2,2,2) block(8,2,2,4) block(4,2,2,8) block(2,2,2,16)",
    "strided": "block(2,3,5,7)",
    "shuffled, strided": "permute(2,35) block(2,3,5,7)",
    "kronecker": "shared(2,3,5,7)",
    "repeat": "repeat(3,4,5,2)",
    "sparse": "sparse(24,40,6,8,7) bias(24)",
    "select": "select(9,17)",
    "shuffle": "permute(3,5)",
    "feed forward": "block(1,24,12,1) bias(24) act(silu,24) block(1,12,24,1) bias(12) add(12,0) "
    "norm(12,layer,1e-05)",
    "rms": "block(1,23,12,1) norm(23,rms,1e-06) act(relu,23)",
    "gated": "block(1,24,12,1) act(gelu_tanh,24) keep(24,1) load(12,0) block(1,24,12,1) mul(24,1) "
    "block(1,12,24,1)",
    "two inputs": "block(1,24,12,1) add(24,1) norm(24,rms,1e-06)",
}


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check(
    form: Tile, dtype: torch.dtype, rows: int, configs: dict[int, Config] | None = None
) -> None:
    (x, *others), weights = sample(form, rows=rows, dtype=dtype)
    kernel = tile.make(form, dtype, configs)
    assert not isinstance(kernel, Refusal), kernel
    got = kernel(x, weights, others)
    want = reference.tile_reference(x.double(), wide(weights), str(form), wide(others))
    assert got.dtype == dtype and got.shape == want.shape
    if rows:
        assert relative_error(got, want) <= TOLERANCE[dtype]


@pytest.fixture(autouse=True)
def nothing_is_left_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN: what a kernel does not write is seen."""
    empty = Tensor.new_empty

    def filled(self: Tensor, *sizes: int, **more: object) -> Tensor:
        made = empty(self, *sizes, **more)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(Tensor, "new_empty", filled)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_step(name: str, dtype: torch.dtype) -> None:
    for rows in (0, 1, 37):
        check(Tile.parse(PROGRAMS[name]), dtype, rows)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 19), st.integers(1, 4),
    st.integers(1, 21), st.booleans(),
)  # fmt: skip
def test_random_factors(a: int, b: int, c: int, d: int, rows: int, shuffled: bool) -> None:
    text = f"block({a},{b},{c},{d})"
    if shuffled:
        text = f"permute({c},{a * d}) {text}"
    check(Tile.parse(text), torch.float32, rows)


@pytest.mark.parametrize("name", ["dense", "sparse", "strided"])
def test_every_config(name: str) -> None:
    form = Tile.parse(PROGRAMS[name])
    program = stages_of(form, torch.float32, folds=True)
    assert not isinstance(program, Refusal)
    every = list(configs(program.stages[0], 40))
    assert len(set(every)) == len(every) > 1
    for config in every:
        check(form, torch.float32, 40, {0: config})


def test_the_default_is_no_larger_than_the_rows() -> None:
    program = stages_of(Tile.parse("block(1,4096,4096,1)"), torch.float32, folds=True)
    assert not isinstance(program, Refusal)
    assert [default(program.stages[0], rows).bm for rows in (1, 16, 40, 4096)] == [16, 16, 32, 128]


def test_inputs_that_are_not_contiguous() -> None:
    form = Tile.parse(PROGRAMS["low rank"])
    (x,), weights = sample(form, rows=20, dtype=torch.float32)
    kernel = tile.make(form, torch.float32)
    assert not isinstance(kernel, Refusal)
    spread = [torch.stack([w, w], -1)[..., 0] for w in weights]
    assert not any(w.is_contiguous() for w in spread)
    torch.testing.assert_close(
        kernel(x.T.contiguous().T, spread), kernel(x, weights), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("text", "dtype", "code"),
    [
        ("block(1,4,4,1)", torch.float64, "DTYPE"),
        ("block(1,20000,4,1) norm(20000,rms,1e-06)", torch.float32, "NORM"),
        ("block(1,0,4,1)", torch.float32, "EMPTY"),
        (str(Tile((Convolve.circulant(8),))), torch.float32, "SPECTRAL"),
    ],
)
def test_what_has_no_kernel(text: str, dtype: torch.dtype, code: str) -> None:
    refusal = tile.make(Tile.parse(text), dtype)
    assert isinstance(refusal, Refusal) and refusal.code == code and refusal.reason


@pytest.mark.parametrize("name", ["monarch", "feed forward", "sparse", "gated"])
def test_golden_sources(name: str, golden) -> None:  # type: ignore[no-untyped-def]
    program = stages_of(Tile.parse(PROGRAMS[name]), torch.float32, folds=True)
    assert not isinstance(program, Refusal)
    golden(f"triton/{name.replace(' ', '-')}.txt", emit(program))

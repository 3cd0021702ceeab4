"""Every step of tile programs as a Triton kernel, under the interpreter against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structc import reference
from structc.codegen.cpu.samples import sample
from structc.codegen.program import Program
from structc.codegen.triton import tile
from structc.codegen.triton.config import PRODUCTS, configs
from structc.codegen.triton.emit import WAYS, emit
from structc.codegen.triton.fft import factors_of
from structc.codegen.triton.plan import VARIANTS, Plan, plans, room
from structc.codegen.triton.targets import target_of
from structc.forms import Convolve, Tile, Transform
from structc.numerics import relative_error
from structc.records import Refusal

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PROGRAMS = {
    "dense": "block(1,33,70,1) bias(33) act(gelu,33)",
    "low rank": "block(1,18,70,1) block(1,33,18,1) bias(33)",
    "monarch": "block(4,12,10,1) permute(4,12) block(12,5,4,1)",
    "monarch of rank 3": "block(5,21,7,1) permute(5,21) block(7,6,15,1) bias(42) act(gelu,42)",
    "monarch of pairs": "permute(3,10) block(3,4,10,1) permute(3,4) block(2,9,6,1) add(18,1) "
    "mul(18,2)",
    "low rank, by blocks": "block(3,18,7,1) block(3,21,18,1) bias(63)",
    "blast": "block(3,18,7,1) block(1,4,3,18) block(4,6,18,1) bias(24) act(relu,24)",
    "block of one": "block(5,1,3,1) block(1,7,5,1)",
    "butterfly": "block(32,2,2,1) block(16,2,2,2) block(8,2,2,4) block(4,2,2,8) block(2,2,2,16)",
    "kaleidoscope": "block(4,2,2,1) block(2,2,2,2) block(1,2,2,4) block(1,2,2,4) block(2,2,2,2) "
    "block(4,2,2,1)",
    "strided": "block(2,3,5,7)",
    "chain": "permute(2,16) block(8,5,4,1) bias(40) act(relu,40) block(2,6,20,1) "
    "block(1,9,6,2) bias(18) act(gelu,18)",
    "strided, large blocks": "permute(4,60) block(3,18,20,4) bias(216)",
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
    "circulant": str(Tile((Convolve.circulant(30),))) + " bias(30) act(gelu,30)",
    "toeplitz, of few taps": str(Tile((Convolve(23, 19, 5, 2, 0),))) + " mul(19,1)",
    "two inputs": "block(1,24,12,1) add(24,1) norm(24,rms,1e-06)",
}


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def program_of(text: str, dtype: torch.dtype = torch.float32) -> Program:
    program = tile.analyse(Tile.parse(text), dtype)
    assert not isinstance(program, Refusal)
    return program


def check(text: str, dtype: torch.dtype, rows: int, some: list[Plan] | None = None) -> None:
    """Every variant of a program, or the plans given."""
    form = Tile.parse(text)
    (x, *others), weights = sample(form, rows=rows, dtype=dtype)
    want = reference.tile_reference(x.double(), wide(weights), str(form), wide(others))
    tried = some or plans(program_of(text, dtype), rows, tile.DTYPES[dtype], target_of("cuda:90"))
    for plan in tried:
        kernel = tile.make(form, dtype, plan)
        assert not isinstance(kernel, Refusal), kernel
        got = kernel(x, weights, others)
        assert got.dtype == dtype and got.shape == want.shape
        if rows:
            assert relative_error(got, want) <= TOLERANCE[dtype], plan


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
        check(PROGRAMS[name], dtype, rows)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 19), st.integers(1, 3),
    st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_random_factors(a: int, b: int, c: int, d: int, rows: int, shuffled: bool) -> None:
    text = f"block({a},{b},{c},{d})"
    if shuffled:
        text = f"permute({c},{a * d}) {text}"
    check(text, torch.float32, rows)


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 20),
    st.integers(1, 18),
)  # fmt: skip
def test_random_pairs(i: int, rank: int, c: int, groups: int, d: int, rows: int) -> None:
    check(
        f"block({i},{groups * rank},{c},1) permute({i},{groups * rank}) "
        f"block({groups},{d},{i * rank},1)",
        torch.float32,
        rows,
    )


CUT = {
    "panel": "block(1,33,270,1) bias(33)",
    "sparse": PROGRAMS["sparse"],
    "strided": PROGRAMS["strided, large blocks"],
    "turned": PROGRAMS["monarch of rank 3"],
    "pair": PROGRAMS["monarch of rank 3"],
    "bottleneck": PROGRAMS["low rank, by blocks"],
    "coupled": PROGRAMS["blast"],
    "listed": PROGRAMS["select"],
    "shuffle": PROGRAMS["shuffle"],
    "move": "act(relu,21)",
    "chain": PROGRAMS["chain"],
    "convolve": str(Tile((Convolve.toeplitz(20, 12),))),
}
"""For each kind of stage a program."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", WAYS)
def test_every_config(kind: str) -> None:
    text, rows, tried = CUT[kind], (3, 40), 0
    for variant, changed in VARIANTS.items():
        program = changed(program_of(text))
        at = next((i for i, s in enumerate(program.stages) if s.kind == kind), None)
        if at is None:
            continue
        for many in rows:
            base = plans(program_of(text), many, "fp32", target_of("cuda:90"))
            (known,) = {p.configs for p in base if p.program == program}
            every = configs(program.stages[at], many)
            assert len(set(every)) == len(every)
            some = [(*known[:at], c, *known[at + 1 :]) for c in every]
            check(text, torch.float32, many, [Plan(variant, program, c, 0.0) for c in some])
            tried += len(every)
        break
    assert tried >= 2


@pytest.mark.parametrize("kind", WAYS)
def test_there_are_eight_configs_of_each_kind(kind: str) -> None:
    big = {
        "panel": "block(1,4096,4096,1)", "sparse": "sparse(4096,4096,64,64,512)",
        "strided": "block(8,4,4,512)", "turned": "block(64,64,64,1) permute(64,64) "
        "block(64,64,64,1)", "bottleneck": "block(1,512,4096,1) block(1,4096,512,1)",
        "coupled": "block(16,64,256,1) block(1,16,16,64) block(16,256,64,1)",
        "convolve": str(Tile((Convolve.circulant(4096),))),
        "listed": "select(4096,4096)", "shuffle": "permute(64,64)", "move": "act(relu,4096)",
    }  # fmt: skip
    big["pair"] = big["turned"]
    big["chain"] = "block(128,48,8,1) block(16,48,48,8) block(1,16,96,64)"
    made = [changed(program_of(big[kind])) for changed in VARIANTS.values()]
    stage = next(s for p in made for s in p.stages if s.kind == kind)
    assert len(configs(stage, 4096)) >= 8 and (kind in PRODUCTS or len(configs(stage, 1)) >= 1)


@pytest.mark.parametrize("own", [(32, 32), (16, 16, 16)])
def test_transforms_of_order_two_and_three(own: tuple[int, ...]) -> None:
    step = Convolve.circulant(math.prod(own))
    found = factors_of(step)
    assert found is not None and found.own == own
    check(str(Tile((step,))), torch.float32, 1)
    assert factors_of(Convolve.circulant(1 << 16)) is None
    program = program_of(str(Tile((step,))))
    for name, many in (("cuda:80", 1), ("cuda:90", 2)):  # registers of sm_80 hold less
        assert (room(program, 1, "bf16", target_of(name)) is None) == (len(own) <= many + 1)


def test_few_rows_take_their_own_ways() -> None:
    program, h100 = program_of("block(1,4096,4096,1)"), target_of("cuda:90")
    one, few, many = (plans(program, n, "fp32", h100)[0].configs[0] for n in (1, 16, 4096))
    assert one.bm == 1 and few.bm == 16 and many.bm == 128 and many.split == 1
    narrow = program_of("block(1,64,16384,1)")
    assert plans(narrow, 16, "fp32", h100)[0].configs[0].split > 1


def test_inputs_that_are_not_contiguous() -> None:
    form = Tile.parse(PROGRAMS["low rank"])
    (x,), weights = sample(form, rows=20, dtype=torch.float32)
    (plan, *_) = plans(program_of(PROGRAMS["low rank"]), 20, "fp32", target_of("cuda:90"))
    kernel = tile.make(form, torch.float32, plan)
    assert not isinstance(kernel, Refusal)
    spread = [torch.stack([w, w], -1)[..., 0] for w in weights]
    assert not any(w.is_contiguous() for w in spread)
    torch.testing.assert_close(
        kernel(x.T.contiguous().T, spread), kernel(x, weights), rtol=0, atol=0
    )


def test_offsets_above_two_to_the_31() -> None:
    n, rows = (1 << 30) + 7, 3  # the last row starts behind 2^31 elements
    x = torch.empty(rows, n, dtype=torch.float16)  # pages that nobody touches cost nothing
    at = torch.tensor([n - 1, 0, 5])
    for row in range(rows):
        x[row, at] = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16) * (row + 1)
    text = f"select(3,{n})"
    (plan, *_) = plans(program_of(text, torch.float16), rows, "fp16", target_of("cuda:90"))
    kernel = tile.make(Tile.parse(text), torch.float16, plan)
    assert not isinstance(kernel, Refusal)
    assert torch.equal(kernel(x, [at]), x[:, at])


@pytest.mark.parametrize(
    ("text", "dtype", "code"),
    [
        ("block(1,4,4,1)", torch.float64, "DTYPE"),
        ("block(1,20000,4,1) norm(20000,rms,1e-06)", torch.float32, "NORM"),
        ("block(1,0,4,1)", torch.float32, "EMPTY"),
        (str(Tile((Convolve.circulant(1 << 17),))), torch.float32, "SPECTRAL"),
        (str(Tile((Transform("dct2", 8),))), torch.float32, "SPECTRAL"),
    ],
)
def test_what_has_no_kernel(text: str, dtype: torch.dtype, code: str) -> None:
    refusal = tile.analyse(Tile.parse(text), dtype)
    assert isinstance(refusal, Refusal) and refusal.code == code and refusal.reason


@pytest.mark.parametrize(
    ("name", "variant"),
    [("monarch", v) for v in VARIANTS]
    + [("feed forward", "stages"), ("sparse", "stages"), ("gated", "stages")]
    + [("low rank", "fused"), ("blast", "fused"), ("circulant", "stages")]
    + [("chain", "chained"), ("strided, large blocks", "stages")],
)
def test_golden_sources(name: str, variant: str, golden) -> None:  # type: ignore[no-untyped-def]
    program = VARIANTS[variant](program_of(PROGRAMS[name]))
    golden(f"triton/{name.replace(',', '').replace(' ', '-')}-{variant}.txt", emit(program))

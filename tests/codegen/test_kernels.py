"""Every emitted kernel against the float64 reference: shapes, epilogues, threads."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structc
from structc import hardware, reference
from structc.codegen import lower
from structc.codegen.cpu import tile
from structc.codegen.cpu.samples import sample
from structc.codegen.cpu.served import analyse
from structc.codegen.program import Program, product
from structc.errors import InternalError
from structc.forms import (
    Act,
    Add,
    Bias,
    Block,
    Keep,
    Load,
    Mul,
    Norm,
    Permute,
    Select,
    Sparse,
    Step,
    Tile,
)
from structc.numerics import relative_error
from structc.records import Refusal

TOLERANCE = 1e-6
BF16 = torch.bfloat16


def low_rank(n: int, m: int, r: int) -> tuple[Step, ...]:
    return Block(1, r, n, 1), Block(1, m, r, 1)


def monarch(k: int, i: int, j: int, l: int, r: int) -> tuple[Step, ...]:
    return Block(k, j * r, i, 1), Permute(k, j * r), Block(j, l, r * k, 1)


SHAPES: dict[str, tuple[Step, ...]] = {
    "dense-1-1": (Block(1, 1, 1, 1),),
    "dense-51-37": (Block(1, 37, 51, 1),),
    "dense-384-100": (Block(1, 100, 384, 1),),
    "lowrank-384-384-96": low_rank(384, 384, 96),
    "lowrank-127-211-13": low_rank(127, 211, 13),
    "lowrank-1-5-1": low_rank(1, 5, 1),
    "lowrank-5-1-3": low_rank(5, 1, 3),
    "lowrank-64-1030-17": low_rank(64, 1030, 17),
    "blockdiag-7-5-129": (Block(7, 129, 5, 1),),
    "blockdiag-200-1-1": (Block(200, 1, 1, 1),),
    "twoblockdiag-4": (Block(4, 64, 96, 1), Block(4, 96, 64, 1)),
    "monarch-4x96-4x96-16": monarch(4, 96, 4, 96, 16),
    "monarch-32x32-rank1": monarch(32, 32, 32, 32, 1),
    "monarch-3x7-2x19-5": monarch(3, 7, 2, 19, 5),
    "monarch-1x9-5x3-2": monarch(1, 9, 5, 3, 2),
    "monarch-5x3-1x11-2": monarch(5, 3, 1, 11, 2),
}
ROWS = (1, 2, 15, 16, 17, 37, 64, 129, 301)


def butterfly(n: int) -> tuple[Step, ...]:
    levels = n.bit_length() - 1
    return tuple(Block(n >> (i + 1), 2, 2, 1 << i) for i in range(levels))


LONGER: dict[str, tuple[Step, ...]] = {
    "butterfly-64": butterfly(64),
    "butterfly-1024": butterfly(1024),
    "butterfly-back-64": butterfly(64)[::-1],
    "blast-4x24-3x20-10": (Block(4, 10, 24, 1), Block(1, 3, 4, 10), Block(3, 20, 10, 1)),
    "blast-wide": (Block(2, 150, 18, 1), Block(1, 5, 2, 150), Block(5, 7, 150, 1)),
    "kronecker-of-three": (Block(5, 3, 4, 6), Block(1, 7, 9, 10), Block(14, 2, 5, 1)),
    "four-low-rank": (*low_rank(40, 60, 8), *low_rank(60, 22, 6)),
    "two-shuffles": (*monarch(4, 6, 6, 8, 4), Permute(6, 8), Block(8, 3, 6, 1)),
}
PROGRAMS = {**SHAPES, **LONGER}


def check(
    form: Tile, config: dict[str, int | str], rows: int, dtype: torch.dtype = torch.float32
) -> None:
    """Into a NaN-filled output between guard bands, against the float64 reference."""
    kernel = tile.make(form, config, dtype=dtype)
    assert not isinstance(kernel, Refusal), kernel.reason
    (x,), weights = sample(form, rows, dtype=dtype)
    memory = torch.full((rows * form.out_features + 64,), 7.5, dtype=dtype)
    y = memory[32:-32].fill_(float("nan")).view(rows, -1)
    kernel.into(x, weights, y)
    expected = reference.tile_reference(x.double(), [w.double() for w in weights], str(form))
    assert relative_error(y, expected) < (TOLERANCE if dtype == torch.float32 else 2e-2)
    assert (memory[:32] == 7.5).all() and (memory[-32:] == 7.5).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", PROGRAMS)
def test_kernel_matches_reference(shape: str, threads: int) -> None:
    torch.set_num_threads(threads)
    form = Tile(PROGRAMS[shape])
    for rows in ROWS:
        for config in ({"tile": 64}, {"tile": 16, "split": 1, "panel": 32}):
            check(form, config, rows)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", PROGRAMS)
def test_bfloat16_matches_reference(shape: str, threads: int) -> None:
    torch.set_num_threads(threads)
    form = Tile(PROGRAMS[shape])
    for rows in ROWS:
        for config in ({"tile": 64}, {"tile": 16, "split": 1, "panel": 32}):
            check(form, config, rows, BF16)


def test_bfloat16_epilogues_and_values() -> None:
    form = Tile((*low_rank(34, 46, 10), Bias(46), Act("gelu", 46)))
    check(form, {"tile": 32}, 75, BF16)
    one = Tile((Block(1, 1, 2, 1),))
    kernel = tile.make(one, {}, dtype=BF16)
    assert not isinstance(kernel, Refusal), kernel.reason
    keep = torch.tensor([1.0, 0.0], dtype=BF16).view(1, 1, 2, 1)
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e38, -1e-30, 0.0])
    x = torch.stack([values, torch.zeros(6)], 1).to(BF16)
    got = kernel(x, [keep])[:, 0]
    assert got[0].isnan() and torch.equal(got[1:], x[1:, 0])


def test_neighbours_merge_only_where_it_pays() -> None:
    for name, count in (
        ("butterfly-64", 2),
        ("butterfly-1024", 3),
        ("butterfly-back-64", 2),
        ("blast-4x24-3x20-10", 3),
    ):
        program = analyse(Tile(LONGER[name]))
        assert isinstance(program, Program) and len(program.stages) == count, name
        assert max(s.block.b for s in program.stages) <= 20


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=4),
    st.integers(1, 3),
    st.booleans(),
)
def test_merged_factors_are_their_product(
    sides: list[tuple[int, int]], over: int, falls: bool
) -> None:
    """Butterflies of any radix: strides that rise, and strides that fall."""
    blocks = []
    for at, (b, c) in enumerate(sides):
        before = math.prod(x for x, _ in sides[:at])
        after = math.prod(y for _, y in sides[at + 1 :])
        blocks.append(
            Block(over * before, b, c, after) if falls else Block(over * after, b, c, before)
        )
    weights = [torch.randn(k.a, k.b, k.c, k.d, dtype=torch.float64) for k in blocks]
    pattern = Block(over, math.prod(b for b, _ in sides), math.prod(c for _, c in sides), 1)
    x = torch.randn(4, blocks[0].a * blocks[0].c * blocks[0].d, dtype=torch.float64)
    want = reference.tile_reference(x, weights, str(Tile(tuple(blocks))))
    found = product(blocks, weights)
    assert found.shape == (pattern.a, pattern.b, pattern.c, pattern.d)
    got = reference.tile_reference(x, [found], str(Tile((pattern,))))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_weights_of_merged_factors_are_all_watched() -> None:
    form = Tile(butterfly(16))
    kernel = tile.make(form, {})
    assert not isinstance(kernel, Refusal)
    (x,), weights = sample(form, 5)
    for changed in (0, 3, 1):
        with torch.no_grad():
            weights[changed].mul_(-1.5)
        assert (
            relative_error(kernel(x, weights), reference.tile_reference(x, weights, str(form)))
            < 1e-5
        )
        weights[changed] = weights[changed] * 2
        assert (
            relative_error(kernel(x, weights), reference.tile_reference(x, weights, str(form)))
            < 1e-5
        )


def mlp(n: int, h: int, r: int, act: str) -> Tile:
    """Two low-rank layers with everything between and behind them."""
    steps = (*low_rank(n, h, r), Bias(h), Act(act, h), *low_rank(h, n, r), Bias(n))
    return Tile((*steps, Add(n, 0), Norm(n, "layer", "1e-12")))


def gated(n: int, h: int) -> Tile:
    """Two products of one input, one the gate of the other, and what stands around them."""
    up, down = Block(1, h, n, 1), Block(1, n, h, 1)
    steps = (Norm(n, "rms", "1e-6"), Keep(n, 1), up, Act("silu", h), Keep(h, 2), Load(n, 1), up)
    return Tile((*steps, Mul(h, 2), down, Add(n, 0)))


CHAINS = {
    "gated": gated(40, 90),
    "sparse": Tile((Sparse(96, 64, 32, 16, 7), Bias(96), Act("relu", 96))),
    "sparse-and-low-rank": Tile(
        (Sparse(64, 64, 8, 16, 9), Keep(64, 1), Load(64, 0), *low_rank(64, 64, 9), Add(64, 1))
    ),
    "empty-rows-of-blocks": Tile((Sparse(96, 64, 16, 32, 1),)),
    "selections": Tile((Select(77, 64), Block(7, 5, 11, 1), Select(35, 35))),
    "shuffles": Tile((Permute(8, 8), Block(2, 31, 32, 1), Permute(2, 31))),
    "shuffle-alone": Tile((Permute(8, 12),)),
    "uneven-shuffle": Tile((Block(4, 6, 5, 1), Permute(4, 6), Block(8, 7, 3, 1))),
    "shuffle-and-strided": Tile((Block(3, 140, 13, 1), Permute(3, 140), Block(1, 6, 6, 70))),
    "shuffle-of-wide-runs": Tile((*monarch(4, 32, 2, 24, 32), Norm(48, "layer", "1e-5"))),
    "no-product": Tile((Bias(37), Act("relu", 37), Act("silu", 37), Keep(37, 1), Mul(37, 1))),
    "bias-behind-a-shuffle": Tile((Block(4, 8, 6, 1), Permute(4, 8), Bias(32), Act("relu", 32))),
    "load-at-the-end": Tile((Keep(9, 1), Block(1, 4, 9, 1), Load(9, 1))),
    "mlp": mlp(48, 130, 10, "gelu"),
    "dense-add-layer": Tile((Block(1, 51, 38, 1), Bias(51), Add(51, 1), Norm(51, "layer", "1e-5"))),
    "rms-between": Tile(
        (Block(1, 50, 38, 1), Norm(50, "rms", "1e-6"), Block(1, 20, 50, 1), Add(20, 2))
    ),
    "residual-of-itself": Tile((*monarch(4, 6, 4, 6, 4), Act("silu", 24), Add(24, 0))),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str, dtype: torch.dtype, threads: int) -> None:
    """Epilogues between factors, residuals and norms, in tiles and with few rows shared."""
    torch.set_num_threads(threads)
    form = CHAINS[name]
    for rows in ROWS:
        for config in ({"tile": 64}, {"tile": 16, "split": 1}):
            kernel = tile.make(form, config, dtype=dtype)
            assert not isinstance(kernel, Refusal), kernel.reason
            (x, *others), weights = sample(form, rows, dtype=dtype)
            y = x.new_full((rows, form.out_features), float("nan"))
            kernel.into(x, weights, y, others)
            wide = [w.double() if w.is_floating_point() else w for w in weights]
            more = [o.double() for o in others]
            expected = reference.tile_reference(x.double(), wide, str(form), more)
            assert relative_error(y, expected) < (2e-6 if dtype == torch.float32 else 2e-2)


def test_chains_through_the_operator() -> None:
    """Leading dimensions, broadcast residuals, gradients, opcheck."""
    form = CHAINS["dense-add-layer"]
    assert lower.bind(form, torch.float32, 64, "tile", {}) is None
    (x, z), weights = sample(form, 12)
    x, z = x.view(3, 4, -1), z[:4]
    (y,) = torch.ops.structc.tile([x, z], weights, str(form))
    expected = reference.tile_reference(x, weights, str(form), [z])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    leaves = [t.clone().requires_grad_() for t in (x, z, *weights)]
    (y,) = torch.ops.structc.tile(leaves[:2], leaves[2:], str(form))
    grads = torch.autograd.grad(y.square().sum(), leaves)
    want = torch.autograd.grad(
        reference.tile_reference(leaves[0], leaves[2:], str(form), leaves[1:2]).square().sum(),
        leaves,
    )
    for got, one in zip(grads, want, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-4, atol=1e-4)
    torch.library.opcheck(torch.ops.structc.tile.default, (leaves[:2], leaves[2:], str(form)))


def test_norms_of_constant_and_huge_rows() -> None:
    form = Tile((Block(1, 40, 40, 1), Norm(40, "layer", "1e-5")))
    kernel = tile.make(form, {})
    assert not isinstance(kernel, Refusal)
    weights = [torch.eye(40).view(1, 40, 40, 1), torch.ones(40), torch.zeros(40)]
    x = torch.stack([torch.full((40,), 3.0), 1e4 + torch.arange(40.0), torch.zeros(40)])
    expected = reference.tile_reference(x.double(), [w.double() for w in weights], str(form))
    torch.testing.assert_close(kernel(x, weights).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", ["dense-51-37", "monarch-3x7-2x19-5"])
def test_the_default_dtype_is_the_callers_own(
    shape: str, fresh_build: Path, float64_by_default: None
) -> None:
    form = Tile(SHAPES[shape])
    kernel = tile.make(form, {"tile": 64})  # tests itself: nothing is built yet
    assert not isinstance(kernel, Refusal), kernel.reason
    (x,), weights = sample(form, 37)
    y = kernel(x, weights)
    expected = reference.tile_reference(x.double(), [w.double() for w in weights], str(form))
    assert y.dtype == x.dtype == torch.float32 and relative_error(y, expected) < TOLERANCE


@pytest.mark.parametrize("height", [1, 7, 16, 48, 128, 4096])
def test_any_tile_height(height: int) -> None:
    form = Tile((*monarch(4, 24, 4, 24, 16), Bias(96)))
    for split in (0, 1):
        check(form, {"tile": height, "split": split}, 131)


@pytest.mark.parametrize("act", ["", "gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_epilogues(bias: bool, act: str) -> None:
    form = Tile(low_rank(33, 47, 9) if bias else (Block(3, 11, 7, 1),))
    form = form.then(Bias(form.out_features)) if bias else form
    form = form.then(Act(act, form.out_features)) if act else form
    check(form, {"tile": 32}, 75)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activation_values(act: str) -> None:
    """Through an identity: accurate near 0 and far out, NaN stays NaN, infinity stays infinite."""
    form = Tile((Block(1, 1, 1, 1), Act(act, 1)))
    kernel = tile.make(form, {})
    assert not isinstance(kernel, Refusal)
    one = [torch.ones(1, 1, 1, 1)]
    x = torch.cat([torch.linspace(-30, 30, 60001), torch.logspace(-30, 4, 500)])
    x = torch.cat([x, -x])[:, None]
    expected = reference.tile_reference(x.double(), [one[0].double()], str(form))
    gap = (kernel(x, one).double() - expected).abs()
    assert (gap <= 3e-7 + 3e-7 * expected.abs()).all()
    small = x.abs() < 1e-3
    assert (gap[small] <= 1e-6 * x[small].abs().double()).all()
    odd = kernel(torch.tensor([[float("nan")], [float("inf")], [3e38], [-3e38]]), one)
    assert odd[0].isnan() and odd[1] == float("inf") and odd[2] == 3e38
    assert odd[3].abs() < 1e-6


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu", "silu"])
def test_activation_values_in_bfloat16(act: str) -> None:
    """Their own polynomials: no further from the true value than rounding and 3e-5."""
    form = Tile((Block(1, 1, 1, 1), Act(act, 1)))
    kernel = tile.make(form, {}, dtype=BF16)
    assert not isinstance(kernel, Refusal)
    one = [torch.ones(1, 1, 1, 1, dtype=BF16)]
    x = torch.cat([torch.linspace(-30, 30, 20001), torch.logspace(-30, 4, 500)]).to(BF16)
    x = torch.cat([x, -x])[:, None]
    expected = reference.tile_reference(x.double(), [one[0].double()], str(form))
    gap = (kernel(x, one).double() - expected).abs()
    assert (gap <= 3e-5 + 2.0**-8 * expected.abs()).all()
    small = x.abs().double() < 1e-2
    assert (gap[small] <= 2.0**-8 * x[small].abs().double()).all()
    odd = kernel(torch.tensor([[float("nan")], [float("inf")], [3e38], [-3e38]], dtype=BF16), one)
    assert odd[0].isnan() and odd[1] == float("inf") and odd[2] == odd[2].new_tensor(3e38)
    assert odd[3].abs() < 1e-4


def test_nan_rows_stay_alone() -> None:
    """A NaN in one token reaches that token's outputs and no other's."""
    for dtype in (torch.float32, BF16):
        form = Tile((*monarch(4, 23, 4, 23, 16), Bias(92), Act("gelu", 92)))
        kernel = tile.make(form, {}, dtype=dtype)
        assert not isinstance(kernel, Refusal)
        (x,), weights = sample(form, 70, dtype=dtype)
        x[33, 5] = float("nan")
        y = kernel(x, weights)
        bad = y.isnan().any(dim=1)
        assert bad[33] and int(bad.sum()) == 1


def test_operator_runs_the_kernel_on_strided_inputs() -> None:
    form = Tile((*low_rank(96, 64, 24), Bias(64)))
    assert lower.bind(form, torch.float32, 4096, "tile[64]", {"tile": 64}) is None
    (x,), weights = sample(form, 3 * 5)
    for view in (
        x.view(3, 5, 96),
        x.view(3, 5, 96).transpose(0, 1),
        torch.cat([x, x], dim=1)[:, ::2].repeat(1, 1),
        x.t().contiguous().t(),
    ):
        (y,) = torch.ops.structc.tile([view], weights, str(form))
        expected = reference.tile_reference(view.double(), [w.double() for w in weights], str(form))
        assert relative_error(y, expected) < TOLERANCE


@pytest.mark.parametrize("shape", [(96,), (0, 96), (3, 0, 96), (1, 1, 2, 3, 96), (2, 1, 7, 1, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_inputs_of_any_rank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    form = Tile((*low_rank(96, 64, 24), Bias(64)))
    assert lower.bind(form, dtype, 64, "tile[64]", {}) is None
    _, weights = sample(form, 1, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    (y,) = torch.ops.structc.tile([x], weights, str(form))
    assert y.shape == (*shape[:-1], 64) and y.dtype == dtype
    wide = reference.tile_reference(x.double(), [w.double() for w in weights], str(form))
    assert relative_error(y, wide) < (TOLERANCE if dtype == torch.float32 else 2e-2)


def test_threads_that_change_and_calls_from_several_threads() -> None:
    form = Tile((*monarch(4, 24, 4, 24, 16), Bias(96), Act("gelu", 96)))
    kernel = tile.make(form, {"tile": 16})
    assert not isinstance(kernel, Refusal)
    (x,), weights = sample(form, 300)
    expected = kernel(x, weights)
    for threads in (1, 2, 4, 1):  # the library was built while there were others
        torch.set_num_threads(threads)
        assert torch.equal(kernel(x, weights), expected)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: torch.equal(kernel(x, weights), expected), range(40)))


@pytest.mark.parametrize(
    ("text", "at", "value"),
    [
        ("select(6,9)", 0, torch.tensor([0, 1])),
        ("select(6,9)", 0, torch.tensor([0, 1, 2, 3, 4, 9])),
        ("select(6,9)", 0, torch.tensor([0, 1, 2, 3, 4, -1])),
        ("sparse(8,9,4,3,2)", 2, torch.tensor([0, 3])),
        ("sparse(8,9,4,3,2)", 1, torch.tensor([0, 2, 1])),
        ("sparse(8,9,4,3,2)", 1, torch.tensor([0, 3])),
        ("sparse(8,9,4,3,2)", 0, torch.zeros(1, 4, 3)),
    ],
)
def test_places_are_checked_before_a_kernel_reads_there(
    text: str, at: int, value: torch.Tensor
) -> None:
    form = Tile.parse(text)
    kernel = tile.make(form, {})
    assert not isinstance(kernel, Refusal)
    (x,), weights = sample(form, 3)
    kernel(x, weights)
    weights[at] = value
    with pytest.raises(IndexError):
        kernel(x, weights)


def test_programs_of_any_length_and_no_rows() -> None:
    steps = [s for _ in range(20) for s in (Block(1, 16, 16, 1), Bias(16), Act("relu", 16))]
    check(Tile(tuple(steps)), {}, 9)
    many = Tile((Block(1, 16, 16, 1), *(Add(16, i) for i in range(1, 16))))
    refused = tile.make(many, {})
    assert isinstance(refused, Refusal) and refused.code == "UNSERVED"
    with pytest.raises(InternalError, match="inputs"):
        Tile((Block(1, 16, 16, 1), *(Add(16, i) for i in range(1, 18))))
    kernel = tile.make(Tile(low_rank(8, 5, 3)), {})
    assert not isinstance(kernel, Refusal)
    _, weights = sample(Tile(low_rank(8, 5, 3)), 1)
    assert kernel(torch.zeros(0, 8), weights).shape == (0, 5)


def test_other_storage_at_an_old_address_is_noticed() -> None:
    form = Tile((Block(1, 96, 96, 1),))
    kernel = tile.make(form, {})
    assert not isinstance(kernel, Refusal)
    x, weight = torch.eye(96), torch.nn.Parameter(torch.randn(1, 96, 96, 1))
    for _ in range(10):
        for _ in range(2):  # the second may lie where the first one lay
            weight.data = torch.randn(1, 96, 96, 1)
        with torch.no_grad():
            assert torch.equal(kernel(x, [weight]), weight[0, :, :, 0].T)


FORKED = """
import os, sys
import torch
from structc.codegen.cpu import tile
from structc.codegen.cpu.samples import sample
from structc.forms import Tile

form = Tile.parse("block(1,24,96,1) block(1,64,24,1) bias(64)")
kernel = tile.make(form, {"tile": 16, "split": int(sys.argv[1])})
(x,), weights = sample(form, 200)
torch.set_num_threads(2)
expected = kernel(x, weights)
child = os.fork()
if not child:
    same = (kernel(x, weights).numpy() == expected.numpy()).all()
    os._exit(0 if same else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("split", ["0", "1"])
def test_a_fork_after_the_build(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child has none of OpenMP's threads: it works alone and does not wait for them."""
    monkeypatch.setenv("PYTHONPATH", str(Path(structc.__file__).parents[1]))
    command = [sys.executable, "-P", "-c", FORKED, split]
    assert subprocess.run(command, timeout=120).returncode == 0


def test_weight_updates_reach_the_kernel() -> None:
    """Packed copies follow in-place changes, and other weights of the same shape have their own."""
    form = Tile(low_rank(32, 32, 16))
    kernel = tile.make(form, {})
    assert not isinstance(kernel, Refusal)
    (x,), weights = sample(form, 9)
    for _ in range(3):
        with torch.no_grad():
            weights[0].mul_(1.5)
        assert (
            relative_error(kernel(x, weights), reference.tile_reference(x, weights, str(form)))
            < 1e-5
        )
        _, others = sample(form, 9, seed=5)
        assert (
            relative_error(kernel(x, others), reference.tile_reference(x, others, str(form))) < 1e-5
        )


def test_weights_of_another_dtype_run_the_reference() -> None:
    form = Tile(low_rank(8, 8, 4))
    kernel = tile.make(form, {})
    assert not isinstance(kernel, Refusal)
    (x,), weights = sample(form, 3)
    with pytest.raises(RuntimeError):  # as the reference does: dtypes do not mix
        kernel(x, [w.double() for w in weights])


def test_inference_weights() -> None:
    form = Tile(low_rank(8, 8, 4))
    kernel = tile.make(form, {})
    assert not isinstance(kernel, Refusal)
    with torch.inference_mode():
        (x,), weights = sample(form, 3)
        assert (
            relative_error(kernel(x, weights), reference.tile_reference(x, weights, str(form)))
            < 1e-5
        )


def test_other_dtypes_and_empty_programs_are_refused() -> None:
    for form, dtype, code in (
        (Tile(low_rank(8, 8, 4)), torch.float64, "DTYPE"),
        (Tile(low_rank(8, 8, 0)), torch.float32, "EMPTY"),
    ):
        refusal = tile.make(form, {}, dtype=dtype)
        assert isinstance(refusal, Refusal) and refusal.code == code


@pytest.mark.parametrize(
    "config",
    [{"tile": 0}, {"panel": 40}, {"layout": "token"}, {"speed": 3}, {"tile": "64"}, {"split": 2}],
)
def test_configs_from_outside_are_checked(config: dict[str, int | str]) -> None:
    refusal = tile.make(Tile(low_rank(8, 8, 4)), config)
    assert isinstance(refusal, Refusal) and refusal.code == "CONFIG"


@pytest.mark.slow
def test_large_shapes() -> None:
    check(Tile((*low_rank(1536, 384, 153), Bias(384))), {}, 4097)
    check(Tile(monarch(32, 64, 32, 64, 2)), {}, 1025)


def test_the_operator_looks_before_the_kernel_reads() -> None:
    form = CHAINS["dense-add-layer"]
    assert lower.bind(form, torch.float32, 64, "tile", {}) is None
    (x, z), weights = sample(form, 6)
    call = torch.ops.structc.tile
    expected = reference.tile_reference(x, weights, str(form), [z[:1, :1]])
    torch.testing.assert_close(call([x, z[:1, :1]], weights, str(form))[0], expected)
    for inputs, own in (([x], weights), ([x[:, :7], z], weights), ([x, z], weights[:2])):
        with pytest.raises(RuntimeError, match="structc::tile takes"):
            call(inputs, own, str(form))


@pytest.mark.parametrize(("isa", "dtype"), [("avx2", torch.float32), ("avx512_bf16", BF16)])
def test_lesser_instruction_sets(
    isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRUCTC_ISA", isa)
    if isa not in hardware.target().isa:
        pytest.skip(f"this processor has no {isa}")
    for name in ("dense-51-37", "lowrank-127-211-13", "monarch-32x32-rank1"):
        for rows in (1, 37, 129):
            check(Tile(SHAPES[name]), {"panel": 48}, rows, dtype)
    check(Tile(LONGER["butterfly-1024"]), {}, 33, dtype)


def test_what_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTC_ISA", "avx2")
    refusal = tile.make(Tile(low_rank(8, 8, 4)), {}, dtype=BF16)
    assert isinstance(refusal, Refusal) and refusal.code == "ISA"
    monkeypatch.setenv("STRUCTC_ISA", "asimd")
    refusal = tile.make(Tile(low_rank(8, 8, 4)), {})
    assert isinstance(refusal, Refusal) and refusal.code == "ISA"


def test_gradients_of_every_step() -> None:
    for name, form in CHAINS.items():
        (x, *others), weights = sample(form, 3, dtype=torch.float64)
        leaves = [t.requires_grad_(t.is_floating_point()) for t in (x, *others, *weights)]
        program, many = str(form), 1 + len(others)

        def run(*given: torch.Tensor, many: int = many, program: str = program) -> torch.Tensor:
            return torch.ops.structc.tile(list(given[:many]), list(given[many:]), program)[0]

        assert torch.autograd.gradcheck(run, leaves, fast_mode=True), name

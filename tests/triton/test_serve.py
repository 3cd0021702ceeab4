"""Operators that find Triton kernels by themselves, as on a GPU: here under the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from structc import ops
from structc.codegen.cpu.samples import sample
from structc.codegen.triton import attempt, device, load, serve
from structc.codegen.triton.attempt import Attempts
from structc.codegen.triton.plan import plans
from structc.codegen.triton.tile import TritonTile, rounds
from structc.forms import Tile
from structc.numerics import relative_error
from structc.records import Refusal
from structc.reference import dense_reference, tile_reference

MONARCH = "block(4,12,10,1) permute(4,12) block(12,5,4,1) bias(60)"


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The CPU's operators look for Triton's kernels."""
    monkeypatch.setitem(ops.BACKENDS, "cpu", serve.__name__)
    monkeypatch.setattr(attempt, "_failures", [])
    ops.detach_all()
    yield
    ops.detach_all()


def given(text: str, rows: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    inputs, weights = sample(Tile.parse(text), rows=rows, dtype=dtype)
    return inputs, weights


def test_tile_runs_on_triton() -> None:
    for rows in (1, 5, 33):
        inputs, weights = given(MONARCH, rows)
        (y,) = ops.tile(inputs, weights, MONARCH)
        wide = tile_reference(inputs[0].double(), [w.double() for w in weights], MONARCH)
        assert relative_error(y, wide) <= 1e-5
    (entries,) = ops.attached().values()
    assert entries == [(1, "triton")]
    served = ops._KERNELS[ops.tile_key(MONARCH, torch.float32)][0][2]
    assert isinstance(served, serve.Served) and {rows for rows, _ in served.found} == {1, 8, 64}


@pytest.fixture
def rounding() -> Any:
    """As a user says that float32 products may be rounded."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def test_pytorchs_setting_of_float32_products_holds(rounding: Any) -> None:
    inputs, weights = given(MONARCH, 5)
    ops.tile(inputs, weights, MONARCH)
    served = ops._KERNELS[ops.tile_key(MONARCH, torch.float32)][0][2]
    torch.set_float32_matmul_precision("highest")
    ops.tile(inputs, weights, MONARCH)
    assert isinstance(served, serve.Served) and set(served.found) == {(8, True), (8, False)}
    for (_, tf32), attempts in served.found.items():
        functions = [x.function for some in attempts.ways[0].launches for x in some]
        text = Path(functions[0].fn.__code__.co_filename).read_text()
        assert ('"tf32"' in text) == tf32
    half, _ = given(MONARCH, 5, torch.bfloat16)
    assert not rounds(half[0].dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("act", ["", "gelu"])
def test_dense_with_an_activation_runs_on_triton(act: str, transposed: bool) -> None:
    x, bias = torch.randn(2, 3, 20), torch.randn(33)
    w = torch.randn(20, 33) if transposed else torch.randn(33, 20)
    for b in (bias, None):
        y = ops.dense(x, w, b, act, transposed)
        want = dense_reference(x, w, b, act, transposed)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert bool(ops.attached()) == bool(act)  # a plain product is the vendor's


def test_opcheck_and_gradients() -> None:
    inputs, weights = given(MONARCH, 7)
    leaves = [inputs[0].requires_grad_(), *(w.requires_grad_() for w in weights)]
    torch.library.opcheck(torch.ops.structc.tile.default, (leaves[:1], leaves[1:], MONARCH))
    torch.library.opcheck(
        torch.ops.structc.dense.default,
        (torch.randn(5, 20), torch.randn(33, 20), torch.randn(33), "gelu", False),
    )
    (y,) = torch.ops.structc.tile(leaves[:1], leaves[1:], MONARCH)
    found = torch.autograd.grad(y.square().sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want = torch.autograd.grad(tile_reference(wide[0], wide[1:], MONARCH).square().sum(), wide)
    for a, b in zip(found, want, strict=True):
        assert relative_error(a, b) <= 1e-5


def test_a_kernel_that_fails_is_recorded_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(attempt._log, "warning", lambda text, *_: told.append(text))
    run, fails = TritonTile.__call__, [2]

    def broken(self: TritonTile, *args: Any) -> Tensor:
        fails[0] -= 1
        if fails[0] >= 0:
            raise RuntimeError("out of resource: shared memory")
        return run(self, *args)

    monkeypatch.setattr(TritonTile, "__call__", broken)
    inputs, weights = given(MONARCH, 33)
    want = tile_reference(inputs[0], weights, MONARCH)
    torch.testing.assert_close(ops.tile(inputs, weights, MONARCH)[0], want)
    found = attempt.failures()
    assert len(found) == 2 == len({f.way for f in found})
    assert all("out of resource" in f.reason and MONARCH in f.what for f in found)
    assert len(told) == 2 and "does not run as" in told[0]
    ops.tile(inputs, weights, MONARCH)
    assert len(attempt.failures()) == 2  # what failed is not tried again


def test_the_reference_is_the_last_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TritonTile, *args: Any) -> Tensor:
        raise RuntimeError("no")

    monkeypatch.setattr(TritonTile, "__call__", broken)
    inputs, weights = given(MONARCH, 5)
    want = tile_reference(inputs[0], weights, MONARCH)
    assert torch.equal(ops.tile(inputs, weights, MONARCH)[0], want)
    many = len(attempt.failures())
    assert many == len(plans_of(5)) >= 3
    ops.tile(inputs, weights, MONARCH)
    assert len(attempt.failures()) == many


def plans_of(rows: int) -> list[Any]:
    served = serve.serve(Tile.parse(MONARCH), torch.float32)
    assert not isinstance(served, Refusal)
    found = plans(served.program, 8, "fp32", served.target, many=serve.MANY)
    return list(served.plans(8)) if len(found) == len(served.plans(8)) else []


def test_memory_that_is_out_is_the_callers() -> None:
    def call(way: int) -> None:
        raise torch.OutOfMemoryError("out")

    attempts = Attempts("x", [1, 2])
    with pytest.raises(torch.OutOfMemoryError):
        attempts.run(call)
    assert attempts.ways == [1, 2] and not attempt.failures()


def test_no_triton_and_old_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    form = Tile.parse(MONARCH)
    monkeypatch.setattr(serve, "running", lambda: device.of_capability((7, 5)))
    refusal = serve.serve(form, torch.float32)
    assert isinstance(refusal, Refusal) and refusal.code == "DEVICE" and "sm_75" in refusal.reason
    inputs, weights = given(MONARCH, 3)
    assert torch.equal(
        ops.tile(inputs, weights, MONARCH)[0], tile_reference(inputs[0], weights, MONARCH)
    )
    assert not ops.attached()
    monkeypatch.setattr(load, "version", lambda: None)
    refusal = serve.serve(form, torch.float32)
    assert isinstance(refusal, Refusal) and refusal.code == "NO_TRITON"


def test_a_version_that_nobody_tested_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    load.warn_untested.cache_clear()
    monkeypatch.setattr(load, "version", lambda: (4, 0))
    with pytest.warns(UserWarning, match=r"Triton 4\.0 is outside the tested versions"):
        serve.serve(Tile.parse(MONARCH), torch.float32)
    load.warn_untested.cache_clear()


def test_tensors_on_several_devices() -> None:
    inputs, weights = given(MONARCH, 3)
    served = serve.serve(Tile.parse(MONARCH), torch.float32)
    assert not isinstance(served, Refusal)
    with pytest.raises(RuntimeError, match=r"x is on cpu, others on .'meta'."):
        served(inputs[0], [w.to("meta") for w in weights])
    assert not attempt.failures()

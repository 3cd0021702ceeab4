"""Gradients on emitted kernels: those of the reference, and the reference where none serves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from structc import ops
from structc.codegen import lower
from structc.codegen.backward import Backward, parts_of
from structc.codegen.cpu.samples import sample
from structc.forms import Act, Bias, Block, Permute, Tile
from structc.numerics import relative_error

PROGRAMS = {
    "low-rank": Tile((Block(1, 13, 51, 1), Block(1, 37, 13, 1), Bias(37))),
    "monarch": Tile((Block(4, 24, 12, 1), Permute(4, 24), Block(6, 7, 16, 1), Bias(42))),
    "rank-1": Tile((Block(8, 32, 8, 1), Permute(8, 32), Block(32, 8, 8, 1), Act("gelu", 256))),
    "blast": Tile((Block(4, 10, 24, 1), Block(1, 3, 4, 10), Block(3, 20, 10, 1))),
    "butterfly": Tile(tuple(Block(32 >> (i + 1), 2, 2, 1 << i) for i in range(5))),
    "one": Tile((Block(3, 5, 7, 1), Bias(15), Act("silu", 15))),
    "shuffled-output": Tile((Block(3, 5, 7, 1), Permute(3, 5))),
}


def gradients(form: Tile, inputs: Tensor, weights: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (inputs, *weights)]
    (y,) = torch.ops.structc.tile([leaves[0]], leaves[1:], str(form))
    return list(torch.autograd.grad((y * y.detach().cos()).sum(), leaves))


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_gradients_are_those_of_the_reference(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = PROGRAMS[name]
    (x,), weights = sample(form, 2 * 35, dtype=dtype)
    x = x.view(2, 35, -1)
    assert lower.bind(form, dtype, 4096, "tile[64]", {}) is None
    with monkeypatch.context() as patch:
        patch.setattr(ops, "tile_reference", None)  # the operator's own way to it
        found = gradients(form, x, weights)
    ops.detach_all()
    for one, want in zip(
        found, gradients(form, x.double(), [w.double() for w in weights]), strict=True
    ):
        assert one.shape == want.shape and one.dtype == dtype
        assert relative_error(one, want) < tolerance


def test_other_programs_and_dtypes_go_to_the_reference() -> None:
    assert parts_of(Tile.parse("block(1,4,4,1) add(4,1)")) is None
    assert parts_of(Tile.parse("block(1,4,4,1) act(relu,4) block(1,4,4,1)")) is None
    assert parts_of(Tile.parse("permute(2,2) block(1,4,4,1)")) is None
    form = PROGRAMS["low-rank"]
    (x,), weights = sample(form, 5)
    wide = Backward(form, torch.float64)
    assert wide(x.double(), [w.double() for w in weights], torch.ones(5, 37).double()) is None
    assert (
        Backward(form, torch.float32)(x, [w.double() for w in weights], torch.ones(5, 37)) is None
    )


def test_weights_that_changed_since_are_seen() -> None:
    form = PROGRAMS["monarch"]
    (x,), weights = sample(form, 9)
    assert lower.bind(form, torch.float32, 64, "tile[64]", {}) is None
    for _ in range(2):
        got = gradients(form, x, weights)
        want = gradients(form, x.double(), [w.double() for w in weights])
        assert all(relative_error(g, w) < 1e-5 for g, w in zip(got, want, strict=True))
        with torch.no_grad():
            weights[1].mul_(-2.0)


def test_gradients_under_transforms_and_tracers() -> None:
    """What looks on goes to the reference: a kernel's output would mean nothing to it."""
    form = PROGRAMS["monarch"]
    (x,), weights = sample(form, 9)
    assert lower.bind(form, torch.float32, 64, "tile[64]", {}) is None

    def loss(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.ops.structc.tile([x], list(weights), str(form))[0].square().sum()

    def slope(x: Tensor, *weights: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, *weights), leaf)[0]

    want = slope(x, *weights)
    traced = make_fx(slope)(x, *weights)
    assert relative_error(traced(2 * x, *weights), slope(2 * x, *weights)) < 1e-5
    leaf = x.clone().requires_grad_()
    (y,) = torch.ops.structc.tile([leaf], weights, str(form))
    rows = torch.stack([2 * y.detach(), torch.zeros_like(y)])
    (several,) = torch.autograd.grad(y, leaf, rows, is_grads_batched=True)
    assert relative_error(several[0], want) < 1e-5 and not several[1].any()

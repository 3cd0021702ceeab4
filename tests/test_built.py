"""``structc.build``: one matrix, tuned, never slower than dense, right at every shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structc
from structc import built, ops
from structc.codegen.autotune import Request, predict
from structc.errors import ConfigError
from structc.families import AbstractFamily, Dense, LowRank, Monarch
from structc.forms import Act, Bias, Block, PackedDense, Tile
from structc.numerics import relative_error
from structc.records import Price, Refusal


def low_rank(out_features: int = 96, in_features: int = 64, rank: int = 20) -> LowRank:
    family = LowRank.fit(torch.randn(out_features, in_features), rank=rank)
    assert isinstance(family, LowRank)
    return family


def expected(family: AbstractFamily, x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    y = x.double() @ family.to_dense().double().T
    y = y if bias is None else y + bias.double()
    return nn.functional.gelu(y) if act == "gelu" else y


@pytest.mark.parametrize("effort", ["none", "quick"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (33, 64), (2, 1, 3, 1, 64), (0, 64), (2, 0, 64)])
def test_every_shape(effort: str, shape: tuple[int, ...]) -> None:
    family, bias = low_rank(), torch.randn(96)
    op = structc.build(family, rows=(1, 32), bias=bias, activation="gelu", effort=effort)
    x = torch.randn(shape)
    y = op(x)
    assert y.shape == (*shape[:-1], 96) and y.dtype == x.dtype
    assert relative_error(y, expected(family, x, bias, "gelu")) < 1e-5
    strided = torch.randn(*shape[:-1], 128)[..., ::2]
    assert relative_error(op(strided), expected(family, strided, bias, "gelu")) < 1e-5


def test_forms_take_their_weights_at_the_call() -> None:
    form = Tile((Block(1, 8, 16, 1), Block(1, 24, 8, 1)))
    u, v, bias, x = (
        torch.randn(1, 8, 16, 1),
        torch.randn(1, 24, 8, 1),
        torch.randn(24),
        torch.randn(5, 16),
    )
    want = torch.relu(x @ u[0, :, :, 0].T @ v[0, :, :, 0].T + bias)
    for given in (form, str(form)):
        op = structc.build(given, rows=5, bias=bias, activation="relu", effort="none")
        assert op.form == form.then(Bias(24), Act("relu", 24))
        torch.testing.assert_close(op(x, [u, v]), want, rtol=1e-5, atol=1e-5)
    dense = structc.build(PackedDense(16, 24), rows=5, bias=bias, effort="none")
    w = torch.randn(24, 16)
    torch.testing.assert_close(dense(x, [w]), x @ w.T + bias, rtol=1e-5, atol=1e-5)


def test_dtype_and_dense_families() -> None:
    family = Dense(torch.randn(16, 24), transposed=True)
    x = torch.randn(3, 16)
    op = structc.build(family, rows=3, effort="none")
    torch.testing.assert_close(op(x), x @ family.weight, rtol=1e-5, atol=1e-5)
    half = structc.build(low_rank(), rows=4, dtype=torch.bfloat16, effort="none")
    assert half(torch.randn(4, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dense_runs_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The structured form wins at 100 rows and loses at 1: one op, two ways."""

    def price(requests: list[Request], **_: Any) -> dict[Request, Price | Refusal]:
        found: dict[Request, Price | Refusal] = {}
        for r in requests:
            guess = predict(r)
            slow = r.rows == 1 and isinstance(r.form, Tile)
            ms = 2.0 if slow else 1.0 if isinstance(r.form, PackedDense) else 0.5
            found[r] = Price(guess.form, r.rows, ms, 1.0, guess.kernel, {}, "aten", 0.0, "measured")
        return found

    monkeypatch.setattr(built.autotune, "price", price)
    family = low_rank()
    op = structc.build(family, rows=(1, 100), activation="gelu", effort="quick")
    assert [p.form.startswith("dense") for p in op.prices.values()] == [True, False]
    seen: list[str] = []
    dense, tile = ops.dense, ops.tile
    monkeypatch.setattr(ops, "dense", lambda *a: seen.append("dense") or dense(*a))
    monkeypatch.setattr(ops, "tile", lambda *a: seen.append("tile") or tile(*a))
    with torch.no_grad():
        for rows in (1, 2, 100, 500):
            x = torch.randn(rows, 64)
            assert relative_error(op(x), expected(family, x, None, "gelu")) < 1e-5
    assert seen == ["dense", "tile", "tile", "tile"]
    op(torch.randn(1, 64)).sum().backward()  # the factors train, so they run
    assert seen[-1] == "tile" and op.family.u.grad is not None
    assert "1 rows: " in repr(op)


def test_a_refused_kernel_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTC_CXX", "/nonexistent/compiler")
    family = Monarch.fit(torch.randn(32, 32), in_blocks=4, out_blocks=4, rank=2)
    op = structc.build(family, rows=8, effort="quick")
    assert op.refusals and "compiler" in repr(op)
    x = torch.randn(8, 32)
    assert relative_error(op(x), x.double() @ family.to_dense().double().T) < 1e-5


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("nonsense(3)", {"rows": 1}, "nonsense"),
        (3, {"rows": 1}, "expected a family"),
        (Refusal("", "low_rank", "RANK", "too large"), {"rows": 1}, "too large"),
        ("dense(3,4,none)", {"rows": 0}, "rows must be"),
        ("dense(3,4,none)", {"rows": ()}, "rows must be"),
        ("dense(3,4,none)", {"rows": True}, "rows must be"),
        ("dense(3,4,none)", {"rows": 1, "activation": "tanh"}, "tanh"),
        ("dense(3,4,none)", {"rows": 1, "bias": torch.ones(3)}, "bias has shape"),
        ("dense(3,4,none)", {"rows": 1, "effort": "much"}, "effort"),
        ("dense(3,4,none)", {"rows": 1, "effort": -3}, "effort"),
    ],
)
def test_bad_arguments(given: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structc.build(given, **options)


def test_two_biases_are_an_error() -> None:
    family = low_rank()
    family.bias = nn.Parameter(torch.ones(96))
    with pytest.raises(ConfigError, match="bias already"):
        structc.build(family, rows=1, bias=torch.ones(96), effort="none")
    assert "bias" in dict(structc.build(family, rows=1, effort="none").family.named_parameters())


def test_dense_follows_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    def price(requests: list[Request], **_: Any) -> dict[Request, Price | Refusal]:
        found: dict[Request, Price | Refusal] = {}
        for r in requests:
            ms = 2.0 if isinstance(r.form, Tile) else 1.0
            found[r] = Price(str(r.form), r.rows, ms, 1.0, "aten", {}, "aten", 0.0, "measured")
        return found

    monkeypatch.setattr(built.autotune, "price", price)
    family, x = low_rank(), torch.randn(3, 64)
    op = structc.build(family, rows=3, effort="quick")
    with torch.no_grad():
        for _ in range(3):
            op.family.u.mul_(-2)
            assert relative_error(op(x), expected(op.family, x, None, "")) < 1e-5


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 1.5},
        {"rows": None},
        {"rows": "16"},
        {"rows": (1, 2.5)},
        {"bias": [0.0] * 48},
        {"dtype": "bfloat16"},
        {"dtype": torch.int8},
    ],
    ids=str,
)
def test_arguments_of_other_types_are_the_users_mistake(wrong: dict[str, Any]) -> None:
    with pytest.raises(structc.ConfigError, match=next(iter(wrong))):
        structc.build(low_rank(), **{"rows": 4, "effort": "none", **wrong})


def test_without_emitted_kernels_the_operators_of_pytorch_are_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STRUCTC_NATIVE", "0")
    family = LowRank.fit(torch.randn(512, 512), rank=16)
    op = structc.build(family, rows=64, effort="quick")
    assert op.prices[64].kernel in ("reference", "aten", "onednn", "mkl")
    again = structc.build(family, rows=64, effort="quick")  # from the database
    assert "STRUCTC_NATIVE=0" in repr(op) and "STRUCTC_NATIVE=0" in repr(again)
    x = torch.randn(64, 512)
    assert relative_error(op(x), x.double() @ family.to_dense().double().T) < 1e-5


@pytest.mark.parametrize(
    "weights", [(), [torch.ones(2, 3)], torch.ones(4, 3), [torch.ones(4, 3)] * 2]
)
def test_weights_given_at_a_call_must_fit_the_form(weights: Any) -> None:
    op = structc.build("dense(3,4,none)", rows=2, effort="none")
    assert op(torch.ones(2, 3), [torch.ones(4, 3)]).tolist() == [[3.0] * 4] * 2
    with pytest.raises(structc.ConfigError, match="takes a"):
        op(torch.ones(2, 3), weights)


def test_weights_of_a_program_must_have_the_shapes_of_its_steps() -> None:
    op = structc.build("block(1,4,8,1) block(1,8,4,1)", rows=2, effort="none")
    x, v, u = torch.randn(2, 8), torch.randn(4, 8), torch.randn(8, 4)
    assert relative_error(op(x, [v, u]), x.double() @ v.double().T @ u.double().T) < 1e-5
    assert torch.equal(op(x, [v, u]), op(x, [v[None, :, :, None], u[None, :, :, None]]))
    with pytest.raises(ConfigError, match=r"weight 0 of \(1, 4, 8, 1\), got \(8, 4\)"):
        op(x, [u, v])


def test_autocast_changes_no_dtype_whatever_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTC_NATIVE", "0")
    op = structc.build(LowRank.fit(torch.randn(64, 64), rank=4), rows=8, effort="quick")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert op(torch.randn(8, 64)).dtype == torch.float32
        assert op(torch.randn(1, 64)).dtype == torch.float32


class Mute:
    """What stands in for a stream in a windowed application."""

    def write(self, text: str) -> int:
        return len(text)


@pytest.mark.parametrize("stream", [None, Mute()])
def test_no_terminal_no_bars(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream)
    op = structc.build("dense(3,4,none)", rows=2, effort="none")
    assert op(torch.ones(2, 3), [torch.ones(4, 3)]).shape == (2, 4)
    fast = structc.compile(nn.Sequential(nn.Linear(3, 4)), torch.ones(2, 3), effort="none")
    assert fast(torch.ones(2, 3)).shape == (2, 4)


@pytest.mark.parametrize(
    "form",
    ["block(0,1,1,1)", "block(1,8,8,1) add(8,3)", "block(1, 8, 8, 1)", "block(1,8,8,1)  bias(8)"],
)
def test_forms_that_make_no_sense_are_refused(form: str) -> None:
    with pytest.raises(ConfigError, match="build:"):
        structc.build(form, rows=2, effort="none")


@pytest.mark.parametrize("x", [None, 3, torch.ones(()), [[1.0]]])
def test_what_is_no_batch_of_vectors_is_refused(x: Any) -> None:
    op = structc.build(LowRank.fit(torch.randn(4, 4), rank=1), rows=2, effort="none")
    with pytest.raises(ConfigError, match="takes a tensor"):
        op(x)


def test_families_without_numbers_are_built() -> None:
    from structc.families import Product, Selection, Transform

    order = Selection(torch.randperm(8), 8)
    for family in (Transform("dct2", 8), order, Product([order, Transform("hadamard", 8)])):
        op, x = structc.build(family, rows=4, effort="none"), torch.randn(4, 8)
        assert torch.allclose(op(x), x @ family.to_dense().T, atol=1e-5)

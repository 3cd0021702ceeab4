"""The modules that everything stands on: names, budgets, inputs, numbers, forms, operators."""

from __future__ import annotations

import gc
import itertools
import json
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import floats, ids

from structc import metrics, names, numerics, ops, timing
from structc import settings as environment
from structc.budget import Budget
from structc.errors import ArtifactWrite, CalibrationError, ConfigError, InternalError, StructcError
from structc.files import write_atomic
from structc.forms import ACTIVATIONS, Act, Bias, Block, PackedDense, Permute, Tile
from structc.inputs import calibration_calls, canonical, clone_call, describe, to_call, token_mask
from structc.records import Call, Plan, Price
from structc.workdir import WorkDir, hash_calls, hash_source, hash_tensors

# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "pattern, name, found",
    [
        ("a.b", "a.b", True),
        ("a", "a.b", True),
        ("b", "a.b", True),
        ("a.b", "a.b.c.d", True),
        ("c.d", "a.b.c.d", True),
        ("b.c", "a.b.c.d", False),
        ("a", "ab", False),
        ("b", "ab", False),
        ("", "a", False),
        ("re:a.*", "abc", True),
        ("re:b", "abc", False),
        ("re:.*mlp.*", "h.0.mlp.up", True),
    ],
)
def test_patterns(pattern: str, name: str, found: bool) -> None:
    assert names.matches(pattern, name) == found


def test_near_misses_are_offered() -> None:
    known = ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense", "lm_head"]
    with pytest.raises(ConfigError, match="'lm_haed' matches none of the 3") as caught:
        names.select("lm_haed", known, "ignore")
    assert "Did you mean 'lm_head'?" in caught.value.hint
    assert names.select("re:.*dense", known, "ignore") == known[:2]
    assert "Sites here: none" in names.no_match("ignore", "x", []).hint


# ---------------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    "value, share",
    [
        ("1%", 0.01),
        (" 5 % ", 0.05),
        ("0.8x", 0.8),
        ("1x", 1.0),
        (0.5, 0.5),
        (1, 1.0),
        ("0.25", 0.25),
    ],
)
def test_shares_in_every_spelling(value: Any, share: float) -> None:
    assert Budget(params=value).params == pytest.approx(share)
    assert Budget.parse(f"params={value}").params == pytest.approx(share)


@pytest.mark.parametrize("text", ["max_drop", "max_drop=", "drop=1%", "1%", "max_drop=1%;error=2"])
def test_budget_texts_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ConfigError, match=r"budget|Budget"):
        Budget.parse(text)


@pytest.mark.parametrize(
    "name, value",
    [("max_drop", 1), ("error", -1), ("latency", 0), ("latency", "0%"), ("params", 0)],
)
def test_a_budget_out_of_range_is_refused_with_its_own_hint(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"Budget: {name} is") as caught:
        Budget(**{name: value})
    assert caught.value.hint.startswith(f"{name} ")


def test_budgets_know_when_they_are_exact() -> None:
    assert Budget().exact and Budget.parse("").exact and Budget(error=0).exact
    assert not any(Budget(**{f: 0.5}).exact for f in ("max_drop", "error", "latency", "params"))
    with pytest.raises(ConfigError, match="max_drop"):
        Budget(metric=lambda m: 1.0)
    with pytest.raises(ConfigError, match="two currencies"):
        Budget(max_drop=0.1, error=0.1)
    data = Budget(metric=metrics.cosine, max_drop=0.1).to_dict()
    assert json.loads(json.dumps(data))["metric"] == "cosine"


# ---------------------------------------------------------------------------- inputs


class Signed(nn.Module):
    def forward(self, x: Tensor, mask: Any = None, *, scale: float = 1.0, **more: Any) -> Tensor:
        return x


@pytest.mark.parametrize(
    "call",
    [
        ((1,), {}),
        ((), {"x": 1}),
        ((1, None), {}),
        ((1,), {"mask": None, "scale": 1.0}),
        ((), {"mask": None, "x": 1, "extra": None}),
    ],
    ids=str,
)
def test_equal_calls_have_one_form(call: Any) -> None:
    made = canonical(Signed(), Call(*call))
    assert made.args == () and made.kwargs == {"x": 1}


def test_different_calls_stay_different() -> None:
    made = canonical(Signed(), Call((1,), {"scale": 2.0, "mask": 3, "extra": 4}))
    assert made.kwargs == {"x": 1, "mask": 3, "scale": 2.0, "extra": 4}
    assert list(made.kwargs)[:2] == ["x", "mask"]
    assert canonical(Signed(), Call((1,), {"scale": 1})).kwargs == {"x": 1, "scale": 1}
    with pytest.raises(ConfigError, match=r"Signed\.forward"):
        canonical(Signed(), Call((), {"scale": 1.0}))


def test_positional_only_arguments_stay_positional() -> None:
    class Positional(nn.Module):
        def forward(self, x: Tensor, /, *rest: Tensor) -> Tensor:
            return x

    assert canonical(Positional(), Call((1, 2, 3), {})).args == (1, 2, 3)


def test_calls_from_everything() -> None:
    x = floats(2, 3)

    class Encoding(dict):  # type: ignore[type-arg]
        pass

    assert to_call(x).args == (x,)
    assert to_call([x, x]).args == (x, x)
    assert to_call(Encoding(a=x)).kwargs == {"a": x}
    assert to_call(OrderedDict(a=x)).kwargs == {"a": x}
    assert to_call(((x,), {"k": 1})).kwargs == {"k": 1}
    assert to_call(((x,), x)).args == ((x,), x)
    assert to_call(to_call(x)).args == (x,)
    for value in (3, "text", None, object()):
        with pytest.raises(ConfigError, match=type(value).__name__):
            to_call(value)


def test_clones_and_masks_and_words() -> None:
    x, mask = floats(2, 3), torch.ones(2, 3, dtype=torch.long)
    call = Call((x,), {"attention_mask": mask, "n": 3})
    copy = clone_call(call)
    copy.args[0].zero_()
    assert float(x.abs().sum()) > 0 and copy.kwargs["n"] == 3
    assert token_mask(call) is mask
    assert token_mask(Call((), {"attention_mask": mask[None]})) is None
    assert describe(call) == "(float32[2, 3], attention_mask=int64[2, 3], n=int)"


def test_a_tuple_of_tensors_is_one_call_and_a_list_is_many() -> None:
    x = floats(2, 3)
    assert [len(calibration_calls(d)) for d in ((x, x), [x, x], {"a": x}, x)] == [1, 2, 1, 1]
    with pytest.raises(CalibrationError, match="0 batches"):
        calibration_calls(iter(()))


# ---------------------------------------------------------------------------- numerics


def test_relative_errors() -> None:
    one = torch.tensor([3.0, 4.0])
    assert numerics.relative_error(one * 1.5, one) == pytest.approx(0.5)
    zero, empty = torch.zeros(2), torch.zeros(0)
    assert numerics.relative_error(zero, zero) == numerics.relative_error(empty, empty) == 0.0
    assert numerics.relative_error(one, zero) == math.inf
    bad = torch.tensor([math.nan, 4.0])
    assert numerics.relative_error(bad, one) == math.inf
    masked = torch.tensor([-math.inf, 4.0])
    assert numerics.relative_error(masked, masked) == 0.0
    assert numerics.relative_error(one, masked) == math.inf
    assert numerics.relative_error(bad, bad) == 0.0
    huge = torch.tensor([1e30, 1e30])
    assert numerics.relative_error(huge * 1.25, huge) == pytest.approx(0.25, rel=1e-6)
    wave = torch.tensor([1j, 1.0])
    assert numerics.relative_error(wave * 2, wave) == pytest.approx(1.0)


def test_output_errors_take_the_worst_leaf() -> None:
    @dataclass
    class Out:
        a: Tensor
        b: Any

    x = floats(4)
    want = {"a": (x, [x]), "b": Out(x, 3), "ids": torch.arange(3), "s": "word"}
    got = {"a": (x, [x * 1.1]), "b": Out(x * 1.2, 4), "ids": torch.zeros(3), "s": "other"}
    assert numerics.output_error(want, want) == 0.0
    assert numerics.output_error(got, {**want, "ids": torch.ones(3)}) >= 0.2
    assert numerics.output_error(x[:3], x) == numerics.output_error((x, x), (x,)) == math.inf


def test_whole_numbers_count_by_the_share_that_differs() -> None:
    ids, flags = torch.arange(8).view(2, 4), torch.tensor([True, False])
    other = ids.clone()
    other[0, 0] = 99
    assert numerics.output_error((ids, flags), (ids.clone(), flags.clone())) == 0.0
    assert numerics.output_error(other, ids) == pytest.approx(1 / 8)
    assert numerics.output_error((ids, ~flags), (ids, flags)) == 1.0
    assert numerics.output_error(other, ids, torch.tensor([[0, 1, 1, 1]] * 2)) == 0.0
    assert numerics.output_error(ids[:, :2], ids) == math.inf
    assert numerics.output_error(ids[:0], ids[:0]) == 0.0
    assert list(numerics.float_leaves((ids, flags))) == []


class Plain:
    """An output without any of the usual kinds, that may hold itself."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def test_plain_objects_are_looked_into() -> None:
    x = floats(3, 4)
    want, got = (Plain(logits=[v], name="n", kind=dict, model=nn.Linear(2, 2)) for v in (x, x * 2))
    want.again, got.again = want, got
    assert numerics.output_error(got, want) == pytest.approx(1.0)
    assert numerics.output_error((1, {"a": want}), (1, {"a": want})) == 0.0
    assert [t is x for t in numerics.float_leaves(want)] == [True]


def test_caches_are_state_unless_there_is_nothing_else() -> None:
    from transformers import DynamicCache

    x, caches = floats(1, 2, 3, 4), [DynamicCache(), DynamicCache()]
    for at, cache in enumerate(caches):
        cache.update(x * (at + 1), x, 0)
    assert numerics.output_error(Plain(y=x, c=caches[1]), Plain(y=x, c=caches[0])) == 0.0
    assert numerics.output_error(caches[1], caches[0]) == pytest.approx(1.0)


def test_outputs_without_tensors_compare_by_value_or_not_at_all() -> None:
    for value in (None, 3, "text", (), {"a": [1.5, None]}):
        assert numerics.output_error(value, value) == 0.0
    assert numerics.output_error(1.1, 1.0) == pytest.approx(0.1)
    for got, want in ((1, 2), (None, 0), ([1], [1, 1]), (floats(2), 3), ("a", "b")):
        assert numerics.output_error(got, want) == math.inf
    for opaque in (object(), {"a": iter(())}, Plain(name="n")):
        with pytest.raises(ConfigError, match="no tensor") as caught:
            numerics.output_error(opaque, opaque)
        assert caught.value.hint


def test_padding_does_not_count() -> None:
    x = floats(2, 3, 4)
    y, mask = x.clone(), torch.tensor([[1, 1, 0], [1, 1, 1]])
    y[0, 2] = 99.0
    assert numerics.output_error(y, x) > 1 and numerics.output_error(y, x, mask) == 0.0
    y[0, 1] *= 2
    assert numerics.output_error(y, x, mask) > 0.1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_weighted_error_is_the_output_error_on_its_data(n: int, m: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w, a = (torch.randn(m, n, generator=g, dtype=torch.float64) for _ in range(2))
    x = torch.randn(20, n, generator=g, dtype=torch.float64)
    direct = numerics.relative_error(x @ a.T, x @ w.T)
    assert numerics.weighted_error(w, a, x.T @ x) == pytest.approx(direct, rel=1e-6)
    assert numerics.weighted_error(w, a, None) == pytest.approx(numerics.relative_error(a, w))


def test_regularised_grams_are_positive() -> None:
    for gram in (torch.zeros(3, 3, dtype=torch.float64), torch.ones(3, 3, dtype=torch.float64)):
        assert float(torch.linalg.eigvalsh(numerics.regularised(gram))[0]) > 0


# ---------------------------------------------------------------------------- settings, timing


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTC_CACHE_DIR", "~/kernels")
    monkeypatch.setenv("STRUCTC_NATIVE", "0")
    monkeypatch.setenv("STRUCTC_LOG", "DEBUG")
    monkeypatch.setenv("CXX", "clang++")
    now = environment.current()
    assert now.cache_dir == Path("~/kernels").expanduser()
    assert (now.native, now.log, now.compiler, now.trace) == (False, "debug", "clang++", None)
    monkeypatch.setenv("STRUCTC_CXX", "icx")
    assert environment.current().compiler == "icx"


@pytest.mark.parametrize(
    "name, value",
    [("STRUCTC_MEMORY_MB", "0"), ("STRUCTC_MEMORY_MB", "-5"), ("STRUCTC_MEMORY_MB", "1.5"),
     ("STRUCTC_LOG", "loud"), ("STRUCTC_NATIVE", "true")],
)  # fmt: skip
def test_settings_that_make_no_sense(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}.*'{value}'"):
        environment.current()


def test_timing_takes_turns_and_drops_disturbed_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    cost = {"a": 0.002, "b": 0.001}
    hiccups = iter([False] * 6 + [True, False, False, True] + [False] * 100)

    def call(name: str) -> None:
        order.append(name)
        clock[0] += cost[name] * (50 if name == "a" and next(hiccups) else 1)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    found = timing.interleaved(
        {n: lambda n=n: call(n) for n in cost}, rounds=5, min_sample_ms=0.0, warmup=1
    )
    assert order[-4:] == ["a", "b", "a", "b"]
    assert found["a"].latency_ms == pytest.approx(2.0) and found["b"].latency_ms == pytest.approx(
        1.0
    )
    assert found["a"].rounds == found["b"].rounds >= 5 and found["a"].spread == pytest.approx(0.0)


def test_prices_compare_with_their_baseline() -> None:
    assert Price("f", 1, 2.0, 3.0, "k", {}, "b", 0.0, "measured").speedup == pytest.approx(1.5)
    assert Price("f", 1, 0.0, 3.0, "k", {}, "b", 0.0, "measured").speedup == 1.0
    with pytest.raises(ConfigError, match="'x'"):
        Plan({}).explain("x")


# ---------------------------------------------------------------------------- files


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "f"
    write_atomic(file, b"one")
    assert file.stat().st_mode & 0o600 == 0o600

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtifactWrite, match=r"3 bytes.*No space"):
        write_atomic(file, b"two")
    assert file.read_bytes() == b"one" and [p.name for p in tmp_path.iterdir()] == ["f"]
    with pytest.raises(ArtifactWrite):
        write_atomic(tmp_path / "no" / "f", b"x")


def test_work_is_kept_by_name(tmp_path: Path) -> None:
    work = WorkDir(tmp_path, {"seed": "0"})
    odd = ["a/b", "a_b", "../up", "", "x" * 300, "ü", "a b"]
    for at, name in enumerate(odd):
        work.put(name, {"at": at})
        work.put_tensors(name, {"t": torch.full((2,), float(at))})
    again = WorkDir(tmp_path, {"seed": "0"})
    for at, name in enumerate(odd):
        assert again.get(name) == {"at": at}
        found = again.get_tensors(name)
        assert found is not None and found["t"].tolist() == [at, at]
    assert again.get("other") is None and again.get_tensors("other") is None
    assert all(p.parent == tmp_path for p in tmp_path.rglob("*"))
    nothing = WorkDir(None, {})
    nothing.put("a", 1)
    assert nothing.get("a") is None and nothing.get_tensors("a") is None


def test_hashes_see_names_values_shapes_and_types() -> None:
    x = floats(2, 3)
    hashes = [
        hash_tensors({"a": x}),
        hash_tensors({"b": x}),
        hash_tensors({"a": x + 1e-6}),
        hash_tensors({"a": x.reshape(3, 2)}),
        hash_tensors({"a": x.double()}),
        hash_tensors({"a": x.bfloat16()}),
        hash_tensors({}),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_tensors({"a": x.T.contiguous().T}) == hashes[0]
    assert hash_tensors({"e": torch.zeros(0), "s": torch.tensor(1.0)})
    assert hash_calls([Call((x,), {})]) != hash_calls([Call((x,), {}), Call((x,), {})])
    sources = [hash_source(f) for f in (None, test_patterns, hash_calls, WorkDir(None, {}), len)]
    assert len(set(sources)) == len(sources) and hash_source(hash_calls) == sources[2]


# ---------------------------------------------------------------------------- forms

steps = st.one_of(
    st.builds(Block, *[st.integers(1, 4)] * 4),
    st.builds(Permute, st.integers(1, 6), st.integers(1, 6)),
    st.builds(Bias, st.integers(1, 30)),
    st.builds(Act, st.sampled_from(ACTIVATIONS), st.integers(1, 30)),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(steps, min_size=1, max_size=4))
def test_programs_are_read_as_they_were_written(program: list[Any]) -> None:
    chains = all(a.out_features == b.in_features for a, b in itertools.pairwise(program))
    if not chains:
        with pytest.raises(InternalError, match="features"):
            Tile(tuple(program))
        return
    tile = Tile(tuple(program))
    assert Tile.parse(str(tile)) == tile and hash(Tile.parse(str(tile))) == hash(tile)
    assert tile.weights == sum(isinstance(s, (Block, Bias)) for s in program)
    assert tile.then(Bias(tile.out_features)).weights == tile.weights + 1


@pytest.mark.parametrize(
    "text",
    ["", "nothing", "blok(1,2,3,4)", "block(1,2,3)", "act(tanh,4)", "block(1,2,a,4)", "act(4,gelu)",
     "bias(4) junk", "bias(-4)", "bias(4)  bias(4)", "bias(4.0)", "bias()"],
)  # fmt: skip
def test_programs_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InternalError):
        Tile.parse(text)


@pytest.mark.parametrize("text", ["dense(1,2)", "dense(1,2,tanh)", "dense(-1,2,none)", "x", ""])
def test_dense_forms_that_cannot_be_read(text: str) -> None:
    with pytest.raises(InternalError):
        PackedDense.parse(text)
    assert PackedDense.parse(str(PackedDense(3, 4, "silu"))) == PackedDense(3, 4, "silu")


# ---------------------------------------------------------------------------- operators

PROGRAM = "block(2,6,5,1) permute(2,6) block(3,2,4,1) bias(6) act(gelu,6)"


def tile_arguments(dtype: torch.dtype = torch.float64, grad: bool = True) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(1)
    shapes = [(4, 10), (2, 6, 5, 1), (3, 2, 4, 1), (6,)]
    x, *weights = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    for t in (x, *weights):
        t.requires_grad_(grad)
    return [x], weights, PROGRAM


def test_operators_pass_opcheck() -> None:
    torch.library.opcheck(torch.ops.structc.tile.default, tile_arguments(torch.float32))
    x, w, b = floats(3, 4), floats(5, 4), floats(5)
    for t in (x, w, b):
        t.requires_grad_()
    torch.library.opcheck(torch.ops.structc.dense.default, (x, w, b, "silu"))
    torch.library.opcheck(
        torch.ops.structc.dense.default, (x, w.detach().T.contiguous(), None, "", True)
    )


def test_tile_gradients() -> None:
    (x,), weights, _ = tile_arguments()

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.ops.structc.tile([x], list(weights), PROGRAM)[0]

    assert torch.autograd.gradcheck(call, (x, *weights))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("act", ["", *ACTIVATIONS])
def test_dense_gradients_and_values(act: str, transposed: bool) -> None:
    x, w, b = (t.double().requires_grad_() for t in (floats(3, 4), floats(5, 4), floats(5)))
    stored = w.detach().T.contiguous().requires_grad_() if transposed else w

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.ops.structc.dense(x, w, b, act, transposed)

    fn = {"": lambda y: y, "gelu": F.gelu, "relu": F.relu, "silu": F.silu,
          "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}[act]  # fmt: skip
    assert torch.allclose(call(x, stored, b), fn(F.linear(x, w, b)), atol=1e-12)
    assert torch.autograd.gradcheck(call, (x, stored, b))


def test_only_wanted_gradients_are_given() -> None:
    (x,), weights, _ = tile_arguments(grad=False)
    weights[1].requires_grad_()
    torch.ops.structc.tile([x], weights, PROGRAM)[0].sum().backward()
    assert weights[1].grad is not None and x.grad is None and weights[0].grad is None


def test_operators_return_no_view_of_their_input() -> None:
    x = floats(3, 6)
    (y,) = torch.ops.structc.tile([x], [], "permute(1,6)")
    y.zero_()
    assert float(x.abs().sum()) > 0


@pytest.mark.parametrize("shape", [(10,), (0, 10), (2, 0, 10), (2, 3, 10), (1, 10)], ids=str)
def test_tiles_take_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    _, weights, _ = tile_arguments(grad=False)
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.ops.structc.tile([x], weights, PROGRAM)[0]
    assert y.shape == (*shape[:-1], 6)
    (meta,) = torch.ops.structc.tile([x.to("meta")], [w.to("meta") for w in weights], PROGRAM)
    assert meta.shape == y.shape and meta.dtype == y.dtype


def test_kernels_serve_the_rows_that_they_are_for() -> None:
    key = ops.dense_key(4, 5, "", torch.float32)
    made: list[str] = []

    def kernel(name: str) -> ops.Kernel:
        def run(x: Tensor, weights: Any) -> Tensor:
            made.append(name)
            return F.linear(x, *weights)

        return run

    for rows, name in ((64, "large"), (4, "small")):
        ops.attach(key, rows, name, kernel(name))
    assert ops.attached()[key] == [(4, "small"), (64, "large")]
    w = floats(5, 4)
    for rows in (1, 4, 5, 64, 1000):
        torch.ops.structc.dense(floats(rows, 4), w, None)
    assert made == ["small", "small", "large", "large", "large"]
    torch.ops.structc.dense(floats(0, 4), w, None)
    torch.ops.structc.dense(floats(3, 4).double(), w.double(), None)
    torch.ops.structc.dense(floats(3, 4), w, None, "relu")
    assert len(made) == 5, "no rows, another dtype, another epilogue: the reference"
    ops.attach(key, 64, "other", kernel("other"))
    torch.ops.structc.dense(floats(9, 4), w, None)
    assert made[-1] == "other"
    ops.detach_all()
    count = ops.call_count()
    torch.ops.structc.dense(floats(9, 4), w, None)
    assert len(made) == 6 and ops.call_count() == count + 1 and ops.attached() == {}


def test_packed_weights_follow_their_weight() -> None:
    w, made = torch.ones(3, 3), []

    def pack(tensors: Sequence[Tensor]) -> Tensor:
        made.append(float(tensors[0].sum()))
        return tensors[0] * 2

    first = ops.derived([w], "packed", pack)
    assert ops.derived([w], "packed", pack) is first and made == [9.0]
    assert ops.derived_bytes() == 36
    w.add_(1)
    assert float(ops.derived([w], "packed", pack)[0, 0]) == 4.0 and made == [9.0, 18.0]
    ops.derived([w], "other", pack)
    assert len(made) == 3 and ops.derived_bytes() == 72
    w.data = torch.zeros(3, 3)
    assert float(ops.derived([w], "packed", pack).sum()) == 0.0
    del w
    gc.collect()
    assert ops.derived_bytes() == 0


def test_packed_weights_of_inference_tensors_are_never_kept() -> None:
    made = []
    with torch.inference_mode():
        w = torch.ones(2, 2)
    for _ in range(2):
        ops.derived([w], "packed", lambda t: made.append(1))
    assert made == [1, 1]


# ---------------------------------------------------------------------------- metrics

MEASURES = [metrics.similarity_spearman, metrics.cosine, metrics.kl, metrics.top1_agreement]


def measure(metric: metrics.Agreement, ours: list[Any], theirs: list[Any]) -> float:
    call = Call((), {})
    return metric.measure(
        [metric.summary(o, call) for o in ours], [metric.summary(o, call) for o in theirs]
    )


@pytest.mark.parametrize("metric", MEASURES, ids=lambda m: m.name)
def test_agreement_is_one_for_equals_and_falls_with_noise(metric: metrics.Agreement) -> None:
    outputs = [floats(6, 5, 16) * (b + 1) for b in range(3)]
    values = []
    for noise in (0.0, 0.3, 3.0):
        torch.manual_seed(2)
        values.append(measure(metric, [o + noise * torch.randn_like(o) for o in outputs], outputs))
    assert values[0] == pytest.approx(1.0, abs=1e-6)
    assert values[0] > values[1] > values[2]


def test_kl_is_in_nats_a_position() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    wanted = float((p * (p / q).log()).sum())
    assert measure(metrics.kl, [q.log()], [p.log()]) == pytest.approx(math.exp(-wanted), rel=1e-5)


def test_padding_counts_in_no_metric() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    call, x = Call((), {"attention_mask": mask}), floats(4, 3, 8)
    y = torch.where(mask.bool()[..., None], x, torch.full_like(x, 50.0))
    for metric in MEASURES:
        assert metric.measure(
            [metric.summary(y, call)], [metric.summary(x, call)]
        ) == pytest.approx(1)


@pytest.mark.parametrize("metric", MEASURES, ids=lambda m: m.name)
def test_nothing_to_compare_is_no_agreement(metric: metrics.Agreement) -> None:
    padding = Call((), {"attention_mask": torch.zeros(2, 3, dtype=torch.long)})
    summaries = [metric.summary(torch.arange(3), Call((), {}))]
    if metric in (metrics.kl, metrics.top1_agreement):
        summaries.append(metric.summary(floats(2, 3, 8), padding))
    for summary in summaries:
        with pytest.raises(ConfigError, match=f"{metric.name}.*nothing") as caught:
            metric.measure([summary], [summary])
        assert caught.value.hint


def test_the_default_metric_follows_the_output() -> None:
    class Out(OrderedDict):  # type: ignore[type-arg]
        pass

    assert metrics.default_for({"logits": floats(2, 3)}) is metrics.kl
    assert metrics.default_for(Out(logits=floats(2, 3))) is metrics.kl
    assert metrics.default_for(floats(2, 3)) is metrics.similarity_spearman


@pytest.mark.parametrize("metric", MEASURES, ids=lambda m: m.name)
@pytest.mark.parametrize("shape", [(1, 4), (2, 4), (4,), (1, 1, 4), (3, 2, 2, 2)], ids=str)
def test_metrics_take_outputs_of_any_shape(
    metric: metrics.Agreement, shape: tuple[int, ...]
) -> None:
    x = floats(*shape)
    assert measure(metric, [x], [x]) == pytest.approx(1.0, abs=1e-6)


# ---------------------------------------------------------------------------- errors


def test_errors_carry_hint_and_layer() -> None:
    error = ConfigError("where: what", hint="do this", layer="a.b")
    assert str(error) == "where: what\n  do this"
    assert (error.hint, error.layer, error.code) == ("do this", "a.b", "CONFIG")
    kinds = StructcError.__subclasses__()
    assert len({k.code for k in kinds}) == len(kinds) and ids(1, 1).numel() == 1


def test_slow_calls_are_timed_in_fewer_rounds() -> None:
    count = itertools.count(1)
    found = timing.interleaved({"a": lambda: next(count)}, rounds=50, warmup=0, seconds=0.0)
    assert found["a"].rounds <= 3
    found = timing.interleaved({"a": lambda: next(count)}, rounds=50, warmup=0)
    assert found["a"].rounds >= 50

"""Kernels compiled beforehand for a GPU that is not here, and found again without a compiler."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import structc
from structc import attend, ops
from structc.attention import Monarch, Polynomial, SparseLowRank, WindowSinks, kernels
from structc.attention.by_head import HeadGroup, text_of
from structc.codegen.cpu.samples import sample
from structc.codegen.triton import (
    aot,
    attention,
    bundle,
    bundle_attention,
    method_kernel,
    serve,
    timing,
)
from structc.codegen.triton.calls import AttentionCall, TileCall, recorded
from structc.codegen.triton.method_kernel import MethodCall
from structc.codegen.triton.serve import TUNED, bucket_of
from structc.codegen.triton.softmax import Shape
from structc.codegen.triton.targets import target_of
from structc.errors import ConfigError
from structc.forms import Convolve, Tile
from structc.reference import tile_reference
from structc.softmax import NOTHING, Extras, Softmax, softmax_reference

MONARCH = "block(4,12,10,1) permute(4,12) block(12,5,4,1) bias(60)"
CAUSAL = Shape(Softmax(0.25, causal=True), 16, 16)
Q = 0.3 * torch.randn(3, 1, 2, 200, 16)
METHODS = tuple(
    replace(call, dtype=torch.bfloat16)
    for method in (Polynomial(2, is_causal=True), SparseLowRank(20, 2), Monarch(14, 2))
    for call in recorded(lambda method=method: method(*Q))  # type: ignore[misc]
    if isinstance(call, MethodCall)
)
CALLS = (
    TileCall(MONARCH, torch.bfloat16, 37),
    TileCall(MONARCH, torch.bfloat16, 60),  # the same number of rows, in powers of two
    TileCall(str(Tile((Convolve.circulant(1 << 17),))), torch.float32, 5),
    AttentionCall(CAUSAL, torch.bfloat16, 64, 64),
    AttentionCall(Shape(Softmax(0.1), 300, 16), torch.float32, 64, 64),
    *METHODS,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("bundle") / "one"
    return folder, bundle.build(CALLS, target_of("cuda:90"), folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that has compiled nothing yet, and whose CPU looks for kernels."""
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    monkeypatch.setitem(ops.BACKENDS, "cpu", serve.__name__)
    monkeypatch.setattr(serve, "TUNED", TUNED)
    monkeypatch.setattr(attention, "TUNED", {})
    monkeypatch.setattr(method_kernel, "TUNED", {})
    ops.detach_all()
    TUNED.clear()
    yield tmp_path / "cache"
    ops.detach_all()
    TUNED.clear()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ways each re-ranking was given; it turns them round."""
    found: list[int] = []

    def ordered(ways: list[Any], call: Any) -> list[Any]:
        found.append(len(ways))
        call(ways[0])
        return ways[::-1]

    monkeypatch.setattr(timing, "ordered", ordered)
    return found


def test_what_a_bundle_holds(built: tuple[Path, list[Any]]) -> None:
    folder, found = built
    one, other, causal, wide, *methods = found
    assert isinstance(one, bundle.Built) and isinstance(other, bundle.Built)
    assert (len(one.plans), len(other.plans)) == (bundle.MANY, 0)
    assert "the FFT is a library's" in other.refusal and not one.refusal
    assert (
        isinstance(causal.call, AttentionCall) and len(causal.configs) == 2 and not causal.refusal
    )
    assert isinstance(wide.call, AttentionCall) and not wide.configs and "300" in wide.refusal
    assert all(isinstance(m.call, MethodCall) and len(m.configs) == 2 for m in methods)
    data = json.loads((folder / bundle.MANIFEST).read_text())
    assert [e["kernel"] for e in data["methods"]] == [
        "polynomial_states", "polynomial_outputs", "polynomial_states", "sparse_polynomial",
        "monarch_right", "monarch_left", "monarch_middle", "monarch_right", "monarch_left",
    ]  # fmt: skip
    (entry,) = data["programs"]
    assert (data["target"], entry["program"], entry["rows"]) == ("cuda:90", MONARCH, 64)
    for plan in entry["plans"]:
        assert plan["predicted_us"] > 0 and plan["spilled_bytes"] == 0
    names = {f.suffix for f in (folder / bundle.FOLDER).rglob("*") if f.is_file()}
    assert names == {".json", ".cubin"}


def test_a_gpu_machine_compiles_nothing(
    built: tuple[Path, list[Any]], cache: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(built[0], tmp_path / "elsewhere")
    assert structc.use_bundle(moved) == 2 + len({m.key for m in METHODS})
    plans = TUNED[MONARCH, torch.bfloat16][64].ways
    jobs = [j for p in plans for j in bundle._jobs(p, torch.bfloat16, target_of("cuda:90"))]
    (call,) = attention.TUNED
    own = attention.TUNED[call].ways
    assert call == CALLS[3] and len(own) == 2
    jobs += [bundle_attention._job(call, config, target_of("cuda:90")) for config in own]
    for launch in METHODS:
        own = method_kernel.TUNED[launch.key].ways
        jobs += [launch.job(config, "cuda:90") for config in own]
    shutil.rmtree(moved)
    found = aot.compiled(jobs, cache=cache)
    assert len(found) == len(jobs) and all(m.cached and m.status == "ok" for m in found)
    (other,) = aot.compiled(
        bundle._jobs(plans[0], torch.float16, target_of("cuda:90")), cache=cache
    )
    assert other.status == "ok" and not other.cached


def test_its_plans_are_what_runs(built: tuple[Path, list[Any]], cache: Path) -> None:
    inputs, weights = sample(Tile.parse(MONARCH), rows=40, dtype=torch.bfloat16)
    ops.tile(inputs, weights, MONARCH)  # found before there was a bundle
    structc.use_bundle(built[0])
    (y,) = ops.tile(inputs, weights, MONARCH)
    torch.testing.assert_close(y, tile_reference(inputs[0], weights, MONARCH), rtol=2e-2, atol=2e-2)
    served = ops._KERNELS[ops.tile_key(MONARCH, torch.bfloat16)][0][2]
    assert isinstance(served, serve.Served)
    first = served.attempts(40).ways[0]
    assert str(first.plan) == str(TUNED[MONARCH, torch.bfloat16][64].ways[0])


def test_the_first_call_may_rank_them_anew(
    built: tuple[Path, list[Any]], cache: Path, seen: list[int]
) -> None:
    structc.use_bundle(built[0], rerank=True)
    inputs, weights = sample(Tile.parse(MONARCH), rows=40, dtype=torch.bfloat16)
    for _ in range(2):
        ops.tile(inputs, weights, MONARCH)
    assert seen == [bundle.MANY]
    served = ops._KERNELS[ops.tile_key(MONARCH, torch.bfloat16)][0][2]
    assert isinstance(served, serve.Served)
    plans = TUNED[MONARCH, torch.bfloat16][64].ways
    assert [str(w.plan) for w in served.attempts(40).ways[:2]] == [str(p) for p in plans[::-1]]


def test_attention_takes_its_configs(
    built: tuple[Path, list[Any]], cache: Path, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attend.BACKENDS, "cpu", attention.__name__)
    attention.source_of.cache_clear()
    structc.use_bundle(built[0], rerank=True)
    q, k, v = torch.randn(3, 1, 2, 50, 16).bfloat16().unbind(0)
    for _ in range(2):
        o, _ = attend.attention(q, k, v, CAUSAL.form)
    want = softmax_reference(q.double(), k.double(), v.double(), CAUSAL.form, NOTHING)[0]
    torch.testing.assert_close(o.double(), want, rtol=3e-2, atol=3e-2)
    assert seen == [2]
    (call,) = attention.TUNED
    source = attention.source_of(CAUSAL, torch.bfloat16, "cuda:90")
    ways = source.left["forward", 64, 64].ways
    assert tuple(ways[:2]) == attention.TUNED[call].ways[::-1]
    attend.forget()
    attention.source_of.cache_clear()


def test_methods_take_their_configs(
    built: tuple[Path, list[Any]], cache: Path, backend: Any, seen: list[int]
) -> None:
    structc.use_bundle(built[0], rerank=True)
    given, method = Q.bfloat16(), Polynomial(2, is_causal=True)
    for _ in range(2):
        found = method(*given)
    assert seen == [2, 2]
    left = {key[1]: a.ways[:2] for key, a in method_kernel._tried.items()}
    for launch in METHODS[:2]:
        assert left[launch.kernel.name] == list(method_kernel.TUNED[launch.key].ways[::-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(kernels.BACKENDS, "cpu")
        torch.testing.assert_close(found, method(*given), rtol=3e-2, atol=3e-2)


def test_order_by_the_clock() -> None:
    times = {"slow": 3.0, "fast": 1.0, "middle": 2.0}
    now: list[str] = []

    def call(way: str) -> None:
        if way == "broken":
            raise RuntimeError("no")
        now.append(way)

    def clock(run: Any) -> float:
        run()
        return times[now[-1]]

    found = timing.ordered(["slow", "broken", "fast", "middle"], call, clock)
    assert found == ["fast", "middle", "slow", "broken"]
    assert timing.ordered(["slow", "fast"], call) == ["slow", "fast"]  # no GPU, no clock


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 9}, "format 9"),
        ({"target": "cuda:30"}, "damaged"),
        ({"programs": [{"program": MONARCH}]}, "damaged: KeyError"),
        (
            {"programs": [{"program": "nonsense", "dtype": "bf16", "rows": 1, "plans": []}]},
            "nonsense",
        ),
        ({"programs": 3}, "damaged"),
        ({"attention": [{"shape": 5}]}, "damaged: TypeError"),
        ({"methods": [{"kernel": 5}]}, "damaged: KeyError"),
        ({"methods": None}, "damaged"),
    ],
)
def test_damaged_bundles(
    built: tuple[Path, list[Any]], cache: Path, tmp_path: Path, change: Any, told: str
) -> None:
    copy = shutil.copytree(built[0], tmp_path / "copy")
    data = json.loads((copy / bundle.MANIFEST).read_text())
    (copy / bundle.MANIFEST).write_text(json.dumps({**data, **change}))
    with pytest.raises(ConfigError, match=told):
        structc.use_bundle(copy)
    assert not TUNED and not attention.TUNED and not cache.exists()


@pytest.mark.parametrize("change", [{"bm": 24}, {"bm": 0}, {"split": 0}])
def test_configs_that_no_kernel_takes(
    built: tuple[Path, list[Any]], cache: Path, tmp_path: Path, change: Any
) -> None:
    copy = shutil.copytree(built[0], tmp_path / "copy")
    data = json.loads((copy / bundle.MANIFEST).read_text())
    data["programs"][0]["plans"][0]["configs"][0].update(change)
    (copy / bundle.MANIFEST).write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="damaged"):
        structc.use_bundle(copy)


def test_no_bundle_and_no_room_for_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no bundle"):
        structc.use_bundle(tmp_path)
    with pytest.raises(ConfigError, match="exists"):
        bundle.build(CALLS, target_of("cuda:90"), tmp_path)
    with pytest.raises(ConfigError, match="no folder"):
        bundle.build(CALLS, target_of("cuda:90"), tmp_path / "a" / "b")


def test_what_a_model_calls() -> None:
    x, w, bias = torch.randn(2, 3, 8), torch.randn(1, 4, 8, 1), torch.randn(5)

    def call() -> None:
        ops.tile([x], [w], "block(1,4,8,1)")
        ops.dense(x, torch.randn(5, 8), bias, "relu")
        ops.dense(x, torch.randn(5, 8), bias)  # the vendor's
        ops.tile([x[:, :0]], [w], "block(1,4,8,1)")  # no rows
        ops.tile([x], [w], "block(1,4,8,1)")

    found = recorded(call)
    assert found == (
        TileCall("block(1,4,8,1)", torch.float32, 6),
        TileCall("block(1,5,8,1) bias(5) act(relu,5)", torch.float32, 6),
    )
    assert bucket_of(6) == 8


def test_which_launches_of_methods_a_model_makes() -> None:
    """Those of an attention by heads too, whatever its plain form does."""
    own = HeadGroup(Polynomial(2, is_causal=True), (0,), 16, 4096)
    form = str(Softmax(0.3, causal=True))

    def call() -> None:
        torch.ops.structc.attention_by_head(*Q, None, form, text_of([own]))

    found = [c for c in recorded(call) if isinstance(c, MethodCall)]
    assert [c.kernel.name for c in found] == ["polynomial_states", "polynomial_outputs"]
    assert kernels.kernel_for("polynomial", *Q) is None  # as before


def test_which_attention_a_model_calls() -> None:
    q, k, v = torch.randn(3, 1, 2, 20, 8).unbind(0)
    form = Softmax(0.3, causal=True)
    own = HeadGroup(WindowSinks(4, 1, is_causal=True), (0,), 16, 4096)

    def call() -> None:
        attend.attention(q, k, v, form, Extras(keys=torch.ones(1, 20, dtype=torch.bool)))
        torch.ops.structc.attention_by_head(q, k, v, None, str(form), text_of([own]))

    padded, first, second = recorded(call)
    assert isinstance(padded, AttentionCall) and padded.shape.shown and padded.queries == 32
    assert isinstance(first, AttentionCall) and first.shape.form.window == 4
    assert isinstance(second, AttentionCall) and not second.shape.form.window

"""The public API end to end, on small models and without timing anything."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from zoo import ZOO, Counter, floats, ids, refusals_in, run, sequential

import structc
from structc import Budget, ops
from structc.compiled import CompiledModel
from structc.families import AbstractStructured, Dense, LowRank
from structc.numerics import output_error, relative_error

WIDTH = 192


class Mlp(nn.Module):
    """Wide enough that the cost model sees low rank pay."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.mid, self.down = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(F.gelu(self.mid(F.relu(self.up(x))))) * scale


def mlp() -> Mlp:
    torch.manual_seed(3)
    return Mlp().eval()


def inputs(rows: int, seed: int = 0) -> Tensor:
    """Inputs that live in 24 of the dimensions, as activations do."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(99)) / 5
    return torch.randn(rows, 24, generator=g) @ basis


def batches(count: int = 8) -> list[Tensor]:
    return [inputs(96, seed) for seed in range(count)]


APPROXIMATE: dict[str, Any] = {
    "calibration": batches(),
    "budget": Budget(error=0.2),
    "effort": "none",
}


def compiled(model: nn.Module, example: Any, **options: Any) -> CompiledModel:
    return structc.compile(model, example, **{"effort": "none", **options})


@pytest.fixture(scope="module")
def approximate() -> tuple[Mlp, CompiledModel]:
    """One approximate product that several tests look at and none changes."""
    model = mlp()
    return model, structc.compile(model, inputs(512), **APPROXIMATE)


def calls_in(f: Callable[[], Any]) -> int:
    before = ops.call_count()
    with torch.no_grad():
        f()
    return ops.call_count() - before


def forced_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the cost model name a kernel of our own, so that dense sites are rewritten too."""
    monkeypatch.setattr("structc.passes.trial.EXACT_KERNELS", ())


# ---------------------------------------------------------------------------- budgets


def test_an_error_budget_holds_on_data_that_nobody_fitted(
    approximate: tuple[Mlp, CompiledModel],
) -> None:
    model, fast = approximate
    families = {c.family for c in fast.plan.choices.values()}
    assert families != {"dense"}, "nothing was approximated: the test shows nothing"
    assert isinstance(fast, Mlp) and isinstance(fast, CompiledModel)
    with torch.no_grad():
        for seed in (50, 51):
            x = inputs(96, seed)
            error = output_error(fast(x), model(x))
            assert 1e-6 < error < 0.25
    data = fast.report.to_dict()
    assert data["verification"]["held"] and data["verification"]["error"] <= 0.2
    assert set(fast.plan.choices) == {"up", "mid", "down"}
    assert sum(p.numel() for p in fast.parameters()) < sum(p.numel() for p in model.parameters())


def test_the_exact_tier_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    forced_dense(monkeypatch)
    model, x = mlp(), inputs(64)
    fast = compiled(model, x)
    assert all(isinstance(m, Dense) for m in (fast.up, fast.mid, fast.down))
    with torch.no_grad():
        assert output_error(fast(x), model(x)) < 1e-5
    assert fast.up.weight is model.up.weight
    assert calls_in(lambda: fast(x)) == 3


def test_a_metric_budget_asks_the_metric() -> None:
    model, seen = mlp(), []

    def metric(candidate: nn.Module, part: str) -> float:
        seen.append(part)
        x = inputs(64, 70 if part == "select" else 71)
        return 1.0 - output_error(candidate(x), model(x))

    fast = structc.compile(
        model,
        inputs(512),
        **{**APPROXIMATE, "budget": Budget(metric=metric, max_drop=0.05)},
    )
    assert {"select", "verify"} == set(seen)
    assert metric(fast, "verify") >= 0.95
    assert fast.report.to_dict()["verification"]["metric_name"] == "metric"


@pytest.mark.parametrize(
    "metric, word",
    [
        (lambda m: float("nan"), "nan"),
        (lambda m: float("inf"), "inf"),
        (lambda m: 1 / 0, "ZeroDivisionError"),
        (lambda m: "good", "ValueError"),
        (lambda m: None, "TypeError"),
    ],
    ids=["nan", "inf", "raises", "text", "none"],
)
def test_a_metric_that_fails_on_the_original_is_the_users_error(metric: Any, word: str) -> None:
    with pytest.raises(structc.ConfigError, match=f"metric.*{word}"):
        structc.compile(
            mlp(), inputs(512), **{**APPROXIMATE, "budget": Budget(metric=metric, max_drop=0.1)}
        )


def test_a_metric_that_fails_on_a_candidate_rejects_it() -> None:
    def metric(candidate: nn.Module) -> float:
        if isinstance(candidate.up, LowRank):
            raise RuntimeError("boom")
        return 1.0

    fast = structc.compile(
        mlp(), inputs(512), **{**APPROXIMATE, "budget": Budget(metric=metric, max_drop=0.5)}
    )
    assert not isinstance(fast.up, LowRank)


@pytest.mark.parametrize("demand", [{"latency": 0.01}, {"params": 0.001}], ids=str)
def test_a_demand_that_quality_does_not_allow_carries_the_best_model(
    demand: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "latency" in demand:
        from structc.passes.race import Raced
        from structc.records import Timed

        times = {n: Timed(t, t, 0.0, 9) for n, t in (("eager", 2.0), ("structc", 1.0))}

        def race(model: Any, example: Any, plain: Any, *_: Any) -> Raced:
            return Raced(plain[0], "graph", times)

        monkeypatch.setattr("structc.passes.acceptance.race", race)
    model = mlp()
    budget = Budget(error=0.05, **demand)
    with pytest.raises(structc.BudgetNotMet, match=next(iter(demand))) as caught:
        structc.compile(model, inputs(512), **{**APPROXIMATE, "budget": budget})
    result = caught.value.result
    assert isinstance(result, Mlp) and isinstance(result, CompiledModel)
    with torch.no_grad():
        assert output_error(result(inputs(96, 60)), model(inputs(96, 60))) < 0.08


def test_without_data_fits_know_no_data_and_the_report_says_so() -> None:
    model = mlp()
    fast = structc.compile(model, inputs(512), budget=Budget(error=0.9), effort="none")
    text = str(fast.report)
    assert "none was used" in " ".join(text.split())
    assert fast.report.to_dict()["verification"]["error"] <= 0.9


def test_config_decides_and_ignore_leaves_alone() -> None:
    options = {**APPROXIMATE, "budget": Budget(error=0.9, params="99%")}
    fast = structc.compile(
        mlp(),
        inputs(512),
        config={"mid": {"family": "low_rank", "rank": 33}, "_default": None},
        ignore=["up"],
        **options,
    )
    assert isinstance(fast.mid, LowRank) and fast.mid.hyper() == {"rank": 33}
    assert type(fast.up) is nn.Linear and type(fast.down) is nn.Linear
    assert "up" not in fast.plan.choices
    assert any(r["code"] == "IGNORED" for r in refusals_in(fast.report.to_dict()))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ignore": ["midd"]}, ["'midd'", "mid"]),
        ({"ignore": "re:.*attn.*"}, ["re:.*attn.*"]),
        ({"config": {"upp": None}}, ["'upp'", "'up'"]),
        ({"ignore": ["re:("]}, ["regular expression"]),
        ({"config": {"up": "lowrank"}}, ["lowrank", "low_rank"]),
        ({"config": {"up": {"rank": 4}}}, ["family"]),
        ({"config": {"up": {"family": "low_rank", "rank": "4"}}}, ["rank"]),
        ({"config": {"up": {"family": "low_rank", "ranks": 4}}}, ["ranks"]),
        ({"config": {"up": {"family": "monarch", "rank": 4}}}, ["in_blocks"]),
        ({"effort": "fast"}, ["effort", "none", "quick"]),
    ],
    ids=lambda v: str(v)[:40],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(structc.ConfigError) as caught:
        structc.compile(mlp(), inputs(64), **{**APPROXIMATE, **options})
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_the_same_seed_gives_the_same_bits(approximate: tuple[Mlp, CompiledModel]) -> None:
    _, first = approximate
    torch.rand(17)
    again = structc.compile(mlp(), inputs(512), **APPROXIMATE)
    assert {n: str(c) for n, c in again.plan.choices.items()} == {
        n: str(c) for n, c in first.plan.choices.items()
    }
    one, two = first.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---------------------------------------------------------------------------- inputs


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor, *, shift: float = 0.0, flag: bool = False) -> dict[str, Tensor]:
        return {"y": self.layer(x) + shift, "z": x if flag else -x}


@pytest.mark.parametrize(
    "example",
    [
        floats(3, 6),
        (floats(3, 6),),
        [floats(3, 6)],
        {"x": floats(3, 6)},
        {"x": floats(3, 6), "shift": 1.0},
        ((floats(3, 6),), {"flag": True}),
    ],
    ids=["tensor", "tuple", "list", "dict", "dict-option", "tuple-dict"],
)
def test_every_form_of_example_inputs(example: Any) -> None:
    model = Named()
    fast = compiled(model, example)
    for options in ({}, {"shift": 1.0}, {"flag": True}):
        with torch.no_grad():
            got, want = fast(floats(5, 6), **options), model(floats(5, 6), **options)
        assert got.keys() == want.keys() and output_error(got, want) < 1e-6


@pytest.mark.parametrize("attribute", ["dummy_inputs", "example_input_array"])
def test_models_that_bring_their_own_inputs(attribute: str) -> None:
    model = sequential()
    setattr(
        model, attribute, floats(3, 12) if attribute != "dummy_inputs" else {"input": floats(3, 12)}
    )
    assert structc.compile(model, effort="none").plan is not None


def test_without_any_inputs_the_first_call_compiles() -> None:
    model = sequential().eval()
    fast = structc.compile(model, effort="none")
    assert isinstance(fast, nn.Sequential) and fast is not model and not hasattr(fast, "plan")
    with torch.no_grad():
        y = fast(floats(3, 12))
    assert output_error(y, model(floats(3, 12))) < 1e-6
    assert set(fast.plan.choices) == {"0", "2"} and fast.report is not None
    assert not hasattr(model, "plan")


def test_deferred_models_keep_a_state_dict_meanwhile() -> None:
    model = sequential()
    fast = structc.compile(model, effort="none")
    assert fast.state_dict().keys() == model.state_dict().keys()


def generator() -> Iterator[Tensor]:
    yield from batches(3)


DATA: dict[str, Any] = {
    "tensor": inputs(96),
    "tuple": (inputs(96),),
    "dict": {"x": inputs(96)},
    "tuple-dict": ((inputs(96),), {"scale": 2.0}),
    "list-of-tensors": batches(3),
    "list-of-dicts": [{"x": b} for b in batches(3)],
    "list-of-tuples": [(b,) for b in batches(3)],
    "generator": generator(),
    "callable": lambda: batches(3),
    "generator-function": generator,
    "loader": DataLoader(TensorDataset(inputs(96)), batch_size=16),
}


@pytest.mark.parametrize("data", DATA.values(), ids=DATA.keys())
def test_every_form_of_calibration_data(data: Any) -> None:
    fast = structc.compile(
        mlp(), inputs(512), **{**APPROXIMATE, "calibration": data, "budget": Budget(error=0.4)}
    )
    report = fast.report.to_dict()
    assert "none was used" not in " ".join(str(fast.report).split())
    assert report["verification"]["error"] <= 0.4


@pytest.mark.parametrize(
    "data",
    [[], (), {}, iter([]), lambda: None, list, 7, [7], [None], "text", [inputs(4).T],
     [{"y": inputs(4)}], lambda: 1 / 0],
    ids=["list", "tuple", "dict", "iterator", "none", "empty-call", "number", "numbers", "nones",
         "text", "shape", "keys", "raises"],
)  # fmt: skip
def test_data_that_are_none_are_an_error(data: Any) -> None:
    with pytest.raises((structc.CalibrationError, structc.ConfigError)) as caught:
        structc.compile(mlp(), inputs(512), **{**APPROXIMATE, "calibration": data})
    assert not isinstance(caught.value, structc.InternalError) and len(str(caught.value)) > 20


# ---------------------------------------------------------------------------- the original


def test_the_original_is_untouched() -> None:
    model = Counter()
    model.inner[2].eval()
    model.inner[0].weight.requires_grad_(False)
    hook = model.inner[1].register_forward_hook(lambda *_: None)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = {n: {k: id(v) for k, v in m.__dict__.items()} for n, m in model.named_modules()}
    modes = {n: m.training for n, m in model.named_modules()}
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    rng = torch.random.get_rng_state()
    fast = compiled(model, floats(4, 12))
    assert torch.equal(torch.random.get_rng_state(), rng)
    with torch.no_grad():
        fast(floats(4, 12))
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads
    now = {n: {k: id(v) for k, v in m.__dict__.items()} for n, m in model.named_modules()}
    for name in before:
        assert now[name].keys() == before[name].keys(), name
        same = {k for k in before[name] if now[name][k] == before[name][k]}
        assert same >= before[name].keys() - {"training"}, name
    assert list(model.inner[1]._forward_hooks) == [hook.id]
    assert int(model.calls) == 0 and int(fast.calls) == 1


def test_modes_come_back_when_compiling_fails() -> None:
    model = Counter().train()
    with pytest.raises(structc.CaptureError):
        compiled(model, floats(4, 11))
    assert all(m.training for m in model.modules()) and int(model.calls) == 0


def test_compile_in_place_is_the_same_object() -> None:
    model = mlp()
    with torch.no_grad():
        want = model(inputs(64, 9))
    again = structc.compile_(model, inputs(512), **APPROXIMATE)
    assert again is model and isinstance(model, CompiledModel) and isinstance(model, Mlp)
    with torch.no_grad():
        assert 1e-6 < output_error(model(inputs(64, 9)), want) < 0.25
    assert model.plan is again.plan
    with pytest.raises(structc.ConfigError, match="original"):
        structc.compile(model, inputs(512), **APPROXIMATE)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(inputs(8)), model(inputs(8)))
        twin.down.bias += 1
        assert not torch.equal(twin(inputs(8)), model(inputs(8))), "its graph reads its own factors"


def test_compile_in_place_without_inputs_changes_nothing() -> None:
    model = mlp()
    before, kind = dict(model.__dict__), type(model)
    with pytest.raises(structc.ConfigError, match="compile_: the model brings") as caught:
        structc.compile_(model, effort="none")
    assert caught.value.hint and type(model) is kind and model.__dict__ == before
    with pytest.raises(TypeError, match="no_such_option"):
        structc.compile_(model, inputs(8), no_such_option=1)
    model.example_input_array = inputs(8)
    assert structc.compile_(model, effort="none") is model and isinstance(model, CompiledModel)


@pytest.mark.parametrize("where", ["weight", "buffer"])
def test_models_on_other_devices_are_refused_before_anything_runs(where: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = sequential()
    with FakeTensorMode():  # a tensor on a device that this machine need not have
        elsewhere = torch.empty(12, device="cuda")
    if where == "buffer":
        model.register_buffer("somewhere", elsewhere)
    else:
        model.register_parameter("somewhere", nn.Parameter(elsewhere))
    model.register_forward_pre_hook(lambda *_: pytest.fail("it ran"))
    for call in (structc.compile, structc.compile_, structc.inspect):
        with pytest.raises(structc.UnsupportedModel, match="somewhere is on cuda") as caught:
            call(model, floats(2, 12))
        assert "CPU" in caught.value.hint
    late = sequential()
    deferred = structc.compile(late, effort="none")
    late.register_buffer("somewhere", elsewhere)
    with pytest.raises(structc.UnsupportedModel, match="cuda"):
        deferred(floats(2, 12))


class Classes(nn.Module):
    """Says nothing but the number of the best class, or hides its floats in an object."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.inner, self.plain = Mlp(), plain

    def forward(self, x: Tensor) -> Any:
        logits = self.inner(x)
        if not self.plain:
            return logits.argmax(-1)
        answer = type("Answer", (), {})()
        answer.logits = logits
        return answer


@pytest.mark.parametrize("plain", [False, True], ids=["argmax", "object"])
def test_an_error_budget_sees_outputs_of_any_kind(plain: bool) -> None:
    model = Classes(plain).eval()
    fast = structc.compile(model, inputs(96), **{**APPROXIMATE, "budget": Budget(error=0.01)})
    verification = fast.report.to_dict()["verification"]
    with torch.no_grad():
        for seed in (50, 51):
            got, want = fast(inputs(96, seed)), model(inputs(96, seed))
            if plain:
                assert relative_error(got.logits, want.logits) < 0.03
            else:
                assert float((got != want).double().mean()) < 0.03
    assert verification["held"] and verification["error"] <= 0.01


def test_compile_in_place_frees_what_it_replaces() -> None:
    model = mlp()
    old = weakref.ref(model.up.weight)
    structc.compile_(model, inputs(512), **APPROXIMATE)
    assert isinstance(model.up, AbstractStructured)
    gc.collect()
    assert old() is None


def test_compiling_a_compiled_model_starts_from_its_original(
    approximate: tuple[Mlp, CompiledModel],
) -> None:
    model, fast = approximate
    again = structc.compile(fast, inputs(512), **APPROXIMATE)
    state, first = again.state_dict(), fast.state_dict()
    assert state.keys() == first.keys() and all(torch.equal(state[k], first[k]) for k in state)
    exact = compiled(fast, inputs(64))
    with torch.no_grad():
        assert output_error(exact(inputs(64)), model(inputs(64))) < 1e-5


def test_compiling_a_compiled_model_without_its_original_says_so() -> None:
    fast = compiled(mlp(), inputs(64))
    gc.collect()
    with pytest.raises(structc.ConfigError, match="original"):
        compiled(fast, inputs(64))


def test_inspect_fits_nothing_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("inspect fitted something")

    monkeypatch.setattr(LowRank, "fit", never)
    monkeypatch.setattr(LowRank, "curve", never)
    model = mlp().train()
    report = structc.inspect(model, inputs(512), ignore=["down"])
    assert model.training
    text = str(report)
    assert "up" in text and "mid" in text
    assert len(report.to_dict()["sites"]) == 2
    with pytest.raises(structc.ConfigError, match="example_inputs"):
        structc.inspect(mlp())


# ---------------------------------------------------------------------------- the product


class Owner(nn.Module):
    """A model that has names of its own where structc would put some."""

    report = "mine"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.plan = {"a": 1}

    def save(self) -> str:
        return "saved"

    def embed(self, x: Tensor) -> Tensor:
        return self.layer(x).sum(-1)

    def both(self, x: Tensor) -> Tensor:
        return self(x) + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_names_of_the_users_model_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    forced_dense(monkeypatch)
    fast = compiled(Owner(), floats(4, 6))
    assert (fast.report, fast.plan, fast.save()) == ("mine", {"a": 1}, "saved")
    assert set(fast.structc.plan.choices) == {"layer"} and fast.structc.report is not None


def test_methods_of_the_model_run_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    forced_dense(monkeypatch)
    model = Owner()
    fast = compiled(model, floats(4, 6))
    x = floats(3, 6)
    assert calls_in(lambda: fast.embed(x)) == 1
    assert calls_in(lambda: fast.both(x)) == 1
    with torch.no_grad():
        assert torch.allclose(fast.embed(x), model.embed(x), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generate_runs_compiled_code_and_says_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced_dense(monkeypatch)
    model = ZOO[name].model()
    fast = compiled(model, ZOO[name].call())
    prompt, tokens = ids(2, 5), 6
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    want = model.generate(prompt, attention_mask=mask, **options)
    before = ops.call_count()
    got = fast.generate(prompt, attention_mask=mask, **options)
    count = ops.call_count() - before
    assert torch.equal(got, want)
    sites = len(fast.plan.choices)
    assert count >= tokens * sites, f"{count} operator calls for {tokens} tokens, {sites} sites"


def test_a_deepcopy_is_a_product_of_its_own(approximate: tuple[Mlp, CompiledModel]) -> None:
    _, fast = approximate
    twin = copy.deepcopy(fast)
    x = inputs(16, 5)
    with torch.no_grad():
        want = fast(x)
        assert torch.equal(twin(x), want)
        assert calls_in(lambda: twin(x)) == calls_in(lambda: fast(x)) >= 1
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(fast(x), want) and float(twin(x).abs().max()) == 0.0
    assert twin.plan is fast.plan


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_product_is_saved_and_not_pickled(
    approximate: tuple[Mlp, CompiledModel], protocol: int
) -> None:
    with pytest.raises(structc.ConfigError, match=r"model\.save\(path\)"):
        pickle.dumps(approximate[1], protocol)


def test_a_shallow_copy_keeps_its_class(approximate: tuple[Mlp, CompiledModel]) -> None:
    _, fast = approximate
    twin = copy.copy(fast)
    assert type(twin) is type(fast) and torch.equal(twin(inputs(3)), fast(inputs(3)))


def test_state_dict_round_trip(approximate: tuple[Mlp, CompiledModel]) -> None:
    _, fast = approximate
    twin = copy.deepcopy(fast)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.uniform_()
    assert not twin.load_state_dict(fast.state_dict()).missing_keys
    with torch.no_grad():
        assert torch.equal(twin(inputs(8)), fast(inputs(8)))


def test_a_training_step_reaches_the_factors(approximate: tuple[Mlp, CompiledModel]) -> None:
    _, fast = approximate
    product = copy.deepcopy(fast).train()
    x, y = inputs(64, 8), inputs(64, 9)
    optimizer = torch.optim.SGD(product.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(product(x), y)
        loss.backward()
        assert all(
            p.grad is not None and bool(p.grad.abs().sum() > 0) for p in product.parameters()
        )
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0]
    product.eval()
    with torch.no_grad():
        trained = product(x)
        structc.reset()
        assert torch.allclose(product(x), trained), "no packed weight is older than the factors"


@pytest.mark.parametrize("dynamic", [True, False])
def test_torch_compile_takes_a_product_whole(
    approximate: tuple[Mlp, CompiledModel], dynamic: bool
) -> None:
    _, fast = approximate
    torch._dynamo.reset()
    whole = torch.compile(fast, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with torch.no_grad():
        assert output_error(whole(inputs(8)), fast(inputs(8))) < 1e-5
        assert output_error(whole(inputs(5)), fast(inputs(5))) < 1e-5
    torch._dynamo.reset()


def test_the_fast_path_of_the_encoder_reads_right_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.TransformerEncoderLayer reads ``linear1.weight`` itself where it may."""
    forced_dense(monkeypatch)
    case = ZOO["encoder"]
    model = case.model()
    fast = compiled(model, floats(2, 7, 32))
    for runner_active in (True, False):
        fast.__dict__["_structc_runner"].active = runner_active
        with torch.no_grad():
            assert output_error(run(fast, case.call(3, 5)), run(model, case.call(3, 5))) < 1e-5
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 4:] = True
    x = floats(2, 7, 32)
    with torch.no_grad():
        got = fast(x, src_key_padding_mask=mask)
        want = model(x, src_key_padding_mask=mask)
    assert output_error(got, want) < 1e-5


def test_half_precision_move_of_a_product(approximate: tuple[Mlp, CompiledModel]) -> None:
    _, fast = approximate
    half = copy.deepcopy(fast).to(torch.bfloat16)
    with torch.no_grad():
        y = half(inputs(8).bfloat16())
        assert y.dtype == torch.bfloat16
        assert output_error(y.float(), fast(inputs(8))) < 5e-2


def test_a_report_prints_and_explains(approximate: tuple[Mlp, CompiledModel]) -> None:
    _, fast = approximate
    assert "up" in str(fast.report)
    said = fast.plan.explain("up")
    assert said.startswith("up: ") and "over the best dense kernel" in said
    assert fast.plan.explain("down") not in said and "cost" in said
    with pytest.raises(structc.ConfigError, match="'upp'"):
        fast.plan.explain("upp")


# ---------------------------------------------------------------------------- interruption


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler, which a run in the background of a script does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_somebody_swallows_still_counts(ctrl_c: None, tmp_path: Path) -> None:
    """Python drops what a signal handler raises inside a destructor or a library's callback."""

    def swallow(stage: str, done: int, total: int) -> None:
        if stage == "calibrate":
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.01)

    before = signal.getsignal(signal.SIGINT)
    options = {**APPROXIMATE, "work_dir": tmp_path / "work"}
    with pytest.raises(structc.Interrupted):
        structc.compile(mlp(), inputs(512), progress=swallow, **options)
    assert signal.getsignal(signal.SIGINT) is before
    assert structc.compile(mlp(), inputs(512), **options).plan.choices


def interrupted_at(n: int) -> Callable[[str, int, int], None]:
    """A progress callback that is interrupted at its n-th call."""
    count = [0]

    def progress(stage: str, done: int, total: int) -> None:
        count[0] += 1
        if count[0] == n:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("n", [1, 3, 9, 12, 15, 18])
def test_an_interrupted_conversion_goes_on_where_it_was(
    n: int, tmp_path: Path, approximate: tuple[Mlp, CompiledModel]
) -> None:
    _, whole = approximate
    options = {**APPROXIMATE, "work_dir": tmp_path / "work"}
    model = mlp().train()
    with pytest.raises(structc.Interrupted, match="work") as caught:
        structc.compile(model, inputs(512), progress=interrupted_at(n), **options)
    assert "same command" in str(caught.value)
    assert model.training
    fast = structc.compile(mlp(), inputs(512), **options)
    one, two = whole.state_dict(), fast.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_another_metric_of_the_same_name_is_another_conversion(tmp_path: Path) -> None:
    def quality(model: nn.Module) -> float:
        return 1.0

    first, old = quality, quality.__name__

    def quality(model: nn.Module) -> float:  # type: ignore[no-redef]
        return 2.0

    assert quality.__name__ == old
    options = {**APPROXIMATE, "work_dir": tmp_path}
    for metric in (first, quality):
        options["budget"] = Budget(metric=metric, max_drop=0.1)
        kind = structc.Interrupted if metric is first else structc.ResumeMismatch
        with pytest.raises(kind, match="metric was" if metric is quality else ""):
            structc.compile(mlp(), inputs(512), progress=interrupted_at(3), **options)


def test_the_second_run_takes_up_the_first_ones_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**APPROXIMATE, "work_dir": tmp_path}
    first = structc.compile(mlp(), inputs(512), **options)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("finished work was done again")

    monkeypatch.setattr("structc.passes.calibrate.forward", never)
    monkeypatch.setattr(LowRank, "curve", never)
    second = structc.compile(mlp(), inputs(512), **options)
    assert {n: str(c) for n, c in second.plan.choices.items()} == {
        n: str(c) for n, c in first.plan.choices.items()
    }


def test_without_a_folder_an_interruption_is_the_users_own() -> None:
    with pytest.raises(KeyboardInterrupt):
        structc.compile(mlp(), inputs(512), progress=interrupted_at(3), **APPROXIMATE)


@pytest.mark.parametrize(
    "change, field",
    [
        ({"seed": 1}, "seed"),
        ({"budget": Budget(error=0.1)}, "budget"),
        ({"calibration": batches(3)}, "data"),
        ({"ignore": ["up"]}, "ignore"),
        ({"config": {"up": None}}, "config"),
        ({"model": sequential(WIDTH, WIDTH, WIDTH)}, "model"),
        ({"example": inputs(16)}, "data"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_the_work_of_another_conversion_is_not_taken(
    change: dict[str, Any], field: str, tmp_path: Path
) -> None:
    options = {**APPROXIMATE, "work_dir": tmp_path}
    with pytest.raises(structc.Interrupted):
        structc.compile(mlp(), inputs(512), progress=interrupted_at(3), **options)
    options |= change
    with pytest.raises(structc.ResumeMismatch, match=f"{field} was"):
        structc.compile(options.pop("model", mlp()), options.pop("example", inputs(512)), **options)


def test_outputs_that_are_not_finite_are_told() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    fast = structc.compile(model, torch.full((3, 6), float("nan")), effort="none")
    assert any("NaN or infinities" in note for note in fast.report.to_dict()["notes"])
    again = structc.compile(model, torch.randn(3, 6), effort="none")
    assert not any("NaN or infinities" in note for note in again.report.to_dict()["notes"])


def test_a_rank_that_the_layer_has_not_is_refused() -> None:
    model, budget = nn.Sequential(nn.Linear(16, 16)), structc.Budget(error=0.9)
    config = {"0": {"family": "low_rank", "rank": 99}}
    fast = structc.compile(model, torch.randn(4, 16), budget=budget, config=config, effort="none")
    assert any("not in 1..16" in r["reason"] for r in fast.report.to_dict()["refusals"])

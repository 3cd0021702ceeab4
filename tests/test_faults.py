"""Bad input: each gets a typed error or a refusal with its reason, and nothing is lost."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from zoo import Experts, floats, refusals_in, sequential

import structc
from structc import Budget
from structc.numerics import output_error, tolerance

SPEND: dict[str, Any] = {
    "effort": "none",
    "budget": Budget(error=0.5, params="99%"),
}


def compiled(model: nn.Module, example: Any, **options: Any) -> Any:
    return structc.compile(model, example, **{**SPEND, **options})


def codes(fast: Any) -> set[str]:
    return {r["code"] for r in refusals_in(fast.report.to_dict())}


# ---------------------------------------------------------------------------- dtypes and sizes


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "spend"])
def test_models_of_every_dtype_keep_it(dtype: torch.dtype, exact: bool) -> None:
    model = sequential().to(dtype).eval()
    x = floats(6, 12).to(dtype)
    budget = Budget() if exact else Budget(error=0.9, params="99%")
    fast = compiled(model, x, budget=budget, calibration=[x, x * 0.5, -x])
    with torch.no_grad():
        y, want = fast(x), model(x)
    assert y.dtype == dtype and {p.dtype for p in fast.parameters()} == {dtype}
    assert output_error(y, want) <= (tolerance(dtype) if exact else 0.9)


@pytest.mark.parametrize(
    "n, hidden, m",
    [(1, 7, 1), (13, 17, 11), (1, 1, 1), (12, 1, 8), (0, 4, 3), (4, 0, 3), (4, 4, 0)],
    ids=lambda v: str(v),
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_sizes_that_are_prime_one_or_zero(n: int, hidden: int, m: int) -> None:
    model = sequential(n, hidden, m).eval()
    x = floats(5, n)
    fast = compiled(model, x, budget=Budget(error=0.9), calibration=[x, x, x])
    for batch in (5, 1, 0, 2):
        with torch.no_grad():
            got, want = fast(floats(batch, n)), model(floats(batch, n))
        assert got.shape == want.shape
        assert got.numel() == 0 or torch.allclose(got, want, atol=0.9 * float(want.norm()) + 1e-5)
    assert structc.inspect(model, x) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_weights_that_are_not_finite_stay_as_they_are(value: float) -> None:
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48)).eval()
    with torch.no_grad():
        model[0].weight[3, 5] = value
    config = {"_default": {"family": "low_rank", "rank": 4}}
    fast = compiled(model, floats(6, 48), config=config, budget=Budget(error=0.9))
    assert type(fast[0]) is nn.Linear or fast.plan.choices["0"].family == "dense"
    assert "NONFINITE" in codes(fast)
    with torch.no_grad():
        a, b = fast[0](floats(6, 48)), model[0](floats(6, 48))
    assert torch.equal(a.isfinite(), b.isfinite())


# ---------------------------------------------------------------------------- kinds of models


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(48, 48), nn.Linear(48, 48, bias=False)
            self.body = nn.Linear(48, 48)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(self.embed(x)))

    model, x = Tied().eval(), torch.arange(12).view(3, 4)
    fast = structc.compile(
        model, x, calibration=[x, x + 7, x + 20], budget=Budget(error=0.9), effort="none"
    )
    assert fast.head.weight is fast.embed.weight is model.embed.weight
    assert fast.plan.choices["head"].family == "dense"


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_and_train_mode_are_restored(p: float) -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Dropout(p), nn.Linear(12, 12)).train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    fast = compiled(model, floats(6, 12))
    assert [m.training for m in model.modules()] == modes
    x = floats(6, 12)
    with torch.no_grad():
        want = model.eval()(x)
        assert output_error(fast(x), want) <= 0.5
    again = fast.train()(x), fast(x)
    assert p == 0.0 or not torch.equal(*again), "dropout drops in train mode"


def test_parametrized_layers_are_left_alone() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(12, 12)), nn.ReLU(), nn.Linear(12, 12)
    ).eval()
    fast = compiled(model, floats(6, 12))
    assert set(fast.plan.choices) == {"2"} and "PARAMETRIZED" in codes(fast)
    with torch.no_grad():
        assert output_error(fast(floats(4, 12)), model(floats(4, 12))) <= 0.5


def test_hooks_of_the_user_keep_firing() -> None:
    model, seen = sequential().eval(), []
    model[0].register_forward_hook(lambda *_: seen.append("layer"))
    model.register_forward_pre_hook(lambda *_: seen.append("model"))
    fast = compiled(model, floats(6, 12))
    seen.clear()
    with torch.no_grad():
        fast(floats(4, 12))
    assert seen == ["model", "layer"] and "HOOKS" in codes(fast)


class Merging(nn.Linear):
    """An adapter that ``train(False)`` merges into the weight, as libraries do."""

    def __init__(self) -> None:
        super().__init__(12, 12)
        self.adapter = nn.Parameter(0.1 * torch.randn(12, 12))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += -self.adapter.data if mode else self.adapter.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + F.linear(x, self.adapter)


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_train_and_eval_move_stay(training: bool) -> None:
    model = nn.Sequential(Merging(), nn.ReLU(), nn.Linear(12, 12)).train(training)
    x = floats(6, 12)
    with torch.no_grad():
        want, before = model(x), model[0].weight.clone()
        fast = compiled(model, x, budget=Budget())
        assert torch.equal(model[0].weight, before) and torch.equal(model(x), want)
        assert output_error(fast(x), want) < 1e-5 and not fast.training
    assert all(m.training == training for m in model.modules())


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        x -= 1
        return self.inner(x)


@pytest.mark.parametrize("effort", ["none", "quick"])
def test_the_users_example_is_not_written(effort: str) -> None:
    model, x = InPlace().eval(), floats(6, 12)
    before = x.clone()
    compiled(model, x, effort=effort)
    assert torch.equal(x, before)
    structc.inspect(model, x)
    assert torch.equal(x, before)
    waiting = compiled(model, None, effort="none")
    with torch.no_grad():
        y = waiting(x)
        assert torch.equal(x, before - 1), "the call itself writes, and once"
        assert output_error(y, model(before.clone())) <= 0.5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["script", "trace", "freeze"])
def test_a_scripted_child_stays_as_it_is(kind: str) -> None:
    inner = nn.Sequential(nn.Linear(12, 12), nn.ReLU()).eval()
    made = torch.jit.trace(inner, floats(2, 12)) if kind == "trace" else torch.jit.script(inner)
    made = torch.jit.freeze(made) if kind == "freeze" else made
    model, x = nn.Sequential(nn.Linear(12, 12), made, nn.Linear(12, 12)), floats(6, 12)
    fast = compiled(model, x, calibration=[x, -x, x * 2])
    with torch.no_grad():
        assert fast[1] is made and {"0", "2"} == set(fast.plan.choices)
        assert output_error(fast(x), model(x)) <= 0.5


def test_an_expert_that_no_data_reach_stays() -> None:
    model, x = Experts().eval(), floats(6, 12)
    fast = compiled(model, x.abs() + 1, calibration=[x, -x, x * 2])
    assert set(fast.plan.choices) == {"first"} and "UNREACHED" in codes(fast)
    assert fast.second.weight is model.second.weight


class Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.layer, self.error = nn.Linear(12, 12), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), KeyError("k"), RuntimeError(), ZeroDivisionError(), StopIteration(),
     AssertionError("a"), NotImplementedError(), RecursionError(), OSError(5, "io")],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_a_model_that_raises_is_a_capture_error(error: Exception) -> None:
    with pytest.raises(structc.CaptureError, match=type(error).__name__) as caught:
        compiled(Raises(error), floats(6, 12))
    assert caught.value.__cause__ is not None


KINDS: dict[str, Callable[[], Any]] = {
    "function": lambda: F.relu,
    "none": lambda: None,
    "state": lambda: sequential().state_dict(),
    "class": lambda: nn.Linear,
    "script": lambda: torch.jit.script(sequential()),
    "trace": lambda: torch.jit.trace(sequential(), floats(2, 12)),
    "meta": lambda: sequential().to("meta"),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(8)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_compiled_is_said_before_any_work(kind: str) -> None:
    for call in (structc.compile, structc.inspect, structc.compile_):
        with pytest.raises(structc.UnsupportedModel) as caught:
            call(KINDS[kind](), floats(2, 12))
        assert caught.value.hint


def test_models_without_a_linear_layer_come_out_running() -> None:
    for model in (nn.ReLU(), nn.Sequential(), nn.Conv2d(3, 4, 3), nn.Embedding(9, 4)):
        x = torch.arange(6).view(2, 3) if isinstance(model, nn.Embedding) else floats(2, 3, 8, 8)
        fast = structc.compile(model, x, effort="none", budget=Budget(error=0.5))
        with torch.no_grad():
            assert torch.equal(fast(x), model(x))
        assert fast.plan.choices == {} and str(fast.report)


def test_outputs_of_any_type_come_back() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            return {"a": (y, [y.argmax(-1), None]), "n": 3, "text": "word"}

    model, x = Mixed().eval(), floats(6, 12)
    fast = structc.compile(model, x, effort="none")
    with torch.no_grad():
        got, want = fast(x), model(x)
    assert got["n"] == 3 and got["text"] == "word" and got["a"][1][1] is None
    assert torch.equal(got["a"][1][0], want["a"][1][0]) and isinstance(got["a"], tuple)


def test_a_model_that_is_not_deterministic_comes_out_running() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.randn_like(x)

    fast = structc.compile(Noisy(), floats(6, 12), effort="none")
    with torch.no_grad():
        x = floats(6, 12)
        assert not torch.equal(fast(x), fast(x))


def test_two_models_at_once_do_not_mix() -> None:
    models = [nn.Sequential(nn.Linear(12, 12)).eval() for _ in range(2)]
    x = floats(6, 12)
    fast = [structc.compile(m, x, effort="none") for m in models]
    with torch.no_grad():
        for f, m in zip(fast, models):
            assert output_error(f(x), m(x)) < 1e-6


def test_forward_in_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = sequential().eval()
    fast = compiled(model, floats(6, 12), budget=Budget(error=0.9, params="99%"))
    batches = [floats(b, 12) for b in (1, 4, 9, 16)] * 4
    with torch.no_grad():
        want = [fast(b) for b in batches]

    def one(b: Tensor) -> Tensor:
        with torch.no_grad():
            return fast(b)

    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(one, batches), want))


# ---------------------------------------------------------------------------- folders


def test_a_work_dir_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("text")
    with pytest.raises(structc.ArtifactWrite, match="work_dir"):
        compiled(sequential(), floats(6, 12), work_dir=tmp_path / "work")


def test_damaged_work_is_done_again(tmp_path: Path) -> None:
    model, data = nn.Sequential(nn.Linear(24, 24)).eval(), [floats(b, 24) for b in (20, 30, 40)]
    options = {"calibration": data, "work_dir": tmp_path, "budget": Budget(error=0.9, params=0.9)}
    first = compiled(model, data[0], **options)
    damaged = 0
    for file in tmp_path.iterdir():
        if file.name != "manifest.json":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            damaged += 1
    assert damaged >= 2
    again = compiled(model, data[0], **options)
    assert all(map(torch.equal, first.parameters(), again.parameters()))


def test_traces_are_written_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTC_TRACE", str(tmp_path / "trace"))
    compiled(sequential(), floats(6, 12))
    names = sorted(p.name for p in (tmp_path / "trace").iterdir())
    assert names[0] == "01-capture.txt" and "08-select.txt" in names and len(names) >= 9
    assert "aten.linear" in (tmp_path / "trace" / "01-capture.txt").read_text()


@pytest.mark.parametrize(
    "name, value", [("STRUCTC_MEMORY_MB", "much"), ("STRUCTC_NATIVE", "yes")], ids=str
)
def test_a_setting_that_makes_no_sense_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(structc.ConfigError, match=f"{name}.*{value}"):
        compiled(sequential(), floats(6, 12), calibration=[floats(6, 12)] * 3, effort="quick")


# ---------------------------------------------------------------------------- anything at all


ODD = st.sampled_from(
    [None, 0, -1, 1.5, math.nan, "", "x", "re:(", b"x", (), [], {}, set(), object(), lambda: 1,
     [None], {"a": None}, {1: 2}, {"_default": "none"}, {"0": {"family": None}}, True, 2**70,
     {"0": {"family": "low_rank", "rank": -1}}, {"0": {"family": "low_rank", "rank": 2**40}},
     {"0": {"family": "monarch", "in_blocks": 0, "out_blocks": 1, "rank": 1}},
     {"0": {"family": "monarch", "in_blocks": 5, "out_blocks": 7, "rank": 1}},
     torch.zeros(0), torch.zeros(2, 12), torch.zeros(2, 12, dtype=torch.long), nn.ReLU]
)  # fmt: skip
NAMES = st.sampled_from(
    ["example_inputs", "calibration", "budget", "config", "ignore", "effort", "seed", "work_dir",
     "verify", "progress"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.dictionaries(NAMES, ODD, min_size=1, max_size=2))
def test_nothing_but_our_own_errors_leaves(arguments: dict[str, Any]) -> None:
    """Whatever a user passes: a model that runs, or an error of ours that is no internal one."""
    if isinstance(arguments.get("work_dir"), (str, bytes)):
        arguments.pop("work_dir")
    logging.getLogger("structc").setLevel(logging.CRITICAL)
    options = {"example_inputs": floats(2, 12), **SPEND, **arguments}
    model = sequential()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    try:
        fast = structc.compile(model, options.pop("example_inputs"), **options)
    except structc.InternalError as e:
        raise AssertionError(f"{arguments}: {e}") from e
    except structc.StructcError as e:
        assert len(str(e)) > 15
    else:
        if fast.__dict__.get("_structc_handle") is not None:
            with torch.no_grad():
                assert fast(floats(3, 12)).shape == (3, 8)
    assert model.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.dictionaries(
        st.sampled_from(["metric", "max_drop", "error", "latency", "params"]),
        st.one_of(
            st.none(), st.floats(), st.integers(-3, 3), st.text(max_size=5), st.binary(max_size=2),
            st.sampled_from(["1%", "0.5x", "x", "%", "1%%", "-1%", "100%", "nan", "inf", [], {}]),
        ),
    )
)  # fmt: skip
def test_budgets_are_right_or_refused(fields: dict[str, Any]) -> None:
    try:
        budget = Budget(**fields)
    except structc.ConfigError as e:
        assert "Budget" in str(e)
        return
    for name in ("max_drop", "error", "latency", "params"):
        value = getattr(budget, name)
        assert value is None or (isinstance(value, float) and 0 <= value < math.inf)
    assert budget.max_drop is None or budget.max_drop < 1


def broken_loader() -> Iterator[Tensor]:
    yield floats(6, 12)
    raise OSError(5, "disk on fire")


def test_a_loader_that_breaks_says_what_broke() -> None:
    with pytest.raises(structc.CalibrationError, match="disk on fire"):
        compiled(sequential(), floats(6, 12), calibration=broken_loader)


def test_a_progress_callback_that_breaks_is_the_users() -> None:
    def progress(*_: Any) -> None:
        raise LookupError("mine")

    with pytest.raises(Exception, match="mine"):
        compiled(sequential(), floats(6, 12), progress=progress)

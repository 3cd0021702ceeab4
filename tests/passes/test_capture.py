"""Capture: every kind of model, graphs that are right at all sizes, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, Branches, Case, Counter, counted, floats, run, sequential

from structc.errors import CaptureError, ConfigError, UnsupportedModel
from structc.inputs import to_call
from structc.numerics import float_leaves, output_error
from structc.passes.capture import capture, export_region
from structc.passes.detect import detect
from structc.passes.rewrite import Product, rewrite
from structc.records import Captured

_cache: dict[str, tuple[nn.Module, Captured]] = {}


def captured_of(name: str) -> tuple[nn.Module, Captured]:
    """Exports take seconds: one for each model serves all tests that only read it."""
    if name not in _cache:
        case = ZOO[name]
        model = case.model()
        _cache[name] = model, capture(model, to_call(case.call()))
    return _cache[name]


def product_of(name: str) -> tuple[nn.Module, Product]:
    """The model beside a product that runs its graphs with nothing rewritten."""
    model, captured = captured_of(name)
    return model, rewrite(captured, detect(captured), {})


# ---------------------------------------------------------------------------- every kind of model


@pytest.mark.parametrize("name", ZOO)
def test_graphs_are_right_at_all_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, (model, product) = ZOO[name], product_of(name)
    assert tuple(r.region.path for r in product.runners) == case.regions
    assert isinstance(product.tree, type(model)) and product.tree is not model
    for size in (case.example, *case.sizes):
        inputs = case.call(*size)
        with torch.no_grad(), counted(monkeypatch) as ran:
            want, got = run(model, inputs), run(product.tree, inputs)
        assert type(got) is type(want)
        assert output_error(got, want) < 1e-5, size
        assert len(list(float_leaves(got))) == len(list(float_leaves(want))) > 0
        assert ran == {"graph": len(case.regions), "tree": 0}, size


@pytest.mark.parametrize("name", ["sequential", "bert", "vit", "encoder"])
def test_an_example_of_batch_one_gives_a_graph_for_all_batches(name: str) -> None:
    case = ZOO[name]
    model = case.model()
    region, reason = export_region(model, "", to_call(case.call(1, 5)))
    assert region is not None, reason
    batch = region.guards.leaves[0].dims[0]
    low, high = region.guards.ranges[batch]
    assert low == 1 and high > 1000


def test_positions_bound_the_length() -> None:
    _, captured = captured_of("bert")
    (region,) = captured.regions
    length = region.guards.leaves[0].dims[1]
    assert region.guards.ranges[length] == (1, 40)


def test_control_flow_keeps_both_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, product = product_of("branches")
    sums = set()
    for seed in range(12):
        x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad(), counted(monkeypatch) as ran:
            assert output_error(product.tree(x), model(x)) < 1e-5
            sums.add(bool(model.up(x).sum() > 0))
        assert ran["graph"] == 1
    assert sums == {True, False}, "the inputs must reach both branches"


def test_what_does_not_export_says_why() -> None:
    _, captured = captured_of("branches")
    (refusal,) = captured.refusals
    assert (refusal.site, refusal.code) == ("model", "EXPORT")
    assert "does not export" in refusal.reason and len(refusal.reason) < 400


def test_a_causal_model_is_analysed_without_its_cache() -> None:
    _, captured = captured_of("llama")
    assert captured.analysis is not None and captured.analysis.path == ""
    assert {r.path for r in captured.regions} == {"model.layers.0.mlp"}
    assert any("cache" in r.reason.lower() for r in captured.refusals)


def test_the_same_model_has_the_same_graph_hash() -> None:
    hashes = set()
    for batch in (2, 3, 6):
        region, _ = export_region(sequential(), "", to_call(floats(batch, 12)))
        assert region is not None
        hashes.add(region.hash)
    assert len(hashes) == 1
    other, _ = export_region(sequential(12, 21, 8), "", to_call(floats(2, 12)))
    tanh, _ = export_region(
        nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)), "", to_call(floats(2, 12))
    )
    assert other is not None and tanh is not None and tanh.hash not in hashes


# ---------------------------------------------------------------------------- guards


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param((floats(2, 7, 12).double(),), id="float64"),
        pytest.param((floats(2, 12),), id="two-dims"),
        pytest.param((floats(2, 3, 4, 12),), id="four-dims"),
        pytest.param((floats(2, 7, 13),), id="features"),
        pytest.param((floats(2, 7, 12), 1), id="argument-too-many"),
        pytest.param((), id="no-argument"),
        pytest.param(({"x": 1},), id="dict"),
        pytest.param((None,), id="none"),
    ],
)
def test_a_call_outside_the_guards_runs_the_module(
    inputs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same answer, or the same error, as the user's own model."""
    model, product = product_of("sequential")
    with torch.no_grad(), counted(monkeypatch) as ran:
        try:
            want: Any = model(*inputs)
        except Exception as e:
            with pytest.raises(type(e), match=r".") as caught:
                product.tree(*inputs)
            assert str(caught.value) == str(e)
        else:
            assert torch.equal(product.tree(*inputs), want)
    assert ran["graph"] == 0


def test_longer_than_the_positions_is_the_models_own_error() -> None:
    model, product = product_of("bert")
    inputs = ZOO["bert"].call(2, 41)
    with pytest.raises(Exception, match=r".") as theirs:
        model(**inputs)
    with pytest.raises(type(theirs.value)):
        product.tree(**inputs)


def test_other_arguments_run_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model, product = product_of("bert")
    inputs = {**ZOO["bert"].call(), "output_hidden_states": True}
    with torch.no_grad(), counted(monkeypatch) as ran:
        assert len(product.tree(**inputs).hidden_states) == len(model(**inputs).hidden_states) == 2
        assert ran["graph"] == 0
        # transformers' hooks for hidden states stay behind and do nothing;
        # an argument at its default, positional or by name, is the same call
        ids, mask = ZOO["bert"].call().values()
        product.tree(ids, mask)
        product.tree(input_ids=ids, attention_mask=mask, token_type_ids=None)
        assert ran["graph"] == 2


def test_a_wanted_gradient_runs_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    _, product = product_of("sequential")
    with counted(monkeypatch) as ran:
        product.tree(floats(2, 7, 12)).sum().backward()
        assert product.tree[0].weight.grad is not None
        product.tree[0].weight.grad = None
        assert ran["graph"] == 0
        with torch.inference_mode():
            product.tree(floats(2, 7, 12))
        assert ran["graph"] == 1


def test_train_mode_and_autocast_run_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    _, product = product_of("sequential")
    x = floats(2, 7, 12)
    with torch.no_grad(), counted(monkeypatch) as ran:
        with torch.autocast("cpu", torch.bfloat16):
            assert product.tree(x).dtype == torch.bfloat16
        product.tree.train()
        product.tree(x)
        assert ran == {"graph": 0, "tree": 2}
        product.tree.eval()
        product.tree(x)
        assert ran["graph"] == 1


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_a_submodule_fires(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, product = product_of("sequential")
    x, seen = floats(2, 7, 12), []
    with torch.no_grad(), counted(monkeypatch) as ran:
        handle = getattr(product.tree[1], kind)(lambda *_: seen.append(1))
        product.tree(x)
        assert seen == [1] and ran["graph"] == 0
        handle.remove()
        product.tree(x)
        assert seen == [1] and ran["graph"] == 1


def test_a_hook_on_the_root_runs_around_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    _, product = product_of("sequential")
    with torch.no_grad(), counted(monkeypatch) as ran:
        handle = product.tree.register_forward_hook(lambda _m, _a, y: 2 * y)
        doubled = product.tree(floats(2, 7, 12))
        handle.remove()
        assert torch.allclose(doubled, 2 * product.tree(floats(2, 7, 12)))
    assert ran == {"graph": 2, "tree": 0}


def test_graph_and_tree_read_the_same_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """One owner: whatever is loaded, replaced or moved is what the graph computes with."""
    case, (_, product) = ZOO["sequential"], product_of("sequential")
    other = sequential().eval()
    inputs = case.call()
    own = {k: v.clone() for k, v in product.tree.state_dict().items()}
    with torch.no_grad(), counted(monkeypatch) as ran:
        product.tree.load_state_dict(other.state_dict())
        assert output_error(run(product.tree, inputs), run(other, inputs)) < 1e-6
        product.tree[0].weight = nn.Parameter(torch.zeros(20, 12))
        other[0].weight = nn.Parameter(torch.zeros(20, 12))
        assert output_error(run(product.tree, inputs), run(other, inputs)) < 1e-6
        assert ran == {"graph": 2, "tree": 0}
        product.tree.load_state_dict(own)


class Asks(nn.Module):
    """Two ways, chosen by the sizes of the inputs."""

    def __init__(self, ask: Any) -> None:
        super().__init__()
        self.fc, self.fd, self.ask = nn.Linear(12, 12), nn.Linear(12, 12), ask

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        y, z = self.fc(a).sum((0, 1)), self.fd(b).sum((0, 1))
        return y - z if self.ask(a, b) else y + z


ASKED: dict[str, tuple[Any, tuple[int, int], list[tuple[int, int]]]] = {
    "divisible": (lambda a, b: a.shape[1] % 4 == 0, (7, 3), [(8, 3), (12, 3), (5, 3), (9, 4)]),
    "longer": (lambda a, b: a.shape[1] > b.shape[1], (10, 6), [(5, 9), (11, 12), (7, 3)]),
    "not-77": (lambda a, b: a.shape[1] != 77, (9, 6), [(77, 6), (78, 5), (20, 9)]),
    "product": (lambda a, b: a.shape[1] * b.shape[1] == 24, (4, 5), [(4, 6), (12, 2), (8, 3)]),
    "batch": (lambda a, b: (a.shape[0] * a.shape[1]) % 8 == 0, (7, 3), [(8, 3), (7, 3), (4, 3)]),
}


@pytest.mark.parametrize("name", ASKED)
def test_a_graph_runs_only_where_what_export_assumed_holds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, example, others = ASKED[name]
    model, x = Asks(ask).eval(), floats(6, 90, 12)
    captured = capture(model, to_call((x[:, : example[0]], x[:, : example[1]])))
    product = rewrite(captured, detect(captured), {})
    with torch.no_grad():
        for s, t in (example, *others):
            for batch in (6, 2, 4, 1):
                call = x[:batch, :s], x[:batch, :t]
                assert output_error(product.tree(*call), model(*call)) < 1e-5, (batch, s, t)
        with counted(monkeypatch) as ran:
            product.tree(x[:, : example[0]], x[:, : example[1]])
        assert ran["graph"] == 1, "the example itself runs the graph"


def test_a_size_that_must_not_be_parts_the_range() -> None:
    model = Asks(lambda a, b: a.shape[1] != 77)
    region, _ = export_region(model.eval(), "", to_call((floats(2, 9, 12), floats(2, 6, 12))))
    assert region is not None
    a, b = (leaf.dims[1] for leaf in region.guards.leaves)
    assert region.guards.ranges[a] == (1, 76) and region.guards.ranges[b][1] > 1000


class Frontend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(12, 16, 3, stride=2, padding=1), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().permute(0, 2, 1).contiguous())


def test_guards_about_memory_formats_fix_nothing() -> None:
    region, reason = export_region(Frontend().eval(), "", to_call(floats(2, 12, 20)))
    assert region is not None, reason
    assert all(high > 1000 for _, high in region.guards.ranges.values())


def test_graphs_that_fail_at_other_sizes_fail_in_silence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FX prints what a graph raises: people would take it for a failure."""

    class Third(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.split(4, 1)[2]

    graph = torch.fx.symbolic_trace(Third())
    monkeypatch.setattr("structc.passes.agreement.call_graph", lambda *_: graph(torch.ones(1, 4)))
    region, _ = export_region(nn.Linear(4, 4), "", to_call(torch.ones(2, 4)))
    assert region is None or not region.guards.ranges
    assert "Traceback" not in capsys.readouterr().err


def test_each_size_is_varied_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a guard escapes, one item more shows that a graph is another way's."""
    monkeypatch.setattr("structc.passes.guards.facts_of", lambda sizes: [])
    model = Asks(lambda a, b: a.shape[1] == 8).eval()
    region, _ = export_region(model, "", to_call((floats(2, 7, 12), floats(2, 5, 12))))
    assert region is not None
    assert all(low == high for low, high in region.guards.ranges.values())


# ---------------------------------------------------------------------------- nothing left behind


def test_buffers_and_modes_are_as_before() -> None:
    model = Counter()
    model.inner[1].eval()
    modes = {n: m.training for n, m in model.named_modules()}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model, to_call(floats(4, 12)))
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert int(model.calls) == 0


def test_inputs_are_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mutates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2.0)
            return self.inner(x)

    x = floats(3, 4)
    before = x.clone()
    captured = capture(Mutates(), to_call(x))
    assert torch.equal(x, before)
    product = rewrite(captured, detect(captured), {})
    with torch.no_grad():
        product.tree(x)
    assert torch.equal(x, 2 * before), "a model that writes to its input still does"


def test_global_switches_are_restored() -> None:
    assert torch.backends.mha.get_fastpath_enabled()
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    capture(Branches(), to_call(floats(2, 3, 12)))
    assert torch.backends.mha.get_fastpath_enabled()
    assert (torch.get_num_threads(), torch.is_grad_enabled()) == (threads, grad)


def test_a_failed_export_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    capture(Branches(), to_call(floats(2, 3, 12)))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# ---------------------------------------------------------------------------- refusals


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4))


def meta() -> nn.Module:
    return nn.Linear(4, 4, device="meta")


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: lambda x: x, "nn.Module"),
        (lambda: torch.jit.script(nn.Linear(4, 4)), "ScriptModule"),
        (meta, "meta"),
        (lazy, "lazy"),
    ],
    ids=["function", "script", "meta", "lazy"],
)
@pytest.mark.filterwarnings("ignore")
def test_kinds_without_readable_weights_are_refused(make: Any, word: str) -> None:
    with pytest.raises(UnsupportedModel, match=word) as caught:
        capture(make(), to_call(torch.zeros(2, 4)))
    assert caught.value.hint


def test_a_model_that_does_not_run_says_what_it_was_given() -> None:
    with pytest.raises(CaptureError, match=r"float32\[3, 5\]") as caught:
        capture(sequential(), to_call(torch.zeros(3, 5)))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_arguments_that_do_not_fit_the_signature() -> None:
    with pytest.raises(ConfigError, match=r"forward\(.*input") as caught:
        capture(sequential(), to_call({"x": torch.zeros(3, 12)}))
    assert "x=float32[3, 12]" in str(caught.value)


def test_case_records_are_complete() -> None:
    assert all(isinstance(case, Case) and case.regions for case in ZOO.values())

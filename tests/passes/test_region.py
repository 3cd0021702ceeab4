"""When a region's graph runs, and when the module's own code must."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structc
from structc.inputs import to_call
from structc.passes.capture import capture
from structc.passes.inductor import Frozen, freeze
from structc.passes.region import Runner, install


class Net(nn.Module):
    """Two layers, a dropout between them; a second output that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 4)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc2(self.drop(self.act(self.fc1(x)))), self.scale.exp()


def product(x: Tensor) -> tuple[nn.Module, Runner]:
    captured = capture(Net().eval(), to_call(x))
    (region,) = captured.regions
    return captured.tree, install(captured.tree, region)


def graph_runs(tree: nn.Module, x: Tensor) -> bool:
    runner, ran = tree.__dict__["_structc_runner"], []
    view = runner.view
    runner.view = lambda *leaves: ran.append(1) or view(*leaves)
    try:
        with torch.no_grad():
            tree(x)
    finally:
        runner.view = view
    return bool(ran)


def test_a_part_in_train_mode_runs_its_own_code() -> None:
    x = torch.randn(6, 8)
    tree, _ = product(x)
    assert graph_runs(tree, x)
    tree.drop.train()
    assert not graph_runs(tree, x)
    with torch.no_grad():
        assert not torch.equal(tree(x)[0], tree(x)[0])
    tree.drop.eval()
    assert graph_runs(tree, x)


def test_a_layer_that_was_replaced_or_wrapped_runs() -> None:
    x = torch.randn(6, 8)
    tree, _ = product(x)
    own = Net().eval()
    tree.act = own.act = nn.Tanh()
    with torch.no_grad():
        torch.testing.assert_close(tree(x)[0], own(x)[0])
        tree.fc1 = nn.Sequential(tree.fc1, nn.Identity())
        torch.testing.assert_close(tree(x)[0], own(x)[0])
    assert not graph_runs(tree, x)


def test_global_hooks_see_every_module() -> None:
    x = torch.randn(6, 8)
    tree, _ = product(x)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with torch.no_grad():
            tree(x)
    finally:
        handle.remove()
    assert tree.fc1 in seen


def test_a_copy_may_first_be_called_from_many_threads() -> None:
    x = torch.randn(6, 8)
    tree, _ = product(x)
    with torch.no_grad():
        want = tree(x)[0]
    for _ in range(20):
        twin, errors, gate = copy.deepcopy(tree), [], threading.Barrier(4)

        def call(twin: Any = twin, errors: Any = errors, gate: Any = gate) -> None:
            gate.wait()
            try:
                with torch.no_grad():
                    assert torch.equal(twin(x)[0], want)
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors


# ---------------------------------------------------------------------------- frozen code


@pytest.fixture(scope="module")
def frozen() -> tuple[nn.Module, Runner, Frozen]:
    tree, runner = product(torch.randn(6, 8))
    return tree, runner, freeze(runner)


def run_frozen(made: tuple[nn.Module, Runner, Frozen], x: Tensor) -> tuple[Any, bool]:
    tree, runner, code = made
    ran: list[int] = []
    inner = code.code

    def counted(*leaves: Tensor) -> Any:
        ran.append(1)
        return inner(*leaves)

    code.code, runner.compiled = counted, code
    try:
        with torch.no_grad():
            return tree(x), bool(ran)
    finally:
        code.code = inner


def test_frozen_code_serves_the_layout_of_the_example_alone(frozen: Any) -> None:
    x = torch.randn(6, 16)
    for inputs, served in ((x[:, :8].contiguous(), True), (x[:, :8], False), (x[:3, :8], False)):
        got, ran = run_frozen(frozen, inputs)
        with torch.no_grad():
            torch.testing.assert_close(got[0], Net().eval()(inputs)[0])
        assert ran is served


def test_a_caller_may_write_to_what_frozen_code_returns(frozen: Any) -> None:
    x = torch.randn(6, 8)
    first, ran = run_frozen(frozen, x)
    assert ran
    want = float(first[1])
    first[1].zero_()
    assert float(run_frozen(frozen, x)[0][1]) == want


@pytest.mark.parametrize("change", ["in-place", "data", "replaced", "loaded"])
def test_frozen_code_is_let_go_when_a_weight_changes(frozen: Any, change: str) -> None:
    tree, runner, _ = frozen
    code = Frozen(frozen[2].code, runner.view)
    assert code.current()
    old = tree.fc1.weight.detach().clone()
    with torch.no_grad():
        match change:
            case "in-place":
                tree.fc1.weight.mul_(2)
            case "data":
                tree.fc1.weight.data = 2 * old
            case "replaced":
                tree.fc1.weight = nn.Parameter(2 * old)
            case "loaded":
                tree.load_state_dict({**tree.state_dict(), "fc1.weight": 2 * old})
        assert not code.current()
        x = torch.randn(6, 8)
        runner.compiled = code
        got = tree(x)[0]
        assert runner.compiled is None
        tree.fc1.weight.copy_(old)
        assert not torch.equal(got, tree(x)[0])


def test_weights_without_versions_are_not_frozen() -> None:
    tree, runner = product(torch.randn(6, 8))
    code = Frozen(lambda *_: (), runner.view)
    with torch.inference_mode():
        tree.fc1.weight = nn.Parameter(torch.randn(12, 8), requires_grad=False)
    assert not code.current()
    with pytest.raises(RuntimeError, match="inference_mode"):
        Frozen(lambda *_: (), runner.view)


def test_graphs_that_disagree_with_the_model_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever capture believed: what is measured on the data decides."""
    from structc.passes import trial

    real = trial.rewrite

    def wrong(*args: Any) -> Any:
        made = real(*args)
        for runner in made.runners:
            view = runner.view
            runner.view = lambda *leaves, v=view: tuple(2 * t for t in v(*leaves))
        return made

    monkeypatch.setattr(trial, "rewrite", wrong)
    model, x = Net().eval(), torch.randn(6, 8)
    fast = structc.compile(model, x, effort="none")
    assert fast.report.data["verification"]["held"]
    assert fast.structc.runner == "modules"
    with torch.no_grad():
        torch.testing.assert_close(fast(x)[0], model(x)[0])

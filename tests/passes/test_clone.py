"""Shallow clones: everything points into the clone, parameters alone are shared."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO, run

from structc.numerics import output_error
from structc.passes.clone import clone_tree, replace_modules, set_modes


class Tangle(nn.Module):
    """References to submodules in every place where people keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again = self.a
        self.stack = nn.ModuleList([self.a, nn.Sequential(self.b, self.a)])
        self.plain = [self.a, self.b]
        self.pair = (self.b, "word")
        self.table = {"first": self.a, "nested": {"second": [self.b]}}
        self.call = self.helper
        self.__dict__["hidden"] = self.a
        self.b.weight = self.a.weight
        self.register_buffer("steps", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.a.register_buffer("steps", self.steps)
        self.settings = {"rate": 0.5}
        self.nothing = None
        self.register_module("absent", None)

    def helper(self, x: Tensor) -> Tensor:
        return self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.call(x) + self.plain[1](x) + self.table["nested"]["second"][0](x)


def modules_in(value: Any) -> list[nn.Module]:
    if isinstance(value, nn.Module):
        return [value]
    if isinstance(value, types.MethodType):
        return modules_in(value.__self__)
    if isinstance(value, dict):
        return [m for v in value.values() for m in modules_in(v)]
    if isinstance(value, (list, tuple)):
        return [m for v in value for m in modules_in(v)]
    return []


def test_every_reference_points_into_the_clone() -> None:
    model = Tangle()
    twin = clone_tree(model)
    theirs = set(map(id, model.modules()))
    for module in twin.modules():
        for name, value in module.__dict__.items():
            assert not theirs & set(map(id, modules_in(value))), name
    assert twin.again is twin.a is twin.plain[0] is twin.table["first"] is twin.__dict__["hidden"]
    assert twin.stack[0] is twin.stack[1][1] is twin.a
    assert twin.call.__self__ is twin and twin.pair == (twin.b, "word")
    assert twin.absent is None and twin.settings is model.settings
    assert [n for n, _ in twin.named_modules()] == [n for n, _ in model.named_modules()]


def test_parameters_are_shared_and_stay_tied() -> None:
    model = Tangle()
    twin = clone_tree(model)
    names = dict(model.named_parameters(remove_duplicate=False))
    assert all(p is names[n] for n, p in twin.named_parameters(remove_duplicate=False))
    assert twin.b.weight is twin.a.weight


def test_buffers_are_copies_and_stay_one() -> None:
    model = Tangle()
    twin = clone_tree(model)
    assert twin.steps is twin.a.steps and twin.steps is not model.steps
    twin(torch.zeros(1, 4))
    assert twin.steps.tolist() == [1, 1, 1] and model.steps.tolist() == [0, 0, 0]
    assert set(twin.state_dict()) == set(model.state_dict())
    assert "scratch" not in twin.state_dict()


def test_changes_to_the_clone_do_not_reach_the_model() -> None:
    model = Tangle()
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    twin = clone_tree(model)
    twin.register_buffer("extra", torch.zeros(1))
    twin.a.register_parameter("more", nn.Parameter(torch.zeros(1)))
    twin.register_forward_hook(lambda *_: None)
    twin.add_module("late", nn.Linear(1, 1))
    twin.eval()
    twin.word = "new"
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
    assert model.training and not model._forward_hooks and "late" not in model._modules
    assert "extra" not in model._buffers and "more" not in model.a._parameters


def test_hooks_are_carried_over() -> None:
    model, seen = Tangle(), []
    model.a.register_forward_hook(lambda m, *_: seen.append(m))
    twin = clone_tree(model)
    twin(torch.zeros(1, 4))
    assert seen == [twin.a]


def test_a_hook_that_is_a_method_of_the_model_becomes_the_clones() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.kept: Tensor | None = None
            self.inner.register_forward_hook(self.keep)

        def keep(self, _m: nn.Module, _a: Any, output: Tensor) -> None:
            self.kept = output

        def forward(self, x: Tensor) -> Tensor:
            self.inner(x)
            assert self.kept is not None
            return self.kept

    model = Keeps()
    twin = clone_tree(model)
    twin(torch.zeros(1, 4))
    assert twin.kept is not None and model.kept is None


@pytest.mark.parametrize("name", ZOO)
def test_clones_of_real_models_compute_the_same(name: str) -> None:
    model = ZOO[name].model()
    twin = clone_tree(model)
    inputs = ZOO[name].call()
    with torch.no_grad():
        assert output_error(run(twin, inputs), run(model, inputs)) == 0.0


def test_replace_reaches_all_occurrences() -> None:
    model = clone_tree(Tangle())
    new = nn.Linear(4, 4)
    replace_modules(model, {"stack.1.1": new})
    assert model.a is model.again is model.stack[0] is model.stack[1][1] is new
    assert model.b is not new


def test_replace_reaches_references_outside_of_the_tree() -> None:
    """A model that calls its layers through a list of its own runs the new ones too."""
    model = clone_tree(Tangle())
    model.bound = model.b.forward
    with torch.no_grad():
        zero = nn.Linear(4, 4)
        zero.weight.zero_()
        zero.bias.zero_()
    replace_modules(model, {"b": zero})
    assert model.plain[1] is zero and model.table["nested"]["second"][0] is zero
    assert model.pair[0] is zero
    assert model.bound.__self__ is zero
    replace_modules(model, {"a": nn.Identity()})
    assert model.call(torch.ones(4)).tolist() == [1.0] * 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["script", "trace"])
def test_scripted_children_are_shared(kind: str) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    made = (
        torch.jit.script(inner) if kind == "script" else torch.jit.trace(inner, torch.zeros(1, 4))
    )
    model = nn.Sequential(nn.Linear(4, 4), made)
    twin = clone_tree(model)
    assert twin[1] is made and twin[0] is not model[0]
    replace_modules(twin, {"0": nn.Identity()})
    assert torch.equal(twin(torch.ones(1, 4)), made(torch.ones(1, 4)))


def test_modes_are_set_without_the_users_code() -> None:
    class Merges(nn.Linear):
        def train(self, mode: bool = True) -> Merges:
            raise AssertionError("train() may change weights")

    model = nn.Sequential(Merges(4, 4), nn.ReLU())
    before = set_modes(model, False)
    assert [m.training for m in model.modules()] == [False] * 3
    assert [training for _, training in before] == [True] * 3

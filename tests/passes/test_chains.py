"""Chains: found where nothing else reads in between, and equal to their parts at all sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ZOO, bert, floats, run

import structc
from structc import forms, pricing
from structc.inputs import to_call
from structc.numerics import output_error
from structc.passes.capture import capture
from structc.passes.chains import Chain, find_chains
from structc.passes.detect import detect
from structc.passes.rewrite import rewrite
from structc.records import Captured

TILE = torch.ops.structc.tile.default


def chains_of(model: nn.Module, inputs: Any) -> tuple[Captured, list[Chain]]:
    captured = capture(model.eval(), to_call(inputs))
    product = rewrite(captured, detect(captured), {})
    return captured, [c for r in product.runners for c in find_chains(r.region, r.view)]


def fused(model: nn.Module, inputs: Any) -> tuple[nn.Module, int]:
    """The model with every chain as one operator, and how many operators there are."""
    captured, found = chains_of(model, inputs)
    product = rewrite(captured, detect(captured), {}, {str(c.program) for c in found})
    graphs = [r.region.graph.graph for r in product.runners]
    return product.tree, sum(len(g.find_nodes(op="call_function", target=TILE)) for g in graphs)


@pytest.mark.parametrize("name", ["bert", "encoder", "vit", "sequential", "functional"])
def test_fused_models_give_what_they_gave(name: str) -> None:
    case = ZOO[name]
    model = case.model()
    tree, count = fused(model, case.call())
    assert count or name not in ("bert", "encoder", "vit")
    with torch.no_grad():
        for size in ((2, 7), *case.sizes):
            want = run(model, case.call(*size))
            assert output_error(run(tree, case.call(*size)), want) < 1e-5


def test_the_chains_of_a_post_norm_encoder() -> None:
    _, found = chains_of(bert(layers=2), ZOO["bert"].call())
    words = [" ".join(s.word for s in c.program.steps) for c in found]
    mlp = "block bias act block bias add norm"
    assert words == [f"block bias add norm keep {mlp}"] * len(words) and len(words) == 2
    assert all(c.program.is_chain for c in found)
    for chain in found:
        added = [s.index for s in chain.program.steps if s.word == "add"]
        kept = [s.index for s in chain.program.steps if s.word == "keep"]
        assert len(chain.inputs) == 2 and added == [1, *kept], "a residual outside, one inside"
        assert chain.rows == 2 * 7 and chain.dtype == torch.float32


def test_nothing_of_a_fused_chain_is_left_behind() -> None:
    """Two layers, so that one chain starts from the end of another; dropout between the links."""
    captured, found = chains_of(bert(layers=2), ZOO["bert"].call())
    product = rewrite(captured, detect(captured), {}, {str(c.program) for c in found})
    before = Counter(n.target for r in captured.regions for n in r.graph.graph.nodes)
    after = Counter(n.target for r in product.runners for n in r.region.graph.graph.nodes)
    steps = Counter(type(s) for c in found for s in c.program.steps)
    aten = torch.ops.aten
    assert after[TILE] == len(found) == 2
    assert after[aten.linear.default] == before[aten.linear.default] - steps[forms.Block]
    assert after[aten.layer_norm.default] == before[aten.layer_norm.default] - steps[forms.Norm]
    assert after[aten.gelu.default] == before[aten.gelu.default] - steps[forms.Act] == 0


class Block(nn.Module):
    """One residual block whose middle may be read by something else."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(12, 20), nn.Linear(20, 12), nn.LayerNorm(12)
        self._forward = forward

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


def read_twice(m: Any, x: Tensor) -> Any:
    h = F.relu(m.up(x))
    return m.norm(m.down(h) + x), h.sum()


def broadcast(m: Any, x: Tensor) -> Any:
    return m.norm(m.down(F.relu(m.up(x))) + x[:1])


def over_two_dims(m: Any, x: Tensor) -> Any:
    return F.layer_norm(m.down(F.relu(m.up(x))), (5, 12)) + x


def itself(m: Any, x: Tensor) -> Any:
    y = m.down(F.relu(m.up(x)))
    return m.norm(y + y)


def other_rows(m: Any, x: Tensor) -> Any:
    return m.norm(m.down(F.relu(m.up(x))).transpose(0, 1) + x.transpose(0, 1))


def mixed(m: Any, x: Tensor) -> Any:
    return m.norm(m.down(F.relu(m.up(x)).cumsum(1)) + x)


def written(m: Any, x: Tensor) -> Any:
    h = m.up(x)
    x.mul_(0.5)
    y = m.norm(m.down(F.relu(h)) + x)
    x.mul_(2.0)
    return y


def with_itself_through_dropout(m: Any, x: Tensor) -> Any:
    h = F.relu(m.up(x))
    return m.norm(m.down(h + F.dropout(h, 0.5, m.training)) + x)


def ends_in_place(m: Any, x: Tensor) -> Any:
    return (m.down(F.relu(m.up(x))) + x).relu_()


def other_dtype(m: Any, x: Tensor) -> Any:
    return m.down(F.relu(m.up(x))) + x.double()


def many_terms(m: Any, x: Tensor) -> Any:
    y = m.down(F.relu(m.up(x)))
    for i in range(20):
        y = y + x.roll(i, 1)
    return y


@pytest.mark.parametrize(
    "forward",
    [
        *(read_twice, broadcast, over_two_dims, itself, other_rows, mixed),
        *(written, other_dtype, many_terms, with_itself_through_dropout, ends_in_place),
    ],
)
def test_only_what_one_token_needs_is_fused(forward: Callable[[Any, Tensor], Any]) -> None:
    torch.manual_seed(1)
    model = Block(forward)
    tree, _ = fused(model, floats(3, 5, 12))
    for chain in chains_of(model, floats(3, 5, 12))[1]:
        assert len([s for s in chain.program.steps if s.word == "block"]) <= 2
    with torch.no_grad():
        x = floats(3, 5, 12)
        assert output_error(tree(x), model(x)) < 1e-5


def test_an_activation_in_place_at_the_end_is_fused_too() -> None:
    model = Block(ends_in_place)
    captured, found = chains_of(model, floats(3, 5, 12))
    product = rewrite(captured, detect(captured), {}, {str(c.program) for c in found})
    left = [n.target for n in product.runners[0].region.graph.graph.nodes]
    assert left.count(TILE) == 1
    assert torch.ops.aten.relu_.default not in left and torch.ops.aten.linear.default not in left


class Stack(nn.Module):
    """Residual blocks; a buffer may be written between the norm and what reads it."""

    def __init__(self, count: int, *, counting: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(ends_in_place) for _ in range(count))
        self.register_buffer("seen", torch.zeros(()))
        self.counting = counting

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert isinstance(block, Block)
            x = block.norm(x + block.down(x))
            if self.counting:
                self.seen.add_(1)
            x = block.norm(x + block.down(F.relu(block.up(x))))
        return x


class Square(Block):
    def __init__(self) -> None:
        super().__init__(ends_in_place)
        self.down, self.up = nn.Linear(12, 12), nn.Linear(12, 12)


@pytest.mark.parametrize(("count", "counting"), [(2, False), (20, False), (2, True)])
def test_what_is_no_chain_as_a_whole_is_cut(count: int, counting: bool) -> None:
    torch.manual_seed(3)
    model = Stack(count, counting=counting)
    model.blocks = nn.ModuleList(Square() for _ in range(count))
    _, found = chains_of(model, floats(3, 5, 12))
    products = [sum(s.word == "block" for s in c.program.steps) for c in found]
    assert sum(products) == 3 * count, "each product is in a chain"
    if count == 2 and not counting:
        (whole,) = found
        assert len(whole.parts) == 2 * count
        assert whole.among({str(whole.program), str(whole.parts[0].program)}) == [whole]
        assert whole.parts[0] in whole.among({str(whole.parts[0].program)})
        captured = capture(model.eval(), to_call(floats(3, 5, 12)))
        both = {str(c.program) for c in (whole, *whole.parts)}
        product = rewrite(captured, detect(captured), {}, both)
        assert product.chains == {str(whole.program)}, "what is not run is not saved"
    tree, operators = fused(model, floats(3, 5, 12))
    assert operators == len(found)
    with torch.no_grad():
        x = floats(3, 5, 12)
        assert output_error(tree(x), model(x)) < 1e-5


class Gated(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(12) if norm else nn.Identity()
        self.gate, self.up, self.down = nn.Linear(12, 20), nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y: Tensor = self.down(F.silu(self.gate(h)) * self.up(h)) + x
        return y


@pytest.mark.parametrize("norm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gated_mlps_are_one_program(norm: bool) -> None:
    torch.manual_seed(2)
    model = Gated(norm)
    _, (chain,) = chains_of(model, floats(3, 5, 12))
    words = [s.word for s in chain.program.steps]
    assert words.count("block") == 3 and "mul" in words and "keep" in words and "load" in words
    tree, count = fused(model, floats(3, 5, 12))
    assert count == 1
    with torch.no_grad():
        for size in ((3, 5, 12), (7, 2, 12)):
            x = floats(*size)
            assert output_error(tree(x), model(x)) < 1e-5
    assert output_error(structc.compile(model, floats(3, 5, 12))(x), model(x)) < 1e-4


def accept_all(
    chains: Sequence[Chain], options: Any, notes: Any
) -> tuple[Collection[str], list[dict[str, Any]]]:
    return frozenset(str(c.program) for c in chains), []


def test_a_product_with_chains_is_verified_saved_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("structc.pipeline.fast_chains", accept_all)
    monkeypatch.setattr("structc.passes.race._beats", lambda *_: True)
    monkeypatch.setattr("structc.passes.race.slower", lambda *_: False)
    case = ZOO["bert"]
    model = case.model()
    fast = structc.compile(model, case.call(), effort="quick")
    if not fast.structc.chains:
        pytest.skip("the version without chains was faster this time")
    assert any("run as one kernel each" in n for n in fast.report.data["notes"])
    again = structc.load(fast.save(tmp_path / "out"), case.model())
    assert again.structc.chains == fast.structc.chains
    with torch.no_grad():
        for size in ((2, 7), (3, 5)):
            want = run(model, case.call(*size))
            for twin in (fast, again):
                assert output_error(run(twin, case.call(*size)), want) < 1e-5


def test_chains_are_priced_against_their_parts() -> None:
    from structc.options import Log, resolve

    _, found = chains_of(ZOO["bert"].model(), ZOO["bert"].call())
    notes = Log()
    fast, bindings = pricing.fast_chains(found, resolve(effort="quick"), notes)
    assert {b["form"] for b in bindings} == fast
    refused = [r for r in notes.refusals if r.family == "chain"]
    assert len(fast) + len(refused) == len({str(c.program) for c in found})
    assert all(r.code == "NOT_FASTER" and "its parts take" in r.reason for r in refused)

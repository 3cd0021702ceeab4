"""The race: which way a product runs, and what is said when it loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from zoo import ZOO, bert

from structc.inputs import to_call
from structc.passes import race as R
from structc.passes.capture import capture
from structc.passes.chains import find_chains
from structc.passes.detect import detect
from structc.passes.rewrite import Product, rewrite
from structc.records import Call, Timed


def timed(ms: float) -> Timed:
    return Timed(ms, ms, 0.0, 9)


@pytest.fixture(scope="module")
def products() -> tuple[Call, Product, Product]:
    """A model without and with its chains as operators; the references run."""
    call = to_call(ZOO["bert"].call())
    captured = capture(bert(layers=2).eval(), call)
    sites = detect(captured)
    plain = rewrite(captured, sites, {})
    found = [c for r in plain.runners for c in find_chains(r.region, r.view)]
    return call, plain, rewrite(captured, sites, {}, {str(c.program) for c in found})


def ways_take(monkeypatch: pytest.MonkeyPatch, ms: Mapping[str, float], ran: list[str]) -> None:
    def interleaved(calls: Mapping[str, Callable[[], object]], **_: Any) -> dict[str, Timed]:
        ran.extend(calls)
        return {name: timed(ms[name]) for name in calls}

    monkeypatch.setattr(R, "interleaved", interleaved)
    monkeypatch.setattr(R, "freeze", lambda runner: f"code of {id(runner)}")


NAMES = ("graph", "graph with chains", "modules", "inductor", "inductor with chains")


@pytest.mark.parametrize("winner", NAMES)
def test_the_fastest_way_is_set(
    winner: str, products: tuple[Call, Product, Product], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, plain, chained = products
    ran: list[str] = []
    ways_take(monkeypatch, {name: 1.0 if name == winner else 2.0 for name in NAMES}, ran)
    product, way = R._fastest(call, [plain, chained], [plain, chained], [])
    assert ran == list(NAMES)
    assert product is (chained if "chains" in winner else plain)
    assert way == winner.split(" ")[0]
    for runner in product.runners:
        assert runner.active == (way != "modules")
        assert (runner.compiled is not None) == (way == "inductor")


def test_inductor_must_be_worth_its_memory(
    products: tuple[Call, Product, Product], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, plain, chained = products
    ways_take(monkeypatch, {**dict.fromkeys(NAMES, 1.0), "inductor": 0.99}, [])
    assert R._fastest(call, [plain, chained], [plain, chained], []) == (plain, "graph")


def test_graphs_that_inductor_cannot_run_stay_in_the_race(
    products: tuple[Call, Product, Product], monkeypatch: pytest.MonkeyPatch
) -> None:
    call, plain, chained = products
    ran: list[str] = []
    ways_take(monkeypatch, dict.fromkeys(NAMES, 1.0), ran)

    def fails(runner: object) -> None:
        raise RuntimeError("no such lowering")

    monkeypatch.setattr(R, "freeze", fails)
    notes: list[str] = []
    R._fastest(call, [plain, chained], [plain, chained], notes)
    assert ran == ["graph", "graph with chains", "modules"]
    assert notes and all("no such lowering" in n for n in notes)


def test_a_faster_compiled_original_is_named() -> None:
    latency = {"eager": timed(10.0), "torch.compile, static": timed(7.0), "structc": timed(8.0)}
    assert "torch.compile, static runs the original in 7 ms" in R.lost_to(latency)
    assert R.lost_to({**latency, "structc": timed(7.1)}) == ""
    assert R.lost_to({}) == ""

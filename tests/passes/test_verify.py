"""Verification: whatever selection believed, the budget holds at the end."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import floats

from structc.budget import Budget
from structc.inputs import to_call
from structc.passes import acceptance, trial, verify
from structc.passes.calibrate import split
from structc.passes.capture import capture
from structc.passes.detect import detect
from structc.passes.fit import fit_candidates
from structc.passes.objective import Objectives
from structc.passes.rollback import dense_plan, milder, share_kept
from structc.passes.select import plan_of
from structc.passes.verify import holds, threshold
from structc.records import Candidate, Plan, Price, Verification
from structc.workdir import WorkDir


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-1e3, 1e3), st.floats(0, 0.99))
def test_thresholds_allow_a_drop_for_metrics_of_either_sign(dense: float, drop: float) -> None:
    limit = threshold(dense, drop)
    assert limit <= dense
    assert dense - limit == pytest.approx(drop * abs(dense), abs=1e-9)
    budget = Budget(metric=lambda _m: 0.0, max_drop=drop)
    assert holds(budget, 9.9, 0.0, dense, dense)
    assert not holds(budget, 0.0, 9.9, limit - 1e-6 - abs(limit) * 1e-6, dense) or drop == 0


def test_error_budgets_compare_errors() -> None:
    assert holds(Budget(error=0.1), 0.1, 0.1, None, None)
    assert not holds(Budget(error=0.1), 0.1001, 0.1, None, None)
    assert not holds(Budget(error=0.1), math.inf, 0.1, None, None)
    assert not holds(Budget(), math.nan, 1.0, None, None)


def candidate(site: str, family: str, error: float, ms: float) -> Candidate:
    hyper = {} if family == "dense" else {"rank": round(100 * ms)}
    return Candidate(site, family, hyper, 1, 1, error, price(ms))


def test_the_worst_bargain_goes_back_first_and_no_further_than_needed() -> None:
    table = {
        "cheap": [candidate("cheap", "dense", 0.0, 1.0), candidate("cheap", "low_rank", 0.1, 0.4)],
        "harmful": [
            candidate("harmful", "dense", 0.0, 1.0),
            candidate("harmful", "low_rank", 0.05, 0.7),
            candidate("harmful", "low_rank", 0.5, 0.5),
        ],
    }
    plan = plan_of([row[-1] for row in table.values()], table, {})
    back = milder(plan, table, 0.5)
    assert back is not None
    assert {s: dict(c.hyper) for s, c in back.choices.items()} == {
        "cheap": {"rank": 40},
        "harmful": {"rank": 70},
    }
    nothing = milder(plan, table, 0.0)
    assert nothing is not None and {c.family for c in nothing.choices.values()} == {"dense"}
    assert milder(nothing, table, 0.5) is None
    assert dense_plan(plan, table).choices == dense_plan(nothing, table).choices == nothing.choices


def test_a_site_of_infinite_error_goes_back_first() -> None:
    table = {
        s: [candidate(s, "dense", 0.0, 1.0), candidate(s, "low_rank", e, 0.5)]
        for s, e in {"a": 0.3, "b": math.inf, "c": 0.2}.items()
    }
    plan = plan_of([row[-1] for row in table.values()], table, {})
    back = milder(plan, table, 0.9)
    assert back is not None
    assert [s for s, c in back.choices.items() if c.family == "dense"] == ["b"]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.floats(0, 10), st.floats(0, 1), st.sampled_from([1, 2]))
def test_each_round_keeps_less(loss: float, allowed: float, power: int) -> None:
    assert 0 <= share_kept(loss, allowed, power) < 1


# ---------------------------------------------------------------------------- rolling back


class Chain(nn.Module):
    """Four layers; ``names`` in the order of the data."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b, self.c, self.d = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))))


def price(ms: float) -> Price:
    return Price("form", 8, ms, 1.0, "aten", {}, "aten", 0.0, "predicted")


def laboratory(budget: Budget) -> tuple[trial.Lab, dict[str, list[Candidate]], Chain]:
    model = Chain().eval()
    example = to_call(floats(16, 24))
    captured = capture(model, example)
    sites = detect(captured)
    parts = split([to_call(torch.randn(16, 24)) for _ in range(6)])
    work, objectives = WorkDir(None, {}), Objectives(captured, None)
    table = {}
    for site in sites.linear:
        offers = [("dense", {}, price(1.0)), ("low_rank", {"rank": 4}, price(0.5))]
        table[site.name], refusals = fit_candidates(objectives, site, offers, work)
        assert not refusals
    return trial.Lab(model, captured, sites, objectives, parts, budget, work), table, model


def verified(
    lab: trial.Lab, table: dict[str, list[Candidate]], sensitivity: dict[str, float]
) -> tuple[Any, Plan, Verification]:
    plan = plan_of([c[1] for c in table.values()], table, sensitivity)
    return acceptance.verify_product(
        lab,
        table,
        plan,
        lab.product(plan, table),
        effort="none",
        verify=True,
        progress=lambda *_: None,
        fast_chains=lambda _: (),
    )


@pytest.mark.parametrize("allowed", [0.9, 0.4, 0.05, 1e-6])
@pytest.mark.parametrize(
    "sensitivity",
    [{}, {"a": 0.0, "b": 0.0, "c": 0.0, "d": 1e3}, dict.fromkeys("abcd", 0.0)],
    ids=["equal", "wrong", "nothing-matters"],
)
def test_rolls_back_until_the_budget_holds(allowed: float, sensitivity: dict[str, float]) -> None:
    """A planted sensitivity that is wrong changes the order, never the outcome."""
    lab, table, model = laboratory(Budget(error=allowed))
    product, plan, found = verified(lab, table, sensitivity)
    assert found.held and found.error <= allowed
    with torch.no_grad():
        worst = max(
            float((product.tree(c.args[0]) - model(c.args[0])).norm() / model(c.args[0]).norm())
            for c in lab.parts.verify
        )
    assert worst == pytest.approx(found.error, rel=1e-3, abs=1e-6)
    dense = {s for s, c in plan.choices.items() if c.family == "dense"}
    assert set(found.rolled_back) == dense and set(product.replaced) == set("abcd") - dense
    if sensitivity.get("d") and dense:
        assert "d" in found.rolled_back
    if allowed == 1e-6:
        assert dense == set("abcd")


def test_a_metric_decides_on_its_own_part_of_the_data() -> None:
    parts: list[str] = []

    def metric(model: nn.Module, part: str) -> float:
        parts.append(part)
        return 1.0 if isinstance(model.b, nn.Linear) else 0.0

    lab, table, _ = laboratory(Budget(metric=metric, max_drop=0.5))
    parts.clear()
    _, plan, found = verified(lab, table, {})
    assert set(parts) == {"verify"}
    assert plan.choices["b"].family == "dense" and found.metric_compiled == 1.0


def test_a_metric_that_never_holds_leaves_the_original() -> None:
    def metric(model: nn.Module) -> float:
        changed = any(not isinstance(m, nn.Linear) for m in model.children())
        return float("nan") if changed else 1.0

    lab, table, _ = laboratory(Budget(metric=metric, max_drop=0.01))
    product, plan, found = verified(lab, table, {})
    assert found.held and product.replaced == {}
    assert {c.family for c in plan.choices.values()} == {"dense"}


def test_sensitivities_are_measured_at_each_site() -> None:
    lab, table, model = laboratory(Budget(error=0.5))
    found = trial.sensitivities(lab, table, lambda *_: None)
    x = lab.parts.select[0].args[0][: trial.PROBE_ROWS]
    with torch.no_grad():
        for name, value in found.items():
            product = lab.product(plan_of([
                table[s][1] if s == name else table[s][0] for s in table
            ], table, {}), table)  # fmt: skip
            moved = float((product.tree(x) - model(x)).norm() / model(x).norm())
            assert value == pytest.approx(moved / table[name][1].error, rel=1e-3)
    assert set(found) == set("abcd") and len(set(found.values())) == 4


def test_demands_that_are_met_are_no_complaint() -> None:
    lab, table, _ = laboratory(Budget(params=0.9))
    plan = plan_of([c[1] for c in table.values()], table, {})
    found = Verification(0.0, None, "", None, None, None, True, 1)
    assert verify.unmet_demand(Budget(params=0.9), plan, found, table) is None
    text = verify.unmet_demand(Budget(params=0.1), plan, found, table)
    assert text is not None and "10%" in text and "33%" in text
    dense = plan_of([c[0] for c in table.values()], table, {})
    assert "100%" in str(verify.unmet_demand(Budget(params=0.9), dense, found, table))
    assert lab.quality is None and replace(plan).choices == plan.choices

"""Selection: the knapsack against brute force, and a search that only returns what it measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structc.passes.select import choose, dense_of, plan_of, search
from structc.records import Candidate, Plan, Price


def candidate(site: str, at: int, ms: float, error: float, params: int) -> Candidate:
    family, hyper = ("dense", {}) if at == 0 else ("low_rank", {"rank": at})
    price = Price("form", 8, ms, 1.0, "aten", {}, "aten", 0.0, "predicted")
    return Candidate(site, family, hyper, params, 2 * params, error, price)


Rows = Sequence[tuple[float, float, int]]


def table_of(sites: Sequence[Rows]) -> dict[str, list[Candidate]]:
    """Each site: its dense candidate, then (latency, error, params) of others."""
    return {
        f"s{i}": [
            candidate(f"s{i}", 0, 1.0, 0.0, 100),
            *(candidate(f"s{i}", at + 1, *row) for at, row in enumerate(rows)),
        ]
        for i, rows in enumerate(sites)
    }


def squares(plan: Sequence[Candidate], weights: dict[str, float]) -> float:
    return sum((weights[c.site] * c.error) ** 2 for c in plan)


def total_ms(plan: Sequence[Candidate]) -> float:
    return sum(c.price.latency_ms for c in plan)


def chosen(plan: Plan, table: dict[str, list[Candidate]]) -> list[Candidate]:
    assert set(plan.choices) == set(table)
    return [
        next(c for c in table[s] if (c.family, c.hyper) == (choice.family, choice.hyper))
        for s, choice in plan.choices.items()
    ]


tables = st.lists(
    st.lists(
        st.tuples(st.floats(0.1, 1.5), st.floats(0.001, 0.9), st.integers(5, 120)), max_size=3
    ),
    min_size=1,
    max_size=4,
)
weights_of = st.lists(st.floats(0.05, 5.0), min_size=4, max_size=4)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tables, weights_of, st.floats(0.0, 2.0), st.floats(0.4, 1.2))
def test_choose_is_the_best_of_all_plans(sites, weights, error, share) -> None:
    table = table_of(sites)
    sensitivity = {f"s{i}": w for i, w in enumerate(weights)}
    params = share * sum(100 for _ in sites)
    plan = choose(table, sensitivity, error=error, params=params)
    allowed = [
        p
        for p in itertools.product(*table.values())
        if squares(p, sensitivity) <= error**2 and sum(c.params for c in p) <= params
    ]
    if not allowed:
        if plan is not None:  # at most a rounding of the solver outside
            assert squares(chosen(plan, table), sensitivity) <= error**2 * (1 + 1e-4) + 1e-6
        return
    assert plan is not None
    mine = chosen(plan, table)
    assert math.sqrt(squares(mine, sensitivity)) <= error * (1 + 1e-4) + 1e-6
    assert sum(c.params for c in mine) <= params * (1 + 1e-6)
    assert total_ms(mine) <= min(map(total_ms, allowed)) * (1 + 2e-4) + 1e-5
    assert plan.predicted_ms == pytest.approx(total_ms(mine))
    assert plan.predicted_error == pytest.approx(math.sqrt(squares(mine, sensitivity)))
    assert plan.dense_ms == pytest.approx(len(table))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(tables, weights_of, st.floats(0.2, 4.0))
def test_least_error_under_a_latency_demand(sites, weights, latency) -> None:
    table = table_of(sites)
    sensitivity = {f"s{i}": w for i, w in enumerate(weights)}
    plan = choose(table, sensitivity, latency_ms=latency, least="error")
    allowed = [p for p in itertools.product(*table.values()) if total_ms(p) <= latency]
    if not allowed:
        assert plan is None or plan.predicted_ms <= latency * (1 + 1e-6) + 1e-6
        return
    assert plan is not None and plan.predicted_ms <= latency * (1 + 1e-6) + 1e-6
    best = min(squares(p, sensitivity) for p in allowed)
    worst = max(squares(p, sensitivity) for p in itertools.product(*table.values()))
    assert plan.predicted_error**2 <= best + 2e-4 * worst + 1e-9


def test_an_error_of_zero_is_dense_everywhere() -> None:
    table = table_of([[(0.1, 1e-6, 5)], [(0.1, 1e-9, 5)], []])
    plan = choose(table, {}, error=0.0)
    assert plan is not None and {c.family for c in plan.choices.values()} == {"dense"}


def test_a_small_budget_is_not_lost_in_the_solvers_tolerance() -> None:
    """Errors of 1e-4 beside one of 1: squares of 1e-8 are below the solver's absolute tolerance."""
    table = table_of([[(0.1, 1.0, 5), (0.5, 2e-4, 5)], [(0.5, 1e-4, 5)]])
    plan = choose(table, {}, error=1.5e-4)
    assert plan is not None and plan.predicted_error <= 1.5e-4


def test_candidates_that_are_not_finite_are_never_chosen() -> None:
    table = table_of([[(0.1, math.inf, 5), (0.2, math.nan, 5), (0.9, 0.1, 50)]])
    plan = choose(table, {}, error=10.0)
    assert plan is not None and plan.choices["s0"].hyper == {"rank": 3}


def test_nothing_to_choose_from_is_an_empty_plan() -> None:
    plan = choose({}, {})
    assert plan is not None and plan.choices == {}


def test_ties_go_to_the_smaller_error() -> None:
    table = table_of([[(0.5, 0.3, 50), (0.5, 0.1, 50), (0.5, 0.2, 50)]])
    plan = choose(table, {}, error=1.0)
    assert plan is not None and plan.choices["s0"].hyper == {"rank": 2}


def test_dense_is_always_there() -> None:
    table = table_of([[(0.5, 0.3, 50)]])
    assert dense_of(table["s0"]).family == "dense"
    plan = plan_of([table["s0"][1]], table, {"s0": 2.0})
    assert plan.predicted_error == pytest.approx(0.6) and plan.dense_ms == 1.0


# ---------------------------------------------------------------------------- search


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    tables,
    st.sampled_from(["error", "square", "random", "inverse", "nan-ish"]),
    st.floats(1e-3, 0.5),
    st.sampled_from([1.0, 2.0]),
)
def test_search_returns_only_what_it_measured(sites, kind, allowed, power) -> None:
    table = table_of(sites)
    measured: dict[str, float] = {}

    def loss(plan: Plan) -> float:
        key = str(sorted((s, str(c)) for s, c in plan.choices.items()))
        value = {
            "error": plan.predicted_error,
            "square": plan.predicted_error**2,
            "random": (hash(key) % 1000) / 1000,
            "inverse": 1.0 / (1e-3 + plan.predicted_error),
            "nan-ish": math.inf,
        }[kind]
        measured[key] = value
        return value

    plan = search(table, {}, loss, allowed=allowed, power=power, evaluations=6)
    assert len(measured) <= 6
    key = str(sorted((s, str(c)) for s, c in plan.choices.items()))
    dense = all(c.family == "dense" for c in plan.choices.values())
    assert dense or measured[key] <= allowed
    assert plan.predicted_ms <= plan.dense_ms + 1e-9
    assert sum(p.chosen for p in plan.points) >= 1


def test_search_comes_close_to_what_the_budget_allows() -> None:
    rows = [(1.0 - 0.1 * k, 0.02 * k, 100 - 10 * k) for k in range(1, 9)]
    table = table_of([rows] * 6)
    plan = search(table, {}, lambda p: p.predicted_error**2, allowed=0.01, power=2)
    assert 0.07 <= plan.predicted_error <= 0.1
    best = choose(table, {}, error=0.1)
    assert best is not None and plan.predicted_ms <= 1.06 * best.predicted_ms


def test_search_finds_nothing_where_nothing_is_allowed() -> None:
    table = table_of([[(0.5, 0.3, 50)]])
    plan = search(table, {}, lambda p: 1.0, allowed=0.01, power=2)
    assert plan.choices["s0"].family == "dense"


def test_search_never_asks_for_more_than_its_evaluations() -> None:
    count = [0]

    def loss(plan: Plan) -> float:
        count[0] += 1
        return plan.predicted_error

    rows = [(1 - k / 40, 0.01 * k, 100 - k) for k in range(1, 30)]
    search(table_of([rows] * 4), {}, loss, allowed=0.3, power=1, evaluations=3)
    assert 1 <= count[0] <= 3

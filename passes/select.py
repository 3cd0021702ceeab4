"""Stage 6, select: a multiple-choice knapsack over the candidates of all sites.

Errors of different sites add as squares (measured on a real encoder: .40 where squares predict .43
and a linear sum 2.2), each with a sensitivity that is measured, never assumed.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from structc.families import Dense
from structc.records import Candidate, Choice, Plan, PlanPoint

log = logging.getLogger("structc.select")

TIME_LIMIT_S = 20.0
STEPS = 24
"""Knapsacks that a search solves; fewer of them give a plan that was not measured yet."""
Table = Mapping[str, Sequence[Candidate]]


def choose(
    table: Table,
    sensitivity: Mapping[str, float],
    *,
    error: float = math.inf,
    latency_ms: float = math.inf,
    params: float = math.inf,
    least: str = "latency",
) -> Plan | None:
    """The best choice of one candidate a site.

    minimise    sum latency   (or sum params, or sum (sensitivity * error)^2: ``least``)
    subject to  one candidate a site;  sum (sensitivity * error)^2 <= error^2;
                sum latency <= latency_ms;  sum params <= params.

    Returns:
        The plan, or None if no choice satisfies the constraints.
    """
    flat = [c for candidates in table.values() for c in candidates]
    if not flat:
        return Plan({})
    cost = np.array([c.price.latency_ms for c in flat])
    squares = np.array([squared_error(c, sensitivity) for c in flat])
    sizes = np.array([float(c.params) for c in flat])
    rows = [at for at, candidates in enumerate(table.values()) for _ in candidates]
    pick = csr_array((np.ones(len(flat)), (rows, range(len(flat)))))
    constraints = [LinearConstraint(pick, 1, 1)]
    usable = np.isfinite(squares)
    for values, limit in ((squares, error**2), (cost, latency_ms), (sizes, params)):
        if math.isfinite(limit):
            usable &= values <= limit  # the solver's tolerances are absolute: what is left is
            if limit > 0:  # compared in units of the limit
                shares = np.where(usable, values, 0.0) / limit
                constraints.append(LinearConstraint(shares[None], -np.inf, 1.0))
    errors = np.where(usable, squares, 0.0)
    goal = {"latency": cost, "params": sizes, "error": errors}[least]
    # among plans of one cost, the one of least error: a small second term decides ties
    other = cost if least == "error" else errors
    goal = goal / max(goal.max(), 1e-300) + 1e-6 * other / max(other.max(), 1e-300)
    with _silent_solver():
        result = milp(
            goal,
            constraints=constraints,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, usable.astype(float)),
            options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": 1e-4},
        )
    if result.x is None:
        return None
    chosen = [c for c, x in zip(flat, result.x, strict=True) if x > 0.5]
    notes = () if result.status == 0 else (f"selection stopped at a gap of {result.mip_gap:.1e}",)
    return plan_of(chosen, table, sensitivity, notes)


@contextmanager
def _silent_solver() -> Iterator[None]:
    """HiGHS prints about its own heuristics on the process's stdout, which is for data."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def plan_of(
    chosen: Sequence[Candidate],
    table: Table,
    sensitivity: Mapping[str, float],
    notes: tuple[str, ...] = (),
) -> Plan:
    """A plan from one candidate a site, with its predictions."""
    return Plan(
        choices={c.site: Choice(c.family, dict(c.hyper)) for c in chosen},
        predicted_ms=sum(c.price.latency_ms for c in chosen),
        dense_ms=sum(dense_of(table[c.site]).price.latency_ms for c in chosen),
        predicted_error=math.sqrt(sum(squared_error(c, sensitivity) for c in chosen)),
        sensitivities=dict(sensitivity),
        notes=notes,
    )


def dense_of(candidates: Sequence[Candidate]) -> Candidate:
    """The dense candidate of a site; it is always there."""
    return next(c for c in candidates if c.family == Dense.name)


def squared_error(candidate: Candidate, sensitivity: Mapping[str, float]) -> float:
    """What a candidate adds to a plan's predicted squared error; infinite if it is not finite."""
    if candidate.exact:
        return 0.0
    square = (sensitivity.get(candidate.site, 1.0) * candidate.error) ** 2
    return square if math.isfinite(square) else math.inf


def search(
    table: Table,
    sensitivity: Mapping[str, float],
    loss: Callable[[Plan], float],
    *,
    allowed: float,
    power: float,
    params: float = math.inf,
    least: str = "latency",
    evaluations: int = 8,
) -> Plan:
    """The fastest plan whose measured loss of quality stays within a limit.

    The knapsack knows predicted output errors, a budget speaks of something else. Plans along the
    trade between error and latency are ordered; each measurement says how far the next one may go
    (the loss grows about as the error to some power), inside a bracket that only shrinks. Whatever
    the metric does, the plan that is returned has been measured.

    Args:
        loss: what a plan loses on the selection part; measured at most ``evaluations`` times.
        allowed: the largest loss that the budget takes.
        power: 1 for a loss that is an error itself, 2 for a metric near its best value.
    """
    dense = choose(table, sensitivity, error=0.0)
    assert dense is not None
    best, points = dense, [PlanPoint(dense.predicted_ms, dense.predicted_error, 0.0)]
    loosest = choose(table, sensitivity, params=params, least=least)
    top = 0.0 if loosest is None else loosest.predicted_error
    low, high = 0.0, top * 1.001
    at = min(high, allowed if power == 1 else 3.0 * allowed**0.5)
    measured: dict[str, float] = {}
    for _ in range(STEPS):
        plan = None
        if at > 0:
            plan = choose(table, sensitivity, error=at, params=params, least=least)
        if plan is None:
            break
        key = str(sorted((s, str(c)) for s, c in plan.choices.items()))
        new = key not in measured
        if new:
            if len(measured) == evaluations:
                break
            measured[key] = loss(plan)
            points.append(PlanPoint(plan.predicted_ms, plan.predicted_error, measured[key]))
        value = measured[key]
        if value <= allowed:
            low = max(low, at)
            best = plan if least == "params" or plan.predicted_ms <= best.predicted_ms else best
        else:
            high = min(high, at)
        if (value <= allowed and at >= top) or high < 1.04 * low:
            break
        if new:
            at = _next_error(plan.predicted_error, value, allowed, power, low, high)
        else:  # nothing was learnt: the knapsack has no plan between this one and where it was
            at = math.sqrt(low * high) if low > 0 else 0.5 * high
    marked = (replace(p, chosen=p.latency_ms == best.predicted_ms) for p in points)
    return replace(best, points=tuple(marked))


def _next_error(
    error: float, value: float, allowed: float, power: float, low: float, high: float
) -> float:
    """Where the loss should reach its limit, kept well inside the bracket."""
    ratio = (allowed / value) ** (1 / power) if value > 0 and math.isfinite(value) else 2.0
    guess = 0.98 * error * min(max(ratio, 0.25), 4.0)
    if low > 0:
        inner = (high / low) ** 0.1
        return min(max(guess, low * inner), high / inner)
    return min(guess, 0.9 * high if guess < high else high)

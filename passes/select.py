"""Stage 6, select: a multiple-choice knapsack over the candidates of all sites.

Errors of different sites add as squares (measured on a real encoder: .40 where squares predict .43
and a linear sum 2.2), each with a sensitivity that is measured, never assumed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from structc.families import Dense
from structc.records import Candidate, Choice, Plan, PlanPoint

log = logging.getLogger("structc.select")

TIME_LIMIT_S = 20.0
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

    minimise    sum latency   (or sum (sensitivity * error)^2, with ``least="error"``)
    subject to  one candidate a site;  sum (sensitivity * error)^2 <= error^2;
                sum latency <= latency_ms;  sum params <= params.

    Returns:
        The plan, or None if no choice satisfies the constraints.
    """
    flat = [c for candidates in table.values() for c in candidates]
    if not flat:
        return Plan({})
    cost = np.array([c.price.latency_ms for c in flat])
    squares = np.array([_square(c, sensitivity) for c in flat])
    sizes = np.array([float(c.params) for c in flat])
    rows = [at for at, candidates in enumerate(table.values()) for _ in candidates]
    pick = csr_array((np.ones(len(flat)), (rows, range(len(flat)))))
    constraints = [LinearConstraint(pick, 1, 1)]
    for values, limit in ((squares, error**2), (cost, latency_ms), (sizes, params)):
        if math.isfinite(limit):
            scale = max(float(values.max()), 1e-300)  # the solver's tolerances are absolute
            constraints.append(LinearConstraint(values[None] / scale, -np.inf, limit / scale))
    usable = np.isfinite(squares)
    goal = cost if least == "latency" else np.where(usable, squares, 0.0)
    # among plans of one cost, the one of least error: a small second term decides ties
    other = np.where(usable, squares, 0.0) if least == "latency" else cost
    goal = goal / max(goal.max(), 1e-300) + 1e-6 * other / max(other.max(), 1e-300)
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
        predicted_error=math.sqrt(sum(_square(c, sensitivity) for c in chosen)),
        sensitivities=dict(sensitivity),
        notes=notes,
    )


def dense_of(candidates: Sequence[Candidate]) -> Candidate:
    """The dense candidate of a site; it is always there."""
    return next(c for c in candidates if c.family == Dense.name)


def _square(candidate: Candidate, sensitivity: Mapping[str, float]) -> float:
    return (sensitivity.get(candidate.site, 1.0) * candidate.error) ** 2


def search(
    table: Table,
    sensitivity: Mapping[str, float],
    holds: Callable[[Plan], float],
    *,
    threshold: float,
    params: float = math.inf,
    evaluations: int = 7,
) -> Plan:
    """The fastest plan whose measured quality stays at or above a threshold.

    The knapsack knows relative output errors, the user's metric is something else: the plans along
    the trade between error and latency are ordered, and bisection over the allowed error finds the
    last one that the metric accepts. Bisection assumes that the metric falls as the error grows;
    where it does not, the plan that is returned has still been measured.

    Args:
        holds: the metric of a plan on the selection part; measured at most ``evaluations`` times.
        threshold: its least value.
    """
    dense = choose(table, sensitivity, error=0.0)
    assert dense is not None
    loosest = choose(table, sensitivity, params=params)
    top = dense.predicted_error if loosest is None else loosest.predicted_error
    best, points = dense, [PlanPoint(dense.predicted_ms, dense.predicted_error, None)]
    if top <= 0:
        return replace(best, points=tuple(points))
    low, high = 0.0, math.log(top)
    low = high - math.log(1000.0)
    seen: dict[tuple[tuple[str, str], ...], float] = {}
    at = high - math.log(4.0)  # most budgets of about 1 % end here or below
    for _ in range(evaluations):
        plan = choose(table, sensitivity, error=math.exp(at), params=params)
        if plan is None:
            low = at
            at = (low + high) / 2
            continue
        key = tuple(sorted((s, f"{c.family}{sorted(c.hyper.items())}") for s, c in plan.choices.items()))
        if key not in seen:
            seen[key] = holds(plan)
            points.append(PlanPoint(plan.predicted_ms, plan.predicted_error, seen[key]))
        if seen[key] >= threshold:
            low = at
            if plan.predicted_ms < best.predicted_ms:
                best = plan
        else:
            high = at
        if high - low < 0.03:
            break
        at = (low + high) / 2
    marked = tuple(
        replace(p, chosen=abs(p.latency_ms - best.predicted_ms) < 1e-12) for p in points
    )
    return replace(best, points=marked)


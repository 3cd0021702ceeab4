"""Taking a plan back, site by site, when what was measured is outside the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from structc.families import Dense
from structc.passes.select import Table, choose, dense_of, plan_of, squared_error
from structc.records import Candidate, Plan

AIM = 0.9
"""What is left of the budget is aimed at, not its edge: each measurement costs a metric."""


def share_kept(loss: float, allowed: float, power: float) -> float:
    """The share of its predicted squared error that a plan may keep.

    Args:
        loss: what was measured: a metric's drop, or an error.
        allowed: its limit.
        power: of the error that the loss grows with: 2 for a metric near its best, 1 for an error.

    >>> round(share_kept(0.02, 0.01, 2), 3), round(share_kept(0.2, 0.1, 1), 4)
    (0.45, 0.2025)
    """
    if not math.isfinite(loss):
        return 0.25
    ratio = AIM * allowed / loss if loss > 0 else 1.0
    return min(ratio, AIM) ** (2 / power)


def milder(plan: Plan, table: Table, share: float, least: int = 1) -> Plan | None:
    """The fastest plan with at most this share of its predicted squared error.

    No site gets a form of more error than it has. Where the prediction asks for fewer changes than
    ``least``, because it is wrong, the sites that remove the most squared error for the time that
    they cost change too.

    Returns:
        The milder plan, or None if all sites are dense already.
    """
    before = {site: chosen_of(plan, table, site) for site in plan.choices}
    weights = plan.sensitivities
    if all(c.family == Dense.name for c in before.values()):
        return None
    allowed = {
        site: [c for c in table[site] if c.exact or c.error <= chosen.error]
        for site, chosen in before.items()
    }
    total = sum(squared_error(c, weights) for c in before.values())
    error = math.sqrt(share * total) if math.isfinite(total) else math.inf
    found = choose(allowed, weights, error=error)
    assert found is not None  # dense is always allowed
    now = {site: chosen_of(found, table, site) for site in plan.choices}
    while sum(now[s] is not before[s] for s in now) < least:
        step = _best_step(now, allowed, weights)
        if step is None:
            break
        now[step.site] = step
    made = plan_of(list(now.values()), table, weights, plan.notes)
    return replace(made, points=plan.points)


def dense_plan(plan: Plan, table: Table) -> Plan:
    """The plan with every site dense."""
    made = plan_of([dense_of(row) for row in table.values()], table, plan.sensitivities, plan.notes)
    return replace(made, points=plan.points)


def chosen_of(plan: Plan, table: Table, site: str) -> Candidate:
    """The candidate that a plan takes at a site."""
    choice = plan.choices[site]
    return next(
        c for c in table[site] if c.family == choice.family and dict(c.hyper) == dict(choice.hyper)
    )


def _best_step(
    now: Mapping[str, Candidate], table: Table, weights: Mapping[str, float]
) -> Candidate | None:
    """The dense candidate of the site that costs most quality for the time it saves."""
    best, most = None, -1.0
    for site, chosen in now.items():
        if chosen.family != Dense.name:
            dense = dense_of(table[site])
            saved = dense.price.latency_ms - chosen.price.latency_ms
            harm = squared_error(chosen, weights) / max(saved, 1e-9)
            if harm > most:
                best, most = dense, harm
    return best

"""Taking a plan back, site by site, when what was measured is outside the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from structc.families import Dense
from structc.passes.select import Table, plan_of
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
    """The plan with at most this share of its predicted squared error.

    Again and again the site that removes the most squared error for the time that it costs goes to
    a candidate of less error; the dense one is the last that each site has.

    Args:
        least: so many steps are taken even if the prediction asks for fewer; it may be wrong.

    Returns:
        The milder plan, or None if all sites are dense already.
    """
    now = {site: chosen_of(plan, table, site) for site in plan.choices}
    weights = plan.sensitivities
    target = share * _total(now, weights)
    steps = 0
    while step := _best_step(now, table, weights):
        now[step.site] = step
        steps += 1
        if steps >= least and _total(now, weights) <= target:
            break
    if not steps:
        return None
    made = plan_of(list(now.values()), table, weights, plan.notes)
    return replace(made, points=plan.points)


def dense_plan(plan: Plan, table: Table) -> Plan:
    """The plan with every site dense."""
    found = milder(plan, table, 0.0, least=sum(map(len, table.values())))
    return plan if found is None else found


def chosen_of(plan: Plan, table: Table, site: str) -> Candidate:
    """The candidate that a plan takes at a site."""
    choice = plan.choices[site]
    return next(
        c for c in table[site] if c.family == choice.family and dict(c.hyper) == dict(choice.hyper)
    )


def _best_step(
    now: Mapping[str, Candidate], table: Table, weights: Mapping[str, float]
) -> Candidate | None:
    best, most = None, -1.0
    for site, chosen in now.items():
        if chosen.family == Dense.name:
            continue
        for other in table[site]:
            if other.family != Dense.name and not other.error < chosen.error:
                continue
            gain = _square(chosen, weights) - _square(other, weights)
            cost = other.price.latency_ms - chosen.price.latency_ms
            worth = gain / max(cost, 1e-9) if math.isfinite(gain) else math.inf
            if worth > most:
                best, most = other, worth
    return best


def _total(now: Mapping[str, Candidate], weights: Mapping[str, float]) -> float:
    return sum(_square(c, weights) for c in now.values())


def _square(candidate: Candidate, weights: Mapping[str, float]) -> float:
    if candidate.family == Dense.name:
        return 0.0
    square = (weights.get(candidate.site, 1.0) * candidate.error) ** 2
    return square if math.isfinite(square) else math.inf

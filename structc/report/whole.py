"""From the records to the plain data of a report, the whole model: part of ``report.json``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from structc.report.data import Json, finite, plain, ratio
from structc.report.words import noise

if TYPE_CHECKING:
    from structc.records import Plan, Profile, Verification

OURS = "structc"
"""The key of the compiled model among the timed versions."""


def latency_data(verification: Verification | None) -> list[Json]:
    """One row for each timed version of the whole model, fastest dense first, ours on top."""
    if verification is None:
        return []
    timed = verification.latency
    ours = timed[OURS].latency_ms if OURS in timed else None
    dense = sorted((t.latency_ms, name) for name, t in timed.items() if name != OURS)
    order = ([OURS] if OURS in timed else []) + [name for _, name in dense]
    return [
        {
            "name": name,
            "latency_ms": finite(timed[name].latency_ms),
            "median_ms": finite(timed[name].median_ms),
            "spread": finite(timed[name].spread),
            "rounds": timed[name].rounds,
            "speedup": ratio(timed[name].latency_ms, ours),
            "ours": name == OURS,
            "best_dense": bool(dense) and name == dense[0][1],
        }
        for name in order
    ]


def plan_data(plan: Plan | None) -> Json | None:
    """A plan as plain data; None for a report that has none."""
    if plan is None:
        return None
    return {
        "predicted_ms": finite(plan.predicted_ms),
        "dense_ms": finite(plan.dense_ms),
        "predicted_error": finite(plan.predicted_error),
        "points": [plain(p) for p in plan.points],
        "notes": list(plan.notes),
    }


def verification_data(v: Verification | None) -> Json | None:
    """A verification as plain data; None where nothing was verified."""
    if v is None:
        return None
    return {
        "error": finite(v.error),
        "diverged": math.isinf(v.error),
        "tolerance": finite(v.tolerance),
        "metric_name": v.metric_name,
        "metric_dense": finite(v.metric_dense),
        "metric_compiled": finite(v.metric_compiled),
        "max_drop": finite(v.max_drop),
        "held": bool(v.held),
        "calls": v.calls,
        "rolled_back": list(v.rolled_back),
        "replaced": len(v.replaced),
        "runner": v.runner,
        "notes": list(v.notes),
    }


def profile_data(profile: Profile | None) -> Json | None:
    """What was calibrated, without the matrices."""
    if profile is None:
        return None
    return {
        "batches": profile.batches,
        "rows": profile.rows,
        "inputs": len(profile.stats),
        "dropped": sum(s.dropped for s in profile.stats.values()),
        "notes": list(profile.notes),
    }


def summary_data(rows: Sequence[Json], latency: Sequence[Json], v: Json | None) -> Json:
    """The handful of numbers that a script asks for first."""
    ours = next((r for r in latency if r["ours"]), None)
    best = next((r for r in latency if r["best_dense"]), None)
    params = [r["params"] for r in rows]
    dense = sum(r["in_features"] * r["out_features"] for r in rows)
    kept = None
    if v and v["metric_dense"] is not None and v["metric_dense"] > 0:
        kept = ratio(v["metric_compiled"], v["metric_dense"])
    return {
        "sites": len(rows),
        "rewritten": sum(r["rewritten"] for r in rows),
        "replaced": 0 if v is None else v["replaced"],
        "rolled_back": sum(r["rolled_back"] for r in rows),
        "could_be_faster": sum(r["fastest"] is not None for r in rows),
        "latency_ms": ours["latency_ms"] if ours else None,
        "best_dense": best["name"] if best else "",
        "best_dense_ms": best["latency_ms"] if best else None,
        "speedup": best["speedup"] if best else None,
        "metric_kept": kept,
        "params_kept": None if None in params else ratio(sum(params), dense),
    }


_SHARE = re.compile(r"([\d.]+(?:e-?\d+)?)\s*([x%]?)")


def share(limit: object) -> float | None:
    """``"0.5x"``, ``"50%"`` and ``0.5`` as a number; None for anything else.

    >>> share("0.5x"), share("50%"), share(0.5), share("fast")
    (0.5, 0.5, 0.5, None)
    """
    found = _SHARE.fullmatch(str(limit).strip())
    if not found:
        return None
    try:
        number = float(found[1])
    except ValueError:
        return None
    return number / 100 if found[2] == "%" else number


def budgets_data(
    options: Mapping[str, Any], summary: Json, v: Json | None, latency: Sequence[Json]
) -> list[Json]:
    """What was demanded, what came, and whether it holds. Null means that it was not measured."""
    found: list[Json] = []

    def add(name: str, limit: float | None, value: float | None, held: bool | None) -> None:
        found.append({"name": name, "limit": limit, "value": value, "held": held})

    if v:
        drop = None if summary["metric_kept"] is None else 1 - summary["metric_kept"]
        alone = (v["tolerance"] is None) != (v["max_drop"] is None)
        if v["max_drop"] is not None:
            held = v["held"] if alone or drop is None else drop <= v["max_drop"]
            add("metric", v["max_drop"], drop, held)
        if v["tolerance"] is not None:
            within = v["error"] is not None and v["error"] <= v["tolerance"]
            add("error", v["tolerance"], v["error"], v["held"] if alone else within)
    asked = options.get("budget")
    asked = asked if isinstance(asked, dict) else {}
    speed = ratio(summary["latency_ms"], summary["best_dense_ms"])
    for name, value in (("latency", speed), ("params", summary["params_kept"])):
        limit = share(asked[name]) if asked.get(name) is not None else None
        if limit is not None:
            add(name, limit, value, None if value is None else value <= limit)
    if speed is not None:
        add("never_slower", 1.0, speed, speed <= 1 + noise(latency))
    return found

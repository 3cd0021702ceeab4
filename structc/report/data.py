"""From the stages' records to the plain data of a report: the schema of ``report.json``.

Nothing here formats for people except sentences that scripts want too (headline, reasons). A
number that is not finite becomes null; ``diverged`` tells an infinite error from an unknown one.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structc.records import (
        AttentionSite,
        Candidate,
        Choice,
        LinearSite,
        Plan,
        Profile,
        Refusal,
        Sites,
        Verification,
    )

Json = dict[str, Any]

OURS = "structc"
"""The key of the compiled model among the timed versions."""


def plain(value: object) -> Any:
    """JSON data for anything: functions become their names, odd numbers null, the rest text.

    >>> plain({"max_drop": 0.01, "metric": plain, "limit": float("inf")})
    {'max_drop': 0.01, 'metric': 'plain', 'limit': None}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return finite(float(value))
    if callable(value):  # repr would carry an address
        return getattr(value, "__qualname__", type(value).__qualname__)
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(v) for v in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if type(value).__repr__ is object.__repr__:
        return type(value).__qualname__
    return str(value).removeprefix("torch.")[:200]


def finite(value: float | None) -> float | None:
    """The number, or None where JSON has no word for it."""
    return None if value is None or not math.isfinite(value) else float(value)


def ratio(top: float | None, bottom: float | None) -> float | None:
    """``top / bottom``, or None where that says nothing."""
    if top is None or not bottom or not math.isfinite(bottom):
        return None
    return finite(top / bottom)


def refusal_data(refusal: Refusal) -> Json:
    """A refusal as plain data."""
    return {
        "site": refusal.site,
        "family": refusal.family,
        "code": refusal.code,
        "reason": refusal.reason,
    }


def attention_data(site: AttentionSite) -> Json:
    """An attention site as plain data."""
    return {
        "name": site.name,
        "spelling": site.spelling,
        "mask_kind": site.mask_kind,
        "scale": finite(site.scale),
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "length": site.length,
    }


def candidate_data(candidate: Candidate, dense_params: int) -> Json:
    """A candidate with its price as plain data."""
    price = candidate.price
    return {
        "family": candidate.family,
        "hyper": plain(candidate.hyper),
        "params": candidate.params,
        "params_kept": ratio(candidate.params, dense_params),
        "flops": candidate.flops,
        "error": finite(candidate.error),
        "diverged": math.isinf(candidate.error),
        "latency_ms": finite(price.latency_ms),
        "dense_ms": finite(price.baseline_ms),
        "speedup": ratio(price.baseline_ms, price.latency_ms),
        "spread": finite(price.spread),
        "kernel": price.kernel,
        "config": plain(price.config),
        "baseline": price.baseline,
        "source": price.source,
        "form": price.form,
    }


def site_data(
    site: LinearSite,
    candidates: Sequence[Candidate],
    refusals: Sequence[Refusal],
    plan: Plan | None,
    before: Choice | None,
    time_share: float | None,
) -> Json:
    """Everything about one linear site, the decision first."""
    dense_params = site.in_features * site.out_features
    rows = [candidate_data(c, dense_params) for c in candidates]
    planned = plan.choices.get(site.name) if plan else None
    choice = None
    if plan is not None:
        choice = {"family": "dense", "hyper": {}} if planned is None else plain(planned)
    chosen = _index(rows, choice)
    _explain(rows, chosen, choice, plain(before))
    return {
        "name": site.name,
        "in_features": site.in_features,
        "out_features": site.out_features,
        "rows": site.rows,
        "dtype": plain(site.dtype),
        "bias": site.bias is not None,
        "activation": site.activation,
        "shared_input": site.group,
        "tags": sorted(site.tags),
        "time_share": finite(time_share),
        "choice": choice,
        "rewritten": choice is not None and choice["family"] != "dense",
        "rolled_back": before is not None,
        "sensitivity": finite(plan.sensitivities.get(site.name)) if plan else None,
        **_outcome(rows, chosen, choice, dense_params),
        "fastest": _fastest(rows),
        "candidates": rows,
        "refusals": [refusal_data(r) for r in refusals],
    }


def _index(rows: Sequence[Json], choice: Json | None) -> int | None:
    """Which candidate was chosen."""
    for i, row in enumerate(rows):
        if choice and row["family"] == choice["family"] and row["hyper"] == choice["hyper"]:
            return i
    return None


def _fastest(rows: Sequence[Json]) -> int | None:
    """Which structured candidate is fastest, if any beats dense."""
    found = [
        (row["latency_ms"], i)
        for i, row in enumerate(rows)
        if row["family"] != "dense" and (row["speedup"] or 0) > 1 and not row["diverged"]
    ]
    return min(found)[1] if found else None


def _outcome(rows: Sequence[Json], chosen: int | None, choice: Json | None, dense: int) -> Json:
    """Times, size and error of what runs now; dense without a candidate of its own is exact."""
    known = next((r["dense_ms"] for r in rows if r["dense_ms"] is not None), None)
    baseline = next((r["baseline"] for r in rows), "")
    if chosen is not None:
        row = rows[chosen]
        return {
            "kernel": row["kernel"],
            "dense_ms": row["dense_ms"],
            "chosen_ms": row["latency_ms"],
            "speedup": row["speedup"],
            "params": row["params"],
            "params_kept": row["params_kept"],
            "error": row["error"],
            "diverged": row["diverged"],
        }
    stays = choice is None or choice["family"] == "dense"
    return {
        "kernel": baseline if stays else "",
        "dense_ms": known,
        "chosen_ms": known if stays else None,
        "speedup": 1.0 if stays and known is not None else None,
        "params": dense if stays else None,
        "params_kept": 1.0 if stays else None,
        "error": 0.0 if stays else None,
        "diverged": False,
    }


def _explain(
    rows: list[Json], chosen: int | None, choice: Json | None, before: Json | None
) -> None:
    """Give each candidate its status and, in a few words, why."""
    best = rows[chosen] if chosen is not None else None
    back = _index(rows, before)
    for i, row in enumerate(rows):
        row["status"] = "chosen" if i == chosen else "rolled_back" if i == back else "not_chosen"
        row["why"] = _why(row, best, choice) if row["status"] == "not_chosen" else ""
        if row["status"] == "rolled_back":
            row["why"] = "chosen first, rolled back when the whole model was verified"


def _why(row: Json, best: Json | None, choice: Json | None) -> str:
    if row["family"] == "dense":
        return "the layer as it is" if choice is None else "a faster form was chosen"
    if row["diverged"]:
        return "its error is not finite"
    if row["speedup"] is not None and row["speedup"] <= 1:
        return "not faster than dense"
    if choice is None:
        return "faster than dense; not fitted" if row["error"] is None else "faster than dense"
    if best is None or choice["family"] == "dense":
        return "faster, but its error did not fit the budget"
    if (row["latency_ms"] or math.inf) > (best["latency_ms"] or 0):
        return "slower than the choice"
    return "faster, but costs more error than the choice"


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


def sites_data(
    sites: Sites,
    candidates: Mapping[str, Sequence[Candidate]],
    refusals: Sequence[Refusal],
    plan: Plan | None,
    verification: Verification | None,
    time_share: Mapping[str, float],
) -> list[Json]:
    """A row for every linear site, in the model's order."""
    of_site: dict[str, list[Refusal]] = {}
    for refusal in refusals:
        of_site.setdefault(refusal.site, []).append(refusal)
    back = verification.rolled_back if verification else {}
    return [
        site_data(
            s,
            candidates.get(s.name, ()),
            of_site.get(s.name, ()),
            plan,
            back.get(s.name),
            time_share.get(s.name),
        )
        for s in sites.linear
    ]


def tier(rows: Sequence[Json], sites: Sites) -> str:
    """``exact`` if every rewrite is within rounding of the dense layer, else ``approximate``."""
    from structc.numerics import tolerance  # torch; a report read from disk does without

    dtypes = {s.name: s.dtype for s in sites.linear}
    changed = [r for r in rows if r["rewritten"]]
    exact = all(
        r["error"] is not None and r["error"] <= tolerance(dtypes[r["name"]]) for r in changed
    )
    return "exact" if exact else "approximate"


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


def budgets_data(options: Mapping[str, Any], summary: Json, v: Json | None) -> list[Json]:
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
        add("never_slower", 1.0, speed, speed <= 1 + _NOISE)
    return found


_NOISE = 0.03
"""Two timings of one model in one run differ by this much on a quiet machine."""

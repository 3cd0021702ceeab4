"""From the records to the plain data of a report, site by site: part of ``report.json``.

Nothing here formats for people except sentences that scripts want too (headline, reasons). A
number that is not finite becomes null; ``diverged`` tells an infinite error from an unknown one.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structc.records import Candidate, LinearSite, Plan, Refusal, Sites, Verification

Json = dict[str, Any]


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
        "exact": candidate.exact,
        "diverged": math.isinf(candidate.error),
        "latency_ms": finite(price.latency_ms),
        "dense_ms": finite(price.baseline_ms),
        "speedup": ratio(price.baseline_ms, price.latency_ms),
        "spread": finite(price.spread),
        "expected_ms": finite(price.expected_ms),
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
    verification: Verification | None,
    time_share: float | None,
) -> Json:
    """Everything about one linear site, the decision first."""
    before = verification.rolled_back.get(site.name) if verification else None
    dense_params = site.in_features * site.out_features
    rows = [candidate_data(c, dense_params) for c in candidates]
    choice = choice_data(site.name, plan)
    chosen = explained(rows, choice, plain(before))
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
        **_outcome(rows, chosen, choice, dense_params, _run_by(site, choice, verification)),
        "fastest": _fastest(rows),
        "candidates": rows,
        "refusals": [refusal_data(r) for r in refusals],
    }


def choice_data(name: str, plan: Plan | None) -> Json | None:
    """What a plan decides about a site; dense where it does not speak of it."""
    if plan is None:
        return None
    planned = plan.choices.get(name)
    return {"family": "dense", "hyper": {}} if planned is None else plain(planned)


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


def _run_by(site: LinearSite, choice: Json | None, verification: Verification | None) -> str:
    """Who computes a dense layer that was left to the model; ``""`` where structc does."""
    if verification is None or choice is None or choice["family"] != "dense":
        return ""
    if site.name in verification.replaced:
        return ""
    return "inductor" if verification.runner == "inductor" else "aten"


def _outcome(
    rows: Sequence[Json], chosen: int | None, choice: Json | None, dense: int, other: str
) -> Json:
    """Times, size and error of what runs now; dense without a candidate of its own is exact."""
    known = next((r["dense_ms"] for r in rows if r["dense_ms"] is not None), None)
    baseline = next((r["baseline"] for r in rows), "")
    if chosen is not None and not other:
        row = rows[chosen]
        return {
            "kernel": row["kernel"],
            "dense_ms": row["dense_ms"],
            "chosen_ms": row["latency_ms"],
            "speedup": row["speedup"],
            "params": row["params"],
            "params_kept": row["params_kept"],
            "error": row["error"],
            "exact": row["exact"],
            "diverged": row["diverged"],
        }
    stays = choice is None or choice["family"] == "dense"
    return {
        "kernel": other or (baseline if stays else ""),
        "dense_ms": known,
        "chosen_ms": known if stays else None,
        "speedup": 1.0 if stays and known is not None else None,
        "params": dense if stays else None,
        "params_kept": 1.0 if stays else None,
        "error": 0.0 if stays else None,
        "exact": stays,
        "diverged": False,
    }


def explained(rows: list[Json], choice: Json | None, before: Json | None) -> int | None:
    """Give each candidate its status and, in a few words, why; and which one was chosen."""
    chosen = _index(rows, choice)
    best = rows[chosen] if chosen is not None else None
    back = _index(rows, before)
    for i, row in enumerate(rows):
        row["status"] = "chosen" if i == chosen else "rolled_back" if i == back else "not_chosen"
        row["why"] = _why(row, best, choice) if row["status"] == "not_chosen" else ""
        if row["status"] == "rolled_back":
            row["why"] = "chosen first, rolled back when the whole model was verified"
    return chosen


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
    return [
        site_data(
            s,
            candidates.get(s.name, ()),
            of_site.get(s.name, ()),
            plan,
            verification,
            time_share.get(s.name),
        )
        for s in sites.linear
    ]


def tier(rows: Sequence[Json], sites: Sites) -> str:
    """``exact`` if every rewrite is within rounding of the dense layer, else ``approximate``."""
    if any(s.by_head for s in sites.attention):
        return "approximate"
    from structc.numerics import tolerance  # torch; a report read from disk does without

    dtypes = {s.name: s.dtype for s in sites.linear}
    changed = [r for r in rows if r["rewritten"]]
    exact = all(
        r["exact"] or (r["error"] is not None and r["error"] <= tolerance(dtypes[r["name"]]))
        for r in changed
    )
    return "exact" if exact else "approximate"

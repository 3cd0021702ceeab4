"""Stage 4: what is asked of the tuner, what is worth fitting, which kernels are bound."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from structc.codegen import attention_price, autotune, lower
from structc.codegen.autotune import Request
from structc.errors import InternalError
from structc.families import BY_NAME, AbstractFamily, Dense, LowRank
from structc.forms import Form, PackedDense, parse_form
from structc.options import Log, Options, forced, proposals
from structc.passes.chains import Chain
from structc.progress import named
from structc.records import Candidate, Hyper, LinearSite, Plan, Price, Refusal, Sites

_BASELINES = (Dense.name, LowRank.name)
WORTH = 0.98
"""A structured form must take less than this share of the best dense time to be fitted at all."""

Prices = dict[tuple[str, str, tuple[tuple[str, int], ...]], tuple[Request, Price]]
"""(site, family, hyper) -> what was asked and what it costs."""


def price(
    sites: Sites, options: Options, notes: Log, known: Mapping[str, AbstractFamily]
) -> Prices:
    """Stage 4: latency depends on shapes, not on values, so it comes before any fit.

    Args:
        known: the structures that weights have exactly.
    """
    requests: dict[tuple[str, str, tuple[tuple[str, int], ...]], Request] = {}
    for site in sites.linear:
        for family, hyper in proposals(site, options, known.get(site.name)):
            form = _form(site, family, hyper)
            if isinstance(form, Refusal):
                notes.refusals.append(form)
                continue
            requests[site.name, family, _frozen(hyper)] = Request(
                form,
                site.rows,
                site.dtype,
                site.bias is not None,
                site.activation,
                site.transposed and isinstance(form, PackedDense),
            )
    found = autotune.price(
        list(requests.values()),
        effort=options.effort,
        seconds=options.seconds,
        prune=options.effort == "quick" and not _asked_for(sites, options),
        progress=named(options.progress, "price"),
    )
    prices: Prices = {}
    for (site_name, family, hyper_key), request in requests.items():
        cost = found[request]
        refusal = cost if isinstance(cost, Refusal) else cost.without
        if refusal is not None:
            notes.refusals.append(replace(refusal, site=site_name, family=family))
        if not isinstance(cost, Refusal):
            prices[site_name, family, hyper_key] = (request, cost)
    notes.notes += _model_note([cost for _, cost in prices.values()])
    return prices


def price_attention(sites: Sites, options: Options, notes: Log) -> Sites:
    """Stage 4: what computes each attention from here on, where that is faster than the graph."""
    able = [a for a in sites.attention if a.case is not None]
    found = attention_price.price(
        [a.case for a in able if a.case is not None],
        effort=options.effort,
        progress=named(options.progress, "attention"),
    )
    settled = []
    for site in sites.attention:
        cost = found.get(site.case) if site.case is not None else site.refusal
        if isinstance(cost, Price) and cost.latency_ms <= WORTH * cost.baseline_ms:
            site = replace(site, kernel=cost.kernel, price=cost)
        elif isinstance(cost, Price):
            reason = (
                f"{cost.kernel} takes {cost.latency_ms:.3g} ms, {cost.baseline} in the graph "
                f"{cost.baseline_ms:.3g} ms"
            )
            refusal = Refusal(site.name, "attention", "NOT_FASTER", reason)
            site = replace(site, price=cost, refusal=refusal)
        elif cost is not None:
            site = replace(site, refusal=replace(cost, site=site.name))
        if site.refusal is not None:
            notes.refusals.append(site.refusal)
        settled.append(site)
    return replace(sites, attention=tuple(settled))


def _form(site: LinearSite, family: str, hyper: Hyper) -> Form | Refusal:
    """The form of a proposal; the user may have asked for one that the sizes do not allow."""
    n, m = site.in_features, site.out_features
    try:
        form = BY_NAME[family].form_of(
            n, m, hyper, bias=site.bias is not None, activation=site.activation
        )
    except (ValueError, ArithmeticError, LookupError, InternalError) as e:
        return Refusal(site.name, family, "HYPER", f"{dict(hyper)} on {m} x {n}: {e}")
    if (form.in_features, form.out_features) == (n, m):
        return form
    reason = f"it has no matrix of {m} x {n}, only of {form.out_features} x {form.in_features}"
    return Refusal(site.name, family, "SIZE", reason)


def _asked_for(sites: Sites, options: Options) -> bool:
    """Whether forms may be wanted that are slower than dense."""
    return options.budget.params is not None or any(forced(s, options) for s in sites.linear)


def _model_note(prices: Sequence[Price]) -> list[str]:
    """How near the cost model came to what was measured."""
    measured = [p for p in prices if p.source == "measured" and p.latency_ms > 0 < p.expected_ms]
    if len(measured) < 2:
        return []
    low, middle, high = statistics.quantiles([p.expected_ms / p.latency_ms for p in measured], n=4)
    return [
        f"the cost model expected {middle:.2f} of the time that was measured (median of "
        f"{len(measured)} prices, quartiles {low:.2f} and {high:.2f})"
    ]


def worth_fitting(
    site: LinearSite, prices: Prices, options: Options, notes: Log, known: AbstractFamily | None
) -> list[tuple[str, Mapping[str, int], Price]]:
    """The proposals of a site that can pay; the others become refusals.

    Not worth a fit: a form that is no faster than the best dense kernel; and, unless the effort is
    full, a form that a low-rank product with more parameters outruns (measured on trained weights,
    other families gain at most about a tenth of the error at equal parameters), unless the weight
    has that structure exactly.
    """
    if forced(site, options) is not None or options.budget.params is not None:
        return [
            (family, dict(hyper), cost)
            for (name, family, hyper), (_, cost) in prices.items()
            if name == site.name
        ]
    kept: list[tuple[str, Mapping[str, int], Price]] = []
    for (name, family, hyper), (request, cost) in prices.items():
        if name != site.name:
            continue
        reason = None if family == Dense.name else _not_faster(cost)
        exact = known is not None and (family, dict(hyper)) == (known.name, dict(known.hyper()))
        if reason is None and options.effort != "full" and family not in _BASELINES and not exact:
            reason = _outrun(request, cost, site, prices)
        if reason is None:
            kept.append((family, dict(hyper), cost))
            continue
        text = ", ".join(f"{k} {v}" for k, v in hyper)
        notes.refusals.append(Refusal(site.name, family, reason[0], f"{text}: {reason[1]}"))
    return kept


def _not_faster(cost: Price) -> tuple[str, str] | None:
    if cost.latency_ms <= WORTH * cost.baseline_ms:
        return None
    return "NOT_FASTER", (
        f"{cost.latency_ms:.3g} ms, the best dense kernel ({cost.baseline}) takes "
        f"{cost.baseline_ms:.3g} ms; {1 - WORTH:.0%} less is the least that is worth a fit"
    )


def _outrun(
    request: Request, cost: Price, site: LinearSite, prices: Prices
) -> tuple[str, str] | None:
    for (name, family, hyper), (other, price_) in prices.items():
        if name != site.name or family != LowRank.name:
            continue
        # compared as ratios to the dense time of the same round: rounds differ, ratios do not
        faster = price_.speedup >= cost.speedup
        if faster and other.form.params >= request.form.params:
            return "OUTRUN", (
                f"{cost.speedup:.2f}x over dense with {request.form.params} parameters; low rank "
                f"{dict(hyper)['rank']} reaches {price_.speedup:.2f}x with {other.form.params}"
            )
    return None


def priced_only(site: LinearSite, prices: Prices, known: AbstractFamily | None) -> list[Candidate]:
    """Candidates without errors, for ``inspect``; what the weight is exactly is known to be so."""
    held = None if known is None else (known.name, dict(known.hyper()))
    out = []
    for (name, family, hyper), (request, price) in prices.items():
        if name == site.name:
            error, form = 0.0 if family == Dense.name else float("nan"), request.form
            out.append(
                Candidate(
                    name,
                    family,
                    dict(hyper),
                    form.params,
                    form.flops,
                    error,
                    price,
                    exact=family == Dense.name or (family, dict(hyper)) == held,
                )
            )
    return out


def fast_chains(
    chains: Sequence[Chain], options: Options, notes: Log
) -> tuple[frozenset[str], list[dict[str, Any]]]:
    """The programs whose kernel beats their parts, attached, and their bindings."""
    wanted = {(c.program, c.rows, c.dtype) for c in chains}
    requests = [Request(form, rows, dtype, False, "") for form, rows, dtype in wanted]
    found = autotune.price(
        sorted(requests, key=lambda r: str(r.form)),
        effort=options.effort,
        seconds=options.seconds,
        progress=named(options.progress, "chains"),
    )
    fast: set[str] = set()
    slow: set[str] = set()  # a program is taken at all its places, or nowhere
    bindings = []
    for request, cost in found.items():
        name, refusal = str(request.form), cost if isinstance(cost, Refusal) else None
        if not isinstance(cost, Refusal) and cost.latency_ms > cost.baseline_ms:
            reason = f"{cost.latency_ms:.3g} ms, its parts take {cost.baseline_ms:.3g} ms"
            refusal = Refusal("", "chain", "NOT_FASTER", f"{name}: {reason}")
        if not isinstance(cost, Refusal) and refusal is None:
            refusal = lower.bind(
                request.form, request.dtype, request.rows, cost.kernel, cost.config
            )
        if refusal is not None:
            notes.refusals.append(replace(refusal, family="chain"))
            slow.add(name)
            continue
        assert not isinstance(cost, Refusal)
        fast.add(name)
        bindings.append(
            {
                "form": name,
                "dtype": str(request.dtype).removeprefix("torch."),
                "rows": request.rows,
                "kernel": cost.kernel,
                "config": dict(cost.config),
                "transposed": False,
                "site": "",
                "family": "chain",
                "hyper": {},
            }
        )
    fast -= slow
    return frozenset(fast), [b for b in bindings if b["form"] in fast]


def bind_all(
    table: Mapping[str, Sequence[Candidate]], sites: Sites, notes: Log
) -> list[dict[str, Any]]:
    """Attach the kernels that the prices promise; a kernel that cannot be built is a refusal.

    A leaf runs without the activation that graphs fuse in: it gets the same kernel for its form.
    """
    by_name = {site.name: site for site in sites.linear}
    bindings: dict[str, dict[str, Any]] = {}
    for name, candidates in table.items():
        site = by_name[name]
        for c in candidates:
            for act in {"", site.activation}:
                form = BY_NAME[c.family].form_of(
                    site.in_features,
                    site.out_features,
                    c.hyper,
                    bias=site.bias is not None,
                    activation=act,
                )
                binding = {
                    "form": str(form),
                    "dtype": str(site.dtype).removeprefix("torch."),
                    "rows": site.rows,
                    "kernel": c.price.kernel,
                    "config": dict(c.price.config),
                    "transposed": site.transposed and c.family == Dense.name,
                    "site": name,
                    "family": c.family,
                    "hyper": dict(c.hyper),
                }
                key = f"{form} {site.dtype} {site.rows} {binding['transposed']}"
                if key in bindings:
                    bindings[f"{key} {name}"] = binding
                    continue
                refusal = lower.bind(
                    form,
                    site.dtype,
                    site.rows,
                    c.price.kernel,
                    c.price.config,
                    transposed=bool(binding["transposed"]),
                )
                if refusal is not None:
                    notes.refusals.append(replace(refusal, site=name, family=c.family))
                bindings[key] = binding
    return list(bindings.values())


def in_plan(binding: Mapping[str, Any], plan: Plan) -> bool:
    """Whether a plan uses the kernel of a binding."""
    choice = plan.choices.get(binding["site"])
    return (
        choice is not None
        and choice.family == binding["family"]
        and dict(choice.hyper) == binding["hyper"]
    )


def _frozen(hyper: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(hyper.items())


def bind_saved(kernels: Sequence[Mapping[str, Any]]) -> list[Refusal]:
    """Attach the kernels that an artifact names; those of another machine may refuse."""
    refusals = []
    for item in kernels:
        try:
            form = parse_form(str(item["form"]))
            dtype = getattr(torch, str(item["dtype"]))
            refusal = lower.bind(
                form,
                dtype,
                int(item["rows"]),
                str(item["kernel"]),
                dict(item["config"]),
                transposed=bool(item["transposed"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, InternalError) as e:
            site = str(item.get("site", "")) if isinstance(item, Mapping) else ""
            refusal = Refusal(site, "load", "KERNEL", f"broken entry: {e}")
        if refusal is not None:
            refusals.append(refusal)
    return refusals

"""The per-head tier of attention: candidates for selection, from statistics, prices and errors.

Statistics propose methods for each head, the clock drops those that are no faster than the exact
kernel, and what is left is held against exact attention on the data that fits see and, to confirm
it, on the selection part. A candidate of an attention is then a share of a head's output that may
be lost; each head takes its cheapest method inside. Heads that recall stay exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

from structc.attention.base import AbstractMethod
from structc.attention.by_head import HeadGroup, method_text, text_of
from structc.attention.methods import METHODS
from structc.attention.stats import HeadStats
from structc.attention_records import PER_HEAD, AttentionSite, HeadRow, HeadTrial
from structc.codegen.head_price import WORTH, HeadPrice, price_methods
from structc.families import Dense
from structc.head_work import kept_stats, kept_verdicts
from structc.options import Log, Options
from structc.passes.calibrate import Parts
from structc.passes.select import Table
from structc.passes.survey_heads import (
    Verdict,
    Verdicts,
    by_head_refused,
    form_of,
    judge,
    survey,
)
from structc.progress import named
from structc.records import Candidate, Captured, Price, Refusal, Sites
from structc.workdir import WorkDir

LEVELS = (10, 20, 50, 100, 200, 300)
"""Shares of a head's output that may be lost, in thousandths."""
RECALL = 0.25
"""Induction score from which on a head stays exact."""
Prices = Mapping[AbstractMethod, HeadPrice | Refusal]


@dataclass(frozen=True)
class Judged:
    """One attention with all that is known of its heads.

    Attributes:
        stats: of each head.
        prices: of each method that some head might take.
        trials: the heads that each method was tried on.
        fitted, confirmed: errors on the data that fits see, and on the selection part.
    """

    site: AttentionSite
    stats: Sequence[HeadStats]
    prices: Prices
    trials: Mapping[AbstractMethod, tuple[int, ...]]
    fitted: Verdicts
    confirmed: Verdicts

    def error(self, head: int, method: AbstractMethod) -> float:
        """Relative output error of a head, the worse of both parts; infinite if one is unknown."""
        key = (self.site.name, method)
        if key not in self.fitted or key not in self.confirmed:
            return math.inf
        at = self.trials[method].index(head)
        return max(self.fitted[key].error(at), self.confirmed[key].error(at))

    def verdicts(self, head: int, method: AbstractMethod) -> tuple[Verdict, Verdict, int]:
        """Both verdicts of a method, and where the head is in them."""
        key = (self.site.name, method)
        return self.fitted[key], self.confirmed[key], self.trials[method].index(head)

    def length(self, method: AbstractMethod) -> tuple[int, int]:
        """Lengths at which a method may run: faster, and inside what was seen in both parts."""
        price = self.prices[method]
        assert isinstance(price, HeadPrice)
        key = (self.site.name, method)
        seen = [self.fitted[key].lengths, self.confirmed[key].lengths]
        # a causal row is the same on a shorter input; a row that sees all keys is not
        shortest = 0 if form_of(self.site).causal else max(map(min, seen))
        return max(price.least, shortest), min(map(max, seen))


def by_head_candidates(
    captured: Captured, sites: Sites, parts: Parts, options: Options, work: WorkDir, notes: Log
) -> tuple[Sites, Table]:
    """What each attention may lose for speed: rows of the table that selection chooses from.

    Statistics and verdicts are kept in ``work``, prices in the tuning database.

    Returns:
        The sites with what is known of their heads, and a row for each that has candidates.
    """
    if options.budget.exact or not sites.attention:
        return sites, {}
    able: list[AttentionSite] = []
    for site in sites.attention:
        refusal = by_head_refused(site)
        if refusal is None and not parts.fit:
            refusal = Refusal(site.name, PER_HEAD, "NO_DATA", "no calibration data reached it")
        if refusal is None:
            able.append(site)
        else:
            notes.refusals.append(replace(refusal, family=PER_HEAD))
    if options.effort == "none" or not able:
        return sites, {}
    judged = _judged(captured, able, parts, options, work)
    table: dict[str, list[Candidate]] = {}
    known = {}
    for one in judged:
        found = _candidates(one)
        rows = tuple(_row(one, head) for head in range(len(one.stats)))
        levels = {int(c.hyper["permille"]): c.price.form for c in found[1:]}
        known[one.site.name] = replace(one.site, levels=levels, head_rows=rows)
        if levels:
            table[one.site.name] = found
    for site in able:
        if site.name not in known:
            reason = "no calibration data without padding reached it at its length"
            notes.refusals.append(Refusal(site.name, PER_HEAD, "UNREACHED", reason))
    attention = tuple(known.get(s.name, s) for s in sites.attention)
    return replace(sites, attention=attention), table


def _judged(
    captured: Captured,
    sites: Sequence[AttentionSite],
    parts: Parts,
    options: Options,
    work: WorkDir,
) -> list[Judged]:
    progress = options.progress
    stats = kept_stats(work, sites, lambda some: survey(captured, some, parts.fit, progress))
    reached = [s for s in sites if s.name in stats]
    prices: dict[str, Prices] = {}
    for site in reached:
        assert site.case is not None
        methods = list(dict.fromkeys(m for h in stats[site.name] for m in _proposed(h)))
        prices[site.name] = price_methods(
            site.case, methods, effort=options.effort, progress=named(progress, "heads")
        )
    trials = {
        s.name: {
            method: tuple(h for h, one in enumerate(stats[s.name]) if method in _proposed(one))
            for method, price in prices[s.name].items()
            if isinstance(price, HeadPrice)
        }
        for s in reached
    }

    fitted = kept_verdicts(
        work, "fit", trials, lambda some: judge(captured, reached, some, parts.fit, progress)
    )
    confirmed = kept_verdicts(
        work, "select", trials, lambda some: judge(captured, reached, some, parts.select, progress)
    )
    return [
        Judged(s, stats[s.name], prices[s.name], trials[s.name], fitted, confirmed) for s in reached
    ]


def _proposed(stats: HeadStats) -> list[AbstractMethod]:
    found = (m.proposals(stats) for m in METHODS)
    return [m for made in found if not isinstance(made, Refusal) for m in made]


# ---------------------------------------------------------------------------- candidates


def _candidates(one: Judged) -> list[Candidate]:
    """Exact attention, and a candidate for each level that changes something and pays."""
    site = one.site
    case = site.case
    assert case is not None
    exact_ms = min((p.exact_ms for p in one.prices.values() if isinstance(p, HeadPrice)), default=0)
    found = [_dense(site, exact_ms)]
    before = ""
    for level in LEVELS:
        chosen = _chosen(one, level / 1000)
        text = text_of(_groups(one, chosen))
        if not chosen or text == before:
            continue
        before = text
        share = (case.heads - len(chosen)) / case.heads
        ms, spread = found[0].price.latency_ms * share, 0.0
        for method in chosen.values():
            price = one.prices[method]
            assert isinstance(price, HeadPrice)
            ms += found[0].price.latency_ms / price.speedup / case.heads
            spread = max(spread, price.spread)
        if ms > WORTH * found[0].price.latency_ms:
            continue
        cost = Price(
            text,
            found[0].price.rows,
            ms,
            found[0].price.latency_ms,
            "structc",
            {},
            "attention",
            spread,
            "measured",
        )
        hyper = {"permille": level}
        error = _site_error(one, chosen)
        found.append(Candidate(site.name, PER_HEAD, hyper, 0, 0, error, cost))
    return found


def _dense(site: AttentionSite, exact_ms: float) -> Candidate:
    """The attention as it is without this tier."""
    case = site.case
    assert case is not None
    ms = exact_ms if site.price is None else min(site.price.latency_ms, site.price.baseline_ms)
    cost = Price(
        case.form, case.batch * case.queries, ms, ms, "structc", {}, "attention", 0.0, "measured"
    )
    return Candidate(site.name, Dense.name, {}, 0, 0, 0.0, cost, exact=True)


def _chosen(one: Judged, most: float) -> dict[int, AbstractMethod]:
    """For each head that may lose so much its cheapest method."""
    chosen = {}
    for head, stats in enumerate(one.stats):
        if stats.recall >= RECALL:
            continue
        able = [
            (price.method_ms, method_text(method), method)
            for method in _proposed(stats)
            if isinstance(price := one.prices[method], HeadPrice)
            and one.error(head, method) <= most
            and one.length(method)[0] <= one.length(method)[1]
        ]
        if able:
            chosen[head] = min(able)[2]
    return chosen


def _groups(one: Judged, chosen: Mapping[int, AbstractMethod]) -> list[HeadGroup]:
    scale = form_of(one.site).scale
    groups: dict[AbstractMethod, list[int]] = {}
    for head, method in sorted(chosen.items()):
        groups.setdefault(method, []).append(head)
    return [
        HeadGroup(replace(method, scale=scale), tuple(heads), *one.length(method))
        for method, heads in groups.items()
    ]


def _site_error(one: Judged, chosen: Mapping[int, AbstractMethod]) -> float:
    """Relative error of all heads' output together, on the selection part."""
    gap = 0.0
    sizes: dict[int, float] = {}
    for head, method in chosen.items():
        _, verdict, at = one.verdicts(head, method)
        gap += verdict.gap[at]
        sizes[head] = verdict.size[at]
    size = sum(sizes.values()) / len(sizes) * len(one.stats)  # heads that stay count as the mean
    return math.sqrt(gap / size) if size else math.inf


# ---------------------------------------------------------------------------- rows of the report


def _row(one: Judged, head: int) -> HeadRow:
    stats = one.stats[head]
    tried: list[HeadTrial] = []
    refused: list[Refusal] = []
    for kind in METHODS:
        made = kind.proposals(stats)
        if isinstance(made, Refusal):
            refused.append(replace(made, site=one.site.name))
            continue
        for method in made:
            price = one.prices[method]
            if isinstance(price, Refusal):
                refused.append(replace(price, site=one.site.name))
            elif not math.isfinite(one.error(head, method)):
                reason = f"{method_text(method)}: no input was inside what it may be used for"
                refused.append(Refusal(one.site.name, kind.name, "INPUTS", reason))
            else:
                tried.append(_trial(one, head, method, price))
    if stats.recall >= RECALL:
        reason = f"induction score {stats.recall:.2f} (at {RECALL} a head stays exact)"
        refused.insert(0, Refusal(one.site.name, PER_HEAD, "RECALL", reason))
    return HeadRow(head, _numbers(stats), tuple(tried), tuple(refused))


def _trial(one: Judged, head: int, method: AbstractMethod, price: HeadPrice) -> HeadTrial:
    first, second, at = one.verdicts(head, method)
    return HeadTrial(
        method_text(method),
        one.error(head, method),
        max(first.kl[at], second.kl[at]),
        max(first.tv[at], second.tv[at]),
        max(first.bound[at], second.bound[at]),
        price.speedup,
    )


def _numbers(stats: HeadStats) -> dict[str, float]:
    """Statistics as plain numbers."""
    found: dict[str, float] = {}
    for f in fields(stats):
        value = getattr(stats, f.name)
        if isinstance(value, Mapping):
            for key, number in value.items():
                name = "+".join(map(str, key)) if isinstance(key, tuple) else f"{key:g}"
                found[f"{f.name} {name}"] = float(number)
        elif isinstance(value, tuple):
            found |= {f"period {at}": float(p) for at, p in enumerate(value, 1)}
        else:
            found[f.name] = float(value)
    return found

"""Stages 6 and 7 on a running model: sensitivities, and the search for a plan."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from structc.attention_records import PER_HEAD
from structc.budget import Budget
from structc.families import AbstractFamily, Dense
from structc.passes import verify as V
from structc.passes.calibrate import Parts, first_items
from structc.passes.fit import materialise, one_thread
from structc.passes.objective import Objectives
from structc.passes.rewrite import Product, rewrite
from structc.passes.rollback import chosen_of
from structc.passes.select import Table, choose, dense_of, search
from structc.records import (
    Call,
    Candidate,
    Captured,
    Choice,
    Plan,
    Refusal,
    Sites,
)
from structc.workdir import WorkDir

log = logging.getLogger("structc.trial")

PROBE_ROWS = 8
"""Items of a batch that sensitivities are measured on."""
EVALUATIONS = 6
"""Plans that selection measures."""
EXACT_KERNELS = ("aten", "reference")
"""Dense kernels that PyTorch itself would use: such a site is left as it is."""

Progress = Callable[[str, int, int], None]


class Lab:
    """Builds products for plans and measures them against the original.

    Modules that were fitted for one plan serve the next; references are computed once.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        sites: Sites,
        objectives: Objectives,
        parts: Parts,
        budget: Budget,
        work: WorkDir,
    ) -> None:
        self.model, self.captured, self.sites = model, captured, sites
        self.objectives, self.parts, self.budget, self.work = objectives, parts, budget, work
        self.by_name = {site.name: site for site in sites.linear}
        self.quality = V.quality_for(budget, captured.tree, parts.select, parts.verify)
        self._modules: dict[str, AbstractFamily] = {}
        self._wanted: dict[str, list[Any]] = {}
        self.untouched: frozenset[str] = frozenset()

    def module(self, site: str, choice: Choice) -> AbstractFamily | Refusal:
        key = f"{site} {choice.family} {sorted(choice.hyper.items())}"
        if key not in self._modules:
            with one_thread():
                made = materialise(self.objectives, self.by_name[site], choice.family, choice.hyper)
            if isinstance(made, Refusal):
                return made
            self._modules[key] = made
        return self._modules[key]

    def product(
        self,
        plan: Plan,
        table: Table,
        untouched: frozenset[str] | set[str] = frozenset(),
        chains: Collection[str] = (),
    ) -> Product:
        """The rewritten model of a plan. Dense sites whose best kernel is PyTorch's stay.

        Args:
            chains: programs that become one operator.
            untouched: dense sites that stay the user's own layers whatever their kernel.
        """
        self.untouched = frozenset(untouched)
        modules: dict[str, AbstractFamily] = {}
        for site, choice in plan.choices.items():
            if site not in self.by_name:
                continue  # an attention
            stays = site in untouched or _plain(table[site]) or self.by_name[site].window
            if choice.family == Dense.name and stays:
                continue  # a convolution as a matrix of windows is no faster than it is
            made = self.module(site, choice)
            if not isinstance(made, Refusal):
                modules[site] = made
        keep = {f"{s} {c.family} {sorted(c.hyper.items())}" for s, c in plan.choices.items()}
        self._modules = {k: m for k, m in self._modules.items() if k in keep}
        return rewrite(self.captured, self.sites_of(plan), modules, chains)

    def sites_of(self, plan: Plan) -> Sites:
        """The sites with what a plan decides about heads of attention."""
        chosen = {n: c.hyper["permille"] for n, c in plan.choices.items() if c.family == PER_HEAD}
        attention = tuple(
            replace(s, by_head=s.levels[int(chosen[s.name])]) if s.name in chosen else s
            for s in self.sites.attention
        )
        return replace(self.sites, attention=attention)

    def forget_filters(self) -> None:
        """Let products have the user's own convolutions, and so none of the graphs without them."""
        self.captured = replace(self.captured, regions=(), filters={})

    @property
    def rewrites_attention(self) -> bool:
        """Whether some attention is computed another way than in its graph."""
        return any(site.kernel for site in self.sites.attention)

    def forget_attention(self, why: str, *, hooked: bool = True) -> None:
        """Let products compute attention as the graphs do.

        Args:
            hooked: whether that holds for attention outside of graphs too.
        """
        kept = []
        for site in self.sites.attention:
            if site.hooked and not hooked:
                kept.append(site)
                continue
            refusal = (
                Refusal(site.name, "attention", "VERIFY", why) if site.kernel else site.refusal
            )
            kept.append(replace(site, kernel="", refusal=refusal, levels={}))
        self.sites = replace(self.sites, attention=tuple(kept))

    def error(self, product: Product, part: str) -> float:
        """Largest relative output error on a part of the held-out data."""
        return V.worst_error(product.tree, self._calls(part), self.wanted(part))

    def metric(self, product: Product, part: str) -> float:
        """The metric of a product; one that fails or is not finite rejects it."""
        assert self.quality is not None
        try:
            value = self.quality.value(product.tree, part)
        except Exception as e:
            log.warning("the metric failed: %s: %s", type(e).__name__, e)
            return -math.inf
        return value if math.isfinite(value) else -math.inf

    def wanted(self, part: str) -> list[Any]:
        """The original's outputs on a part of the held-out data."""
        if part not in self._wanted:
            self._wanted[part] = V.references(self.captured.tree, self._calls(part))
        return self._wanted[part]

    def _calls(self, part: str) -> Sequence[Call]:
        return self.parts.select if part == "select" else self.parts.verify


def _plain(candidates: Sequence[Candidate]) -> bool:
    return dense_of(candidates).price.kernel in EXACT_KERNELS


# ---------------------------------------------------------------------------- selection


def select_plan(lab: Lab, table: Table, progress: Progress) -> Plan:
    """The plan that a budget buys."""
    budget = lab.budget
    dense_only = choose(table, {}, error=0.0)
    assert dense_only is not None
    if budget.exact or all(len(c) == 1 for c in table.values()):
        return dense_only
    sensitivity = sensitivities(lab, table, progress)
    full = sum(dense_of(c).params for c in table.values())
    params = math.inf if budget.params is None else float(budget.params) * full
    if budget.max_drop is None and budget.error is None:
        return _demanded(table, sensitivity, budget, params) or dense_only

    count = [0]

    def measured(plan: Plan) -> float:
        count[0] += 1
        progress("select", count[0], EVALUATIONS)
        choices = sorted((s, c.family, *sorted(c.hyper.items())) for s, c in plan.choices.items())
        known = lab.work.get(f"loss-{choices}")
        if known is None:
            known = _loss(lab, table, plan)
            lab.work.put(f"loss-{choices}", known)
        return float(known)

    if lab.quality is not None:
        dense = lab.quality.dense["select"]
        allowed = dense - V.threshold(dense, float(budget.max_drop or 0.0))
    else:
        allowed = float(budget.error or 0.0)
    plan = search(
        table,
        sensitivity,
        measured,
        allowed=allowed,
        power=1 if lab.quality is None else 2,
        params=params,
        evaluations=EVALUATIONS,
    )
    if params < math.inf and _size(plan, table) > params:
        # what is asked for costs too much quality: as few parameters as quality allows
        plan = search(
            table,
            sensitivity,
            measured,
            allowed=allowed,
            power=1 if lab.quality is None else 2,
            least="params",
            evaluations=EVALUATIONS,
        )
    progress("select", EVALUATIONS, EVALUATIONS)
    return plan


def _size(plan: Plan, table: Table) -> int:
    """Parameters of the linear layers that a plan leaves."""
    return sum(chosen_of(plan, table, site).params for site in plan.choices)


def _loss(lab: Lab, table: Table, plan: Plan) -> float:
    """What a plan loses on the selection part: metric, or relative output error."""
    product = lab.product(plan, table)
    if lab.quality is None:
        return lab.error(product, "select")
    return lab.quality.dense["select"] - lab.metric(product, "select")


def _demanded(
    table: Table, sensitivity: Mapping[str, float], budget: Budget, params: float
) -> Plan | None:
    """The least error that meets a demand on latency or parameters alone."""
    latency = math.inf
    if budget.latency is not None:
        latency = float(budget.latency) * sum(dense_of(c).price.latency_ms for c in table.values())
    plan = choose(table, sensitivity, latency_ms=latency, params=params, least="error")
    if plan is not None:
        return plan
    return choose(table, sensitivity)


def sensitivities(lab: Lab, table: Table, progress: Progress) -> dict[str, float]:
    """Model output error / site output error, by replacing one site at a time.

    Measured with the middle candidate of each site on a few held-out items; never assumed: a site
    error of .020 can move a model by .107 in one place and .121 by .035 in another.
    """
    probe = first_items(lab.parts.select[0], PROBE_ROWS)
    wanted = V.references(lab.captured.tree, [probe])
    found: dict[str, float] = {}
    names = [s for s, c in table.items() if len(c) > 1]
    for at, name in enumerate(names):
        progress("sensitivity", at, len(names))
        known = lab.work.get(f"sensitivity-{name}")
        if known is None:
            structured = sorted((c for c in table[name] if 0 < c.error < 1), key=lambda c: c.error)
            if not structured:
                continue
            middle = structured[len(structured) // 2]
            product = _alone(lab, name, Choice(middle.family, middle.hyper))
            if product is None:
                continue
            moved = V.worst_error(product.tree, [probe], wanted)
            known = moved / middle.error if math.isfinite(moved) else 1e3
            lab.work.put(f"sensitivity-{name}", known)
        found[name] = float(known)
    progress("sensitivity", len(names), len(names))
    return found


def _alone(lab: Lab, name: str, choice: Choice) -> Product | None:
    """The model with one site rewritten; None if it cannot be."""
    if choice.family == PER_HEAD:
        return rewrite(lab.captured, lab.sites_of(Plan({name: choice})), {})
    made = lab.module(name, choice)
    return None if isinstance(made, Refusal) else rewrite(lab.captured, lab.sites, {name: made})

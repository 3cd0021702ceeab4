"""Stages 6 to 9 on a running model: sensitivities, the search for a plan, and its verification."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from structc.budget import Budget
from structc.families import AbstractFamily, Dense
from structc.passes import verify as V
from structc.passes.calibrate import Parts, first_items
from structc.passes.fit import materialise
from structc.passes.objective import Objectives
from structc.passes.race import race, set_way, slower
from structc.passes.rewrite import Product, rewrite
from structc.passes.rollback import chosen_of, dense_plan, milder, share_kept
from structc.passes.select import Table, choose, dense_of, search
from structc.records import (
    Call,
    Candidate,
    Captured,
    Choice,
    Plan,
    Refusal,
    Sites,
    Timed,
    Verification,
)
from structc.workdir import WorkDir

log = logging.getLogger("structc.trial")

PROBE_ROWS = 8
"""Items of a batch that sensitivities are measured on."""
EVALUATIONS = 6
"""Plans that selection measures."""
AHEAD = 1.2
"""So many times as fast as PyTorch's a dense kernel must be for Inductor not to do better: it fuses
activations, and merges the products of one input."""
SAME = 1.01
"""Errors of two versions of one plan may differ by rounding alone."""
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
            made = materialise(self.objectives, self.by_name[site], choice.family, choice.hyper)
            if isinstance(made, Refusal):
                return made
            self._modules[key] = made
        return self._modules[key]

    def product(
        self, plan: Plan, table: Table, untouched: frozenset[str] | set[str] = frozenset()
    ) -> Product:
        """The rewritten model of a plan. Dense sites whose best kernel is PyTorch's stay.

        Args:
            untouched: dense sites that stay the user's own layers whatever their kernel.
        """
        self.untouched = frozenset(untouched)
        modules: dict[str, AbstractFamily] = {}
        for site, choice in plan.choices.items():
            if choice.family == Dense.name and (site in untouched or _plain(table[site])):
                continue
            made = self.module(site, choice)
            if not isinstance(made, Refusal):
                modules[site] = made
        keep = {f"{s} {c.family} {sorted(c.hyper.items())}" for s, c in plan.choices.items()}
        self._modules = {k: m for k, m in self._modules.items() if k in keep}
        return rewrite(self.captured, self.sites, modules)

    def error(self, product: Product, part: str) -> float:
        """Largest relative output error on a part of the held-out data."""
        return V.worst_error(product.tree, self._calls(part), self.wanted(part))

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
    return lab.quality.dense["select"] - _metric(lab, product, "select")


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
            made = lab.module(name, Choice(middle.family, middle.hyper))
            if isinstance(made, Refusal):
                continue
            product = rewrite(lab.captured, lab.sites, {name: made})
            moved = V.worst_error(product.tree, [probe], wanted)
            known = moved / middle.error if math.isfinite(moved) else 1e3
            lab.work.put(f"sensitivity-{name}", known)
        found[name] = float(known)
    progress("sensitivity", len(names), len(names))
    return found


# ---------------------------------------------------------------------------- verification


def verify_product(
    lab: Lab,
    table: Table,
    plan: Plan,
    product: Product,
    *,
    effort: str,
    verify: bool,
    progress: Progress,
) -> tuple[Product, Plan, Verification]:
    """Measure on unused data, roll back until the budget holds, then time against the baselines.

    A structured site goes back to a milder form and in the end to dense; then a dense site with
    another kernel goes back to the user's own layer. Steps double, so that a prediction which is
    wrong ends soon.
    """
    budget = lab.budget
    if not verify:
        return product, plan, Verification(math.nan, None, "", None, None, None, True, 0)
    tolerance = _tolerance(lab)
    first, untouched, round_ = plan, set(lab.untouched), 0
    while True:
        progress("verify", round_, round_ + 1)
        error = lab.error(product, "verify")
        metric = dense = None
        if lab.quality is not None:
            metric, dense = _metric(lab, product, "verify"), lab.quality.dense["verify"]
        held = V.holds(budget, error, tolerance, metric, dense)
        if held or not product.replaced:
            break
        log.info("rolling back: error %.3g, metric %s", error, metric)
        least = 2 ** max(0, round_ - 1)
        back = milder(plan, table, _share(budget, error, tolerance, metric, dense), least)
        if back is None:
            untouched |= set(list(product.replaced)[:least])
        else:
            plan = back
        product = lab.product(plan, table, untouched)
        round_ += 1
    if not held:  # nothing is rewritten any more: it is the graphs that are wrong
        product = _without_graphs(product)
        error = lab.error(product, "verify")
        if lab.quality is not None:
            metric = _metric(lab, product, "verify")
        held = V.holds(budget, error, tolerance, metric, dense)
    raced = _raced(lab, table, plan, product, untouched, effort, progress)
    product, runner, latency, notes = raced
    if not held:
        notes = (*notes, "the model's own layers do not agree with it: is it deterministic?")
    if product.replaced and budget.params is None and slower(latency):
        ours, eager = latency["structc"], latency["eager"]
        notes = (
            *notes,
            f"the rewritten model took {ours.latency_ms:.3g} ms, the original "
            f"{eager.latency_ms:.3g} ms: nothing is rewritten",
        )
        plan, untouched = dense_plan(plan, table), set(plan.choices)
        product = lab.product(plan, table, untouched)
        set_way(product, "modules")
        runner, latency = "modules", {**latency, "structc": eager}
        error, metric, held = 0.0, dense, True
    verification = Verification(
        error=error,
        tolerance=None if budget.max_drop is not None else tolerance,
        metric_name=lab.quality.name if lab.quality else "",
        metric_dense=dense,
        metric_compiled=metric,
        max_drop=None if budget.max_drop is None else float(budget.max_drop),
        held=held,
        calls=len(lab.parts.verify),
        rolled_back={
            s: c for s, c in first.choices.items() if c != plan.choices[s] or s in untouched
        },
        latency=latency,
        runner=runner,
        notes=(*(lab.quality.notes if lab.quality else ()), *notes),
    )
    return product, plan, verification


def _without_graphs(product: Product) -> Product:
    """The product as a module tree alone."""
    log.warning("the exported graphs do not agree with the model on the data: they are not used")
    set_way(product, "modules")
    return replace(product, runners=())


def _raced(
    lab: Lab,
    table: Table,
    plan: Plan,
    product: Product,
    untouched: set[str],
    effort: str,
    progress: Progress,
) -> tuple[Product, str, Mapping[str, Timed], tuple[str, ...]]:
    """The product in its fastest way.

    Inductor gets the dense layers whose own kernel is not far ahead: it merges and fuses them.
    """
    near = {
        site
        for site, module in product.replaced.items()
        if isinstance(module, Dense) and dense_of(table[site]).price.speedup < AHEAD
    }
    for_inductor = lab.product(plan, table, untouched | near) if near else product
    model, example = lab.captured.tree, lab.captured.example
    raced = race(model, example, product, for_inductor, effort, progress)
    if raced.product is for_inductor is not product:
        # the same factors with other dense kernels: measured too, for it is what is returned
        ours, theirs = lab.error(for_inductor, "verify"), lab.error(product, "verify")
        if ours > SAME * theirs + V.exact_tolerance(lab.wanted("verify")):
            set_way(product, "graph")
            note = "Inductor's version was further from the original: it is not used"
            return product, "graph", {}, (*raced.notes, note)
    return raced.product, raced.way, raced.latency, raced.notes


def _metric(lab: Lab, product: Product, part: str) -> float:
    """The metric of a product; a metric that fails or is not finite rejects it."""
    assert lab.quality is not None
    try:
        value = lab.quality.value(product.tree, part)
    except Exception as e:
        log.warning("the metric failed: %s: %s", type(e).__name__, e)
        return -math.inf
    return value if math.isfinite(value) else -math.inf


def _tolerance(lab: Lab) -> float:
    """The relative output error that the budget allows; infinite if it speaks of savings alone."""
    if lab.budget.error is not None:
        return float(lab.budget.error)
    if lab.budget.exact:
        return max(V.exact_tolerance(o) for o in lab.wanted("verify"))
    return math.inf


def _share(
    budget: Budget, error: float, tolerance: float, metric: float | None, dense: float | None
) -> float:
    """How much of its predicted squared error a plan may keep after a measurement."""
    if metric is None or dense is None:
        return share_kept(error, tolerance, power=1)
    allowed = dense - V.threshold(dense, float(budget.max_drop or 0.0))
    return share_kept(dense - metric, allowed, power=2)

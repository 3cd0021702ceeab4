"""Stage 9 on a running model: roll back until the budget holds, then choose how it runs."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from structc.families import Dense
from structc.passes import verify as V
from structc.passes.chains import Chain, find_chains
from structc.passes.race import Raced, lost_to, race, set_way, slower
from structc.passes.rewrite import Product
from structc.passes.rollback import chosen_of, dense_plan, milder, share_kept
from structc.passes.select import Table, dense_of, plan_of
from structc.passes.trial import Lab
from structc.records import Plan, Timed, Verification

log = logging.getLogger("structc.acceptance")

AHEAD = 1.2
"""So many times as fast as PyTorch's a dense kernel must be for Inductor not to do better: it fuses
activations, and merges the products of one input."""
UNFILTERED = (
    "long convolutions by FFT do not agree with the model on the data: they stay as they are, and "
    "the module tree runs without graphs"
)
NOT_FINITE = (
    "the original's output holds NaN or infinities on held-out calls: of those only the places "
    "were compared"
)
BLAME = 0.5
"""Filters are what is wrong if the error without them is below this share."""
SAME = 1.01
"""Errors of two versions of one plan may differ by rounding alone."""
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """What a product does on the held-out data.

    Attributes:
        error: largest relative output error.
        metric, dense: the metric of the product and of the original, if the budget has one.
        held: whether the budget holds.
    """

    error: float
    metric: float | None
    dense: float | None
    held: bool


@dataclass(frozen=True, eq=False)
class Settled:
    """A product that needs no further roll-back: its budget holds, or nothing is left to give back.

    Attributes:
        untouched: dense sites that are the user's own layers whatever their kernel.
    """

    product: Product
    plan: Plan
    untouched: frozenset[str]
    measured: Measured


def verify_product(
    lab: Lab,
    table: Table,
    plan: Plan,
    product: Product,
    *,
    effort: str,
    verify: bool,
    progress: Progress,
    fast_chains: Callable[[Sequence[Chain]], Collection[str]],
) -> tuple[Product, Plan, Verification]:
    """Measure on unused data, roll back until the budget holds, then time against the baselines.

    Args:
        fast_chains: the programs, of those found, whose kernel beats their parts; it is attached.
    """
    if not verify:
        unseen = Verification(math.nan, None, "", None, None, None, True, 0)
        return product, plan, replace(unseen, replaced=frozenset(product.replaced))
    tolerance, filtered = _tolerance(lab), bool(lab.captured.filters)
    settled = _roll_back(lab, table, plan, product, tolerance, progress)
    notes = list(lab.quality.notes if lab.quality else ())
    if filtered and not lab.captured.filters:
        notes.append(UNFILTERED)
    if not all(V.finite(wanted) for wanted in lab.wanted("verify")):
        notes.append(NOT_FINITE)
    if not settled.measured.held:
        notes.append("the model's own layers do not agree with it: is it deterministic?")
    raced = _raced(lab, table, settled, effort, progress, fast_chains)
    notes += raced.notes
    way, latency = raced.way, raced.latency
    settled = replace(settled, product=raced.product)
    if way == "modules":
        settled = _unattended(lab, table, settled)
    attended = lab.rewrites_attention or settled.product.by_head
    changed = settled.product.replaced or lab.captured.filters or attended
    rewritten = bool(changed) or way != "modules"
    if rewritten and lab.budget.params is None and slower(latency):
        settled, note = _given_up(lab, table, settled, latency)
        notes.append(note)
        way, latency = "modules", {**latency, "structc": latency["eager"]}
    notes += filter(None, [lost_to(latency)])
    now, measured = settled.plan.choices, settled.measured
    verification = Verification(
        error=measured.error,
        tolerance=None if lab.budget.max_drop is not None else tolerance,
        metric_name=lab.quality.name if lab.quality else "",
        metric_dense=measured.dense,
        metric_compiled=measured.metric,
        max_drop=None if lab.budget.max_drop is None else float(lab.budget.max_drop),
        held=measured.held,
        calls=len(lab.parts.verify),
        rolled_back={
            s: c for s, c in plan.choices.items() if c != now[s] or s in settled.untouched
        },
        replaced=frozenset(settled.product.replaced),
        latency=latency,
        runner=way,
        notes=tuple(notes),
    )
    return settled.product, settled.plan, verification


def _roll_back(
    lab: Lab, table: Table, plan: Plan, product: Product, tolerance: float, progress: Progress
) -> Settled:
    """Measure and give back, until the budget holds.

    A structured site goes back to a milder form and in the end to dense; then a dense site with
    another kernel goes back to the user's own layer. Steps double, so that a prediction which is
    wrong ends soon. When nothing is left, it is the graphs that are wrong.
    """
    untouched, rounds, blamed = set(lab.untouched), 0, False
    while True:
        progress("verify", rounds, rounds + 1)
        measured = _measure(lab, product, tolerance)
        if not measured.held and lab.captured.filters and not rounds:
            product, measured = _blamed(lab, product, measured, tolerance, plan, table)
        if not (measured.held or blamed or product.by_head) and lab.rewrites_attention:
            # what is approximated goes first: then attention is as exact as it claims, or wrong
            product, measured = _attention_blamed(lab, product, measured, tolerance, plan, table)
            blamed = True
        if measured.held or not (product.replaced or product.by_head):
            break
        log.info("rolling back: error %.3g, metric %s", measured.error, measured.metric)
        least = 2 ** max(0, rounds - 1)
        back = milder(plan, table, _share(lab, measured, tolerance), least)
        if back is None:
            untouched |= set(list(product.replaced)[:least])
        else:
            plan = back
        product = lab.product(plan, table, untouched)
        rounds += 1
    if not measured.held and product.runners:
        log.warning("the exported graphs do not agree with the model on the data: not used")
        set_way(product, "modules")
        product = replace(product, runners=())
        measured = _measure(lab, product, tolerance)
    return Settled(product, plan, frozenset(untouched), measured)


def _blamed(
    lab: Lab, product: Product, measured: Measured, tolerance: float, plan: Plan, table: Table
) -> tuple[Product, Measured]:
    """The same plan without long filters by FFT, where these are what is wrong."""
    before = lab.captured
    lab.forget_filters()
    other = lab.product(plan, table, set(lab.untouched))
    now = _measure(lab, other, tolerance)
    if now.held or now.error < BLAME * measured.error or not product.replaced:
        log.warning("%s", UNFILTERED)
        return other, now
    lab.captured = before
    return product, measured


def _attention_blamed(
    lab: Lab, product: Product, measured: Measured, tolerance: float, plan: Plan, table: Table
) -> tuple[Product, Measured]:
    """The same plan with attention as the graphs have it, where the error is attention's."""
    before = lab.sites
    lab.forget_attention("the product did not agree with the model on the data")
    other = lab.product(plan, table, set(lab.untouched))
    now = _measure(lab, other, tolerance)
    if now.held or now.error < BLAME * measured.error:
        log.warning("attention did not agree with the model: it stays as it is")
        return other, now
    lab.sites = before
    return product, measured


def _measure(lab: Lab, product: Product, tolerance: float) -> Measured:
    error = lab.error(product, "verify")
    metric = dense = None
    if lab.quality is not None:
        metric, dense = lab.metric(product, "verify"), lab.quality.dense["verify"]
    return Measured(error, metric, dense, V.holds(lab.budget, error, tolerance, metric, dense))


def _raced(
    lab: Lab,
    table: Table,
    settled: Settled,
    effort: str,
    progress: Progress,
    fast_chains: Callable[[Sequence[Chain]], Collection[str]],
) -> Raced:
    """The product in its fastest way.

    Inductor gets the dense layers whose own kernel is not far ahead: it merges and fuses them.
    Chains that beat their parts are one operator in further versions, raced as well.
    """
    product, plan, untouched = settled.product, settled.plan, settled.untouched
    near = {
        site
        for site, module in product.replaced.items()
        if isinstance(module, Dense) and dense_of(table[site]).price.speedup < AHEAD
    }
    plain, for_inductor = [product], [product]
    if effort != "none" and product.runners:
        if near:
            for_inductor = [lab.product(plan, table, untouched | near)]
        whole = [c for r in product.runners for c in find_chains(r.region, r.view)]
        found = [one for c in whole for one in (c, *c.parts)]
        chains = fast_chains(found) if found else ()
        if chains:
            plain.append(lab.product(plan, table, untouched, chains))
            for_inductor.append(lab.product(plan, table, untouched | near, chains))
    model, example = lab.captured.tree, lab.captured.example
    raced = race(model, example, plain, for_inductor, effort, progress)
    if raced.product is not product:
        # the same factors with other kernels: measured too, for it is what is returned
        error = lab.error(raced.product, "verify")
        rounding = max(V.exact_tolerance(o) for o in lab.wanted("verify"))
        if error > SAME * settled.measured.error + rounding:
            note = f"run as {raced.way} it was further from the original: that is not used"
            alone = race(model, example, [product], [], effort, progress)
            return replace(alone, notes=(*raced.notes, note, *alone.notes))
    if raced.product.chains:
        operator = torch.ops.structc.tile.default
        graphs = [runner.region.graph.graph for runner in raced.product.runners]
        calls = [n for g in graphs for n in g.find_nodes(op="call_function", target=operator)]
        count = sum(str(n.args[2]) in raced.product.chains for n in calls)
        note = f"{count} chains of layers run as one kernel each, residuals and norms included"
        raced = replace(raced, notes=(*raced.notes, note))
    return raced


def _unattended(lab: Lab, table: Table, settled: Settled) -> Settled:
    """The same product, said to compute attention as it was: only graphs know another way."""
    why = "the model runs fastest without graphs, where attention is the user's"
    lab.forget_attention(why, hooked=False)
    attended = {s.name for s in lab.sites.attention}
    now = [
        dense_of(table[site]) if site in attended else chosen_of(settled.plan, table, site)
        for site in settled.plan.choices
    ]
    plan = plan_of(now, table, settled.plan.sensitivities, settled.plan.notes)
    product = replace(settled.product, by_head=frozenset())
    return replace(settled, product=product, plan=replace(plan, points=settled.plan.points))


def _given_up(
    lab: Lab, table: Table, settled: Settled, latency: Mapping[str, Timed]
) -> tuple[Settled, str]:
    """The original's layers, because the product was slower than they are."""
    ours, eager = latency["structc"], latency["eager"]
    note = (
        f"the rewritten model took {ours.latency_ms:.3g} ms, the original "
        f"{eager.latency_ms:.3g} ms: nothing is rewritten"
    )
    plan = dense_plan(settled.plan, table)
    untouched = frozenset(plan.choices)
    if lab.captured.filters:
        lab.forget_filters()
    lab.forget_attention("the rewritten model was slower than the original")
    product = lab.product(plan, table, untouched)
    set_way(product, "modules")
    dense = settled.measured.dense
    return Settled(product, plan, untouched, Measured(0.0, dense, dense, True)), note


def _tolerance(lab: Lab) -> float:
    """The relative output error that the budget allows; infinite if it speaks of savings alone."""
    if lab.budget.error is not None:
        return float(lab.budget.error)
    if lab.budget.exact:
        return max(V.exact_tolerance(o) for o in lab.wanted("verify"))
    return math.inf


def _share(lab: Lab, measured: Measured, tolerance: float) -> float:
    """How much of its predicted squared error a plan may keep after a measurement."""
    if measured.metric is None or measured.dense is None:
        return share_kept(measured.error, tolerance, power=1)
    dense = measured.dense
    allowed = dense - V.threshold(dense, float(lab.budget.max_drop or 0.0))
    return share_kept(dense - measured.metric, allowed, power=2)

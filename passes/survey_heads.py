"""Attention heads on calibration data: what they look at, and what methods do to their output.

Queries, keys and values are seen where the graph computes them, one attention at a time; nothing of
them is kept. Calls with padding are left out, by the name of an argument or by what an attention's
mask hides: with padding every head is exact anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from structc.attention.base import AbstractMethod, judged
from structc.attention.stats import HeadStats, StatsSum, recall_scores
from structc.attention_records import AttentionSite
from structc.inputs import token_mask
from structc.passes.calibrate import first_items, forward, interpreted
from structc.passes.predicates import Given
from structc.passes.rewrite_attention import Planned, planned
from structc.records import Call, Captured, Refusal, Region
from structc.softmax import Softmax

SHORTEST = 256
"""Keys below which no approximation is faster than exact attention."""
CALLS, ITEMS = 4, 2
"""Calls, and items of each, that heads are looked at on."""
ROWS = 128
"""Queries of each input on which a method's output is held against the exact one."""
See = Callable[[AttentionSite, Tensor, Tensor, Tensor], None]
Progress = Callable[[str, int, int], None]


def by_head_refused(site: AttentionSite) -> Refusal | None:
    """Why no head of an attention may be approximated; None if they may.

    Skips when: the attention is not rewritten, is short, has a mask that is not by rule alone or
        is a window already, a cap or a sink, or its queries are not its keys.
    """
    case = site.case
    if case is None or site.hooked:
        return site.refusal or _refuse(site, "NOT_EXPORTED", "its graph is no part of the product")
    form = Softmax.parse(case.form)
    if case.mask or case.lags or case.sink or form.softcap or form.window or form.offset:
        return _refuse(site, "FORM", "its scores are biased, capped or masked by more than a rule")
    if case.queries != case.keys:
        return _refuse(site, "SIZE", f"{case.queries} queries and {case.keys} keys")
    if case.keys < SHORTEST:
        return _refuse(site, "SHORT", f"{case.keys} keys; nothing is faster below {SHORTEST}")
    return None


def survey(
    captured: Captured, sites: Sequence[AttentionSite], calls: Sequence[Call], progress: Progress
) -> dict[str, list[HeadStats]]:
    """Statistics of every head of each attention that the calls reach, by the attention's name."""
    sums: dict[str, StatsSum] = {s.name: StatsSum() for s in sites}

    def see(site: AttentionSite, q: Tensor, k: Tensor, v: Tensor) -> None:
        form = form_of(site)
        sums[site.name].add(q, k, scale=form.scale, is_causal=form.causal)

    watch(captured, sites, calls, see, progress)
    found = {name: total.pooled() for name, total in sums.items() if total.parts}
    scores = _recall(captured, [s for s in sites if form_of(s).causal], calls, progress)
    for name, heads in found.items():
        if name in scores:
            found[name] = [
                replace(h, recall=r) for h, r in zip(heads, scores[name].tolist(), strict=True)
            ]
    return found


def form_of(site: AttentionSite) -> Softmax:
    """What exact attention computes there."""
    assert site.case is not None
    return Softmax.parse(site.case.form)


@dataclass
class Verdict:
    """A method on some heads of one attention, summed over inputs.

    Attributes:
        gap, size: squared norms of error and output, for each of the heads.
        kl, tv, bound: as in a certificate, mean, largest and mean, for each of the heads.
        lengths: of the inputs.
    """

    gap: list[float]
    size: list[float]
    kl: list[float]
    tv: list[float]
    bound: list[float]
    lengths: list[int] = field(default_factory=list)

    def error(self, at: int) -> float:
        """Relative output error of one of the heads."""
        return math.sqrt(self.gap[at] / self.size[at]) if self.size[at] else math.inf


Trials = Mapping[str, Mapping[AbstractMethod, tuple[int, ...]]]
"""For each attention the methods to be tried, and on which heads."""


Verdicts = Mapping[tuple[str, AbstractMethod], Verdict]
"""For each attention and method what the data say, where some input was inside its use."""


def judge(
    captured: Captured,
    sites: Sequence[AttentionSite],
    trials: Trials,
    calls: Sequence[Call],
    progress: Progress,
) -> Verdicts:
    """Every method on its heads, on some data."""
    found: dict[tuple[str, AbstractMethod], Verdict] = {}

    def see(site: AttentionSite, q: Tensor, k: Tensor, v: Tensor) -> None:
        for method, heads in trials[site.name].items():
            _add(found, (site.name, method), heads, q, k, v, form_of(site))

    wanted = [s for s in sites if trials.get(s.name)]
    watch(captured, wanted, calls, see, progress)
    return found


def _add(
    found: dict[tuple[str, AbstractMethod], Verdict],
    key: tuple[str, AbstractMethod],
    heads: tuple[int, ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    form: Softmax,
) -> None:
    at = list(heads)
    method = replace(key[1], scale=form.scale)
    if method.applies(q.shape[2], k.shape[2]) is not None:
        return
    if not method.holds(q[:, at], k[:, at]):
        return  # the product computes such an input exactly
    one = judged(method, q[:, at], k[:, at], v[:, at], is_causal=form.causal, rows=ROWS)
    gap, size = (t.sum(0).tolist() for t in (one.gap, one.size))
    gap = [g if math.isfinite(g) else math.inf for g in gap]
    kl, bound = one.kl.mean((0, 2)).tolist(), one.bound.mean(0).tolist()
    tv = one.tv.amax((0, 2)).tolist()
    old = found.get(key)
    if old is None:
        found[key] = Verdict(gap, size, kl, tv, bound, [q.shape[2]])
        return
    seen = len(old.lengths)
    old.gap = [a + b for a, b in zip(old.gap, gap, strict=True)]
    old.size = [a + b for a, b in zip(old.size, size, strict=True)]
    old.kl = [(a * seen + b) / (seen + 1) for a, b in zip(old.kl, kl, strict=True)]
    old.bound = [(a * seen + b) / (seen + 1) for a, b in zip(old.bound, bound, strict=True)]
    old.tv = [max(a, b) for a, b in zip(old.tv, tv, strict=True)]
    old.lengths.append(q.shape[2])


# ---------------------------------------------------------------------------- data


def unpadded(calls: Sequence[Call]) -> Iterator[Call]:
    """The first items of calls without padding, so many as are looked at."""
    count = 0
    for call in calls:
        mask = token_mask(call)
        if (mask is None or bool(mask.all())) and count < CALLS:
            count += 1
            yield first_items(call, ITEMS)


def watch(
    captured: Captured,
    sites: Sequence[AttentionSite],
    calls: Sequence[Call],
    see: See,
    progress: Progress,
) -> None:
    """Show queries, keys and values of each attention, ``(B, H, n, d)``, on every call.

    Heads of keys and values are repeated for their groups. Inputs that are short or not finite
    are not shown.
    """
    handles = []
    for region in captured.regions:
        inside = [s for s in sites if s.node.region == region.path]
        if inside:
            handles.append(interpreted(captured, region, _watcher(region, inside, see)))
    some = list(unpadded(calls))
    try:
        for at, call in enumerate(some):
            progress("heads", at, len(some))
            forward(captured.tree, call)
    finally:
        for handle in handles:
            handle.remove()


def _watcher(
    region: Region, sites: Sequence[AttentionSite], see: See
) -> type[torch.fx.Interpreter]:
    """An interpreter that shows each attention when the last of its operands is there."""
    nodes = {n.name: n for n in region.graph.graph.nodes}
    plans: dict[str, Planned] = {}
    needed: dict[str, set[str]] = {}
    wanted: dict[str, list[AttentionSite]] = {}
    for site in sites:
        found = planned(nodes[site.node.node])
        if isinstance(found, Planned):
            plans[site.name], needed[site.name] = found, _needed(found)
            for name in needed[site.name]:
                wanted.setdefault(name, []).append(site)

    class Watcher(torch.fx.Interpreter):
        def __init__(self, module: torch.fx.GraphModule) -> None:
            super().__init__(module)
            self.held: dict[str, dict[str, Tensor]] = {}

        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            for site in wanted.get(n.name, ()):
                held = self.held.setdefault(site.name, {})
                held[n.name] = value
                plan = plans[site.name]
                if held.keys() >= needed[site.name]:
                    if not any(_hides(given, held) for given in plan.keys):
                        _show(site, [(p, held[p.node.name]) for p in _operands(plan)], see)
                    del self.held[site.name]
            return value

    return Watcher


def _needed(found: Planned) -> set[str]:
    return {p.node.name for p in (*_operands(found), *found.keys)}


def _hides(given: Given, held: Mapping[str, Tensor]) -> bool:
    """Whether some key is padding: the product computes such an input exactly."""
    seen = held[given.node.name].bool()
    return bool(seen.any() if given.flipped else (~seen).any())


def _operands(found: Planned) -> tuple[Any, Any, Any]:
    return found.parts.q, found.parts.k, found.parts.v


def _show(site: AttentionSite, given: Sequence[tuple[Any, Tensor]], see: See) -> None:
    made = []
    for operand, value in given:
        for op, args in operand.steps:
            value = op(value, *args)
        made.append(value.detach())
    q, k, v = made
    finite = all(bool(t.isfinite().all()) for t in made)
    if not finite or q.shape[2] != k.shape[2] or q.shape[2] < SHORTEST:
        return
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    see(site, q, k, v)


# ---------------------------------------------------------------------------- recall


def _recall(
    captured: Captured, sites: Sequence[AttentionSite], calls: Sequence[Call], progress: Progress
) -> dict[str, Tensor]:
    """Induction scores on random tokens of the data, written twice; none without token inputs."""
    scores: dict[str, Tensor] = {}
    probe = next((p for c in unpadded(calls) if (p := _twice(c)) is not None), None)
    if probe is None or not sites:
        return scores
    call, half = probe

    def see(site: AttentionSite, q: Tensor, k: Tensor, v: Tensor) -> None:
        form = form_of(site)
        scores[site.name] = recall_scores(q, k, scale=form.scale, is_causal=form.causal, half=half)

    watch(captured, sites, [call], see, progress)
    return scores


def _twice(call: Call) -> tuple[Call, int] | None:
    """A call with its tokens replaced by random ones of it, written twice; and how many."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    for at, leaf in enumerate(leaves):
        tokens = isinstance(leaf, Tensor) and leaf.dtype == torch.long and leaf.dim() == 2
        if not tokens or leaf.shape[1] < SHORTEST or len(values := leaf.unique()) < 32:
            continue
        half = min(leaf.shape[1] // 2, len(values))  # each once: two of one share the mass
        generator = torch.Generator().manual_seed(0)
        orders = [torch.randperm(len(values), generator=generator) for _ in leaf]
        drawn = values[torch.stack(orders)[:, :half]]
        again = torch.cat([drawn, drawn, leaf[:, 2 * half :]], 1)
        args, kwargs = pytree.tree_unflatten([*leaves[:at], again, *leaves[at + 1 :]], spec)
        return Call(args, kwargs), half
    return None


def _refuse(site: AttentionSite, code: str, reason: str) -> Refusal:
    return Refusal(site.name, "attention_by_head", code, reason)

"""Where a dense model spends its time: shares of sites, attention and everything else."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils import _pytree as pytree

from structc.inputs import clone_call, run
from structc.passes.region import bind_sizes, view_of
from structc.records import Captured, Region, Sites

RUNS = 3


def time_shares(captured: Captured, sites: Sites) -> dict[str, float]:
    """Share of one dense call by site name, with ``"attention"`` and ``"other"``.

    A whole-model graph is interpreted node by node; without one, leaf modules are timed by hooks.
    The least time of a few runs counts for each part, so that a disturbance does not.
    """
    for region in captured.regions:
        if region.path == "":
            return _of_graph(captured, region, sites)
    return _of_modules(captured, sites)


def _of_graph(captured: Captured, region: Region, sites: Sites) -> dict[str, float]:
    owners = {ref.node: s.name for s in sites.linear for ref in s.nodes if ref.region == ""}
    whole = [a for a in sites.attention if a.node.region == ""]
    owners |= {node: "attention" for a in whole for node in a.nodes}
    call = captured.example
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    if bind_sizes(region.guards, leaves, spec) is None:
        return _of_modules(captured, sites)
    best: dict[str, float] = {}

    class Timed(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            start = time.perf_counter()
            result = super().run_node(n)
            took = time.perf_counter() - start
            best[n.name] = min(best.get(n.name, took), took)
            return result

    view = view_of(region.graph, captured.tree)
    with torch.no_grad():
        for _ in range(RUNS):
            own = clone_call(call)  # a model may write to its inputs
            Timed(view).run(*pytree.tree_leaves((own.args, own.kwargs)))
    total = sum(best.values()) or 1.0
    shares: dict[str, float] = {}
    for node, seconds in best.items():
        name = owners.get(node, "other")
        shares[name] = shares.get(name, 0.0) + seconds / total
    return shares


def _of_modules(captured: Captured, sites: Sites) -> dict[str, float]:
    best: dict[str, float] = {}
    handles = []
    for site in sites.linear:
        if not site.module:
            continue
        module, started = captured.tree.get_submodule(site.module), [0.0]

        def before(_m: Any, _a: Any, s: list[float] = started) -> None:
            s[0] = time.perf_counter()

        def after(
            _m: Any, _a: Any, _o: Any, s: list[float] = started, name: str = site.name
        ) -> None:
            took = time.perf_counter() - s[0]
            best[name] = min(best.get(name, took), took)

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    totals = []
    try:
        for _ in range(RUNS):
            call = clone_call(captured.example)
            start = time.perf_counter()
            with torch.no_grad():
                run(captured.tree, call)
            totals.append(time.perf_counter() - start)
    finally:
        for handle in handles:
            handle.remove()
    total = max(min(totals), sum(best.values()), 1e-9)
    shares = {name: seconds / total for name, seconds in best.items()}
    return {**shares, "other": max(0.0, 1.0 - sum(shares.values()))}

"""How a product's regions run, and how fast the product is against the best dense versions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from structc.numerics import output_error
from structc.passes.rewrite import Product
from structc.passes.verify import baselines, exact_tolerance
from structc.records import Call, Timed
from structc.timing import interleaved

log = logging.getLogger("structc.race")

ROUNDS = {"quick": 9, "full": 21}
GAIN = 0.98
"""Inductor must take less than this share of the plain graph's time to be worth compiling."""


def race(
    model: nn.Module,
    example: Call,
    product: Product,
    effort: str,
    progress: Callable[[str, int, int], None],
) -> tuple[str, dict[str, Timed], list[str]]:
    """Choose the fastest way to run the product's regions, then time it beside the baselines.

    The ways: the module tree; the regions' graphs as they are; the graphs with everything around
    structc's operators handed to Inductor.

    Args:
        model: the dense original.
        example: the call to time.
        effort: ``"none"`` times nothing.

    Returns:
        The way, the timings (``"structc"`` and each baseline, interleaved in one run), notes.
    """
    if effort == "none":
        return ("graph" if product.runners else "modules"), {}, []
    notes: list[str] = []
    progress("baselines", 0, 3)
    way = _fastest_way(example, product, notes)
    progress("baselines", 1, 3)
    dense, more = baselines(model, example, compiled=True)
    progress("baselines", 2, 3)
    calls = {**dense, "structc": _caller(product.tree, example)}
    latency = interleaved(calls, rounds=ROUNDS[effort], min_sample_ms=5.0)
    progress("baselines", 3, 3)
    return way, latency, [*notes, *more]


def _fastest_way(example: Call, product: Product, notes: list[str]) -> str:
    if not product.runners:
        return "modules"
    ways: dict[str, Callable[[], object]] = {
        "graph": _way(product, example, active=True, compiled=None),
        "modules": _way(product, example, active=False, compiled=None),
    }
    root = [r for r in product.runners if r.region.path == ""]
    compiled = _inductor(root[0], product, example, notes) if root else None
    if compiled is not None:
        ways["inductor"] = _way(product, example, active=True, compiled=compiled)
    timed = interleaved(ways, rounds=7, min_sample_ms=5.0)
    best = "graph" if timed["graph"].latency_ms <= timed["modules"].latency_ms else "modules"
    if "inductor" in timed and timed["inductor"].latency_ms < GAIN * timed[best].latency_ms:
        best = "inductor"
    set_way(product, best, compiled)
    return best


def set_way(product: Product, way: str, compiled: Any = None) -> None:
    """Make all regions of a product run one way."""
    for runner in product.runners:
        runner.active = way != "modules"
        runner.compiled = compiled if way == "inductor" and runner.region.path == "" else None


def _way(product: Product, example: Call, *, active: bool, compiled: Any) -> Callable[[], object]:
    call = _caller(product.tree, example)

    def timed() -> object:
        for runner in product.runners:
            runner.active, runner.compiled = active, compiled
        return call()

    return timed


def _inductor(
    runner: Any, product: Product, example: Call, notes: list[str]
) -> Callable[..., Any] | None:
    """The root region through Inductor, if that compiles and gives the same."""
    call = _caller(product.tree, example)
    runner.compiled = None
    want = call()
    try:
        compiled = compile_view(runner)
        runner.compiled = compiled
        got = call()
    except Exception as e:  # Inductor fails in many ways; the graph then runs as it is
        log.info("Inductor: %s: %s", type(e).__name__, e)
        notes.append(f"Inductor could not compile the rewritten graph ({type(e).__name__})")
        runner.compiled = None
        return None
    error = output_error(got, want)
    if error > exact_tolerance(want):
        notes.append(f"Inductor's code moves the output by {error:.2g}: not used")
        runner.compiled = None
        return None
    return compiled


def compile_view(runner: Any) -> Callable[..., Any]:
    """A region's graph with everything around structc's operators compiled by Inductor.

    For the sizes of the example alone: static code is faster, and a runner uses it for no others.
    """
    result: Callable[..., Any] = torch.compile(runner.view, dynamic=False)
    return result


def _caller(model: nn.Module, example: Call) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return model(*example.args, **example.kwargs)

    return call

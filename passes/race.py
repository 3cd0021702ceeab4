"""How a product's regions run, and how fast the product is against the best dense versions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from structc.passes.inductor import Frozen, freeze
from structc.passes.rewrite import Product
from structc.passes.verify import baselines, caller
from structc.records import Call, Timed
from structc.timing import interleaved

log = logging.getLogger("structc.race")

TIMING_S = 60.0
"""Rounds are cut, down to three, so that the timing of a slow model takes no longer."""
ROUNDS, WAY_ROUNDS = {"quick": 9, "full": 21}, 7
GAIN = 0.98
"""Inductor must take less than this share of the plain graph's time to be worth its memory."""
NOISE, AGAIN = 1.03, 2
"""A product that takes longer than so many times the original's time, three times, is given up."""
MOST_REGIONS = 4
"""Each region takes Inductor ten seconds and more: a model in many pieces runs its graphs."""


@dataclass(frozen=True, eq=False)
class Raced:
    """The fastest way found.

    Attributes:
        product: the rewritten model that won, set to run that way.
        way: ``"graph"``, ``"inductor"`` or ``"modules"``.
        latency: ``"structc"`` and each baseline, interleaved in one run.
        notes: sentences for the report.
    """

    product: Product
    way: str
    latency: Mapping[str, Timed]
    notes: tuple[str, ...] = ()


def race(
    model: nn.Module,
    example: Call,
    plain: Sequence[Product],
    for_inductor: Sequence[Product],
    effort: str,
    progress: Callable[[str, int, int], None],
) -> Raced:
    """Choose the fastest way to run the product's regions, then time it beside the baselines.

    The ways: the module tree; the regions' graphs as they are, with or without chains; the graphs
    with everything around structc's operators handed to Inductor.

    Args:
        model: the dense original.
        example: the call to time.
        plain: how it runs without Inductor; another one that has chains besides, where some are
            ahead of their parts.
        for_inductor: the same two, with more dense products left to Inductor.
        effort: ``"none"`` times nothing.
    """
    if effort == "none":
        return Raced(plain[0], "graph" if plain[0].runners else "modules", {})
    notes: list[str] = []
    progress("baselines", 0, 3)
    start = time.monotonic()
    product, way = _fastest(example, plain, for_inductor, notes)
    log.info("Inductor and the choice of a way took %.1f s", time.monotonic() - start)
    progress("baselines", 1, 3)
    dense, more = baselines(model, example, compiled=True)
    progress("baselines", 2, 3)
    log.info("with baselines %.1f s", time.monotonic() - start)
    calls = {**dense, "structc": caller(product.tree, example)}
    latency = _settled(calls, ROUNDS[effort])
    progress("baselines", 3, 3)
    return Raced(product, way, latency, (*notes, *more))


def slower(latency: Mapping[str, Timed]) -> bool:
    """Whether the product lost to the original by more than the noise of both."""
    if not latency:
        return False
    ours, eager = latency["structc"], latency["eager"]
    return ours.latency_ms > NOISE * eager.latency_ms and ours.median_ms > eager.median_ms


def lost_to(latency: Mapping[str, Timed]) -> str:
    """A sentence where another version of the dense model is faster than the product, or ""."""
    ours = latency.get("structc")
    best = min(latency, key=lambda name: latency[name].latency_ms, default="")
    if ours is None or ours.latency_ms <= NOISE * latency[best].latency_ms:
        return ""
    return (
        f"{best} runs the original in {latency[best].latency_ms:.3g} ms, this takes "
        f"{ours.latency_ms:.3g} ms: inside this budget nothing faster was found"
    )


def _settled(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timed]:
    """Timings, taken again when they would give the product up: a busy machine is no reason."""
    latency = interleaved(calls, rounds=rounds, min_sample_ms=5.0, seconds=TIMING_S)
    for _ in range(AGAIN):
        if not slower(latency):
            break
        latency = interleaved(calls, rounds=rounds, min_sample_ms=5.0, seconds=TIMING_S)
    return latency


def _fastest(
    example: Call, plain: Sequence[Product], for_inductor: Sequence[Product], notes: list[str]
) -> tuple[Product, str]:
    if not plain[0].runners:
        return plain[0], "modules"
    none: list[Frozen | None] = [None] * len(plain[0].runners)
    ways: dict[str, tuple[Product, str, Sequence[Frozen | None]]] = {}
    for one in plain:
        ways[_name("graph", one)] = (one, "graph", none)
    ways["modules"] = (plain[0], "modules", none)
    for one in for_inductor:
        code = _frozen(one, notes)
        if code is not None:
            ways[_name("inductor", one)] = (one, "inductor", code)
    calls = {name: _way(example, *way) for name, way in ways.items()}
    timed = interleaved(calls, rounds=WAY_ROUNDS, min_sample_ms=5.0, seconds=TIMING_S)
    log.info("ways: %s", {name: round(t.latency_ms, 3) for name, t in timed.items()})
    able = sorted(ways, key=lambda name: timed[name].latency_ms)
    best = next(name for name in able if ways[name][1] != "inductor")
    compiled = next((name for name in able if ways[name][1] == "inductor"), None)
    if compiled is not None and _beats(timed[compiled], timed[best]):
        best = compiled
    fastest, way, kept = ways[best]
    set_way(fastest, way, kept)
    return fastest, way


def _name(way: str, product: Product) -> str:
    return f"{way} with chains" if product.chains else way


def _beats(compiled: Timed, other: Timed) -> bool:
    """Whether either quartile says so: compiled code is nearly always faster, timings are noisy."""
    return (
        compiled.latency_ms < GAIN * other.latency_ms or compiled.median_ms < GAIN * other.median_ms
    )


def set_way(product: Product, way: str, compiled: Sequence[Frozen | None] | None = None) -> None:
    """Make all regions of a product run one way."""
    for at, runner in enumerate(product.runners):
        runner.active = way != "modules"
        runner.compiled = compiled[at] if way == "inductor" and compiled is not None else None


def _way(
    example: Call, product: Product, way: str, compiled: Sequence[Frozen | None]
) -> Callable[[], object]:
    call = caller(product.tree, example)

    def timed() -> object:
        set_way(product, way, compiled)
        return call()

    return timed


def _frozen(product: Product, notes: list[str]) -> list[Frozen] | None:
    """All regions through Inductor, if that compiles and gives what the graphs give."""
    if len(product.runners) > MOST_REGIONS:
        return None
    try:
        return [freeze(runner) for runner in product.runners]
    except Exception as e:  # Inductor fails in many ways; the graph then runs as it is
        log.info("Inductor: %s: %s", type(e).__name__, e)
        reason = str(e).strip().splitlines()[:1] or [type(e).__name__]
        notes.append(f"Inductor does not run the rewritten graph: {reason[0][:200]}")
        return None

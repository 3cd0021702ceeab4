"""Stage 4, price: what each form costs on this machine, against the best dense kernel.

Latency depends on shapes, not on values, so this comes before any fitting. The dense contenders
of a shape are settled once; the best of them is then timed in turns with every configuration of
every form at that shape, so that each price carries a baseline from the same minute.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch

from structc import hardware, settings
from structc.codegen import cost, tuning_db
from structc.codegen.contenders import Contender, Request
from structc.codegen.cpu import build
from structc.codegen.cpu.served import analyse
from structc.codegen.measure import Measurement
from structc.codegen.tuning_db import Key, Row, TuningDb
from structc.codegen.worker_client import Worker
from structc.errors import ConfigError
from structc.forms import Act, Bias, Block, Form, PackedDense, Tile
from structc.records import Price, Refusal

__all__ = ["Request", "predict", "price", "tuning_key"]

log = logging.getLogger("structc.autotune")

EFFORTS = ("none", "recorded", "quick", "full")
NEAR, MOST_RIVALS = 1.25, 2
"""Dense kernels within this factor of the best are timed again beside each form."""
HOPELESS = 1.5
"""What the cost model expects to take so many times what dense takes need not be timed."""
IMPLAUSIBLE = 4.0
"""A speedup of so many times what a form saves is another process's doing, not the cache's."""
ALIKE, MOST_ALIKE = 1.1, 2
"""Configurations so near the best of one form are what a quick search tries at its siblings: forms
of the same steps at the same dense shape, another rank say."""


def price(
    requests: Sequence[Request],
    *,
    effort: str,
    seconds: float | None = None,
    prune: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Request, Price | Refusal]:
    """Latency of every request against the best dense kernel at its shape.

    Args:
        requests: forms with rows and dtype; equal ones are priced once.
        effort: ``"none"`` predicts and builds nothing, ``"recorded"`` takes what the tuning
            database has and times nothing, ``"quick"`` times the likely configurations, ``"full"``
            all of them.
        seconds: stop measuring after this long; what is left is refused with code ``BUDGET``.
        prune: refuse untimed, with code ``PRUNED``, what the cost model sees no chance for.
        progress: called with what was priced, how many are done, and how many there are.

    Returns:
        For each request its price, or why it has none: no kernel could be built, or each one failed
        its check. A dense request always has a price.

    Errors:
        ConfigError: ``effort`` is none of the four.
    """
    if effort not in EFFORTS:
        raise ConfigError(f"effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    unique = list(dict.fromkeys(requests))
    if effort == "none":
        return {request: predict(request) for request in unique}
    prices: dict[Request, Price | Refusal] = {}
    with Worker() as worker:  # starts when it is first asked: a full database needs none
        session = _Session(worker, effort, seconds, prune)
        for done, request in enumerate(sorted(unique, key=_group), 1):
            prices[request] = session.price(request)
            if progress is not None:
                progress(str(request.form), done, len(unique))
    return {request: prices[request] for request in unique}


def predict(request: Request) -> Price:
    """A price from the cost model: nothing is built, nothing is timed."""
    baseline = cost.predict_ms(request.dense().form, request.rows, request.dtype)
    latency = cost.predict_ms(request.form, request.rows, request.dtype)
    kernel = "aten" if isinstance(request.form, PackedDense) else "reference"
    return Price(
        str(request.form),
        request.rows,
        latency,
        baseline,
        kernel,
        {},
        "aten",
        0.0,
        "predicted",
        expected_ms=latency,
    )


def tuning_key(request: Request) -> Key:
    """What the request's measurements are stored under."""
    plus = "+bias" if request.bias and not isinstance(request.form, Tile) else ""
    plus = "+parts" if request.parts else f" for {request.of}" if request.of else plus
    form = f"{request.form}{plus}"
    return key_here(form, request.rows, request.dtype, transposed=request.transposed)


def key_here(form: str, rows: int, dtype: torch.dtype, *, transposed: bool = False) -> Key:
    """The key of something that was timed on this machine, as it is set up now."""
    target = hardware.target()
    compiler = build.compiler_version(settings.current().compiler)
    return Key(
        form=form,
        rows=rows,
        dtype=str(dtype).removeprefix("torch."),
        transposed=transposed,
        threads=target.threads,
        cpu=target.cpu,
        isa=target.isa,
        cores=target.cores,
        torch=target.torch,
        compiler="none" if isinstance(compiler, Refusal) else compiler,
        source=tuning_db.source_hash() if settings.current().native else "off",
    )


def _group(request: Request) -> tuple[object, ...]:
    """Requests of one dense shape follow each other, the dense one first."""
    dense = request.dense()
    shape = (request.in_features, request.out_features, request.activation, request.bias)
    return (str(request.dtype), *shape, request.rows, request.transposed, request != dense)


@dataclass
class _Session:
    """One call of :func:`price`: a worker, a deadline, the dense kernels settled so far."""

    worker: Worker
    effort: str
    seconds: float | None
    prune: bool
    db: TuningDb = field(default_factory=TuningDb)
    started: float = field(default_factory=time.monotonic)
    dense: dict[Request, list[Row]] = field(default_factory=dict)
    without: dict[Request, Refusal] = field(default_factory=dict)
    """Why a dense shape has no kernel, where it has none."""
    siblings: dict[tuple[object, ...], list[Row]] = field(default_factory=dict)
    refusal: Refusal = field(default_factory=lambda: _refuse("nothing was priced"))
    left_out: dict[Request, Refusal] = field(default_factory=dict)
    """The first refusal of a contender, where others were timed."""

    def price(self, request: Request) -> Price | Refusal:
        """From the database or from a measurement; the dense kernels of the shape come first."""
        dense = self._yardstick(request)
        if dense not in self.dense:
            if self.dense:
                self.worker.forget()
            self.dense[dense] = self._find(dense, [])
            self.without[dense] = self.refusal
        if request != dense:
            if self.prune and (hopeless := _hopeless(request, dense)):
                return hopeless
            rivals = _rivals(self.dense[dense])
            if not rivals:
                why = self.without[dense].reason
                return _refuse(f"no dense baseline was timed for {request.form}: {why}")
            rows = self._find(request, rivals, dense)
            self.siblings.setdefault(_kind(request), rows)
        else:
            rows = self.dense[dense]
        row = next((r for r in rows if r.effort), None)
        found = _from_row(request, row) if row is not None else self.refusal
        if row is not None and row.kernel == "reference" and isinstance(found, Price):
            found = replace(found, without=self.left_out.get(request) or _without(request, rows))
        # Eager PyTorch always runs: without a measurement it is what there is.
        return predict(request) if isinstance(found, Refusal) and request == dense else found

    def _yardstick(self, request: Request) -> Request:
        """The dense product of the shape; for a chain its parts, each by its best kernel."""
        if not isinstance(request.form, Tile) or not request.form.is_chain:
            return request.dense()
        kernels = []
        chain = Tile.parse(request.of) if request.of else request.form
        for form in chain.pieces():
            if not isinstance(form, Tile):
                continue
            bias = any(isinstance(s, Bias) for s in form.steps)
            act = form.steps[-1].fn if isinstance(form.steps[-1], Act) else ""
            first, whole = form.steps[0], cast(Form, form)
            if form.weights == 1 + bias and isinstance(first, Block) and first.a == first.d == 1:
                whole = PackedDense(form.in_features, form.out_features, act)
            found = self.price(replace(request, form=whole, bias=bias, activation=act, of=""))
            price = predict(request) if isinstance(found, Refusal) else found
            kernels.append([str(whole), price.kernel, dict(price.config)])
        return replace(request, form=chain, parts=json.dumps(kernels), of="")

    def _find(
        self,
        request: Request,
        rivals: list[tuple[Contender, float]],
        against: Request | None = None,
    ) -> list[Row]:
        """Rows of a request with one of them chosen, or none and the reason in ``refusal``."""
        key = tuning_key(request)
        recorded = self.effort == "recorded"
        if self.db.chosen(key, "quick" if recorded else self.effort) is not None:
            return self.db.rows(key)
        if recorded:
            self.refusal = _refuse("the tuning database has no measurement of it, and none is made")
            return []
        if self.seconds is not None and time.monotonic() - self.started > self.seconds:
            self.refusal = _refuse(f"the {self.seconds:g} s for tuning ran out")
            return []
        likely = self._likely(request)
        measurement = Measurement(self.worker, request, likely, rivals, self.effort, against)
        rows = measurement.run()
        if _implausible(request, rows):
            measurement = Measurement(self.worker, request, likely, rivals, self.effort, against)
            rows = measurement.run()
        passing = measurement.passing()
        if passing is not None:
            log.warning("%s is not emitted today: %s", request.form, passing.reason)
        elif _implausible(request, rows):
            log.warning("%s: timings make no sense, is the machine busy? Not kept", request.form)
        elif any(r.effort for r in rows):
            self.db.put(key, rows)
        if not any(r.effort for r in rows):
            self.refusal = measurement.refusal()
        elif measurement.refused:
            self.left_out[request] = measurement.refused[0][1]
        return rows

    def _likely(self, request: Request) -> list[Contender]:
        """What is worth timing, the default first: all, or what was good at a sibling."""
        every = request.contenders(self.effort)
        known = [] if self.effort == "full" else self.siblings.get(_kind(request), [])
        able = sorted((r for r in known if r.status == "ok"), key=lambda r: r.latency_ms)
        good = [r.config for r in able if r.latency_ms <= ALIKE * able[0].latency_ms][:MOST_ALIKE]
        if not good:
            return every
        return [c for i, c in enumerate(every) if i == 0 or dict(c.config) in good]


def _hopeless(request: Request, dense: Request) -> Refusal | None:
    """A refusal where the cost model sees no chance, and timing would be wasted."""
    if isinstance(request.form, Tile) and request.form.is_chain:
        return None
    ours = cost.predict_ms(request.form, request.rows, request.dtype)
    theirs = cost.predict_ms(dense.form, request.rows, request.dtype)
    if ours <= HOPELESS * theirs:
        return None
    reason = f"the cost model expects {ours:.3g} ms where dense takes {theirs:.3g}: not timed"
    return Refusal("", "tuner", "PRUNED", reason)


def _implausible(request: Request, rows: Sequence[Row]) -> bool:
    """Whether the choice gains far more than the form saves.

    While another process holds a core, each barrier of a threaded product takes a scheduler's
    quantum, with hardly any spread.
    """
    row = next((r for r in rows if r.effort and r.status == "ok"), None)
    chain = isinstance(request.form, Tile) and request.form.is_chain
    if row is None or chain or request == request.dense():  # eager may be slow, that is no wonder
        return False
    n, m, form = request.in_features, request.out_features, request.form
    saved = max(1.0, n * m / max(1, form.flops // 2), n * m / max(1, form.params))
    return row.baseline_ms > IMPLAUSIBLE * saved * row.latency_ms


def _kind(request: Request) -> tuple[object, ...]:
    """What forms have in common that are best run alike."""
    form = request.form
    words = [step.word for step in form.steps] if isinstance(form, Tile) else [str(form)]
    return (request.dense(), *words)


def _rivals(rows: Sequence[Row]) -> list[tuple[Contender, float]]:
    """The dense kernels that may be the fastest when timed again: all that came near the best."""
    able = sorted((r for r in rows if r.status == "ok"), key=lambda r: r.latency_ms)
    near = [r for r in able if r.latency_ms <= NEAR * able[0].latency_ms][:MOST_RIVALS]
    return [(Contender(r.kernel, r.config), r.latency_ms) for r in near]


def _without(request: Request, rows: Sequence[Row]) -> Refusal | None:
    """Why no emitted kernel was there to be timed, or why one of them was not."""
    compiler = build.usable_compiler()
    if isinstance(compiler, Refusal):
        return compiler
    if isinstance(request.form, Tile):
        stages = analyse(request.form, request.dtype)
        if isinstance(stages, Refusal):
            return None if stages.code == "SPECTRAL" else stages  # libraries serve transforms
    return next((_refusal_of(r) for r in rows if r.status == "refused"), None)


def _refusal_of(row: Row) -> Refusal:
    code, _, reason = row.reason.partition(": ")
    return Refusal("", row.kernel, code, reason)


def _refuse(reason: str) -> Refusal:
    return Refusal("", "tuner", "BUDGET", reason)


def _from_row(request: Request, row: Row) -> Price | Refusal:
    """The price that a stored choice stands for: the same whenever it is read."""
    if row.status == "refused":
        return _refusal_of(row)
    return Price(
        str(request.form),
        request.rows,
        row.latency_ms,
        row.baseline_ms,
        Contender(row.kernel, row.config).label,
        dict(row.config),
        row.baseline,
        row.spread,
        "measured",
        expected_ms=cost.predict_ms(request.form, request.rows, request.dtype),
    )

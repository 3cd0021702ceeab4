"""Find the fastest right configuration of one form: check all, time in turns, choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from structc.codegen.bench import Job
from structc.codegen.contenders import Contender, Request
from structc.codegen.tuning_db import Row
from structc.codegen.worker_client import Worker
from structc.forms import PackedDense
from structc.records import Refusal, Timed

ROUNDS = {"quick": 5, "full": 15}
SCREEN = 3
"""Rounds after which a full search drops what is far from the best."""
KEEP = 6
"""How many configurations stay after screening."""
TIMING_S = 20.0
"""Rounds are cut, down to three, so that one form takes no longer."""
TRIES, QUIET = 3, 0.25
"""A timing in which some spread is larger is repeated, so many times at most."""
FAR = 8.0
"""PyTorch's operators that take so many times as long as an emitted kernel are not timed."""
SLACK = 1.25
"""A dense kernel whose timing was disturbed counts as this times what it was known to take."""
MARGIN, DENSE_MARGIN = (0.02, 0.10), (0.05, 0.10)
"""A default gives way to something better by more than the spread, held inside these bounds.

PyTorch's own dense product gives way less easily: what compilers fuse around it is lost.
"""
# Reasons that lie in the surroundings and may be gone tomorrow: never stored.
PASSING = frozenset(
    {"OFF", "NO_COMPILER", "COMPILE", "COMPILE_TIME", "LOCKED", "CACHE", "LOAD", "WORKER"}
)

Baseline = tuple[str, float]
"""Label and milliseconds of the dense kernel that everything else is held against."""
Results = list[tuple[Contender, Timed]]
Able = list[tuple[Contender, float]]
"""Contenders that passed their check, with the milliseconds of one call."""


@dataclass
class Measurement:
    """One form against the best dense kernel, or the dense kernels against each other.

    Attributes:
        worker: checks and times.
        request: what is measured.
        contenders: what may serve it, the default first.
        rivals: dense kernels to beat, with what they took among themselves, in milliseconds; empty
            while that is being found.
        effort: ``"quick"`` or ``"full"``.
        against: what the rivals compute, if it is not the dense product of the shape.
        refused: contenders that failed their check or took the worker down.
    """

    worker: Worker
    request: Request
    contenders: Sequence[Contender]
    rivals: Sequence[tuple[Contender, float]]
    effort: str
    against: Request | None = None
    refused: list[tuple[Contender, Refusal]] = field(default_factory=list)

    def run(self) -> list[Row]:
        """A row for each contender; the chosen one carries the effort.

        If all are refused, and for reasons of their own, the first refusal is the choice.
        """
        able = _quick_enough(self._check(self.contenders))
        if self.effort == "full" and len(able) > KEEP:
            screened = self._time(able, SCREEN)[1]
            fast = sorted(screened, key=lambda pair: pair[1].latency_ms)[:KEEP]
            kept = [c for c, _ in fast]
            able = [pair for i, pair in enumerate(able) if i == 0 or pair[0] in kept]
        base, timed = self._time(able, ROUNDS[self.effort])
        rows = [self._row(c, t, base) for c, t in timed] if base is not None else []
        own = [_refused_row(c, r) for c, r in self.refused if r.code not in PASSING]
        if rows:
            margin = DENSE_MARGIN if isinstance(self.request.form, PackedDense) else MARGIN
            winner = choose([t for _, t in timed], margin)
            rows[winner] = replace(rows[winner], effort=self.effort)
        elif own and len(own) == len(self.refused):
            own[0] = replace(own[0], effort=self.effort)
        return rows + own

    def refusal(self) -> Refusal:
        """Why nothing was chosen."""
        if self.refused:
            return self.refused[0][1]
        what = f"{self.request.form} in {self.request.dtype}"
        return Refusal("", "tile", "UNSERVED", f"no emitted kernel serves {what}")

    def passing(self) -> Refusal | None:
        """Why some contender was left out today that may be there tomorrow: nothing to remember.

        A missing compiler, and kernels turned off, are part of the key of what is remembered.
        """
        codes = PASSING - {"OFF", "NO_COMPILER"}
        return next((r for _, r in self.refused if r.code in codes), None)

    def _check(self, contenders: Sequence[Contender]) -> Able:
        able: Able = []
        for contender in contenders:
            checked = self.worker.check(self.request.job(contender))
            if isinstance(checked, Refusal):
                self.refused.append((contender, checked))
            else:
                able.append((contender, checked))
        return able

    def _time(self, able: Able, rounds: int) -> tuple[Baseline | None, Results]:
        """The baseline and everybody's time; what kills the worker drops out of ``able``."""
        against = self.against or self.request.dense()
        yardstick = [against.job(c) for c, _ in self.rivals]
        while able:
            jobs = [*yardstick, *(self.request.job(c) for c, _ in able)]
            once_s = (sum(ms for _, ms in able) + able[0][1] * len(yardstick)) / 1e3
            turns = max(3, min(rounds, int(TIMING_S / max(once_s, 1e-6))))
            result = self._undisturbed(jobs, turns, once_s)
            if isinstance(result, list):
                theirs = result[len(yardstick) :]
                timed = [(c, t) for (c, _), t in zip(able, theirs, strict=True)]
                return self._baseline(result), timed
            index, refusal = result
            if index < len(yardstick):  # the yardstick itself, or a death outside any kernel
                self.refused += [(c, _untimed(c, refusal)) for c, _ in able]
                able.clear()
            else:
                self.refused.append((able.pop(index - len(yardstick))[0], refusal))
        return None, []

    def _undisturbed(
        self, jobs: Sequence[Job], turns: int, once_s: float
    ) -> list[Timed] | tuple[int, Refusal]:
        """Timings of the worker; again, and the steadiest try kept, while they are far apart.

        A busy machine can make a product of microseconds take a scheduler's quantum: a baseline
        that was hit would promise a speedup that nobody gets.
        """
        tries: list[list[Timed]] = []
        for _ in range(TRIES):
            result = self.worker.time(jobs, turns, expected_s=2 * turns * once_s)
            if not isinstance(result, list):
                return result
            tries.append(result)
            if _worst(result) <= QUIET:
                break
        return min(tries, key=_worst)  # whole: what is compared ran in the same rounds

    def _baseline(self, result: Sequence[Timed]) -> Baseline:
        """The fastest rival of this run; among dense kernels eager PyTorch, timed first."""
        if not self.rivals:
            return self.contenders[0].label, result[0].latency_ms
        times = zip(self.rivals, result, strict=False)
        ms, name = min((_plausible(t, ms), c.label) for (c, ms), t in times)
        return name, ms

    def _row(self, contender: Contender, timed: Timed, base: Baseline) -> Row:
        return Row(
            contender.kernel,
            dict(contender.config),
            latency_ms=timed.latency_ms,
            baseline_ms=base[1],
            baseline=base[0],
            spread=timed.spread,
        )


def _quick_enough(able: Able) -> Able:
    """Without PyTorch's operators where they take far longer: all would get fewer rounds."""
    best = min((ms for c, ms in able if c.kernel != "reference"), default=math.inf)
    return [(c, ms) for c, ms in able if c.kernel != "reference" or ms <= FAR * best]


def _worst(timed: Sequence[Timed]) -> float:
    return max(t.spread for t in timed)


def _plausible(now: Timed, known_ms: float) -> float:
    """What a dense kernel takes; one that was disturbed counts as what it is known to take.

    Processors have phases in which everything is slower for minutes: what is steady is believed,
    for whatever is compared with it ran in the same rounds.
    """
    return now.latency_ms if now.spread <= QUIET else min(now.latency_ms, SLACK * known_ms)


def choose(timed: Sequence[Timed], bounds: tuple[float, float] = MARGIN) -> int:
    """Index of the winner; the first one is the default and stays unless clearly beaten.

    >>> choose([Timed(10.0, 10.0, 0.05, 9), Timed(9.8, 9.9, 0.05, 9), Timed(9.0, 9.1, 0.05, 9)])
    2
    >>> choose([Timed(10.0, 10.0, 0.05, 9), Timed(9.8, 9.9, 0.05, 9)])
    0
    """
    winner = min(range(len(timed)), key=lambda i: timed[i].latency_ms)
    default, best = timed[0], timed[winner]
    margin = max(bounds[0], min(bounds[1], default.spread, best.spread))
    return winner if best.latency_ms < default.latency_ms * (1 - margin) else 0


def _untimed(contender: Contender, refusal: Refusal) -> Refusal:
    """Something else took the worker down: that says nothing about this contender."""
    reason = f"{contender.kernel} was not timed: {refusal.reason} ({refusal.code})"
    return Refusal("", contender.kernel, "WORKER", reason)


def _refused_row(contender: Contender, refusal: Refusal) -> Row:
    reason = f"{refusal.code}: {refusal.reason}"
    return Row(contender.kernel, dict(contender.config), "refused", reason)

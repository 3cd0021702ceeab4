"""Check and time one kernel: what runs inside the tuning worker.

A job is plain data, so that it can be sent to another process. Inputs are seeded; weights are warm
(a layer's weights are used call after call), and two inputs take turns, so that activations come
from where the previous layer of a model leaves them: L2 for few rows, L3 or memory for many.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from structc import ops, reference, timing
from structc.codegen import dense, faults, lower
from structc.codegen.cpu import tile
from structc.codegen.cpu.emit import spec_of
from structc.codegen.cpu.samples import sample, sample_form
from structc.codegen.cpu.served import analyse
from structc.codegen.program import Program
from structc.forms import Form, PackedDense, Tile, parse_form
from structc.numerics import relative_error
from structc.records import Refusal, Timed

TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Relative error of a kernel against the float64 reference that is still rounding."""
GUARD = 64
"""Elements before and after an output that must keep their value."""
_SENTINEL = 12345.678
_SLICE = 64


@dataclass(frozen=True)
class Job:
    """One kernel with one config at one shape.

    Attributes:
        form: text of the form: a tile program or ``dense(n,m,act)``.
        rows: of the input.
        dtype: its name, ``"float32"``.
        bias: dense only: whether there is one.
        transposed: dense only: whether the weight is stored (in, out).
        kernel: ``"tile"``, ``"onednn"``, ``"aten"``.
        config: of the kernel.
    """

    form: str
    rows: int
    dtype: str
    bias: bool
    transposed: bool
    kernel: str
    config: Mapping[str, int | str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "config": dict(self.config)}


@dataclass(frozen=True, eq=False)
class Problem:
    """A job made concrete."""

    form: Form
    run: ops.Kernel
    inputs: tuple[list[Tensor], list[Tensor]]
    weights: list[Tensor]
    reference: Callable[..., Tensor]

    def call(self, inputs: Sequence[Tensor]) -> Tensor:
        """The kernel's output."""
        x, *others = inputs
        return self.run(x, self.weights, others) if others else self.run(x, self.weights)


class Bench:
    """Checks and times jobs in this process; the worker owns one."""

    def __init__(self) -> None:
        self._problems: dict[str, Problem] = {}
        self._data: dict[tuple[object, ...], Any] = {}

    def check(self, job: Job) -> tuple[Refusal | None, float]:
        """Build the kernel and hold it against the float64 reference.

        Returns:
            None if it may be timed, and the milliseconds of one call.
        """
        problem = self._problem(job)
        if isinstance(problem, Refusal):
            return problem, 0.0
        tolerance = TOLERANCE.get(getattr(torch, job.dtype), 1e-5)
        failed = _check_odd(job, tolerance)
        failed = failed or _compare(problem, job, tolerance, f"{job.rows} rows")
        if failed is not None:
            return failed, 0.0
        with torch.inference_mode():
            start = time.perf_counter()
            problem.call(problem.inputs[1])
        return None, (time.perf_counter() - start) * 1e3

    def time(
        self, jobs: Sequence[Job], rounds: int, mark: Callable[[int], None] = lambda _: None
    ) -> list[Timed]:
        """Interleaved timings; the first job is the yardstick.

        Args:
            jobs: checked jobs.
            rounds: to keep.
            mark: told the index of the job that runs next, so that a crash finds its culprit.
        """
        calls = {}
        for index, job in enumerate(jobs):
            problem = self._problem(job)
            if isinstance(problem, Refusal):
                raise ValueError(f"a job that was refused cannot be timed: {problem.reason}")
            calls[str(index)] = _call(problem, index, mark)
        with torch.inference_mode():
            timed = timing.interleaved(calls, rounds=rounds, min_sample_ms=2.0, warmup=1)
        return [timed[str(i)] for i in range(len(jobs))]

    def forget(self) -> None:
        """Free inputs and weights: the next jobs have other shapes."""
        self._problems.clear()
        self._data.clear()

    def _problem(self, job: Job) -> Problem | Refusal:
        key = repr(job)
        if key not in self._problems:
            form, dtype = parse_form(job.form), getattr(torch, job.dtype)
            run = _kernel(form, dtype, job)
            if isinstance(run, Refusal):
                return run
            # Candidates of one form share their data, and so do all inputs of one shape.
            wide = form.input_features if isinstance(form, Tile) else (form.in_features,)
            inputs = self._cached(
                ("x", wide, job.rows, dtype), lambda: _inputs(wide, job.rows, dtype)
            )
            weights = self._cached(
                (job.form, job.bias, job.transposed, dtype), lambda: _weights(form, job, dtype)
            )
            self._problems[key] = Problem(form, run, inputs, weights, _reference(form, job))
        return self._problems[key]

    def _cached(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        if key not in self._data:
            self._data[key] = make()
        return self._data[key]


def _call(problem: Problem, index: int, mark: Callable[[int], None]) -> Callable[[], object]:
    turns = itertools.cycle(problem.inputs)

    def call() -> object:
        mark(index)
        return problem.call(next(turns))

    return call


def _kernel(form: Form, dtype: torch.dtype, job: Job) -> ops.Kernel | Refusal:
    if job.kernel == "fault":  # only tests ask for one; lower.make knows none
        return faults.make(str(job.config["kind"]), form)
    return lower.make(form, dtype, job.rows, job.kernel, job.config, transposed=job.transposed)


def _inputs(
    features: Sequence[int], rows: int, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def noise(n: int) -> Tensor:
        wide = torch.randn(rows, n, generator=generator, dtype=torch.float32, device="cpu")
        return wide.to(dtype)

    return [noise(n) for n in features], [noise(n) for n in features]


def _weights(form: Form, job: Job, dtype: torch.dtype) -> list[Tensor]:
    program = dense.tile_form(form, job.bias) if isinstance(form, PackedDense) else form
    _, weights = sample(program, rows=1)
    if isinstance(form, PackedDense):
        matrix = weights[0].reshape(form.out_features, form.in_features)
        weights[0] = matrix.t().contiguous() if job.transposed else matrix
    return [w.to(dtype) if w.is_floating_point() else w for w in weights]


def _reference(form: Form, job: Job) -> Callable[..., Tensor]:
    if isinstance(form, PackedDense):
        kernel = dense.make(form, torch.float64, job.rows, "aten", {}, transposed=job.transposed)
        assert not isinstance(kernel, Refusal)
        return kernel
    text = str(form)
    return lambda x, weights, *others: reference.tile_reference(x, weights, text, *others)


# ---------------------------------------------------------------------------- checks


def _check_odd(job: Job, tolerance: float) -> Refusal | None:
    """The same library and config at small odd sizes, where every edge case is met."""
    if job.kernel.split("[")[0] != "tile":
        return None
    form = parse_form(job.form)
    program = dense.tile_form(form, True) if isinstance(form, PackedDense) else form
    assert isinstance(program, Tile)  # no other form has an emitted kernel
    dtype = getattr(torch, job.dtype)
    parts = analyse(program, dtype)
    if not isinstance(parts, Program):
        return parts
    shuffles = any(stage.blocks for stage in parts.stages)
    odd = sample_form(spec_of(parts, dtype), shuffles=shuffles)
    if odd is None:
        return _refuse(job, "UNSERVED", "more slots than a test of its library may have")
    kernel = tile.make(odd, job.config, dtype=dtype)
    if isinstance(kernel, Refusal):
        return kernel
    for rows in (1, 37):
        inputs, weights = sample(odd, rows, dtype=dtype)
        problem = Problem(odd, kernel, (inputs, inputs), weights, _reference(odd, job))
        failed = _compare(problem, job, tolerance, f"odd sizes, {rows} rows")
        if failed is not None:
            return failed
    return None


def _compare(problem: Problem, job: Job, tolerance: float, what: str) -> Refusal | None:
    inputs = problem.inputs[0]
    x, before = inputs[0], [i.clone() for i in inputs]
    with torch.inference_mode():
        y, intact = _guarded(problem, inputs)
    if not intact:
        return _refuse(job, "OUT_OF_BOUNDS", f"wrote outside its output ({what})")
    if not all(map(torch.equal, inputs, before)):
        return _refuse(job, "INPUT_CHANGED", f"changed its input ({what})")
    if y.shape != (x.shape[0], problem.form.out_features) or y.dtype != x.dtype:
        return _refuse(job, "SHAPE", f"gave {tuple(y.shape)} {y.dtype} ({what})")
    if not bool(torch.isfinite(y).all()):
        return _refuse(job, "NONFINITE", f"gave NaN or infinity for finite input ({what})")
    wide = [w.double() if w.is_floating_point() else w for w in problem.weights]
    # Rows do not depend on each other: the ends and the middle stand for all.
    for start in {0, max(0, x.shape[0] // 2 - _SLICE), max(0, x.shape[0] - _SLICE)}:
        rows = slice(start, start + _SLICE)
        first, *others = [i[rows].double() for i in inputs]
        more = [others] if others else []
        error = relative_error(y[rows], problem.reference(first, wide, *more))
        if not error <= tolerance or math.isnan(error):
            return _refuse(job, "WRONG", f"relative error {error:.1e} > {tolerance:.0e} ({what})")
    return None


def _guarded(problem: Problem, inputs: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """The output, and whether the guard bands around it kept their value."""
    into = getattr(problem.run, "into", None)
    x, *others = inputs
    if into is None:
        return problem.call(inputs), True
    size = x.shape[0] * problem.form.out_features
    memory = x.new_full((size + 2 * GUARD,), _SENTINEL)
    y = memory[GUARD : GUARD + size].fill_(float("nan")).view(x.shape[0], -1)
    into(x, problem.weights, y, *([others] if others else []))
    bands = torch.cat([memory[:GUARD], memory[GUARD + size :]])
    return y, bool((bands == x.new_tensor(_SENTINEL)).all())


def _refuse(job: Job, code: str, reason: str) -> Refusal:
    return Refusal("", job.kernel, code, f"{job.kernel} {dict(job.config)}: {reason}")

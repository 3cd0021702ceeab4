"""Pricing: honest baselines, one measurement a key, and kernels that misbehave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from structc import ops
from structc.codegen import autotune, contenders, lower, measure, worker_client
from structc.codegen.autotune import Request, price
from structc.codegen.contenders import Contender
from structc.codegen.cpu import tile
from structc.codegen.tuning_db import FILE, TuningDb
from structc.errors import ConfigError
from structc.forms import Act, Bias, Block, PackedDense, Permute, Tile
from structc.records import Price, Refusal, Timed

F32 = torch.float32
LOW_RANK = Tile((Block(1, 16, 64, 1), Block(1, 64, 16, 1), Bias(64), Act("gelu", 64)))
MONARCH = Tile((Block(4, 16, 16, 1), Permute(4, 16), Block(4, 16, 16, 1)))
SMALL = Request(LOW_RANK, 64, F32, True, "gelu")
DENSE = Request(PackedDense(64, 64, "gelu"), 64, F32, True, "gelu")


@pytest.fixture
def empty_db(session_cache: Path) -> Iterator[TuningDb]:
    """Built kernels stay, measurements go."""
    db = TuningDb(session_cache / FILE)
    db.clear()
    yield db
    db.clear()


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", {"quick": 3, "full": 3})


def forbid_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise AssertionError("a worker was started")

    monkeypatch.setattr(worker_client.Worker, "_start", refuse)


def test_effort_none_predicts(monkeypatch: pytest.MonkeyPatch, empty_db: TuningDb) -> None:
    forbid_worker(monkeypatch)
    requests = [SMALL, DENSE, Request(MONARCH, 1, torch.bfloat16, False, "")]
    first, second = price(requests, effort="none"), price(requests, effort="none")
    assert first == second and list(first) == requests
    for found in first.values():
        assert isinstance(found, Price)
        assert found.source == "predicted" and found.kernel in ("reference", "aten")
    assert empty_db.list() == []


def test_unknown_effort() -> None:
    with pytest.raises(ConfigError, match="quick"):
        price([SMALL], effort="much")


@pytest.mark.parametrize("effort", ["quick", pytest.param("full", marks=pytest.mark.slow)])
def test_price_then_bind(
    effort: str, few_rounds: None, empty_db: TuningDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    transposed = Request(PackedDense(64, 64), 64, F32, False, "", True)
    requests = [SMALL, Request(MONARCH, 64, F32, False, ""), DENSE, transposed, SMALL]
    seen: list[tuple[str, int, int]] = []
    prices = price(requests, effort=effort, progress=lambda *a: seen.append(a))
    assert list(prices) == requests[:-1] and [s[1:] for s in seen] == [(i, 4) for i in range(1, 5)]
    for request, found in prices.items():
        assert isinstance(found, Price), found
        assert found.source == "measured" and found.latency_ms > 0 and found.baseline_ms > 0
        assert found.form == str(request.form) and found.rows == 64
        refused = lower.bind(
            request.form, F32, 64, found.kernel, found.config, transposed=request.transposed
        )
        assert refused is None
    assert len(ops.attached()) == 4
    forbid_worker(monkeypatch)  # the same key again: the identical price, nothing is timed
    assert price(requests, effort=effort) == prices
    assert price(requests, effort="quick") == prices


def test_thread_count_is_the_callers(few_rounds: None, empty_db: TuningDb) -> None:
    torch.set_num_threads(1)
    price([DENSE], effort="quick")
    assert {key["threads"] for key, _ in empty_db.list()} == {1}
    torch.set_num_threads(2)
    price([DENSE], effort="quick")
    assert {key["threads"] for key, _ in empty_db.list()} == {1, 2}


def test_no_time_left(few_rounds: None, empty_db: TuningDb) -> None:
    prices = price([SMALL, DENSE], effort="quick", seconds=0.0)
    refused, dense = prices[SMALL], prices[DENSE]
    assert isinstance(refused, Refusal) and refused.code == "BUDGET"
    assert isinstance(dense, Price) and dense.source == "predicted"
    assert empty_db.list() == []


def test_no_compiler(few_rounds: None, empty_db: TuningDb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTC_CXX", "/nonexistent")
    prices = price([SMALL, DENSE], effort="quick")
    ours, dense = prices[SMALL], prices[DENSE]
    assert isinstance(ours, Price) and ours.kernel == "reference" and ours.source == "measured"
    assert isinstance(dense, Price) and dense.kernel in ("aten", "onednn", "mkl")


def test_other_dtypes_run_as_the_operators_of_pytorch(few_rounds: None, empty_db: TuningDb) -> None:
    request = Request(LOW_RANK, 64, torch.float64, True, "gelu")
    found = price([request], effort="quick")[request]
    assert isinstance(found, Price) and found.kernel == "reference"


def test_what_a_failing_compiler_left_out_is_not_remembered(
    few_rounds: None,
    empty_db: TuningDb,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    price([DENSE], effort="quick")
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$1" in --version) echo fake 1.0;; *) exit 1;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("STRUCTC_CXX", str(compiler))
    with caplog.at_level("WARNING", logger="structc"):
        found = price([SMALL], effort="quick")[SMALL]
    assert isinstance(found, Price) and found.kernel == "reference"
    assert "is not emitted today" in caplog.text
    assert empty_db.rows(autotune.tuning_key(SMALL)) == []


FAULTS = {
    "hang": "HANG",
    "crash": "CRASHED",
    "exit": "CRASHED",
    "wrong": "WRONG",
    "nan": "NONFINITE",
    "overrun": "OUT_OF_BOUNDS",
    "late_crash": "CRASHED",
    "late_hang": "HANG",
}


def with_faults(monkeypatch: pytest.MonkeyPatch, *kinds: str, alone: bool = False) -> None:
    """Let kernels that misbehave take part, before all others."""
    normal = contenders.tile_contenders
    faulty = [Contender("fault", {"kind": kind}) for kind in kinds]

    def contend(*args: Any) -> list[Contender]:
        return [*faulty, *([] if alone else normal(*args))]

    monkeypatch.setattr(contenders, "tile_contenders", contend)
    monkeypatch.setattr(worker_client, "CHECK_LIMIT_S", 8.0 if "hang" in kinds else 60.0)
    monkeypatch.setattr(worker_client, "TIME_LIMIT_S", 5.0)


@pytest.mark.parametrize(
    "kinds",
    [
        ("wrong", "nan", "overrun", "crash", "exit"),
        ("hang",),
        pytest.param(("late_crash", "late_hang"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_faulty_kernels_never_win(
    kinds: tuple[str, ...], few_rounds: None, empty_db: TuningDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    price([DENSE], effort="quick")  # the dense contenders are not what is tested here
    tile.make(LOW_RANK, {})  # built before: the short limit is for the hang alone
    with_faults(monkeypatch, *kinds)
    found = price([SMALL], effort="quick")[SMALL]
    assert isinstance(found, Price) and found.kernel.startswith("tile[")
    for kind in kinds:
        rows = empty_db.rows(autotune.tuning_key(SMALL))
        (row,) = (r for r in rows if r.kernel == "fault" and r.config == {"kind": kind})
        assert row.status == "refused" and row.effort == ""
        assert row.reason.startswith(FAULTS[kind])
        assert kind != "crash" or "SIGSEGV" in row.reason


def test_nothing_but_faults_is_a_refusal(
    few_rounds: None, empty_db: TuningDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    price([DENSE], effort="quick")
    with_faults(monkeypatch, "wrong", alone=True)
    refused = price([SMALL], effort="quick")[SMALL]
    assert isinstance(refused, Refusal) and refused.code == "WRONG"
    forbid_worker(monkeypatch)
    assert price([SMALL], effort="quick")[SMALL] == refused


def test_no_configuration_names_a_fault() -> None:
    for effort in ("quick", "full"):
        for request in (SMALL, DENSE, Request(MONARCH, 4096, F32, False, "")):
            assert all(c.kernel != "fault" for c in request.contenders(effort))


def test_default_stays_within_the_spread() -> None:
    def timed(ms: float, spread: float) -> Timed:
        return Timed(ms, ms, spread, 9)

    assert measure.choose([timed(10.0, 0.08), timed(9.5, 0.08)]) == 0
    assert measure.choose([timed(10.0, 0.01), timed(9.5, 0.01)]) == 1
    assert measure.choose([timed(10.0, 0.9), timed(8.0, 0.9), timed(8.5, 0.9)]) == 1


def test_contenders_are_distinct_and_served() -> None:
    for effort in ("quick", "full"):
        for form in (LOW_RANK, MONARCH):
            for rows in (1, 17, 128, 4096):
                found = contenders.tile_contenders(form, rows, F32, effort)
                assert found and len({str(c) for c in found}) == len(found)
                assert all(not isinstance(tile.complete(c.config), Refusal) for c in found)


@pytest.mark.parametrize("index", [0, -1], ids=["rival", "outside"])
@pytest.mark.parametrize("code", ["CRASHED", "HANG"])
def test_another_ones_death_is_nobodys_refusal(index: int, code: str, empty_db: TuningDb) -> None:
    """Whoever was not running when the worker died is tried again another day."""

    class Dying:
        def check(self, job: object) -> float:
            return 0.1

        def time(self, *_: object, **__: object) -> tuple[int, Refusal]:
            return index, Refusal("", "aten", code, "aten: gone while timed")

    dying: Any = Dying()
    rivals = [(Contender("aten"), 0.8)]
    measurement = measure.Measurement(dying, SMALL, SMALL.contenders("quick"), rivals, "quick")
    assert measurement.run() == []
    assert {r.code for _, r in measurement.refused} == {"WORKER"}
    assert code in measurement.refusal().reason and "gone" in measurement.refusal().reason


def test_a_worker_that_does_not_start_is_no_kernels_fault(
    empty_db: TuningDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_client.sys, "executable", "/bin/false")
    with worker_client.Worker() as worker:
        measurement = measure.Measurement(worker, SMALL, SMALL.contenders("quick"), [], "quick")
        assert measurement.run() == []
    assert {r.code for _, r in measurement.refused} == {"WORKER"}
    found = price([SMALL], effort="quick")[SMALL]
    assert isinstance(found, Refusal) and "does not start" in found.reason
    assert empty_db.list() == []


def test_a_dead_yardstick_is_not_remembered(
    empty_db: TuningDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> tuple[int, Refusal]:
        return -1, Refusal("", "worker", "CRASHED", "worker: gone")

    monkeypatch.setattr(worker_client.Worker, "check", lambda *_: 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(worker_client.Worker, "time", die)
        found = price([DENSE], effort="quick")[DENSE]
        assert isinstance(found, Price) and found.source == "predicted"
    assert empty_db.list() == []


def test_a_disturbed_baseline_promises_nothing(empty_db: TuningDb) -> None:
    """A dense kernel that was hit by the scheduler counts as what it is known to take."""

    spread = 2.0

    class Busy:
        def check(self, job: object) -> float:
            return 0.1

        def time(self, jobs: list[object], rounds: int, expected_s: float) -> list[Timed]:
            return [Timed(8.0, 8.0, spread, 3), *(Timed(0.5, 0.5, 0.0, 3) for _ in jobs[1:])]

    rivals = [(Contender("aten"), 0.8)]
    tried = SMALL.contenders("quick")
    busy: Any = Busy()
    rows = measure.Measurement(busy, SMALL, tried, rivals, "quick").run()
    assert {r.baseline_ms for r in rows} == {0.8 * measure.SLACK}
    spread = 0.02  # slow but steady: everything beside it was as slow
    rows = measure.Measurement(busy, SMALL, tried, rivals, "quick").run()
    assert {r.baseline_ms for r in rows} == {8.0}


def test_a_speedup_that_no_kernel_can_have_is_not_kept(
    few_rounds: None,
    empty_db: TuningDb,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another process holds a core: each barrier of the dense kernel takes a quantum, steadily."""
    price([DENSE], effort="quick")
    honest, runs = measure.Measurement.run, []

    def stalled(self: measure.Measurement) -> list[Any]:
        runs.append(self.request)
        return [replace(r, baseline_ms=100 * r.latency_ms) for r in honest(self)]

    monkeypatch.setattr(measure.Measurement, "run", stalled)
    with caplog.at_level("WARNING", logger="structc"):
        found = price([SMALL], effort="quick")[SMALL]
    assert isinstance(found, Price) and len(runs) == 2, "it is measured again first"
    assert "is the machine busy" in caplog.text
    assert empty_db.rows(autotune.tuning_key(SMALL)) == []

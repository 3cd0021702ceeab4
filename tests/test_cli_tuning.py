"""``structc tune``, ``structc cache`` and ``structc bench kernels``."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import structc
from structc.cli import app
from structc.codegen import peaks
from structc.codegen.autotune import Request, tuning_key
from structc.codegen.cost import predict_ms
from structc.codegen.tuning_db import Row, TuningDb
from structc.forms import Block, PackedDense, Tile

FORM = Tile((Block(1, 8, 16, 1), Block(1, 16, 8, 1)))
ROW = Row("aten", {}, latency_ms=0.5, baseline_ms=0.5, baseline="aten", effort="quick")
MODEL = """
import torch
def make():
    return torch.nn.Linear(48, 48), torch.randn(4, 48)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STRUCTC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def run(*args: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, list(args))
    assert done.exit_code == code, f"{done.exit_code}: {done.stdout}{done.stderr}"
    return json.loads(done.stdout) if "--json" in args else done


def key_of(rows: int = 4) -> Any:
    return tuning_key(Request(PackedDense(16, 16), rows, torch.float32, False, ""))


def test_path_and_an_empty_list(cache: Path) -> None:
    assert run("cache", "path").stdout.strip() == str(cache)
    assert run("cache", "path", "--json") == {"path": str(cache)}
    assert run("cache", "list").stdout.strip() == "nothing is measured yet"
    assert run("cache", "list", "--json") == []


def test_what_was_measured_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(ROW, kernel="onednn", effort="")
    TuningDb().put(key_of(), [ROW, other])
    TuningDb().put(replace(key_of(8), cpu="another"), [ROW])
    assert [r["usable"] for r in run("cache", "list", "--json")].count(True) == 1
    assert len(run("cache", "list", "--all", "--json")) == 3
    assert "dense(16,16,none)" in run("cache", "list").stdout
    assert run("cache", "export", "rows.json", "--json")["rows"] == 3
    assert "exists already" in run("cache", "export", "rows.json", code=2).stderr
    run("cache", "export", "rows.json", "--overwrite")
    monkeypatch.setenv("STRUCTC_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert run("cache", "import", "rows.json", "--json") == {
        "file": "rows.json",
        "rows": 3,
        "usable": 2,
    }
    assert TuningDb().chosen(key_of(), "quick") == TuningDb(
        tmp_path / "cache/tuning.sqlite"
    ).chosen(key_of(), "quick")
    assert run("cache", "prune", "--older-than", "1", "--json") == {"deleted": 0}
    assert run("cache", "prune", "--foreign", "--json") == {"deleted": 1}
    assert run("cache", "prune", "--older-than", "0", "--json") == {"deleted": 2}


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99, "runs": []}', '{"schema": 1}'])
def test_foreign_files_are_not_imported(text: str) -> None:
    Path("bad.json").write_text(text)
    assert "bad.json" in run("cache", "import", "bad.json", code=1).stderr
    assert TuningDb().list() == []


def test_a_locked_database_is_no_empty_one(cache: Path) -> None:
    """A person who asks is told; the compiler, which can do without, is not."""
    TuningDb().put(key_of(), [ROW])
    holder = sqlite3.connect(cache / "tuning.sqlite")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        done = run("cache", "prune", "--older-than", "0", code=1)
        assert "locked" in done.stderr
    finally:
        holder.close()
    (cache / "tuning.sqlite").write_bytes(b"not a database, whatever its name says" * 99)
    assert "moved aside" in run("cache", "export", "rows.json", code=1).stderr
    assert not Path("rows.json").exists()


def test_verify_finds_kernels_that_are_wrong() -> None:
    TuningDb().put(key_of(), [ROW])
    wrong = replace(ROW, kernel="fault", config={"kind": "wrong"})
    TuningDb().put(key_of(8), [wrong])
    done = run("cache", "verify", code=4)
    assert "1 of 2 kernels are right" in done.stdout and "8 rows: WRONG" in done.stdout
    found = run("cache", "verify", "--remove", "--json")
    assert found["checked"] == 2 and found["removed"] == 1
    assert run("cache", "verify", "--json") == {"checked": 1, "failed": [], "removed": 0}


def test_peaks_are_measured_once_and_then_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "SIZES", (128,))
    monkeypatch.setattr(peaks, "STREAM_MB", 4)
    assert peaks.known().source == "assumed"
    found = run("tune", "--peaks", "--json")["peaks"]
    assert min(found["gflops"], found["gflops_bf16"], found["gb_per_s"]) > 0.1
    now = peaks.known()
    assert now.source == "measured" and now.gflops == found["gflops"]
    form = PackedDense(2048, 2048)
    double = replace(now, gflops=2 * now.gflops, gb_per_s=2 * now.gb_per_s)
    assert predict_ms(form, 512, torch.float32) > predict_ms(form, 512, torch.float32, double)
    TuningDb().put_fact(peaks.FACT, structc.hardware.target().to_dict(), {"gflops": "many"})
    assert peaks.known().source == "assumed"


def test_tune_fills_the_database_for_recorded_conversions() -> None:
    Path("net.py").write_text(MODEL)
    assert "nothing to do" in run("tune", code=2).stderr
    before = run("inspect", "net.py:make", "--effort", "recorded", "--json")
    reasons = {r["reason"] for r in before["refusals"]}
    assert any("tuning database has no measurement" in r for r in reasons)
    assert "forms priced for 1 layers" in run("tune", "net.py:make").stdout
    rows = TuningDb().list()
    assert rows
    after = run("inspect", "net.py:make", "--effort", "recorded", "--json")
    again = run("inspect", "net.py:make", "--effort", "recorded", "--json")
    assert TuningDb().list() == rows
    assert after["sites"] == again["sites"]
    assert {c["source"] for c in after["sites"][0]["candidates"]} == {"measured"}


def test_an_effort_in_seconds_ends() -> None:
    Path("net.py").write_text(MODEL)
    short = run("inspect", "net.py:make", "--effort", "0.000001s", "--json")
    assert {c["source"] for c in short["sites"][0]["candidates"]} == {"predicted"}
    assert any("for tuning ran out" in r["reason"] for r in short["refusals"])
    assert TuningDb().list() == []


@pytest.mark.slow
def test_bench_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from structc.codegen import kernel_table

    monkeypatch.setattr(peaks, "SIZES", (128,))
    monkeypatch.setattr(peaks, "STREAM_MB", 4)
    monkeypatch.setattr(kernel_table, "_forms", lambda: iter([("tiny", FORM, (8, 64))]))
    monkeypatch.setattr(kernel_table, "_mlps", lambda: iter([]))
    before = torch.get_num_threads()
    found = run("bench", "kernels", "--rows", "8,64", "--dtype", "both", "--threads", "1", "--json")
    assert torch.get_num_threads() == before
    assert found["target"]["threads"] == 1 and found["peaks"]["source"] == "measured"
    assert [(r["rows"], r["dtype"]) for r in found["kernels"]] == [
        (8, "float32"),
        (64, "float32"),
        (8, "bfloat16"),
        (64, "bfloat16"),
    ]
    for r in found["kernels"]:
        if "refused" not in r:
            assert r["ratio"] == 1.0 and r["efficiency"] == pytest.approx(r["speedup"])
            assert r["gflops"] == pytest.approx(1e-6 * r["rows"] * FORM.flops / r["latency_ms"])
    assert "tiny" in run("bench", "kernels", "--rows", "8").stdout
    assert "tiny" in run("bench", "kernels", "--rows", "8", "--effort", "60s").stdout
    assert "effort" in run("bench", "kernels", "--rows", "8", "--effort", "soon", code=2).stderr
    assert "--rows" in run("bench", "kernels", "--rows", "8,x", code=2).stderr
    assert "--dtype" in run("bench", "kernels", "--dtype", "int4", code=2).stderr

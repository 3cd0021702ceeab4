"""The tuning database: a cache that is never wrong and never in the way."""

from __future__ import annotations

import json
import logging
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import structc
from structc.codegen import tuning_db
from structc.codegen.tuning_db import Key, Row, TuningDb
from structc.errors import CacheError

KEY = Key(
    form="block(1,8,16,1) block(1,16,8,1)",
    rows=64,
    dtype="float32",
    transposed=False,
    threads=2,
    cpu="a processor",
    isa=("avx512f", "avx2"),
    cores=2,
    torch="2.13.0",
    compiler="g++ 12",
    source="abc",
)
ROW = Row(
    "tile",
    {"tile": 64},
    latency_ms=1.25,
    baseline_ms=2.5,
    baseline="aten",
    spread=0.03,
    effort="quick",
    time=1e9,
)
OTHER: dict[str, Any] = {
    "form": "block(1,8,16,1)",
    "rows": 65,
    "dtype": "bfloat16",
    "transposed": True,
    "threads": 1,
    "cpu": "another processor",
    "isa": ("avx2",),
    "cores": 4,
    "torch": "2.14.0",
    "compiler": "g++ 13",
    "source": "abd",
    "schema": 2,
}


@pytest.fixture
def db(tmp_path: Path) -> Iterator[TuningDb]:
    tuning_db._warned.clear()
    yield TuningDb(tmp_path / "cache" / "tuning.sqlite")


def test_round_trip(db: TuningDb) -> None:
    assert db.rows(KEY) == [] and db.chosen(KEY, "quick") is None
    refused = Row("onednn", {}, "refused", "WRONG: relative error 1", time=1e9)
    assert db.put(KEY, [ROW, refused])
    assert sorted(db.rows(KEY), key=lambda r: r.kernel) == [refused, ROW]
    assert db.chosen(KEY, "quick") == ROW


def test_every_component_of_the_key_counts(db: TuningDb) -> None:
    db.put(KEY, [ROW])
    assert set(OTHER) == set(Key.__dataclass_fields__)
    for name, value in OTHER.items():
        assert db.rows(replace(KEY, **{name: value})) == [], name


def test_more_effort_takes_over(db: TuningDb) -> None:
    db.put(KEY, [ROW])
    assert db.chosen(KEY, "full") is None
    better = replace(ROW, config={"tile": 32}, effort="full")
    db.put(KEY, [better])
    assert db.chosen(KEY, "quick") == db.chosen(KEY, "full") == better
    assert replace(ROW, effort="") in db.rows(KEY)


def test_an_import_keeps_what_is_newer(db: TuningDb, tmp_path: Path) -> None:
    other = TuningDb(tmp_path / "other.sqlite")
    config = {"tile": 16}
    theirs = replace(ROW, config=config, time=2e9)
    other.put(KEY, [theirs, replace(ROW, effort="", latency_ms=1.0, time=5e8)])
    other.export_json(tmp_path / "rows.json")
    db.put(KEY, [ROW])
    assert db.import_json(tmp_path / "rows.json") == 1
    assert db.chosen(KEY, "quick") == theirs and replace(ROW, effort="") in db.rows(KEY)
    assert [r for r in db.rows(KEY) if r.effort] == [theirs]
    db.put(KEY, [replace(ROW, time=3e9)])
    assert db.import_json(tmp_path / "rows.json") == 0
    assert [r.time for r in db.rows(KEY) if r.effort] == [3e9]


@pytest.mark.parametrize(
    "change",
    [
        {"latency_ms": float("nan")},
        {"latency_ms": -1.0},
        {"latency_ms": 0.0},
        {"spread": float("inf")},
        {"status": "good"},
        {"effort": "huge"},
        {"config": {"tile": 1.5}},
    ],
)
def test_impossible_values_are_not_stored(db: TuningDb, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no measurement"):
        db.put(KEY, [replace(ROW, **change)])


@pytest.mark.parametrize(
    "statement",
    [
        "latency_ms = -3",
        "latency_ms = 'fast'",
        "config = 'not json'",
        "config = '[1]'",
        "status = 'maybe'",
        "key = '{}'",
    ],
)
def test_altered_rows_are_misses(db: TuningDb, statement: str) -> None:
    db.put(KEY, [ROW])
    with sqlite3.connect(db.path) as raw:
        raw.execute(f"UPDATE {tuning_db._TABLE} SET {statement}")
    raw.close()
    assert db.rows(KEY) == []


def test_damaged_file_is_moved_aside(db: TuningDb, caplog: pytest.LogCaptureFixture) -> None:
    db.path.parent.mkdir(parents=True)
    for _ in range(2):
        db.path.write_bytes(b"this is no database, whatever its name says" * 100)
        with caplog.at_level(logging.WARNING, logger="structc"):
            assert db.rows(KEY) == []
        assert db.put(KEY, [ROW]) and db.chosen(KEY, "quick") == ROW
    assert db.path.with_name("tuning.sqlite.corrupt").exists()
    assert len([r for r in caplog.records if "moved aside" in r.message]) == 1


def test_truncated_file(db: TuningDb) -> None:
    db.put(KEY, [replace(ROW, config={"tile": i}) for i in range(2000)])
    raw = sqlite3.connect(db.path)
    raw.execute("PRAGMA journal_mode=DELETE")
    raw.close()
    db.path.write_bytes(db.path.read_bytes()[: db.path.stat().st_size // 2])
    db.rows(KEY)
    assert db.put(KEY, [ROW]) or db.put(KEY, [ROW])
    assert db.chosen(KEY, "quick") == ROW


def test_locked_is_a_miss(db: TuningDb, monkeypatch: pytest.MonkeyPatch) -> None:
    db.put(KEY, [ROW])
    monkeypatch.setattr(tuning_db, "BUSY_MS", 50)
    holder = sqlite3.connect(db.path)
    holder.execute("BEGIN EXCLUSIVE")
    assert db.put(KEY, [ROW]) is False
    holder.rollback()
    holder.close()
    assert db.put(KEY, [ROW])


def test_unusable_place_is_a_miss(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    db = TuningDb(tmp_path / "file" / "tuning.sqlite")
    assert db.rows(KEY) == [] and db.put(KEY, [ROW]) is False
    assert db.list() == [] and db.clear() == 0 and db.prune(0) == 0
    folder = TuningDb(tmp_path)
    assert folder.rows(KEY) == [] and folder.put(KEY, [ROW]) is False


def test_list_prune_clear(db: TuningDb) -> None:
    db.put(KEY, [ROW, replace(ROW, config={"tile": 1}, effort="", time=0.0)])
    listed = db.list()
    assert len(listed) == 2 and listed[1][1] == ROW
    assert listed[0][0]["form"] == KEY.form
    assert db.prune(older_than_days=30) == 1 and len(db.list()) == 1
    assert db.clear() == 1 and db.list() == []


def test_export_and_import(db: TuningDb, tmp_path: Path) -> None:
    db.put(KEY, [ROW])
    assert db.export_json(tmp_path / "out.json") == 1
    other = TuningDb(tmp_path / "other.sqlite")
    assert other.import_json(tmp_path / "out.json") == 1
    assert other.chosen(KEY, "quick") == ROW
    data = json.loads((tmp_path / "out.json").read_text())
    data["runs"][0]["row"]["latency_ms"] = -1
    (tmp_path / "out.json").write_text(json.dumps(data))
    assert TuningDb(tmp_path / "third.sqlite").import_json(tmp_path / "out.json") == 0


def test_export_to_nowhere(db: TuningDb, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="cannot be written"):
        db.export_json(tmp_path / "no" / "such" / "folder.json")


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 99, "runs": []}', '{"schema": 1}'])
def test_import_of_something_else(db: TuningDb, tmp_path: Path, text: str) -> None:
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(CacheError):
        db.import_json(tmp_path / "in.json")


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from structc.codegen.tuning_db import Key, Row, TuningDb
me = int(sys.argv[2])
db = TuningDb(Path(sys.argv[1]))
key = Key("f", 1, "float32", False, 1, "c", ("i",), 1, "t", "g", "s")
for i in range(int(sys.argv[3])):
    row = Row("tile", {"n": 1000 * me + i}, latency_ms=1.0, baseline_ms=1.0, baseline="aten")
    assert db.put(key, [row])
    assert any(r.config == row.config for r in db.rows(key))
"""


@pytest.mark.parametrize(
    ("processes", "rows"), [(4, 25), pytest.param(16, 200, marks=pytest.mark.slow)]
)
def test_several_processes_write_at_once(
    processes: int, rows: int, db: TuningDb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(structc.__file__).parents[1]))
    command = [sys.executable, "-P", "-c", WRITER, str(db.path)]
    writers = [subprocess.Popen([*command, str(i), str(rows)]) for i in range(processes)]
    assert [w.wait(240) for w in writers] == [0] * processes
    key = Key("f", 1, "float32", False, 1, "c", ("i",), 1, "t", "g", "s")
    assert len(db.rows(key)) == processes * rows

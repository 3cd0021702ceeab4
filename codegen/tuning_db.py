"""The tuning database: one row per (key, configuration), in SQLite.

It is a cache: whatever is wrong with it (locked, read-only, missing, damaged) makes it a miss,
never an error. A damaged file is moved aside to ``*.corrupt`` with one warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from structc import settings
from structc.errors import CacheError

SCHEMA = 1
FILE = "tuning.sqlite"
BUSY_MS = 3000
EFFORTS = ("", "quick", "full")
_TABLE = f"runs_{SCHEMA}"
_COLUMNS = (
    "key_hash",
    "key",
    "config",
    "kernel",
    "status",
    "reason",
    "latency_ms",
    "baseline_ms",
    "baseline",
    "spread",
    "effort",
    "time",
)
_CREATE = f"""
CREATE TABLE IF NOT EXISTS {_TABLE} (
    key_hash TEXT NOT NULL, key TEXT NOT NULL, config TEXT NOT NULL, kernel TEXT NOT NULL,
    status TEXT NOT NULL, reason TEXT NOT NULL, latency_ms REAL NOT NULL,
    baseline_ms REAL NOT NULL, baseline TEXT NOT NULL, spread REAL NOT NULL,
    effort TEXT NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (key_hash, kernel, config));
CREATE TABLE IF NOT EXISTS facts_{SCHEMA} (
    name TEXT NOT NULL, machine TEXT NOT NULL, value TEXT NOT NULL, time REAL NOT NULL,
    PRIMARY KEY (name, machine))
"""

_log = logging.getLogger("structc")
_warned: set[Path] = set()
T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """Everything that a latency depends on. A change of any of it is a miss.

    Attributes:
        form: text of the form, with ``+bias`` for a dense product that has one.
        rows: of one call.
        dtype: ``"float32"``.
        transposed: whether a dense weight is stored (in, out).
        threads: of PyTorch's pool.
        cpu, isa, cores, torch: of :class:`structc.hardware.Target`.
        compiler: first line of its ``--version``.
        source: hash of the kernels' sources.
        schema: of this database.
    """

    form: str
    rows: int
    dtype: str
    transposed: bool
    threads: int
    cpu: str
    isa: tuple[str, ...]
    cores: int
    torch: str
    compiler: str
    source: str
    schema: int = SCHEMA

    @property
    def text(self) -> str:
        """Canonical JSON."""
        return _text(asdict(self))


KERNELS = frozenset(
    {"aten", "onednn", "mkl", "tile", "fft", "pocket", "band", "parts", "reference", "fault"}
    | {"attention", "by_head", "sdpa"}
)
"""Everything that was ever timed; tests time faults."""


@dataclass(frozen=True)
class Row:
    """What is known about one configuration under one key.

    Attributes:
        kernel: ``"tile"``, ``"onednn"``, ``"aten"``.
        config: of the kernel.
        status: ``"ok"`` or ``"refused"``.
        reason: ``"CODE: sentence"`` if it was refused.
        latency_ms, baseline_ms, spread: as in :class:`structc.records.Price`.
        baseline: the dense kernel that it was timed against.
        effort: the effort at which it was chosen; ``""`` if another one was.
        time: seconds since the epoch.
    """

    kernel: str
    config: Mapping[str, int | str] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""
    latency_ms: float = 0.0
    baseline_ms: float = 0.0
    baseline: str = ""
    spread: float = 0.0
    effort: str = ""
    time: float = 0.0

    def is_valid(self) -> bool:
        """Whether the values can have come from a measurement."""
        numbers = (self.latency_ms, self.baseline_ms, self.spread, self.time)
        texts = (self.kernel, self.reason, self.baseline, self.effort)
        if not all(isinstance(v, str) for v in texts) or self.effort not in EFFORTS:
            return False
        if self.kernel not in KERNELS:
            return False
        if not all(isinstance(v, (int, float)) and math.isfinite(v) and v >= 0 for v in numbers):
            return False
        if not isinstance(self.config, Mapping) or not all(
            isinstance(k, str) and type(v) in (int, str) for k, v in self.config.items()
        ):
            return False
        measured = self.latency_ms > 0 and self.baseline_ms > 0
        return (self.status == "ok" and measured) or self.status == "refused"


class TuningDb:
    """Access to the database; each call opens and closes it, so threads and forks are safe.

    Args:
        path: of the file; ``tuning.sqlite`` in the cache folder by default.
        strict: whether a database that cannot be used is an error (:class:`CacheError`), not a
            miss: for people who ask for its contents.
    """

    def __init__(self, path: Path | None = None, *, strict: bool = False) -> None:
        self.path, self.strict = path or settings.current().cache_dir / FILE, strict

    def rows(self, key: Key) -> list[Row]:
        """All valid rows of a key."""

        def read(db: sqlite3.Connection) -> list[Row]:
            return [
                row
                for text, row in _select(db, "WHERE key_hash = ?", _hash(key.text))
                if text == key.text
            ]

        return self._access(read, [])

    def chosen(self, key: Key, effort: str) -> Row | None:
        """The configuration that was chosen with at least this effort."""
        wanted = EFFORTS[EFFORTS.index(effort) :]
        return next((r for r in self.rows(key) if r.effort in wanted), None)

    def put(self, key: Key, rows: Sequence[Row]) -> bool:
        """Store rows, replacing those of the same configuration; one transaction.

        A row with an effort takes the choice over from the one that had it.
        """
        now = time.time()
        rows = [r if r.time else replace(r, time=now) for r in rows]
        if not all(r.is_valid() for r in rows):
            raise ValueError(f"rows that no measurement can have given: {rows}")

        def write(db: sqlite3.Connection) -> bool:
            _insert(db, [(key.text, r) for r in rows])
            return True

        return self._access(write, False)

    def list(self) -> list[tuple[dict[str, Any], Row]]:
        """Every valid row with its key, newest first."""

        def read(db: sqlite3.Connection) -> list[tuple[dict[str, Any], Row]]:
            return [(json.loads(text), r) for text, r in _select(db, "ORDER BY time DESC")]

        return self._access(read, [])

    def fact(self, name: str, machine: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was measured about a machine as a whole, or None."""

        def read(db: sqlite3.Connection) -> dict[str, Any] | None:
            query = f"SELECT value FROM facts_{SCHEMA} WHERE name = ? AND machine = ?"
            found = db.execute(query, (name, _text(machine))).fetchone()
            try:
                value = json.loads(found[0]) if found else None
            except (ValueError, TypeError):
                return None
            return value if isinstance(value, dict) else None

        return self._access(read, None)

    def put_fact(self, name: str, machine: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
        """Remember a fact about a machine."""

        def write(db: sqlite3.Connection) -> bool:
            record = (name, _text(machine), _text(value), time.time())
            db.execute(f"INSERT OR REPLACE INTO facts_{SCHEMA} VALUES (?, ?, ?, ?)", record)
            return True

        return self._access(write, False)

    def prune(self, older_than_days: float) -> int:
        """Delete rows older than that; how many."""
        limit = time.time() - older_than_days * 86400
        return self._access(lambda db: _delete(db, "WHERE time < ?", limit), 0)

    def delete(self, key: Mapping[str, Any], row: Row) -> int:
        """Delete one configuration of a key as :meth:`list` gave it; how many rows that were."""
        config = json.dumps(dict(row.config), sort_keys=True)
        where = "WHERE key_hash = ? AND kernel = ? AND config = ?"
        values = (_hash(_text(key)), row.kernel, config)
        return self._access(lambda db: _delete(db, where, *values), 0)

    def clear(self) -> int:
        """Delete every row; how many."""
        return self._access(lambda db: _delete(db, ""), 0)

    def export_json(self, path: Path) -> int:
        """Write every row as JSON; how many.

        Raises:
            CacheError: the file cannot be written.
        """
        rows = [{"key": key, "row": _plain(row)} for key, row in self.list()]
        try:
            path.write_text(json.dumps({"schema": SCHEMA, "runs": rows}, indent=1))
        except OSError as e:
            raise CacheError(f"{path} cannot be written: {e.strerror or e}") from None
        return len(rows)

    def import_json(self, path: Path) -> int:
        """Add the valid rows of an export that are newer than what is here; how many.

        Raises:
            CacheError: the file is no export, or one of another schema.
        """
        try:
            data = json.loads(path.read_text())
            if data["schema"] != SCHEMA:
                raise CacheError(f"{path}: schema {data['schema']}, this version reads {SCHEMA}")
            pairs = [(_canonical(item["key"]), _row(item["row"])) for item in data["runs"]]
        except OSError as e:
            raise CacheError(f"{path} cannot be read: {e.strerror or e}") from None
        except (ValueError, KeyError, TypeError) as e:
            why = f"it has no {e}" if isinstance(e, KeyError) else str(e)
            raise CacheError(f"{path} is no export of the tuning database: {why}") from None
        valid = [(text, row) for text, row in pairs if text is not None and row is not None]

        def write(db: sqlite3.Connection) -> int:
            new = [(text, row) for text, row in valid if not _is_older(db, text, row)]
            _insert(db, new)
            return len(new)

        return self._access(write, 0)

    def _access(self, use: Callable[[sqlite3.Connection], T], miss: T) -> T:
        try:
            with self._open() as db:
                return use(db)
        except (sqlite3.OperationalError, OSError) as e:  # locked, read-only, not to be opened
            failed: Exception = e
        except (sqlite3.DatabaseError, UnicodeDecodeError) as e:
            self._move_aside(e)
            if not self.strict:
                return miss
            hint = "The damaged file is moved aside: the next command starts a new one."
            raise CacheError(f"tuning database {self.path}: {e}", hint=hint) from None
        hint = "Another process may be writing to it."
        if isinstance(failed, OSError):
            hint = "STRUCTC_CACHE_DIR names another folder."
        if self.strict:
            raise CacheError(f"tuning database {self.path}: {failed}", hint=hint)
        if self.path not in _warned:  # everything works, and is timed again each time
            _warned.add(self.path)
            _log.warning("tuning database %s: %s: nothing is remembered", self.path, failed)
        return miss

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        db = sqlite3.connect(self.path, timeout=BUSY_MS / 1000)
        try:
            with contextlib.suppress(sqlite3.OperationalError):  # some file systems have no WAL
                db.execute("PRAGMA journal_mode=WAL")
            db.execute(f"PRAGMA busy_timeout={BUSY_MS}")
            with db:
                for statement in _CREATE.split(";"):
                    db.execute(statement)
                yield db
        finally:
            db.close()

    def _move_aside(self, error: Exception) -> None:
        if self.path not in _warned:
            _warned.add(self.path)
            _log.warning("tuning database %s is damaged (%s): moved aside", self.path, error)
        with contextlib.suppress(OSError):
            self.path.replace(self.path.with_name(self.path.name + ".corrupt"))
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)


def source_hash() -> str:
    """Hash of everything that decides what a kernel computes and how fast."""
    from structc.codegen import cpu

    return _hash_sources(Path(cpu.__file__).parent)


@lru_cache(maxsize=4)
def _hash_sources(folder: Path) -> str:
    beside = [folder.parent / f"{name}.py" for name in ("dense", "spectral", "parts")]
    files = sorted([*folder.glob("*.h"), *folder.glob("*.py"), *beside])
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()[:16]


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), sort_keys=True, separators=(",", ":"))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _plain(row: Row) -> dict[str, Any]:
    return {**asdict(row), "config": dict(row.config)}


def _row(values: Mapping[str, Any]) -> Row | None:
    names = {f.name for f in fields(Row)}
    if set(values) != names:
        return None
    row = Row(**values)
    return row if row.is_valid() else None


def _canonical(key: Mapping[str, Any]) -> str | None:
    """Text of a key that came from outside, or None if it is none."""
    if set(key) != {f.name for f in fields(Key)}:
        return None
    return _text(key)


def _select(db: sqlite3.Connection, where: str, *values: object) -> Iterator[tuple[str, Row]]:
    query = f"SELECT {', '.join(_COLUMNS)} FROM {_TABLE} {where}"
    for record in db.execute(query, values).fetchall():
        named = dict(zip(_COLUMNS, record, strict=True))
        text = named.pop("key")
        named.pop("key_hash")
        try:
            named["config"] = json.loads(named["config"])
        except (ValueError, TypeError):
            continue
        row = _row(named)
        if row is not None:
            yield text, row


def _is_older(db: sqlite3.Connection, text: str, row: Row) -> bool:
    """Whether the same configuration, or the choice that this one would replace, is no older."""
    return any(
        known.time >= row.time and (_place(known) == _place(row) or (known.effort and row.effort))
        for key, known in _select(db, "WHERE key_hash = ?", _hash(text))
        if key == text
    )


def _place(row: Row) -> tuple[str, dict[str, int | str]]:
    return row.kernel, dict(row.config)


def _insert(db: sqlite3.Connection, pairs: Sequence[tuple[str, Row]]) -> None:
    """Insert or replace; a row with an effort takes its key's choice over from all others."""
    taken = [(_hash(text),) for text, row in pairs if row.effort]
    db.executemany(f"UPDATE {_TABLE} SET effort = '' WHERE key_hash = ?", taken)
    records = []
    for text, row in pairs:
        values = {**_plain(row), "key": text, "key_hash": _hash(text)}
        values["config"] = json.dumps(values["config"], sort_keys=True)
        records.append(tuple(values[c] for c in _COLUMNS))
    marks = ", ".join("?" * len(_COLUMNS))
    db.executemany(
        f"INSERT OR REPLACE INTO {_TABLE} ({', '.join(_COLUMNS)}) VALUES ({marks})", records
    )


def _delete(db: sqlite3.Connection, where: str, *values: object) -> int:
    return db.execute(f"DELETE FROM {_TABLE} {where}", values).rowcount

"""What compiled code said of configs, and how defaults follow it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from structc.codegen.triton import spilled, table
from structc.codegen.triton.aot import Job
from structc.codegen.triton.config import Config
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.targets import TARGETS

A, B, C, D = (Config(bm, 64, 1, 4, 2) for bm in (128, 64, 32, 16))
SOME = (A, B, C, D)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    monkeypatch.setattr(spilled, "_table", lambda: found)
    return found


def test_the_least_spilled_comes_first(known: dict[str, Any]) -> None:
    own = {str(A): 40, str(B): None, str(C): 8, str(D): 0}
    known["cuda:90"] = {"bf16": {"one 64": own, "one 128": {str(D): 4}}}
    assert spilled.usable("one", 64, SOME, "bf16", "cuda:90") == [D, C, A, B]
    assert spilled.usable("one", 16, SOME, "bf16", "cuda:90") == [D, C, A, B]  # the next width
    assert spilled.usable("one", 100, SOME, "bf16", "cuda:90") == [A, B, C, D]
    assert spilled.usable("one", 256, SOME, "bf16", "cuda:90") == [A, B, C, D]  # the widest
    assert spilled.usable("one", 64, SOME, "fp16", "cuda:90") == list(SOME)
    assert spilled.usable("two", 64, SOME, "bf16", "cuda:90") == list(SOME)
    assert spilled.spilled("one 64", B, "bf16", "cuda:90") == math.inf
    known["cuda:90"]["fp32"] = {"one 64": {str(A): 12}}
    assert spilled.spilled("one 64", A, "tf32", "cuda:90") == 12


def test_learning_ends_where_every_default_was_compiled(
    known: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two cases of one kernel: the worse one counts."""
    takes = {A: (40, 0), B: (0, 20), C: (0, None), D: (24, 0)}
    compiled: list[tuple[str, Config]] = []

    def wanted(*_: Any, every: bool) -> list[Entry]:
        assert not every
        (first, *_rest) = spilled.usable("one", 64, SOME, "bf16", "cuda:90")
        job = Job("", "one", {}, {}, "bf16", 4, 2, "cuda:90")
        return [Entry(case, "one 64", "one", first, True, job, None) for case in ("a", "b")]

    def rows(some: Sequence[Entry], **_: Any) -> list[dict[str, Any]]:
        compiled.extend((e.case, e.config) for e in some)
        bytes_of = [takes[e.config]["ab".index(e.case)] for e in some]
        room = TARGETS["cuda:90"].shared
        return [
            {"status": "ok", "spilled_bytes": n or 0, "shared_bytes": room + (n is None)}
            for n in bytes_of
        ]

    monkeypatch.setattr(table, "wanted", wanted)
    monkeypatch.setattr(table, "table", rows)
    monkeypatch.setattr(spilled, "PATH", tmp_path / "spilled.json")
    spilled.learn()
    own = {str(A): 40, str(B): 20, str(C): None, str(D): 24}
    assert json.loads((tmp_path / "spilled.json").read_text()) == {
        "cuda:90": {"bf16": {"one 64": own}}
    }
    assert compiled == [(case, config) for config in SOME for case in "ab"]
    assert spilled.usable("one", 64, SOME, "bf16", "cuda:90") == [B, D, A, C]

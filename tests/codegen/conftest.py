"""A cache folder for this run alone, and an empty kernel table for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from structc import ops
from structc.codegen.cpu import build


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built kernels are shared by the tests of a run and never taken from an earlier one."""
    return tmp_path_factory.mktemp("structc-cache")


@pytest.fixture(autouse=True)
def surroundings(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The run's cache folder; threads and kernel table as they were, afterwards."""
    for name in ("STRUCTC_NATIVE", "STRUCTC_CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STRUCTC_CACHE_DIR", str(session_cache))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    ops.detach_all()


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder, and nothing loaded."""
    monkeypatch.setenv("STRUCTC_CACHE_DIR", str(tmp_path / "cache"))
    build.forget()
    yield tmp_path / "cache"
    build.forget()

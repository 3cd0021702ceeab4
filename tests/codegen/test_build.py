"""Building at run time: what goes wrong is a Refusal, what was built is found again."""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from pathlib import Path

import filelock
import pytest

from structc.codegen.cpu import build, tile
from structc.forms import Tile
from structc.records import Refusal

SOURCE = 'extern "C" int structc_run() { return 42; }\n'
FORM = Tile.parse("block(1,4,8,1) block(1,8,4,1)")


def script(folder: Path, text: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def refusal(result: object) -> Refusal:
    assert isinstance(result, Refusal)
    assert result.reason
    return result


def test_built_once_and_found_again(fresh_build: Path) -> None:
    library = build.load("probe", SOURCE)
    assert not isinstance(library, Refusal)
    assert library.structc_run() == 42
    (built,) = (fresh_build / "kernels").glob("*.so")
    stamp = built.stat().st_mtime_ns
    build.forget()
    assert not isinstance(build.load("probe", SOURCE), Refusal)
    assert built.stat().st_mtime_ns == stamp
    assert stat.S_IMODE((fresh_build / "kernels").stat().st_mode) == 0o700
    assert not list((fresh_build / "kernels").glob("*.tmp"))


def test_corrupt_library_is_rebuilt(fresh_build: Path) -> None:
    assert not isinstance(build.load("probe", SOURCE), Refusal)
    (built,) = (fresh_build / "kernels").glob("*.so")
    built.unlink()  # a mapped file must not be written to in place
    built.write_bytes(b"not a library")
    build.forget()
    library = build.load("probe", SOURCE)
    assert not isinstance(library, Refusal) and library.structc_run() == 42


def test_no_compiler(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTC_CXX", "/nonexistent")
    found = refusal(tile.make(FORM, {}))
    assert found.code == "NO_COMPILER" and "/nonexistent" in found.reason


def test_failing_compiler(
    fresh_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'case "$1" in --version) echo fake 1.0;; *) echo "fatal error: no" >&2; exit 1;; esac'
    monkeypatch.setenv("STRUCTC_CXX", script(tmp_path, text))
    found = refusal(tile.make(FORM, {}))
    assert found.code == "COMPILE" and "fatal error: no" in found.reason


def test_compiler_that_cannot_tell_its_version(
    fresh_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRUCTC_CXX", script(tmp_path, "exit 1"))
    assert refusal(tile.make(FORM, {})).code == "COMPILE"


def test_hanging_compiler(
    fresh_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'case "$1" in --version) echo fake 1.0;; *) sleep 600;; esac'
    monkeypatch.setenv("STRUCTC_CXX", script(tmp_path, text))
    monkeypatch.setattr(build, "TIME_LIMIT_S", 0.5)
    found = refusal(tile.make(FORM, {}))
    assert found.code == "COMPILE_TIME" and "0.5 s" in found.reason
    assert not list((fresh_build / "kernels").glob("*.tmp"))


def test_compiler_that_writes_rubbish(
    fresh_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = 'case "$1" in --version) echo fake 1.0;; *) exit 0;; esac'
    monkeypatch.setenv("STRUCTC_CXX", script(tmp_path, text))
    assert refusal(tile.make(FORM, {})).code == "LOAD"


def test_turned_off(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTC_NATIVE", "0")
    assert refusal(tile.make(FORM, {})).code == "OFF"
    assert not fresh_build.exists()


def test_unusable_cache_falls_back_to_a_private_folder(
    fresh_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STRUCTC_CACHE_DIR", str(tmp_path / "file" / "below"))
    assert not isinstance(build.load("probe", SOURCE), Refusal)


def test_locked(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(build.load("probe", SOURCE), Refusal)
    (built,) = (fresh_build / "kernels").glob("*.so")
    built.unlink()
    build.forget()
    monkeypatch.setattr(build, "LOCK_LIMIT_S", 0.2)
    with filelock.FileLock(built.with_suffix(".lock")):
        assert refusal(build.load("probe", SOURCE)).code == "LOCKED"


def test_wrong_arithmetic_is_noticed(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile, "emit", lambda spec: SOURCE.replace("42", "0"))
    assert refusal(tile.make(FORM, {})).code == "SELF_TEST"
    monkeypatch.setattr(tile, "emit", lambda spec: SOURCE)
    assert refusal(tile.make(FORM, {})).code == "SELF_TEST"


def test_threads_build_one_library(fresh_build: Path) -> None:
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(build.load("probe", SOURCE))) for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 4 and len({id(f) for f in found}) == 1


def test_a_child_tells_what_it_loads(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_is_child", True)
    kernel = tile.make(FORM, {})
    assert not isinstance(kernel, Refusal)
    (library,) = build._loaded.values()
    assert ctypes.c_bool.in_dll(library, "structc_forked").value


def test_a_library_is_tested_once(fresh_build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(tile.make(FORM, {}), Refusal)
    (passed,) = (fresh_build / "kernels").glob("*.ok")
    failed = Refusal("", "tile", "SELF_TEST", "asked again")
    monkeypatch.setattr(tile, "_self_test", lambda *_: failed)
    build.forget()
    assert not isinstance(tile.make(FORM, {}), Refusal)
    passed.unlink()
    build.forget()
    assert tile.make(FORM, {}) is failed and not passed.exists()
    broken = passed.with_name("broken.so")
    broken.write_bytes(b"no library")
    broken.with_suffix(".ok").touch()
    assert build._open(broken) is None
    assert not broken.exists() and not broken.with_suffix(".ok").exists()


def test_no_second_openmp(fresh_build: Path) -> None:
    """Threads come from PyTorch's pool: the library itself brings no OpenMP runtime."""
    import subprocess

    assert not isinstance(tile.make(FORM, {}), Refusal)
    (built,) = (fresh_build / "kernels").glob("*.so")
    listed = subprocess.run(["ldd", str(built)], capture_output=True, text=True, check=True)
    assert "omp" not in listed.stdout


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_read_only_cache(
    fresh_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    monkeypatch.setenv("STRUCTC_CACHE_DIR", str(folder))
    assert not isinstance(build.load("probe", SOURCE), Refusal)

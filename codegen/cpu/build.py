"""Compile emitted C++ at run time, cached by content.

The key is a hash of the source, the compiler's version, the flags, the processor and the version of
PyTorch; the library is written under another name and renamed, so that nobody loads half of one. No
compiler, a compiler that fails or hangs, a library that does not load: each is a returned Refusal,
and the reference runs instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import filelock
import torch

from structc import hardware, settings
from structc.records import Refusal

TIME_LIMIT_S = 60.0
LOCK_LIMIT_S = 90.0
# No -ffast-math: NaN and infinities keep their meaning. The two flags below only say that nobody
# reads errno or floating-point exceptions, which lets loops with rint vectorise.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=default",
)

NAME_LIMIT = 80
"""Characters of a library's name before its hash: programs have no end, file names have."""

_log = logging.getLogger("structc")
_loaded: dict[str, ctypes.CDLL] = {}
_failed: dict[str, Refusal] = {}
_guard = threading.Lock()
_is_child = False


def _after_fork() -> None:
    """A child has none of OpenMP's threads, and nobody in it gives back what another one locked."""
    global _guard, _is_child
    _guard, _is_child = threading.Lock(), True


os.register_at_fork(after_in_child=_after_fork)


def load(name: str, source: str) -> ctypes.CDLL | Refusal:
    """The library of a source, from this process, from the cache folder, or compiled now.

    Args:
        name: readable part of the file name.
        source: self-contained C++.
    """
    current = settings.current()
    version = usable_compiler()
    if isinstance(version, Refusal):
        return version
    key = _key(source, version)
    with _guard:  # one build at a time in this process; the file lock is for the others
        if key not in _loaded:
            if key in _failed:  # once a process: a compiler that hangs does so each time
                return _failed[key]
            built = _load_or_build(f"{name[:NAME_LIMIT]}-{key}", source, current)
            if isinstance(built, Refusal):
                if built.code in ("COMPILE", "COMPILE_TIME"):
                    _failed[key] = built
                return built
            if _is_child:  # loaded after the fork: it has not seen it
                ctypes.c_bool.in_dll(built, "structc_forked").value = True
            _loaded[key] = built
        return _loaded[key]


def tested(library: ctypes.CDLL, test: Callable[[], Refusal | None]) -> Refusal | None:
    """Hold a library against its reference once on this machine; what passed is written beside it.

    A library is never written again under its name.
    """
    passed = Path(library._name).with_suffix(".ok")
    failed = None if passed.exists() else test()
    if failed is None:
        with contextlib.suppress(OSError):
            passed.touch()
    return failed


def forget() -> None:
    """Load libraries anew from here on; what is loaded already stays mapped."""
    with _guard:
        _loaded.clear()
        _failed.clear()
        _version_of.cache_clear()


def usable_compiler() -> str | Refusal:
    """The version of the compiler that builds kernels, or why none are built."""
    current = settings.current()
    if not current.native:
        return _refuse("OFF", "emitted kernels are turned off (STRUCTC_NATIVE=0)")
    return compiler_version(current.compiler)


def compiler_version(compiler: str) -> str | Refusal:
    """First line of ``compiler --version``, or why it cannot be asked."""
    path = shutil.which(compiler)
    if path is None:
        return _refuse("NO_COMPILER", f"no C++ compiler: {compiler!r} is not an executable")
    return _version_of(path, Path(path).stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _version_of(path: str, mtime_ns: int) -> str | Refusal:
    result = _execute([path, "--version"], limit_s=10.0)
    if isinstance(result, Refusal):
        return result
    return result.splitlines()[0].strip() if result.strip() else path


def flags() -> tuple[str, ...]:
    """Compiler flags for this machine, no better than ``STRUCTC_ISA`` allows."""
    isa = hardware.target().isa
    if not _is_x86():
        return (*FLAGS, "-mcpu=native")
    if "avx512f" not in isa:
        return (*FLAGS, "-march=x86-64-v3")
    capped = settings.current().isa and "amx_bf16" not in isa
    without = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16") if capped else ()
    return (*FLAGS, "-march=native", "-mprefer-vector-width=512", *without)


def _is_x86() -> bool:
    return os.uname().machine in ("x86_64", "amd64")


def _key(source: str, version: str) -> str:
    target = hardware.target()
    parts = (source, version, *flags(), target.cpu, *target.isa, torch.__version__)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _load_or_build(stem: str, source: str, current: settings.Settings) -> ctypes.CDLL | Refusal:
    folder = _folder(current.cache_dir / "kernels")
    if isinstance(folder, Refusal):
        return folder
    library = folder / f"{stem}.so"
    try:
        found = _open(library)
        if found is not None:
            return found
        with filelock.FileLock(folder / f"{stem}.lock", timeout=LOCK_LIMIT_S):
            found = _open(library)  # somebody else may have built it while we waited
            if found is not None:
                return found
            failed = _compile(source, library, current.compiler)
    except filelock.Timeout:
        return _refuse("LOCKED", f"{stem} was locked by another process for {LOCK_LIMIT_S:.0f} s")
    except OSError as e:
        return _refuse("CACHE", f"kernel folder {folder}: {e}")
    if failed is not None:
        return failed
    found = _open(library)
    return found or _refuse("LOAD", f"the library built for {stem} does not load")


def _folder(wanted: Path) -> Path | Refusal:
    """A folder that only this user can write to: what lies in it is executed."""
    try:
        wanted.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(wanted, os.W_OK | os.X_OK) and wanted.stat().st_uid == os.getuid():
            return wanted
    except OSError as e:
        _log.info("kernel folder %s cannot be used: %s", wanted, e)
    return _private_folder()


@lru_cache(maxsize=1)
def _private_folder() -> Path | Refusal:
    try:  # a fresh name: a predictable one in a shared folder could be somebody else's
        return Path(tempfile.mkdtemp(prefix="structc-kernels-"))
    except OSError as e:
        return _refuse("CACHE", f"no folder for built kernels: {e}")


def _open(library: Path) -> ctypes.CDLL | None:
    """The library, or None if it is absent or broken; a broken one is removed."""
    if not library.is_file():
        return None
    try:
        opened = ctypes.CDLL(str(library), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        opened.structc_run  # noqa: B018 - an AttributeError here means a foreign library
    except (OSError, AttributeError) as e:
        _log.warning("built kernel %s is unusable (%s); it is built again", library.name, e)
        with contextlib.suppress(OSError):
            library.unlink()
            library.with_suffix(".ok").unlink(missing_ok=True)  # what was tested is gone
        return None
    return opened


def _compile(source: str, library: Path, compiler: str) -> Refusal | None:
    text = library.with_suffix(".cpp")
    with _temporary(library) as made:
        text.write_text(source)
        libraries = Path(torch.__file__).parent / "lib"
        command = [compiler, *flags(), str(text), "-o", str(made)]
        done = _execute([*command, f"-L{libraries}", "-ltorch_cpu"], limit_s=TIME_LIMIT_S)
        if isinstance(done, Refusal):
            return done
        made.chmod(0o700)
        made.replace(library)
    return None


@contextlib.contextmanager
def _temporary(library: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=library.parent, prefix=library.stem, suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _execute(command: list[str], limit_s: float) -> str | Refusal:
    """Standard output of a compiler run, which is killed with its children at the limit."""
    what = Path(command[0]).name
    try:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as e:
        return _refuse("NO_COMPILER", f"no C++ compiler: {what} cannot be run: {e}")
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return _refuse("COMPILE_TIME", f"{what} did not finish in {limit_s:g} s")
    if process.returncode != 0:
        first = next((line for line in err.splitlines() if "error" in line.lower()), err.strip())
        return _refuse("COMPILE", f"{what} failed ({process.returncode}): {first[:300]}")
    return out


def _refuse(code: str, reason: str) -> Refusal:
    return Refusal("", "cpu", code, reason)

"""Emitted Triton source as a module: written to the cache once, by content, and imported."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

from structc import settings
from structc.files import write_atomic
from structc.records import Refusal

FUSED = {"enable_fp_fusion": True}
"""Option of every kernel, said outright: Triton's default changes with its version."""
TESTED = ((3, 9), (3, 9))
"""The oldest and the newest version of Triton that the tests have seen."""


def version() -> tuple[int, int] | None:
    """Of Triton, or None if it is not installed; nothing is imported."""
    from importlib import metadata

    try:
        first, second, *_ = metadata.version("triton").split(".")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    return int(first), int(second)


def write(source: str) -> Path:
    """The file of a source in the cache folder: Triton reads functions from files."""
    name = f"structc_{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
    path = settings.current().cache_dir / "triton" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, source.encode())
    return path


def module_of(source: str) -> ModuleType | Refusal:
    """The module of a source, imported once; a Refusal where there is no Triton."""
    if version() is None:
        return Refusal("", "triton", "NO_TRITON", "triton is not installed")
    return module_at(write(source))


def module_at(path: Path) -> ModuleType:
    """The module of a file that :func:`write` wrote, imported once."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # Triton asks for the globals of its functions by name
        try:
            spec.loader.exec_module(module)
        except BaseException:  # or the next call would take half a module for a whole one
            del sys.modules[path.stem]
            raise
    return sys.modules[path.stem]


@functools.cache
def warn_untested() -> None:
    """Say once that nobody tested this version of Triton; nothing otherwise."""
    if told := untested():
        warnings.warn(told, stacklevel=2)


def untested() -> str:
    """What to tell of a version of Triton outside the tested ones; ``""`` inside."""
    found = version()
    if found is None or TESTED[0] <= found <= TESTED[1]:
        return ""
    low, high = (".".join(map(str, v)) for v in TESTED)
    told = ".".join(map(str, found))
    return f"Triton {told} is outside the tested versions, {low} to {high}"

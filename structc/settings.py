"""Every ``STRUCTC_*`` environment variable, typed, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from structc.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        cache_dir: kernels and tuning database (``STRUCTC_CACHE_DIR``).
        trace: folder that gets one numbered file a stage (``STRUCTC_TRACE``).
        log: level of the ``structc`` logger (``STRUCTC_LOG``).
        native: whether emitted kernels are used at all (``STRUCTC_NATIVE=0`` turns them off).
        compiler: the C++ compiler (``STRUCTC_CXX``, then ``CXX``, then ``g++``).
        isa: the best instruction set that kernels are written for (``STRUCTC_ISA``), or ``""`` for
            all that the processor has.
        memory_mb: how much memory calibration may hold before it spills to disk
            (``STRUCTC_MEMORY_MB``).
    """

    cache_dir: Path
    trace: Path | None
    log: str
    native: bool
    compiler: str
    isa: str
    memory_mb: int


VARIABLES: dict[str, str] = {
    "STRUCTC_CACHE_DIR": "folder of built kernels and the tuning database",
    "STRUCTC_TRACE": "folder that receives one numbered file for each stage",
    "STRUCTC_LOG": "log level: debug, info, warning or error",
    "STRUCTC_NATIVE": "0 turns emitted kernels off; the reference runs instead",
    "STRUCTC_CXX": "C++ compiler for emitted kernels",
    "STRUCTC_ISA": "best instruction set to use: amx_bf16, avx512_bf16, avx512f or avx2",
    "STRUCTC_MEMORY_MB": "memory that calibration may hold before it spills to disk",
}
INSTRUCTION_SETS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "asimd")
"""Those that matter here, best first."""
LOG_LEVELS = ("debug", "info", "warning", "error")


def current() -> Settings:
    """Read the environment now; nothing is remembered between calls.

    >>> current().memory_mb
    2048
    """
    env = os.environ.get
    cache = env("STRUCTC_CACHE_DIR")
    return Settings(
        cache_dir=Path(cache).expanduser() if cache else _user_cache_dir(),
        trace=Path(trace) if (trace := env("STRUCTC_TRACE")) else None,
        log=_one_of("STRUCTC_LOG", env("STRUCTC_LOG", "warning").lower(), LOG_LEVELS),
        native=_one_of("STRUCTC_NATIVE", env("STRUCTC_NATIVE", "1"), ("0", "1")) == "1",
        compiler=env("STRUCTC_CXX") or env("CXX") or "g++",
        isa=_one_of("STRUCTC_ISA", env("STRUCTC_ISA", ""), ("", *INSTRUCTION_SETS)),
        memory_mb=_positive_int("STRUCTC_MEMORY_MB", env("STRUCTC_MEMORY_MB", "2048")),
    )


def _user_cache_dir() -> Path:
    import platformdirs  # a quarter of the import time of this module, needed here alone

    return Path(platformdirs.user_cache_dir("structc"))


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        known = ", ".join(filter(None, allowed))
        raise ConfigError(f"{name} must be one of {known}, got {value!r}")
    return value


def _positive_int(name: str, value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise ConfigError(f"{name} must be a positive whole number, got {value!r}")
    return int(value)

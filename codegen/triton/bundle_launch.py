"""What a bundle holds of single kernels: the first configs of each call, compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from structc.codegen.triton import aot
from structc.codegen.triton.aot import Job
from structc.codegen.triton.calls import AttentionCall
from structc.codegen.triton.config import Config, checked
from structc.codegen.triton.method_kernel import MethodCall
from structc.codegen.triton.targets import GpuTarget
from structc.codegen.triton.tile import DTYPES

MANY = 2
"""Configs of a call: the first, and the one to hold it against."""


@dataclass(frozen=True)
class Launch:
    """One call and what is compiled for it.

    Attributes:
        call: its sizes.
        configs: to be tried; none where there is no kernel.
        jobs: of each config.
        refusal: why there is no kernel, or ``""``.
    """

    call: AttentionCall | MethodCall
    configs: Sequence[Config]
    jobs: Sequence[Job]
    refusal: str = ""


@dataclass(frozen=True)
class BuiltLaunch:
    """What became of one call.

    Attributes:
        call: its sizes.
        refusal: why there is no kernel, or ``""``.
        configs: that were compiled and fit.
    """

    call: Any
    refusal: str
    configs: tuple[Config, ...] = ()


def build(
    what: str,
    launches: Iterable[Launch],
    target: GpuTarget,
    cache: Path,
    progress: Callable[[str, int, int], None],
) -> list[BuiltLaunch]:
    """Compile launches into a cache.

    Args:
        what: they are, for ``progress``.
    """
    some = list(launches)
    jobs = [job for one in some for job in one.jobs]
    progress(what, 0, len(jobs))
    made = iter(aot.compiled(jobs, cache=cache))
    progress(what, len(jobs), len(jobs))
    found = []
    for one in some:
        rows = [(config, next(made)) for config in one.configs]
        able = [c for c, m in rows if m.status == "ok" and m.shared_bytes <= target.shared]
        why = one.refusal if able or not rows else f"nothing compiles: {rows[0][1].status}"
        found.append(BuiltLaunch(one.call, why, tuple(able)))
    return found


def dtype_of(word: str) -> torch.dtype:
    """A dtype as the manifest spells it.

    >>> dtype_of("bf16")
    torch.bfloat16
    """
    return {word: dtype for dtype, word in DTYPES.items()}[word]


def configs_of(data: Iterable[Any]) -> tuple[Config, ...]:
    """Configs of the manifest."""
    return tuple(checked(c) for c in data)

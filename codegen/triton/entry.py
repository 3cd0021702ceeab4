"""What is given to the compiler: a stage's jobs, and rows of ``structc bench triton``."""

from __future__ import annotations

from dataclasses import dataclass

from structc.codegen.program import Stage
from structc.codegen.triton.aot import Job
from structc.codegen.triton.config import Config
from structc.codegen.triton.emit import kernels, own_config
from structc.codegen.triton.pieces import Kernel


def stage_jobs(
    path: str, at: int, stage: Stage, config: Config, dtype: str, target: str
) -> list[tuple[Kernel, Config, Job]]:
    """The kernels that a stage runs under a config, each with its own config and its job.

    Args:
        path: of the program's source.
        at, stage: the stage and its number.
        config: how it is cut up.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        target: name of a GPU.
    """
    found = []
    for kernel in kernels(at, stage, config):
        own = own_config(kernel, stage, config)
        sizes, arguments = own.constexprs(kernel.sizes), kernel.arguments(dtype)
        job = Job(path, kernel.name, arguments, sizes, dtype, own.warps, own.stages, target)
        found.append((kernel, own, job))
    return found


@dataclass(frozen=True)
class Entry:
    """One kernel to be compiled.

    Attributes:
        case: the program, for people.
        key: what :mod:`structc.codegen.triton.spilled` knows it by.
        kind: of the kernel: ``"panel"``, ``"norm"``, ...
        config: how it is cut up.
        chosen: whether that is the default.
        job: for the compiler.
        predicted: seconds of the stage, by the cost model; None where it has no room, or for what
            follows a product.
    """

    case: str
    key: str
    kind: str
    config: Config
    chosen: bool
    job: Job
    predicted: float | None

"""What each Triton kernel takes of a GPU: the cases of ``structc bench triton``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from structc.codegen.triton import aot, load
from structc.codegen.triton.aot import Job
from structc.codegen.triton.config import Config, configs, default
from structc.codegen.triton.emit import emit, kernels, widths
from structc.codegen.triton.predict import predict
from structc.codegen.triton.targets import TARGETS
from structc.codegen.triton.tile import DTYPES, analyse, own_config
from structc.forms import Tile
from structc.records import Refusal

ROWS = 4096
"""Of a call; what configs are chosen for."""
PROGRAMS = {
    "dense, bias, GELU, residual 4096": "block(1,4096,4096,1) bias(4096) act(gelu,4096) "
    "add(4096,0)",
    "low rank 512 of 4096": "block(1,512,4096,1) block(1,4096,512,1)",
    "Monarch 32x32 rank 1, 4096": "block(32,32,128,1) permute(32,32) block(32,128,32,1)",
    "factor with strides, layer norm 4096": "block(8,4,4,128) norm(4096,layer,1e-05)",
    "block sparse 64x64, 1/8 of 4096": "sparse(4096,4096,64,64,512)",
    "selection, RMS norm 4096": "select(4096,4096) norm(4096,rms,1e-06)",
    "shuffle 4096": "permute(64,64)",
}
"""A program for each kind of kernel, at a size that people use."""
BATCH = 32
"""Jobs that one child process compiles: progress is seen."""


@dataclass(frozen=True)
class Entry:
    """One kernel to be compiled.

    Attributes:
        case: the program, for people.
        kind: of the kernel: ``"panel"``, ``"norm"``, ...
        config: how it is cut up.
        chosen: whether that is the default.
        job: for the compiler.
        predicted: seconds of the stage at :data:`ROWS`, by the cost model; None where it has no
            room, or for what follows a product.
    """

    case: str
    kind: str
    config: Config
    chosen: bool
    job: Job
    predicted: float | None


def entries(
    case: str, form: Tile, dtype: torch.dtype, targets: Sequence[str], *, every: bool
) -> list[Entry] | Refusal:
    """The kernels of a program for each target; with all their configs, or the default."""
    program = analyse(form, dtype)
    if isinstance(program, Refusal):
        return program
    path, found = str(load.write(emit(program))), []
    for at, (stage, width) in enumerate(zip(program.stages, widths(program), strict=True)):
        chosen = default(stage, ROWS)
        for kernel in kernels(at, stage, width):
            some = configs(stage, ROWS) if every else [chosen]
            for config in dict.fromkeys(own_config(kernel, stage, c) for c in some):
                first = config == own_config(kernel, stage, chosen)
                kind = kernel.name.rpartition("_")[2]
                for target in targets:
                    job = Job(
                        path, kernel.name, kernel.arguments(DTYPES[dtype]), config.constexprs(),
                        DTYPES[dtype], config.warps, config.stages, target,
                    )  # fmt: skip
                    model = None
                    if kind != "norm":
                        model = predict(stage, width, ROWS, config, job.dtype, TARGETS[target])
                    seconds = None if model is None else model.seconds
                    found.append(Entry(case, kind, config, first, job, seconds))
    return found


def _programs(dtype: torch.dtype, targets: Sequence[str], every: bool) -> list[Entry]:
    found: list[Entry] = []
    for case, text in PROGRAMS.items():
        some = entries(case, Tile.parse(text), dtype, targets, every=every)
        assert not isinstance(some, Refusal), some
        found += some
    return found


SOURCES = (_programs,)
"""What gives the entries of a dtype, one for each kind of operator."""


def table(
    dtypes: Sequence[torch.dtype],
    targets: Sequence[str],
    *,
    every: bool,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Each kernel compiled for each target, as plain data; a failure is a row with its error."""
    wanted = [e for dtype in dtypes for make in SOURCES for e in make(dtype, targets, every)]
    rows = []
    for start in range(0, len(wanted), BATCH):
        progress("triton", start, len(wanted))
        some = wanted[start : start + BATCH]
        for entry, made in zip(some, aot.compiled([e.job for e in some]), strict=True):
            rows.append(
                {
                    "case": entry.case,
                    "kernel": entry.kind,
                    "dtype": entry.job.dtype,
                    "target": entry.job.target,
                    "config": str(entry.config),
                    "default": entry.chosen,
                    **asdict(made),
                    "predicted_us": None if entry.predicted is None else 1e6 * entry.predicted,
                }
            )
    progress("triton", len(wanted), len(wanted))
    return rows

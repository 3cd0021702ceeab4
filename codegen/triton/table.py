"""What each Triton kernel takes of a GPU: the cases of ``structc bench triton``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from structc.codegen.triton import (
    aot,
    attention_table,
    conv_basis,
    load,
    monarch,
    polynomial,
    sparse_polynomial,
)
from structc.codegen.triton.config import configs
from structc.codegen.triton.emit import emit, widths
from structc.codegen.triton.entry import Entry, stage_jobs
from structc.codegen.triton.plan import VARIANTS, plans, room
from structc.codegen.triton.predict import key_of, predict
from structc.codegen.triton.targets import TARGETS
from structc.codegen.triton.tile import DTYPES, analyse
from structc.forms import Convolve, Tile
from structc.records import Refusal


@dataclass(frozen=True)
class Case:
    """A program at a size that people use.

    Attributes:
        name: for people.
        program: as text.
        rows: of a call; what configs are chosen for.
        variant: of :data:`structc.codegen.triton.plan.VARIANTS`.
    """

    name: str
    program: str
    rows: int = 4096
    variant: str = "stages"


_MONARCH = "block(32,32,128,1) permute(32,32) block(32,128,32,1)"
_BUTTERFLY = "block(128,48,8,1) block(16,48,48,8) block(1,16,96,64)"
CASES = (
    Case("dense, bias, GELU, residual 4096", "block(1,4096,4096,1) bias(4096) act(gelu,4096) "
         "add(4096,0)"),
    Case("dense 4096, one row", "block(1,4096,4096,1) bias(4096)", 1),
    Case("dense 16384 to 256, 16 rows", "block(1,256,16384,1) bias(256)", 16),
    Case("low rank 512 of 4096", "block(1,512,4096,1) block(1,4096,512,1)"),
    Case("low rank 128 of 4096", "block(1,128,4096,1) block(1,4096,128,1)", variant="fused"),
    Case("Monarch 32x32 rank 1, 4096", _MONARCH, variant="fused"),
    Case("Monarch 32x32 rank 1, 4096", _MONARCH, variant="turned"),
    Case("BLAST 16x16 rank 64, 4096", "block(16,64,256,1) block(1,16,16,64) block(16,256,64,1)",
         variant="fused"),
    Case("butterfly of 3 factors, 4096", _BUTTERFLY),
    Case("butterfly of 3 factors, 4096", _BUTTERFLY, variant="chained"),
    Case("factor with strides, layer norm 4096", "block(16,2,2,128) norm(4096,layer,1e-05)"),
    Case("block sparse 64x64, 1/8 of 4096", "sparse(4096,4096,64,64,512)"),
    Case("selection, RMS norm 4096", "select(4096,4096) norm(4096,rms,1e-06)"),
    Case("shuffle 4096", "permute(64,64)"),
    Case("GELU 4096", "act(gelu,4096)"),
    Case("circulant 1024", str(Tile((Convolve.circulant(1024),)))),
    Case("circulant 4096", str(Tile((Convolve.circulant(4096),)))),
)  # fmt: skip
"""Programs for each kind of kernel."""
BATCH = 32
"""Jobs that one child process compiles: progress is seen."""


def entries(
    case: Case, dtype: torch.dtype, targets: Sequence[str], *, every: bool
) -> list[Entry] | Refusal:
    """The kernels of a program for each target that has room: all configs, or the default."""
    program = analyse(Tile.parse(case.program), dtype)
    if isinstance(program, Refusal):
        return program
    word, found = DTYPES[dtype], []
    changed = VARIANTS[case.variant](program)
    path = str(load.write(emit(changed)))
    for name in targets:
        target = TARGETS[name]
        if room(program, case.rows, word, target) is not None:
            continue
        known = plans(program, case.rows, word, target)
        plan = next((p for p in known if p.program == changed), None)
        if plan is None:  # not a variant for this GPU
            continue
        for at, stage in enumerate(changed.stages):
            width, chosen = widths(changed)[at], plan.configs[at]
            some = [chosen, *configs(stage, case.rows)] if every else [chosen]
            for config in dict.fromkeys(some):
                model = predict(stage, width, case.rows, config, word, target)
                seconds = None if model is None else model.seconds
                for kernel, own, job in stage_jobs(path, at, stage, config, word, name):
                    alone = seconds if kernel.kind not in ("norm", "join") else None
                    made = Entry(
                        case.name, key_of(stage), kernel.kind, own, config == chosen, job, alone
                    )
                    found.append(made)
    keys = [(e.job.function, e.config, e.job.target) for e in found]
    return [e for at, e in enumerate(found) if keys[at] not in keys[:at]]


def _programs(dtype: torch.dtype, targets: Sequence[str], every: bool) -> list[Entry]:
    found: list[Entry] = []
    for case in CASES:
        some = entries(case, dtype, targets, every=every)
        assert not isinstance(some, Refusal), some
        found += some
    return found


SOURCES = (_programs, attention_table.entries, conv_basis.entries, monarch.entries,
           polynomial.entries, sparse_polynomial.entries)  # fmt: skip
"""What gives the entries of a dtype, one for each kind of operator."""


def wanted(dtypes: Sequence[torch.dtype], targets: Sequence[str], *, every: bool) -> list[Entry]:
    """All kernels; with all their configs, or the default."""
    return [e for dtype in dtypes for make in SOURCES for e in make(dtype, targets, every)]


def table(
    some: Sequence[Entry], *, progress: Callable[[str, int, int], None] = lambda *_: None
) -> list[dict[str, Any]]:
    """Each entry compiled, as plain data; a failure is a row with its error."""
    rows = []
    for start in range(0, len(some), BATCH):
        progress("triton", start, len(some))
        part = some[start : start + BATCH]
        for entry, made in zip(part, aot.compiled([e.job for e in part]), strict=True):
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
    progress("triton", len(some), len(some))
    return rows

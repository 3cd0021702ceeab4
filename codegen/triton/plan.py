"""How a program runs at so many rows: which of its variants, and the config of each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from structc.codegen.program import Program
from structc.codegen.triton.chain import chained
from structc.codegen.triton.config import Config, configs
from structc.codegen.triton.emit import widths
from structc.codegen.triton.pair import fused
from structc.codegen.triton.panel import turned
from structc.codegen.triton.predict import ranked
from structc.codegen.triton.targets import GpuTarget
from structc.records import Refusal

VARIANTS: Mapping[str, Callable[[Program], Program]] = {
    "stages": lambda program: program,
    "turned": turned,
    "fused": fused,
    "chained": chained,
}
"""What may become of a program's stages: shuffles in loads, shuffles in stores, two factors in one
kernel, many factors in one kernel."""


@dataclass(frozen=True)
class Plan:
    """One way to run a program.

    Attributes:
        variant: of :data:`VARIANTS`.
        program: after it.
        configs: one for each stage.
        seconds: that the cost model predicts; infinite where it sees no room for any config.
    """

    variant: str
    program: Program
    configs: tuple[Config, ...]
    seconds: float

    def __str__(self) -> str:
        return f"{self.variant}: {'; '.join(map(str, self.configs))}"


def room(program: Program, rows: int, dtype: str, target: GpuTarget) -> Refusal | None:
    """Why a GPU has no room for a program, or None."""
    for stage, width in zip(program.stages, widths(program), strict=True):
        if not ranked(stage, width, rows, dtype, target):
            reason = f"a {stage.kind} of {stage.out} features has no room on {target.gpu}"
            return Refusal("", "triton", "ROOM", reason)
    return None


def plans(
    program: Program, rows: int, dtype: str, target: GpuTarget, *, many: int = 1
) -> list[Plan]:
    """Ways to run a program, the one that is predicted fastest first.

    Args:
        program: with its shuffles folded.
        rows: of a call.
        dtype: of :data:`structc.codegen.triton.predict.BYTES`.
        target: the GPU.
        many: plans of each variant: the second takes the second best config of every stage.

    >>> from structc.codegen.program import stages_of
    >>> from structc.codegen.triton.targets import target_of
    >>> from structc.forms import Tile
    >>> import torch
    >>> form = Tile.parse("block(32,32,128,1) permute(32,32) block(32,128,32,1)")
    >>> program = stages_of(form, torch.bfloat16, folds=True)
    >>> plans(program, 4096, "bf16", target_of("cuda:90"))[0].variant
    'fused'
    """
    found: dict[tuple[Program, tuple[Config, ...]], Plan] = {}
    for name, variant in VARIANTS.items():
        made = variant(program)
        if not target.orders and any(s.kind == "chain" for s in made.stages):
            continue
        for at in range(many):
            plan = _plan(name, made, rows, dtype, target, at)
            found.setdefault((made, plan.configs), plan)
    able = [plan for plan in found.values() if plan.seconds < float("inf")]
    return sorted(able or found.values(), key=lambda plan: plan.seconds)


def _plan(name: str, program: Program, rows: int, dtype: str, target: GpuTarget, at: int) -> Plan:
    chosen, seconds = [], 0.0
    for stage, width in zip(program.stages, widths(program), strict=True):
        able = ranked(stage, width, rows, dtype, target)
        if not able:  # the smallest may still fit: the model is not exact
            chosen.append(configs(stage, rows)[-1])
            seconds = float("inf")
            continue
        config, prediction = able[min(at, len(able) - 1)]
        chosen.append(config)
        seconds += prediction.seconds
    return Plan(name, program, tuple(chosen), seconds)

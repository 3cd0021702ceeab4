"""Attention in a bundle: the first configs of each shape that a model calls, compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from structc.codegen.triton import aot, load
from structc.codegen.triton.aot import Job
from structc.codegen.triton.attempt import Tuned
from structc.codegen.triton.attention import WIDEST, configs
from structc.codegen.triton.attention_table import arguments
from structc.codegen.triton.calls import AttentionCall
from structc.codegen.triton.config import Config, checked
from structc.codegen.triton.softmax import Shape, emit
from structc.codegen.triton.targets import GpuTarget
from structc.codegen.triton.tile import DTYPES
from structc.softmax import Softmax

MANY = 2
"""Configs of a shape: the first, and the one to hold it against."""


@dataclass(frozen=True)
class BuiltAttention:
    """What became of one call.

    Attributes:
        call: the shape and its sizes.
        refusal: why there is no kernel, or ``""``.
        configs: that were compiled.
    """

    call: AttentionCall
    refusal: str
    configs: tuple[Config, ...] = ()

    def data(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        call = self.call
        shape = {f.name: getattr(call.shape, f.name) for f in fields(Shape)}
        return {
            "shape": shape | {"form": str(call.shape.form)}, "dtype": DTYPES[call.dtype],
            "queries": call.queries, "keys": call.keys,
            "configs": [asdict(c) for c in self.configs],
        }  # fmt: skip


def build(
    calls: Sequence[AttentionCall],
    target: GpuTarget,
    cache: Path,
    progress: Callable[[str, int, int], None],
) -> list[BuiltAttention]:
    """Compile the forward kernels of calls into a cache."""
    some = [configs_of(call, target) for call in calls]
    jobs = [[_job(c, one, target) for one in own] for c, own in zip(calls, some, strict=True)]
    made = compiled_groups("attention", jobs, target, cache, progress)
    found = []
    for call, own, (able, why) in zip(calls, some, made, strict=True):
        found.append(BuiltAttention(call, _unserved(call) or why, tuple(own[at] for at in able)))
    return found


def compiled_groups(
    what: str,
    groups: Sequence[Sequence[Job]],
    target: GpuTarget,
    cache: Path,
    progress: Callable[[str, int, int], None],
) -> list[tuple[list[int], str]]:
    """Of each group of jobs which have a kernel that fits, and why none has."""
    every = [job for group in groups for job in group]
    progress(what, 0, len(every))
    made = iter(aot.compiled(every, cache=cache))
    progress(what, len(every), len(every))
    found = []
    for group in groups:
        rows = [next(made) for _ in group]
        able = [
            at for at, m in enumerate(rows) if m.status == "ok" and m.shared_bytes <= target.shared
        ]
        why = f"nothing compiles: {rows[0].status}" if rows and not able else ""
        found.append((able, why))
    return found


def configs_of(call: AttentionCall, target: GpuTarget) -> list[Config]:
    """The first ones that a call would try; none where it has no kernel."""
    if _unserved(call):
        return []
    return configs("forward", call.shape, target, call.dtype, call.queries, call.keys)[:MANY]


def _unserved(call: AttentionCall) -> str:
    if call.dtype not in DTYPES:
        return f"kernels are {', '.join(DTYPES.values())}"
    wide = max(call.shape.d, call.shape.dv)
    return f"heads of {wide} numbers, more than {WIDEST}" if wide > WIDEST else ""


def _job(call: AttentionCall, config: Config, target: GpuTarget) -> Job:
    word = DTYPES[call.dtype]
    return Job(
        str(load.write(emit(call.shape))), "attention_forward",
        arguments("forward", call.shape, word), {"BM": config.bm, "BN": config.bn}, word,
        config.warps, config.stages, target.name,
    )  # fmt: skip


def parse(data: Mapping[str, Any], *, rerank: bool) -> tuple[AttentionCall, Tuned[Config]]:
    """What :meth:`BuiltAttention.data` wrote.

    Errors: whatever a changed file raises.
    """
    words = {word: dtype for dtype, word in DTYPES.items()}
    kinds = {f.name: f.type for f in fields(Shape)}
    given = {name: data["shape"][name] for name in kinds}
    shape = Shape(**given | {"form": replace(Softmax.parse(given["form"]), offset=0)})
    call = AttentionCall(shape, words[data["dtype"]], int(data["queries"]), int(data["keys"]))
    return call, Tuned(tuple(checked(c) for c in data["configs"]), rerank)

"""Attention in a bundle: of each shape that a model calls its forward kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from structc.codegen.triton import load
from structc.codegen.triton.aot import Job
from structc.codegen.triton.attempt import Tuned
from structc.codegen.triton.attention import WIDEST, configs
from structc.codegen.triton.attention_table import arguments
from structc.codegen.triton.bundle_launch import MANY, BuiltLaunch, Launch, configs_of, dtype_of
from structc.codegen.triton.calls import AttentionCall
from structc.codegen.triton.config import Config
from structc.codegen.triton.softmax import Shape, emit
from structc.codegen.triton.targets import GpuTarget
from structc.codegen.triton.tile import DTYPES
from structc.softmax import Softmax


def launch(call: AttentionCall, target: GpuTarget) -> Launch:
    """What is compiled for a call: the first configs that it would try."""
    if why := _unserved(call):
        return Launch(call, (), (), why)
    some = configs("forward", call.shape, target, call.dtype, call.queries, call.keys)[:MANY]
    return Launch(call, some, [_job(call, config, target) for config in some])


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


def data(built: BuiltLaunch) -> dict[str, Any]:
    """As it stands in the manifest."""
    call = built.call
    shape = {f.name: getattr(call.shape, f.name) for f in fields(Shape)}
    return {
        "shape": shape | {"form": str(call.shape.form)}, "dtype": DTYPES[call.dtype],
        "queries": call.queries, "keys": call.keys, "configs": [asdict(c) for c in built.configs],
    }  # fmt: skip


def parse(entry: Mapping[str, Any], rerank: bool) -> tuple[AttentionCall, Tuned[Config]]:
    """What :func:`data` wrote.

    Errors: whatever a changed file raises.
    """
    given = {f.name: entry["shape"][f.name] for f in fields(Shape)}
    shape = Shape(**given | {"form": replace(Softmax.parse(given["form"]), offset=0)})
    sizes = int(entry["queries"]), int(entry["keys"])
    call = AttentionCall(shape, dtype_of(entry["dtype"]), *sizes)
    return call, Tuned(configs_of(entry["configs"]), rerank)

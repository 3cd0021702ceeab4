"""Kernels of attention methods in a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from structc.codegen.triton.attempt import Tuned
from structc.codegen.triton.bundle_launch import MANY, BuiltLaunch, Launch, configs_of, dtype_of
from structc.codegen.triton.config import Config
from structc.codegen.triton.method_kernel import Key, MethodCall
from structc.codegen.triton.targets import GpuTarget
from structc.codegen.triton.tile import DTYPES


def launch(call: MethodCall, target: GpuTarget) -> Launch:
    """What is compiled for a call."""
    some = call.ordered(target.name)[:MANY]
    return Launch(call, some, [call.job(config, target.name) for config in some])


def data(built: BuiltLaunch) -> dict[str, Any]:
    """As it stands in the manifest."""
    kernel, dtype, sizes = built.call.key
    configs = [asdict(c) for c in built.configs]
    return {"kernel": kernel, "dtype": DTYPES[dtype], "sizes": dict(sizes), "configs": configs}


def parse(entry: Mapping[str, Any], rerank: bool) -> tuple[Key, Tuned[Config]]:
    """What :func:`data` wrote.

    Errors: whatever a changed file raises.
    """
    sizes = tuple((str(name), int(size)) for name, size in entry["sizes"].items())
    key = str(entry["kernel"]), dtype_of(entry["dtype"]), sizes
    return key, Tuned(configs_of(entry["configs"]), rerank)

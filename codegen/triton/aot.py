"""Ahead-of-time compilation with Triton's own compiler: no GPU, no driver, about a second a kernel.

A jitted function is an interpreter's object or a compiler's, by the environment when Triton was
imported: compilation runs in a process of its own (``python -m structc.codegen.triton.aot``), which
reads jobs from its input and writes one line of JSON for each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from structc.codegen.triton.load import FUSED, module_at
from structc.codegen.triton.targets import TARGETS, GpuTarget

_TORCH = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "i64": "int64", "i32": "int32",
    "i8": "int8", "u8": "uint8", "i1": "bool",
}  # fmt: skip
MOST = 8
"""Processes that compile at a time."""
_SCALARS = {"i32": 999_983, "stride": 4096, "one": 1, "fp32": 0.3}
"""Numbers that a call may pass: none that code would be made for, but strides, multiples of 16,
and 1."""


@dataclass(frozen=True)
class Job:
    """One function to be compiled.

    Attributes:
        path, function: where its source is.
        arguments: by name what they are, in order: ``"*bf16"``, ``"*i64"``, ``"i32"``,
            ``"stride"``, ``"one"``; pointers are taken to be aligned to 16 bytes.
        sizes: compile-time arguments; ``DOT`` is the dtype of products, ``dtype`` without it.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        warps, stages: of :class:`structc.codegen.triton.config.Config`.
        target: name of a :class:`structc.codegen.triton.targets.GpuTarget`.
    """

    path: str
    function: str
    arguments: Mapping[str, str]
    sizes: Mapping[str, int | str]
    dtype: str
    warps: int
    stages: int
    target: str


@dataclass(frozen=True)
class Compiled:
    """What a compiled function takes.

    Attributes:
        shared_bytes: of shared memory.
        registers, spilled_bytes: of a thread; 0 where a cache holds no assembly to read.
        matrix_instructions: that multiply matrices.
        wide_loads: of 8 bytes and more a thread.
        status: ``"ok"``, or why it did not compile.
        cached: whether Triton's cache had it.
    """

    shared_bytes: int = 0
    registers: int = 0
    spilled_bytes: int = 0
    matrix_instructions: int = 0
    wide_loads: int = 0
    status: str = "ok"
    cached: bool = False


def compiled(
    jobs: Sequence[Job], *, cache: Path | None = None, timeout: float = 600.0
) -> list[Compiled]:
    """Compile jobs in child processes, one a core; a job that fails says why.

    Args:
        jobs: what to compile.
        cache: folder of Triton's cache; its own without.
        timeout: seconds for all of them.
    """
    many = max(1, min(len(jobs), os.cpu_count() or 1, MOST))
    found = [Compiled()] * len(jobs)
    with ThreadPoolExecutor(many) as pool:  # a thread waits for its process
        shares = pool.map(
            lambda own: _child(own, cache, timeout), (jobs[i::many] for i in range(many))
        )
        for at, share in enumerate(shares):
            found[at::many] = share
    return found


def _child(jobs: Sequence[Job], cache: Path | None, timeout: float) -> list[Compiled]:
    """Compile jobs one after the other in a process of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    env |= {} if cache is None else {"TRITON_CACHE_DIR": str(cache)}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    child = subprocess.run(
        [sys.executable, "-m", "structc.codegen.triton.aot"],
        input=json.dumps([asdict(job) for job in jobs]),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )
    rows = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    lost = child.stderr.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
    rows += [{"status": f"the compiler's process ended: {lost[0]}"}] * (len(jobs) - len(rows))
    return [Compiled(**row) for row in rows]


# ---------------------------------------------------------------------------- in the child


def _main() -> None:
    for row in _run(json.load(sys.stdin)):
        print(json.dumps(row), flush=True)


def _run(jobs: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for given in jobs:
        job = Job(**given)
        try:
            yield asdict(_compile(job))
        except Exception as e:  # whatever the compiler raises is the job's result
            text = " ".join(f"{type(e).__name__}: {e}".split())
            short = text if len(text) <= 400 else f"{text[:120]} ... {text[-280:]}"
            yield asdict(Compiled(status=short))


class _Driver:
    """What a jitted function asks of a driver, for a GPU that is not here.

    It compiles on the way that a call on that GPU takes, so what it leaves in Triton's cache is
    found there.
    """

    def __init__(self, target: GpuTarget) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.target.backend, self.target.arch, self.target.warp)

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target.name)

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(job: Job) -> Compiled:
    import triton
    import triton.language as tl
    from triton.runtime.jit import MockTensor

    target, hits = TARGETS[job.target], []
    triton.runtime.driver.set_active(_Driver(target))
    triton.knobs.compilation.listener = lambda **more: hits.append(more["cache_hit"])
    function = getattr(module_at(Path(job.path)), job.function)
    given = [
        MockTensor(getattr(torch, _TORCH[kind[1:]])) if kind[0] == "*" else _SCALARS[kind]
        for kind in job.arguments.values()
    ]
    word = str(job.sizes.get("DOT", job.dtype))
    sizes = {**job.sizes, "DOT": getattr(tl, _TORCH[word])}
    made = function.warmup(
        *given, grid=(1,), **sizes, num_warps=job.warps, num_stages=job.stages, **FUSED
    )
    return replace(_measured(made, target), cached=all(hits))


def _measured(made: Any, target: GpuTarget) -> Compiled:
    kind = "ptx" if target.backend == "cuda" else "amdgcn"
    if kind not in made.asm:  # found in a cache that a bundle filled: the binary alone
        return Compiled(shared_bytes=made.metadata.shared)
    text = made.asm[kind]
    registers, spilled = (_ptxas if target.backend == "cuda" else _amd)(text, target)
    wide = r"ld\.global\S*\.v[24]|cp\.async" if target.backend == "cuda" else r"_load_dwordx[24]"
    return Compiled(
        shared_bytes=made.metadata.shared,
        registers=registers,
        spilled_bytes=spilled,
        matrix_instructions=sum(text.count(word) for word in target.matrix),
        wide_loads=len(re.findall(wide, text)),
    )


def _ptxas(ptx: str, target: GpuTarget) -> tuple[int, int]:
    """Registers and spilled bytes, from the assembler that ships with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    done = subprocess.run(
        [str(tool), "-v", f"-arch={target.assembler}", "-o", os.devnull, "-"],
        input=ptx,
        capture_output=True,
        text=True,
        check=True,
    )
    used = re.findall(r"Used (\d+) registers", done.stderr)
    stores, loads = (
        re.findall(rf"(\d+) bytes spill {w}", done.stderr) for w in ("stores", "loads")
    )
    return max(map(int, used)), sum(map(int, [*stores, *loads]))


def _amd(text: str, target: GpuTarget) -> tuple[int, int]:
    counts = {
        name: max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text)), default=0)
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    }
    return counts["vgpr_count"], 4 * (counts["vgpr_spill_count"] + counts["sgpr_spill_count"])


if __name__ == "__main__":
    _main()

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from structc.codegen.triton.load import module_at
from structc.codegen.triton.targets import TARGETS, GpuTarget

FUSED = {"enable_fp_fusion": True}
"""Said outright: Triton's default changes with its version."""
_DOT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Job:
    """One function to be compiled.

    Attributes:
        path, function: where its source is.
        arguments: by name what they are, in order: ``"*bf16"``, ``"*i64"``, ``"i32"``, ``"fp32"``;
            pointers are taken to be aligned to 16 bytes.
        sizes: compile-time arguments; ``DOT`` is the dtype of products.
        dtype: ``"bf16"``, ``"fp16"`` or ``"fp32"``.
        warps, stages: of :class:`structc.codegen.triton.config.Config`.
        target: name of a :class:`structc.codegen.triton.targets.GpuTarget`.
    """

    path: str
    function: str
    arguments: Mapping[str, str]
    sizes: Mapping[str, int]
    dtype: str
    warps: int
    stages: int
    target: str


@dataclass(frozen=True)
class Compiled:
    """What a compiled function takes.

    Attributes:
        shared_bytes: of shared memory.
        registers, spilled_bytes: of a thread.
        matrix_instructions: that multiply matrices.
        wide_loads: of 8 bytes and more a thread.
        status: ``"ok"``, or why it did not compile.
    """

    shared_bytes: int = 0
    registers: int = 0
    spilled_bytes: int = 0
    matrix_instructions: int = 0
    wide_loads: int = 0
    status: str = "ok"


def compiled(jobs: Sequence[Job], *, timeout: float = 600.0) -> list[Compiled]:
    """Compile jobs in a child process; a job that fails says why."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
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


def _compile(job: Job) -> Compiled:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(module_at(Path(job.path)), job.function)
    target = TARGETS[job.target]
    signature = {**job.arguments, **dict.fromkeys((*job.sizes, "DOT"), "constexpr")}
    values = {**job.sizes, "DOT": getattr(tl, _DOT[job.dtype])}
    kinds = enumerate(job.arguments.values())
    aligned: dict[Any, Any] = {(at,): [["tt.divisibility", 16]] for at, k in kinds if k[0] == "*"}
    made = triton.compile(
        ASTSource(function, signature, values, aligned),
        target=GPUTarget(target.backend, target.arch, target.warp),
        options={"num_warps": job.warps, "num_stages": job.stages, **FUSED},
    )
    return _measured(made, target)


def _measured(made: Any, target: GpuTarget) -> Compiled:
    text = made.asm["ptx"] if target.backend == "cuda" else made.asm["amdgcn"]
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

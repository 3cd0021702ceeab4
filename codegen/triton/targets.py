"""GPUs that kernels are compiled for: what a program may use of them, and their published peaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from structc.errors import ConfigError

TERA = 1e12
SIXFOLD = 6
"""Products of bfloat16 that make one of float32 (Triton's ``bf16x6``)."""


@dataclass(frozen=True)
class GpuTarget:
    """One kind of GPU.

    Attributes:
        name: as users write it, ``"cuda:90"``.
        gpu: the product whose figures these are.
        backend, arch, warp: as Triton has them.
        assembler: architecture for ``ptxas``; ``""`` where the compiler assembles itself.
        shared: bytes of shared memory that a program may have.
        registers: for a thread, at most.
        matrix: instructions that multiply matrices, as the assembly spells them.
        units: multiprocessors.
        file, warps: registers of 4 bytes and warps that one of them holds.
        early: buffers of a pipelined loop are so many fewer than its stages.
        orders: whether a barrier orders a program's stores to memory before its loads. For gfx942
            Triton 3.9 emits a bare ``s_barrier``, which does not wait for stores (seen in its
            assembly).
        points: of a transform that a program holds without a spill, seen in compiled code.
        flops: dense peaks a second by dtype, products of matrices where the units have them.
        bandwidth: bytes a second of memory.
        source: of the figures.
    """

    name: str
    gpu: str
    backend: str
    arch: int | str
    warp: int
    assembler: str
    shared: int
    registers: int
    matrix: tuple[str, ...]
    units: int
    file: int
    warps: int
    early: int
    orders: bool
    points: int
    flops: Mapping[str, float]
    bandwidth: float
    source: str

    def products(self, dtype: str) -> float:
        """The peak of our products: those of float32 are six of bfloat16."""
        return self.flops["bf16"] / SIXFOLD if dtype == "fp32" else self.flops[dtype]


def _peaks(half: float, tf32: float, fp32: float) -> dict[str, float]:
    """In tera operations a second."""
    return {"bf16": half * TERA, "fp16": half * TERA, "tf32": tf32 * TERA, "fp32": fp32 * TERA}


TARGETS = {
    target.name: target
    for target in (
        GpuTarget(
            "cuda:80", "A100 SXM 80 GB", "cuda", 80, 32, "sm_80", 163 * 1024, 255, ("mma.sync",),
            108, 1 << 16, 64, 1, True, 1024, _peaks(312, 156, 19.5), 2.039e12,
            "NVIDIA A100 datasheet, 2021",
        ),
        GpuTarget(
            "cuda:90", "H100 SXM", "cuda", 90, 32, "sm_90a", 227 * 1024, 255,
            ("wgmma.mma_async", "mma.sync"), 132, 1 << 16, 64, 0, True, 4096,
            _peaks(989.4, 494.7, 66.9), 3.35e12, "NVIDIA H100 datasheet, 2023, without sparsity",
        ),
        GpuTarget(
            "cuda:100", "B200", "cuda", 100, 32, "sm_100a", 227 * 1024, 255,
            ("tcgen05.mma", "mma.sync"), 148, 1 << 16, 64, 0, True, 4096,
            _peaks(2250, 1125, 75), 8e12,
            "NVIDIA Blackwell architecture brief, 2024, without sparsity",
        ),
        GpuTarget(
            "hip:gfx942", "MI300X", "hip", "gfx942", 64, "", 64 * 1024, 512, ("v_mfma",), 304,
            1 << 17, 32, 1, False, 4096, _peaks(1307.4, 653.7, 163.4), 5.3e12,
            "AMD Instinct MI300X data sheet, 2023",
        ),
    )
}  # fmt: skip
"""All targets by name."""


def target_of(name: str) -> GpuTarget:
    """The target of that name.

    Errors: :class:`ConfigError` for any other.

    >>> target_of("cuda:90").gpu
    'H100 SXM'
    """
    if name not in TARGETS:
        raise ConfigError(
            f"target: {name!r} is not one that kernels are compiled for",
            hint=f"One of {', '.join(TARGETS)}.",
        )
    return TARGETS[name]

"""Which GPU kernels are for, and whether it can run them."""

from __future__ import annotations

import functools

import torch

from structc.codegen.triton.targets import TARGETS, GpuTarget
from structc.records import Refusal

LEAST = (8, 0)
"""The oldest compute capability whose matrix units take bfloat16 and TF32."""
ASSUMED = "cuda:90"
"""The target of predictions where there is no GPU."""


@functools.cache
def running() -> GpuTarget | Refusal:
    """The target of this process's GPU; the assumed one where there is none (Triton's interpreter).

    A GPU newer than all targets counts as the newest of its kind: its code is compiled for itself,
    predictions are the older one's.
    """
    if not torch.cuda.is_available():
        return TARGETS[ASSUMED]
    if torch.version.hip:
        return TARGETS["hip:gfx942"]
    return of_capability(torch.cuda.get_device_capability())


def name_here() -> str:
    """The name of that target, for a process that has one."""
    target = running()
    return ASSUMED if isinstance(target, Refusal) else target.name


def of_capability(found: tuple[int, int]) -> GpuTarget | Refusal:
    """The target of an NVIDIA GPU by its compute capability.

    >>> of_capability((8, 6)).name, of_capability((12, 0)).name
    ('cuda:80', 'cuda:100')
    >>> of_capability((7, 5)).reason
    'kernels need sm_80 or newer, this GPU is sm_75'
    """
    if found < LEAST:
        told = "sm_{}{} or newer, this GPU is sm_{}{}".format(*LEAST, *found)
        return Refusal("", "triton", "DEVICE", f"kernels need {told}")
    known = sorted((int(t.arch), t) for t in TARGETS.values() if t.backend == "cuda")
    return [target for arch, target in known if arch <= 10 * found[0] + found[1]][-1]

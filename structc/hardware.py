"""What this machine is: the part of every tuning key that names the hardware."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from structc import settings


@dataclass(frozen=True)
class Target:
    """A machine as far as a CPU kernel can tell.

    Attributes:
        cpu: model name, with family and model number where virtual machines hide the name.
        isa: instruction sets that matter here and may be used, best first.
        cores: logical processors this process may use.
        threads: PyTorch's intra-op threads now.
        torch: version of PyTorch.
    """

    cpu: str
    isa: tuple[str, ...]
    cores: int
    threads: int
    torch: str

    def to_dict(self) -> dict[str, object]:
        """Plain data, for keys and reports."""
        return {**asdict(self), "isa": list(self.isa)}


def target() -> Target:
    """The machine that this process runs on."""
    facts = _cpuinfo()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    name = facts.get("model name") or platform.processor() or platform.machine()
    best = settings.current().isa
    known = settings.INSTRUCTION_SETS
    allowed = known[known.index(best) :] if best else known
    numbers = "/".join(facts[k] for k in ("cpu family", "model", "stepping") if k in facts)
    return Target(
        cpu=f"{name} ({numbers})" if numbers else name,
        isa=tuple(i for i in allowed if i in flags),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}

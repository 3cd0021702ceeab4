"""What this machine can do: peaks assumed from its instruction set, or measured and remembered."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from structc import hardware, ops, timing
from structc.codegen import dense
from structc.codegen.tuning_db import TuningDb
from structc.forms import PackedDense
from structc.records import Refusal

FLOPS_PER_CYCLE = {"avx512f": 64, "avx2": 32, "asimd": 16}
"""Of one core in float32: two fused multiply-adds over a vector register (one on asimd)."""
BF16_GAIN = {"amx_bf16": 8.0, "avx512_bf16": 2.0}
"""bfloat16 over float32, by the best instruction set that there is."""
CLOCK_GHZ = 2.0
CORE_GB_PER_S = 12.0
SIZES = (256, 512, 768, 1024)
"""Square products that fit into the second-level caches, or nearly."""
STREAM_MB = 256
ROUNDS = 7
FACT = "peaks"


@dataclass(frozen=True)
class Peaks:
    """What a machine can do over all threads.

    Attributes:
        gflops: of products in float32.
        gb_per_s: read and written, from memory.
        gflops_bf16: of products in bfloat16.
        source: ``"measured"`` here, or ``"assumed"`` from the instruction set.
    """

    gflops: float
    gb_per_s: float
    gflops_bf16: float
    source: str = "assumed"

    def of(self, dtype: torch.dtype) -> float:
        """GFLOP/s of products in a dtype."""
        if dtype == torch.bfloat16:
            return self.gflops_bf16
        return self.gflops / 2 if dtype == torch.float64 else self.gflops


def assumed(target: hardware.Target | None = None) -> Peaks:
    """Peaks by instruction set and threads: no measurement, the same on every run."""
    target = target or hardware.target()
    lanes = next((FLOPS_PER_CYCLE[i] for i in target.isa if i in FLOPS_PER_CYCLE), 8)
    gain = next((BF16_GAIN[i] for i in target.isa if i in BF16_GAIN), 1.0)
    threads = max(1, min(target.threads, target.cores))
    gflops = lanes * CLOCK_GHZ * threads
    return Peaks(gflops, CORE_GB_PER_S * threads, gain * gflops)


def known() -> Peaks:
    """What was measured on this machine with this many threads, else what is assumed."""
    target = hardware.target()
    values = TuningDb().fact(FACT, target.to_dict())
    guess = assumed(target)
    if values is None:
        return guess
    numbers = [values.get(name) for name in ("gflops", "gb_per_s", "gflops_bf16")]
    good = [float(v) for v in numbers if isinstance(v, (int, float)) and v > 0]
    if len(good) != len(numbers):
        return guess
    return Peaks(good[0], good[1], good[2], "measured")


def measure() -> Peaks:
    """Measure and remember: the fastest dense product of any kernel and size, and a stream."""
    found = Peaks(
        max(_gflops(torch.float32, name, n) for name in dense.LIBRARIES for n in SIZES),
        _gb_per_s(),
        max(_gflops(torch.bfloat16, name, n) for name in dense.LIBRARIES for n in SIZES),
        "measured",
    )
    TuningDb().put_fact(FACT, hardware.target().to_dict(), asdict(found))
    return found


def _gflops(dtype: torch.dtype, kernel: str, n: int) -> float:
    """Of one square product; 0 where the kernel does not serve it."""
    form = PackedDense(n, n)
    run = dense.make(form, dtype, n, kernel, {})
    if isinstance(run, Refusal):
        return 0.0
    x, w = _noise(n, dtype)
    return 2e-6 * n**3 / _best_ms(run, x, w)


def _best_ms(run: ops.Kernel, x: torch.Tensor, w: torch.Tensor) -> float:
    with torch.inference_mode():
        timed = timing.interleaved({"product": lambda: run(x, [w])}, rounds=ROUNDS)
    return timed["product"].latency_ms


def _noise(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, n, n, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    return both[0], both[1]


def _gb_per_s() -> float:
    """A sum of two streams into a third: two reads and a write."""
    elements = STREAM_MB * 2**20 // 4
    a, b, c = (torch.full((elements,), 1.0, dtype=torch.float32, device="cpu") for _ in range(3))
    timed = timing.interleaved({"add": lambda: torch.add(a, b, out=c)}, rounds=ROUNDS)
    return 3 * 4e-6 * elements / timed["add"].latency_ms

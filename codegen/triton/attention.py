"""``structc::attention`` and its gradient on Triton kernels."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from structc import attend
from structc.codegen.triton import load
from structc.codegen.triton.attempt import Attempts, Tuned
from structc.codegen.triton.calls import AttentionCall
from structc.codegen.triton.config import DOT, Config, power_above
from structc.codegen.triton.device import running
from structc.codegen.triton.softmax import LENGTHS, Shape, emit
from structc.codegen.triton.spilled import usable
from structc.codegen.triton.targets import TARGETS, GpuTarget
from structc.codegen.triton.tile import DTYPES, dot_dtype
from structc.records import Refusal
from structc.softmax import Extras, Softmax

WIDEST = 256
"""Numbers of a head: more leave no room for a tile."""
FORWARD = (
    Config(128, 128, 1, 8, 3), Config(128, 64, 1, 8, 3), Config(128, 64, 1, 4, 3),
    Config(128, 64, 1, 8, 2), Config(64, 64, 1, 4, 3), Config(64, 64, 1, 4, 2),
    Config(64, 32, 1, 4, 2), Config(32, 64, 1, 4, 2), Config(32, 32, 1, 4, 2),
    Config(32, 32, 1, 4, 1), Config(16, 64, 1, 4, 2), Config(16, 32, 1, 4, 1),
    Config(16, 32, 1, 2, 1), Config(16, 16, 1, 4, 1), Config(16, 32, 1, 8, 1),
    Config(16, 16, 1, 8, 1),
)  # fmt: skip
"""Queries and keys of a tile, warps, stages; the largest first."""
BACKWARD = (
    Config(64, 128, 1, 8, 2), Config(128, 64, 1, 8, 2), Config(64, 64, 1, 8, 2),
    Config(64, 64, 1, 4, 2), Config(32, 64, 1, 4, 2), Config(64, 32, 1, 4, 2),
    Config(64, 32, 1, 8, 2), Config(32, 32, 1, 4, 2), Config(32, 32, 1, 8, 1),
    Config(32, 32, 1, 4, 1), Config(32, 16, 1, 4, 1), Config(16, 32, 1, 4, 1),
    Config(16, 32, 1, 8, 1), Config(16, 16, 1, 4, 2), Config(16, 16, 1, 8, 2),
    Config(16, 16, 1, 4, 1), Config(16, 16, 1, 8, 1),
)  # fmt: skip
KERNELS: Mapping[str, tuple[Config, ...]] = {
    "forward": FORWARD,
    "queries": BACKWARD,
    "keys": BACKWARD,
}
"""The kernels of a source, and what each may be compiled with."""
_log = logging.getLogger("structc")


def configs(
    kernel: str, shape: Shape, target: GpuTarget, dtype: torch.dtype, queries: int, keys: int
) -> list[Config]:
    """What may be tried, the largest tiles first that have room and are not mostly empty; those
    that are known to spill stand last.

    >>> from structc.codegen.triton.targets import target_of
    >>> shape = Shape(Softmax(0.125, causal=True), 64, 64)
    >>> str(configs("forward", shape, target_of("cuda:90"), torch.bfloat16, 4096, 4096)[0])
    '128x128x1, 8 warps, 3 stages'
    """
    most = (max(DOT, power_above(queries)), max(DOT, power_above(keys)))
    able = [
        c
        for c in KERNELS[kernel]
        if c.bm <= most[0] and c.bn <= most[1] and _fits(kernel, shape, c, target, dtype.itemsize)
    ]
    name, width = key_of(kernel, shape).rsplit(" ", 1)
    found = usable(name, int(width), able, DTYPES[dtype], target.name)
    return found or [KERNELS[kernel][-1]]


def key_of(kernel: str, shape: Shape) -> str:
    """What :mod:`structc.codegen.triton.spilled` knows a kernel by: masks take registers."""
    more = (shape.form.window, shape.bias, shape.lags, shape.shown, shape.blocks)
    return f"attention_{kernel}{'_masked' if any(more) else ''} {max(shape.wide)}"


def _fits(kernel: str, shape: Shape, config: Config, target: GpuTarget, size: int) -> bool:
    """Whether tiles have room in shared memory and sums in registers, about."""
    d, e = shape.wide
    m, n = config.bm, config.bn
    buffers = max(1, config.stages - target.early)
    threads = config.warps * target.warp
    if kernel == "forward":
        shared, numbers = (m * d + buffers * n * (d + e)), m * e + 1.5 * m * n + m * d * size / 8
    elif kernel == "queries":
        shared, numbers = (m + buffers * n) * (d + e) + m * n, m * d + 2.5 * m * n
    else:
        shared, numbers = (n + buffers * m) * (d + e) + 2 * m * n, n * (d + e) + 2.5 * m * n
    room = 0.8 * target.registers if kernel == "forward" else 0.7 * target.registers
    return shared * size <= target.shared and numbers / threads + 32 <= room


TUNED: dict[AttentionCall, Tuned[Config]] = {}
"""What bundles brought, for the forward kernel."""


@dataclass(frozen=True, eq=False)
class Source:
    """The three functions of one shape, and what is left to try of each.

    Attributes:
        shape: of the form.
        module: the source, imported.
        dot: dtype of products.
        dtype: of q, k and v.
        target: the GPU.
        left: configs by kernel and lengths in powers of two.
    """

    shape: Shape
    module: Any
    dot: Any
    dtype: torch.dtype
    target: GpuTarget
    left: dict[tuple[str, int, int], Attempts[Config]] = field(default_factory=dict)

    def run(
        self,
        kernel: str,
        tensors: Sequence[Tensor],
        strides: Sequence[int],
        lengths: Sequence[int],
        batches: int,
    ) -> bool:
        """Launch a kernel; False if it runs with none of its configs."""
        heads, share, queries, keys, _ = lengths
        attempts = self._attempts(kernel, queries, keys)
        function = getattr(self.module, f"attention_{kernel}")

        def call(config: Config) -> bool:
            tiles = -(-keys // config.bn) if kernel == "keys" else -(-queries // config.bm)
            grid = (tiles * batches * (heads // share if kernel == "keys" else heads),)
            sizes = {"BM": config.bm, "BN": config.bn, "DOT": self.dot}
            function[grid](
                *tensors, *strides, *lengths, **sizes, num_warps=config.warps,
                num_stages=config.stages, **load.FUSED,
            )  # fmt: skip
            return True

        with torch.cuda.device_of(tensors[0]):
            tuned = self._tuned(queries, keys) if kernel == "forward" else None
            if tuned is not None:
                tuned.settle(attempts, call)
            return attempts.run(call) is not None

    def _tuned(self, queries: int, keys: int) -> Tuned[Config] | None:
        sizes = power_above(queries), power_above(keys)
        return TUNED.get(AttentionCall(self.shape, self.dtype, *sizes))

    def _attempts(self, kernel: str, queries: int, keys: int) -> Attempts[Config]:
        key = (kernel, power_above(queries), power_above(keys))
        if key not in self.left:
            some = configs(kernel, self.shape, self.target, self.dtype, queries, keys)
            tuned = self._tuned(queries, keys) if kernel == "forward" else None
            some = some if tuned is None else list(dict.fromkeys((*tuned.ways, *some)))
            self.left[key] = Attempts(f"attention_{kernel} of {self.shape.form}", some)
        return self.left[key]


@dataclass(frozen=True, eq=False)
class AttentionKernel:
    """``(q, k, v, form, extras) -> (o, lse)``; None for inputs that it does not serve."""

    dtype: torch.dtype
    target: GpuTarget

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, form: Softmax, extras: Extras
    ) -> tuple[Tensor, Tensor] | None:
        source = self._source(q, v, form, extras)
        if source is None:
            return None
        q, k, v = (_side(t) for t in (q, k, v))
        o, lse = attend.empty_outputs(q, v)
        given, strides = _extras(extras)
        sink = [] if extras.sink is None else [extras.sink.contiguous()]
        done = source.run(
            "forward",
            [q, k, v, *given, *sink, o, lse],
            [*_strides(q, k, v, o), *strides],
            _lengths(q, k, form),
            q.shape[0],
        )
        return (o, lse) if done else None

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        form: Softmax,
        extras: Extras,
        o: Tensor,
        lse: Tensor,
        grad_o: Tensor,
        grad_lse: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Gradients of q, k and v, or None where they are not served."""
        source = self._source(q, v, form, extras)
        if source is None or not (q.numel() and k.numel() and v.numel()):
            return None
        q, k, v, grad = (_side(t) for t in (q, k, v, grad_o.to(q.dtype)))
        dots = (grad.float() * o.float()).sum(-1) - grad_lse.float()
        given, strides = _extras(extras)
        rest = [grad, lse.float().contiguous(), dots.contiguous()]
        made = [t.new_empty(t.shape) for t in (q, k, v)]
        steps, lengths = [*_strides(q, k, v, grad), *strides], _lengths(q, k, form)
        for kernel, out in (("queries", made[:1]), ("keys", made[1:])):
            if not source.run(kernel, [q, k, v, *given, *rest, *out], steps, lengths, q.shape[0]):
                return None
        return made[0], made[1], made[2]

    def _source(self, q: Tensor, v: Tensor, form: Softmax, extras: Extras) -> Source | None:
        if max(q.shape[-1], v.shape[-1]) > WIDEST:
            return None
        shape = Shape.of(form, q.shape[-1], v.shape[-1], extras, self.dtype)
        return source_of(shape, self.dtype, self.target.name)


def kernel_of(dtype: torch.dtype) -> AttentionKernel | None:
    """The kernel of a dtype on this process's GPU; None where there is none."""
    made = make(dtype)
    if isinstance(made, Refusal):
        _log.info("attention in %s runs on the reference: %s", dtype, made.reason)
        return None
    return made


def make(dtype: torch.dtype) -> AttentionKernel | Refusal:
    """The kernel of a dtype, or why there is none; nothing is compiled before a call.

    >>> make(torch.float64).reason
    'kernels are fp32, fp16, bf16'
    """
    if dtype not in DTYPES:
        return Refusal("", "attention", "DTYPE", f"kernels are {', '.join(DTYPES.values())}")
    if load.version() is None:
        return Refusal("", "attention", "NO_TRITON", "triton is not installed")
    target = running()
    if isinstance(target, Refusal):
        return target
    load.warn_untested()
    return AttentionKernel(dtype, target)


@functools.lru_cache(maxsize=256)
def source_of(shape: Shape, dtype: torch.dtype, target: str) -> Source:
    """The functions of a shape, imported once."""
    module = load.module_of(emit(shape))
    assert not isinstance(module, Refusal)
    return Source(shape, module, dot_dtype(dtype), dtype, TARGETS[target])


def _side(t: Tensor) -> Tensor:
    """Numbers of a head side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [t.stride(at) for t in tensors for at in range(3)]


def _lengths(q: Tensor, k: Tensor, form: Softmax) -> tuple[int, ...]:
    """In the order of :data:`structc.codegen.triton.softmax.LENGTHS`."""
    found = (q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], form.offset)
    assert len(found) == len(LENGTHS)
    return found


def _extras(extras: Extras) -> tuple[list[Tensor], list[int]]:
    """Tensors in the order of pointers, and their strides; 0 for a dimension that repeats."""
    bias, lags, keys, blocks, _ = extras
    given: list[Tensor] = []
    steps: list[int] = []
    for t, places in ((bias, (0, 1, 2, 3)), (lags, (0,)), (keys, (0,)), (blocks, (0, 1, 2, 3))):
        if t is None:
            continue
        own = t if len(places) == 4 else t.contiguous()
        given.append(own.view(torch.uint8) if own.dtype == torch.bool else own)
        steps += [0 if own.shape[at] == 1 else own.stride(at) for at in places]
    return given, steps

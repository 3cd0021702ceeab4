"""A tile program bound to its emitted Triton kernels: the launches of one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structc import ops
from structc.codegen.program import Program, Stage, full, product, stages_of
from structc.codegen.triton.config import Config
from structc.codegen.triton.emit import emit, kernels, own_config
from structc.codegen.triton.fft import factors_of, step_of, tables
from structc.codegen.triton.load import FUSED, module_of
from structc.codegen.triton.pieces import Kernel
from structc.codegen.triton.plan import Plan
from structc.forms import Tile
from structc.records import Refusal

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
WIDEST_NORM = 1 << 14
"""Features of a normalisation: a row is one tile."""


def analyse(form: Tile, dtype: torch.dtype) -> Program | Refusal:
    """The stages that Triton kernels run, or why there are none for the program.

    >>> len(analyse(Tile.parse("block(4,8,64,1) permute(4,8) block(8,64,4,1)"),
    ...             torch.float16).stages)
    2
    """
    if dtype not in DTYPES:
        return Refusal("", "triton", "DTYPE", f"kernels are {', '.join(DTYPES.values())}")
    program = stages_of(form, dtype, folds=True, convolves=True)
    return program if isinstance(program, Refusal) else _too_wide(program) or program


def _too_wide(program: Program) -> Refusal | None:
    """Why rows of a program have no room on chip, or None."""
    for stage in program.stages:
        if stage.convolution is not None and factors_of(stage.convolution) is None:
            reason = f"{stage.convolution}: a row has no room on chip, the FFT is a library's"
            return Refusal("", "triton", "SPECTRAL", reason)
        if stage.norm is not None and stage.out > WIDEST_NORM:
            reason = f"a norm over {stage.out} features, more than {WIDEST_NORM}"
            return Refusal("", "triton", "NORM", reason)
    return None


@dataclass(frozen=True)
class Launch:
    """One kernel of a call with its function and sizes."""

    kernel: Kernel
    function: Any
    config: Config


@dataclass(frozen=True, eq=False)
class TritonTile:
    """``(x (rows, in_features), weights, others) -> (rows, out_features)``, contiguous rows."""

    form: Tile
    plan: Plan
    launches: tuple[tuple[Launch, ...], ...]
    """Of each stage."""
    dot: Any

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], others: Sequence[Tensor] = ()
    ) -> Tensor:
        slots = {at: t.contiguous() for at, t in enumerate([x, *others])}
        rows, current = x.shape[0], slots[0]
        for stage, launches in zip(self.plan.program.stages, self.launches, strict=True):
            current = slots[stage.reads] if stage.reads is not None else current
            out = current.new_empty(rows, stage.out)
            tensors = {**_weights(stage, weights), "x": current, "y": out}
            for name, slot in (("mul", stage.mul), ("add", stage.add)):
                if slot is not None:
                    tensors[name] = slots[slot]
            for launch in launches if rows else ():
                self._run(launch, tensors, rows)
            current = out
            if stage.keeps is not None:
                slots[stage.keeps] = current
        return current

    def _run(self, launch: Launch, tensors: dict[str, Tensor], rows: int) -> None:
        kernel, own = launch.kernel, launch.config
        if kernel.shares:
            out = tensors["y"]
            tensors["part"] = out.new_empty(own.split, *out.shape, dtype=torch.float32)
        if kernel.holds:
            many = kernel.grid(rows, own)
            tensors["held"] = tensors["y"].new_empty(many, 2, own.bm, kernel.holds)
        given = [tensors[name] for name in kernel.pointers]
        sizes = {**own.constexprs(kernel.sizes), "DOT": self.dot}
        grid, warps, stages = (kernel.grid(rows, own),), own.warps, own.stages
        launch.function[grid](*given, rows, **sizes, num_warps=warps, num_stages=stages, **FUSED)


def rounds(dtype: torch.dtype) -> bool:
    """Whether float32 factors may be rounded to 10 bits: as ``torch.set_float32_matmul_precision``
    says of PyTorch's own products, ``"highest"`` (its default) or less.

    >>> rounds(torch.float32), rounds(torch.bfloat16)
    (False, False)
    """
    return dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


def dot_dtype(dtype: torch.dtype) -> Any:
    """What factors are multiplied in: their own, but for bfloat16 under Triton's interpreter, which
    multiplies its bits."""
    import triton
    import triton.language as tl

    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16}.get(dtype, tl.bfloat16)


def make(form: Tile, dtype: torch.dtype, plan: Plan, *, tf32: bool = False) -> TritonTile | Refusal:
    """The kernels of a plan; nothing is compiled before the first call.

    Args:
        form: the program.
        dtype: of inputs, factors and outputs; sums are float32.
        plan: of :func:`structc.codegen.triton.plan.plans` for the stages of :func:`analyse`.
        tf32: whether float32 products may round their factors to 10 bits.
    """
    module = module_of(emit(plan.program, tf32=tf32))
    if isinstance(module, Refusal):
        return module
    launches = tuple(
        tuple(
            Launch(kernel, getattr(module, kernel.name), own_config(kernel, stage, config))
            for kernel in kernels(at, stage, config)
        )
        for at, (stage, config) in enumerate(zip(plan.program.stages, plan.configs, strict=True))
    )
    return TritonTile(form, plan, launches, dot_dtype(dtype))


def _weights(stage: Stage, weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The tensors of a stage by the names of its pointers."""
    own = [weights[i] for i in stage.weights]
    found: dict[str, Tensor] = {}
    for at, inner in enumerate(stage.inner):
        found[f"w{at}"] = _factors(inner, weights)
        if inner.bias is not None:
            found[f"bias{at}"] = weights[inner.bias].contiguous()
    if stage.kind == "sparse":
        found |= dict(zip(("w", "first", "place"), (t.contiguous() for t in own), strict=True))
    elif stage.kind == "convolve":
        step = step_of(stage)
        found |= ops.derived(own, f"triton{step}", lambda w: tables(step, w[0]))
    elif stage.kind == "listed":
        found["place"] = own[0].contiguous()
    elif own:
        found["w"] = _factors(stage, weights)
    if stage.bias is not None:
        found["bias"] = weights[stage.bias].contiguous()
    if stage.norm is not None:
        norm, at = stage.norm
        names = ("gain", "shift")[: norm.weights]
        found |= {n: weights[at + i].contiguous() for i, n in enumerate(names)}
    return found


def _factors(stage: Stage, weights: Sequence[Tensor]) -> Tensor:
    """(a, b, c, d) in memory: one factor, or several that were merged."""
    own = [weights[i] for i in stage.weights]
    return ops.derived(own, f"triton{stage.parts}", lambda w: _factor(stage, w))


def _factor(stage: Stage, weights: Sequence[Tensor]) -> Tensor:
    """Consecutive factors that were merged, as one; (a, b, c, d) in memory."""
    if len(weights) == 1:
        return full(stage.parts[0], weights[0]).contiguous()
    wide = product(stage.parts, [w.float() for w in weights])
    return wide.to(weights[0].dtype).contiguous()

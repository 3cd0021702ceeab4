"""One Triton function of an attention method: how it is launched, noted and compiled.

A call's arguments are its tensors, the strides of batch, head and token of some of them, then
numbers. Whatever launches such a function does so by :meth:`MethodKernel.run`; under
:func:`noted` nothing is launched, and what would have been is kept: the rows of ``structc bench
triton`` and what a bundle holds are found that way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from structc.codegen.triton import load
from structc.codegen.triton.aot import Job
from structc.codegen.triton.attempt import Attempts, Tuned
from structc.codegen.triton.config import DOT, Config, power_above
from structc.codegen.triton.device import name_here
from structc.codegen.triton.entry import Entry
from structc.codegen.triton.pieces import HEAD
from structc.codegen.triton.spilled import usable
from structc.codegen.triton.tile import DTYPES, dot_dtype, rounds
from structc.records import Refusal

START = (
    HEAD
    + '''

@triton.jit
def times(a, b, DOT: tl.constexpr, TF32: tl.constexpr):
    """a product of matrices"""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision="tf32" if TF32 else SINGLE)


@triton.jit
def tile(x, rows, columns, step, length, width):
    """a tile of a tensor, rows and columns shaped as they lie in it; 0 outside"""
    at = rows.to(tl.int64) * step + columns
    return tl.load(x + at, mask=(rows < length) & (columns < width), other=0.0)
'''
)
"""Of every source of a method."""
Sizes = tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class MethodKernel:
    """A function of a source.

    Attributes:
        name: of the function.
        source: where it is.
        configs: what may be tried, the best guess first.
        tiles: compile-time sizes that a config says.
        pointers: tensors in order, and what they hold: ``""`` for the dtype of a call, ``"sum"``
            for bfloat16 in such a call and float32 in others, or a type as Triton spells it.
        strides: names of tensors whose strides of batch, head and token follow.
        numbers: names of what follows then; those in ``widths`` are told from multiples of 16.
        single: whether float16 factors are multiplied as float32 ones, with 10 bits: sums over all
            keys have no room in float16.
    """

    name: str
    source: str
    configs: tuple[Config, ...]
    tiles: tuple[str, ...]
    pointers: Mapping[str, str]
    strides: tuple[str, ...]
    numbers: tuple[str, ...]
    single: bool = False

    def run(
        self,
        tensors: Sequence[Tensor],
        strided: Sequence[Tensor],
        numbers: Sequence[int | float],
        programs: Callable[[Config], int],
        like: Tensor,
        **sizes: int,
    ) -> bool:
        """Launch it with the first config that it runs with; False if there is none.

        Args:
            tensors, strided, numbers: as the function takes them.
            programs: how many a config makes.
            like: whose dtype and device are the call's.
            sizes: compile-time sizes that no config says; those of a token on chip begin with W.
        """
        steps = [t.stride(at) for t in strided for at in range(3)]
        assert len(tensors) == len(self.pointers) and len(steps) == 3 * len(self.strides)
        some = tuple(sorted(sizes.items()))
        if (notes := _notes.get()) is not None:
            words = (*map(_word, steps), *map(_number, self.numbers, numbers))
            notes.append(MethodCall(self, like.dtype, some, words))
            return True
        function = _function(self.source, self.name)
        if function is None:
            return False
        fixed = {**sizes, "TF32": self.ten_bits(like.dtype), "DOT": self._dot(like.dtype)}

        def call(config: Config) -> bool:
            function[(programs(config),)](
                *tensors, *steps, *numbers, **config.constexprs(self.tiles), **fixed,
                num_warps=config.warps, num_stages=config.stages, **load.FUSED,
            )  # fmt: skip
            return True

        with torch.cuda.device_of(like):
            left, tuned = self._left(like, some)
            if tuned is not None:
                tuned.settle(left, call)
            return left.run(call) is not None

    def ten_bits(self, dtype: torch.dtype) -> bool:
        """Whether float32 factors are rounded so far."""
        return (self.single and dtype == torch.float16) or rounds(dtype)

    def _dot(self, dtype: torch.dtype) -> Any:
        return dot_dtype(torch.float32 if self.single and dtype == torch.float16 else dtype)

    def _left(self, like: Tensor, sizes: Sizes) -> tuple[Attempts[Config], Tuned[Config] | None]:
        """What is left to try, and what a bundle brought."""
        own = (self.name, like.dtype, (*sizes, ("TF32", self.ten_bits(like.dtype))))
        tuned, key = TUNED.get(own), (like.device.index, *own)
        if key not in _tried:
            some = self.ordered(sizes, like.dtype, name_here())
            some = some if tuned is None else list(dict.fromkeys((*tuned.ways, *some)))
            _tried[key] = Attempts(f"{self.name} in {like.dtype}, {dict(sizes)}", some)
        return _tried[key], tuned

    def ordered(self, sizes: Sizes, dtype: torch.dtype, target: str) -> list[Config]:
        """Configs for a target, those that spill last."""
        return usable(self.name, _width(sizes), self.configs, DTYPES[dtype], target)


@dataclass(frozen=True)
class MethodCall:
    """A launch as it is compiled, but for its tiles.

    Attributes:
        kernel: the function.
        dtype: of q, k and v.
        sizes: compile-time sizes that no config says.
        words: strides and numbers, as Triton tells them apart.
    """

    kernel: MethodKernel
    dtype: torch.dtype
    sizes: Sizes
    words: tuple[str, ...]

    @property
    def key(self) -> Key:
        """What :data:`TUNED` knows it by."""
        more = ("TF32", self.kernel.ten_bits(self.dtype))
        return self.kernel.name, self.dtype, (*self.sizes, more)

    def job(self, config: Config, target: str) -> Job:
        """What the compiler is given."""
        kernel, word = self.kernel, DTYPES[self.dtype]
        kinds = {"": word, "sum": "bf16" if word == "bf16" else "fp32"}
        names = (*(f"{t}{s}" for t in kernel.strides for s in "bhn"), *kernel.numbers)
        arguments = {name: f"*{kinds.get(kind, kind)}" for name, kind in kernel.pointers.items()}
        single = kernel.single and self.dtype == torch.float16
        return Job(
            str(load.write(kernel.source)), kernel.name,
            arguments | dict(zip(names, self.words, strict=True)),
            {**dict(self.sizes), "TF32": kernel.ten_bits(self.dtype),
             **config.constexprs(kernel.tiles), "DOT": "fp32" if single else word},
            word, config.warps, config.stages, target,
        )  # fmt: skip

    def ordered(self, target: str) -> list[Config]:
        """Configs for a target, those that spill last."""
        return self.kernel.ordered(self.sizes, self.dtype, target)


Key = tuple[str, torch.dtype, Sizes]
TUNED: dict[Key, Tuned[Config]] = {}
"""What bundles brought."""
WIDTHS = ("d", "e")
"""Numbers that code is made for where they are multiples of 16."""
_tried: dict[tuple[Any, ...], Attempts[Config]] = {}
_notes: ContextVar[list[MethodCall] | None] = ContextVar("notes", default=None)


@contextmanager
def noted() -> Iterator[list[MethodCall]]:
    """Where calls are noted and nothing is launched; results hold nothing.

    Tensors on ``torch.device("meta")`` do.
    """
    found: list[MethodCall] = []
    token = _notes.set(found)
    try:
        yield found
    finally:
        _notes.reset(token)


def forget() -> None:
    """Take up anew what failed or was found before."""
    _tried.clear()


def entries(
    case: str, launch: Callable[[], object], targets: Sequence[str], every: bool
) -> list[Entry]:
    """What ``launch`` runs, for ``structc bench triton``; with all configs, or the default."""
    with noted() as calls:
        launch()
    return [
        Entry(
            case, f"{call.kernel.name} {_width(call.sizes)}", call.kernel.name, config, at == 0,
            call.job(config, target), None,
        )
        for call in dict.fromkeys(calls)
        for target in targets
        for at, config in enumerate(call.ordered(target)[: None if every else 1])
    ]  # fmt: skip


def serves(most: int, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there are kernels for these: heads of so many numbers at most."""
    able = v.dtype in DTYPES and max(q.shape[-1], v.shape[-1]) <= most
    return able and bool(q.numel() and k.numel())


def side(t: Tensor) -> Tensor:
    """Numbers of a head side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def wide(d: int) -> int:
    """A size as products take it."""
    return max(DOT, power_above(d))


@functools.lru_cache(maxsize=64)
def _function(source: str, name: str) -> Any:
    module = load.module_of(source)
    return None if isinstance(module, Refusal) else getattr(module, name)


def _width(sizes: Sizes) -> int:
    """Numbers of a token on chip, by which it is known what spills."""
    return sum(size for name, size in sizes if name[0] == "W")


def _word(step: int) -> str:
    return "one" if step == 1 else "i32" if step % 16 else "stride"


def _number(name: str, value: int | float) -> str:
    if isinstance(value, float):
        return "fp32"
    return _word(value) if name in WIDTHS else "i32"

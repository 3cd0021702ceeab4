"""Which operators a model calls, at which sizes: what a bundle holds kernels for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from structc.attention import by_head
from structc.attention.kernels import given_by
from structc.codegen.triton.config import power_above
from structc.codegen.triton.method_kernel import MethodCall, noted
from structc.codegen.triton.methods import KERNELS
from structc.codegen.triton.softmax import Shape
from structc.softmax import Extras, Softmax


@dataclass(frozen=True)
class TileCall:
    """One tile program as a model calls it.

    Attributes:
        program: as text.
        dtype: of its inputs.
        rows: of the call.
    """

    program: str
    dtype: torch.dtype
    rows: int


@dataclass(frozen=True)
class AttentionCall:
    """Attention as a model calls it.

    Attributes:
        shape: what its source is for.
        dtype: of q, k and v.
        queries, keys: of a head, in powers of two.
    """

    shape: Shape
    dtype: torch.dtype
    queries: int
    keys: int


Call = TileCall | AttentionCall | MethodCall


def recorded(call: Callable[[], object]) -> tuple[Call, ...]:
    """The calls of tile programs, of attention and of kernels of its methods, each once, in order;
    dense products with an activation too.

    Args:
        call: runs the model on inputs of the sizes that it will see.

    >>> from structc import ops
    >>> x, w = torch.randn(3, 8), torch.randn(1, 4, 8, 1)
    >>> recorded(lambda: ops.tile([x], [w], "block(1,4,8,1)"))
    (TileCall(program='block(1,4,8,1)', dtype=torch.float32, rows=3),)
    """
    recorder = _Recorder()
    with torch.no_grad(), given_by(recorder.method), recorder:
        call()
    return tuple(dict.fromkeys(recorder.found))


class _Recorder(TorchDispatchMode):
    """Sees operators on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.structc.tile.default:
            x, program = args[0][0], args[2]
            self._add(program, x)
        elif func is torch.ops.structc.dense.default:
            self._dense(*args, **(kwargs or {}))
        elif func is torch.ops.structc.attention.default:
            self._attention(*args)
        elif func is torch.ops.structc.attention_by_head.default:
            with self:  # its methods call attention in turn
                return _by_head(*args)
        return func(*args, **(kwargs or {}))

    def _dense(
        self, x: Any, weight: Any, bias: Any, act: str = "", transposed: bool = False
    ) -> None:
        if act:
            n, m = weight.shape if transposed else weight.shape[::-1]
            self._add(dense_program(n, m, act, bias is not None), x)

    def _attention(self, q: Any, k: Any, v: Any, *rest: Any) -> None:
        *extras, form = rest
        sizes = q.shape[-1], v.shape[-1]
        shape = Shape.of(Softmax.parse(form), *sizes, Extras(*extras), q.dtype)
        if q.numel() and k.numel():
            sizes = power_above(q.shape[2]), power_above(k.shape[2])
            self.found.append(AttentionCall(shape, q.dtype, *sizes))

    def method(self, name: str) -> _Noting | None:
        """What notes a method's launches; None for one without kernels."""
        return _Noting(KERNELS[name], self.found) if name in KERNELS else None

    def _add(self, program: str, x: Any) -> None:
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        if rows:
            self.found.append(TileCall(program, x.dtype, rows))


class _Noting:
    """A method's kernel whose launches are noted; the plain form gives the result."""

    def __init__(self, kernel: Any, found: list[Call]) -> None:
        self.kernel, self.found = kernel, found

    def serves(self, *given: Tensor) -> bool:
        return bool(self.kernel.serves(*given))

    def __call__(self, *given: Any) -> None:
        with noted() as calls:
            self.kernel(*given)
        self.found += calls


def _by_head(q: Any, k: Any, v: Any, keys: Any, form: str, heads: str) -> Any:
    return by_head.by_head(q, k, v, keys, Softmax.parse(form), heads)


def dense_program(n: int, m: int, act: str, bias: bool) -> str:
    """A dense product with its epilogue as a tile program.

    >>> dense_program(8, 4, "gelu", True)
    'block(1,4,8,1) bias(4) act(gelu,4)'
    """
    words = [f"block(1,{m},{n},1)", f"bias({m})" if bias else "", f"act({act},{m})" if act else ""]
    return " ".join(filter(None, words))

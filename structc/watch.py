"""Who looks on at a call: gradients, modes, transforms, tracers, profilers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))


def watched(tensors: Sequence[Tensor]) -> bool:
    """Whether a gradient is wanted, or a mode, a transform, a tracer or a profiler looks on."""
    if (
        _looked_at()
        or torch._C._len_torch_function_stack()
        or torch.autograd.profiler._is_profiler_enabled
    ):
        return True
    graph, batched = torch.is_grad_enabled(), torch._C._functorch.is_legacy_batchedtensor
    for t in tensors:  # a generator would take as long as all the questions
        if (
            type(t) not in _PLAIN
            or (graph and t.requires_grad)
            or t.is_neg()
            or t._is_zerotensor()
            or batched(t)
        ):
            return True
    return False


def traced(tensors: Sequence[Tensor]) -> bool:
    """Whether a call is seen by what knows ATen alone: a mode, a transform or a tracer.

    A kernel that is no operator would write past them.

    >>> from torch.fx.experimental.proxy_tensor import make_fx
    >>> seen = []
    >>> _ = make_fx(lambda x: seen.append(traced([x])) or x + 1)(torch.ones(1))
    >>> seen, traced([torch.ones(1)])
    ([True], False)
    """
    odd = torch._C._functorch.is_legacy_batchedtensor
    return _looked_at() or any(
        type(t) not in _PLAIN or t.is_neg() or t._is_zerotensor() or odd(t) for t in tensors
    )


def _looked_at() -> bool:
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )

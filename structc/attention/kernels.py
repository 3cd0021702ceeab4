"""Kernels of attention methods: found when a device's first call needs one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BACKENDS = {"cuda": "structc.codegen.triton.methods"}
"""For each kind of device the module whose ``kernel_of(name)`` gives a method's kernel, or None."""


def kernel_for(name: str, *given: Tensor) -> Callable[..., Any] | None:
    """The kernel of a method for these tensors; None where its plain form runs.

    Where a gradient is wanted, and the kernel has no ``backward``, the plain form runs.
    """
    device = given[0].device.type
    if device not in BACKENDS:
        return None
    kernel = _found(BACKENDS[device], name)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return kernel if hasattr(kernel, "backward") or not wanted else None


@functools.cache
def _found(module: str, name: str) -> Callable[..., Any] | None:
    made: Callable[..., Any] | None = importlib.import_module(module).kernel_of(name)
    return made

"""Kernels of attention methods: found when a device's first call needs one."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from structc.watch import traced

BACKENDS = {"cuda": "structc.codegen.triton.methods"}
"""For each kind of device the module whose ``kernel_of(name)`` gives a method's kernel, or None."""
Look = Callable[[str], Any]
_look: ContextVar[Look | None] = ContextVar("look", default=None)


@contextmanager
def given_by(look: Look) -> Iterator[None]:
    """Where kernels are what ``look(name)`` gives, whatever the device."""
    token = _look.set(look)
    try:
        yield
    finally:
        _look.reset(token)


def kernel_for(name: str, *given: Tensor) -> Any:
    """The kernel of a method for these tensors; None where its plain form runs.

    That is where a gradient is wanted of a kernel without ``backward``, and where a tracer, a mode
    or a transform looks on: no kernel is an operator that those would see.
    """
    look = _look.get()
    device = given[0].device.type
    if look is None and (device not in BACKENDS or traced(given)):
        return None
    kernel = _found(BACKENDS[device], name) if look is None else look(name)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    return kernel if hasattr(kernel, "backward") or not wanted else None


@functools.cache
def _found(module: str, name: str) -> Any:
    return importlib.import_module(module).kernel_of(name)
